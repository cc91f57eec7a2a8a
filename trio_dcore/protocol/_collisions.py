"""Dicts and sets of a peer's keys, without letting the peer choose how long they take to build.

Texts and bytes are hashed with a secret of the process.  Everything else is hashed by a public formula, and ``hash(-1) ==
hash(-2)``, so 2**n tuples of n such numbers have one hash; and integers, whose hash is their value, can be chosen so that all of
them are looked for along one path through the table.  Either way the n-th key is compared with the n - 1 before it: a megabyte of
such keys takes 20 s, in one call that nothing can interrupt.

So a table of more than a few keys that are not all texts is first built on paper, by the rules of CPython's own tables
(``Objects/dictobject.c``, ``Objects/setobject.c``; the same ones in 3.11 to 3.14), and given up once it has taken more steps than
any sensible keys take.  That costs about as much again as decoding the keys did, and nothing where all keys are texts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from msgpack import unpackb

from ._errors import RemoteProtocolError

__all__ = ["Keys", "unpack_plain"]

# As many keys are not looked at, whatever they are: 120 comparisons are harmless.
_FEW = 16
_TEXTS = frozenset({str, bytes})
_U64 = 2**64 - 1
_SHIFT = 5  # PERTURB_SHIFT of both kinds of table
_LINEAR = 9  # LINEAR_PROBES of sets
_SMALLEST = 64  # slots; the first table on paper that has room for more than _FEW
# Steps beyond the first that each key put into a table may take, on average over a message.  Random keys take 0.7, and so do tuples
# of names and numbers; times in nanoseconds take 3.  The worst that anybody may have in earnest are 100 000 floats i / 2**20 with 13,
# 100 000 integers i * 2**24 with 17.
_STEPS = 20
# And as many more for a whole message, for the little that is more regular: the 729 tuples of six numbers from -2 to 0 take half of it.
# On paper they take 20 ms.
_EXTRA_STEPS = 2**17


class Keys:
    """Makes the dicts and sets of one message.

    Attributes:
        few: as many keys are not looked at.
    """

    __slots__ = ("_left", "few")

    def __init__(self) -> None:
        self.few: int = _FEW
        self._left = _EXTRA_STEPS

    def expect_slow_ones(self) -> None:
        """From here on there may be keys of which two take long to compare, as :func:`_weight` says: look at a few as well."""
        self.few = 1

    def make_dict(self, pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
        """``dict(pairs)``.

        Raises:
            RemoteProtocolError: the keys were chosen to collide.
            TypeError: a key can't be hashed.
        """
        if len(pairs) > self.few:
            self._vet([key for key, _ in pairs], "keys of a map")
        return dict(pairs)

    def make_set(self, elements: Sequence[Any]) -> set[Any]:
        """``set(elements)``; errors as :meth:`make_dict`."""
        return set(self._distinct(elements))

    def make_frozenset(self, elements: Sequence[Any]) -> frozenset[Any]:
        """``frozenset(elements)``; errors as :meth:`make_dict`."""
        return frozenset(self._distinct(elements))

    def _distinct(self, elements: Sequence[Any]) -> Iterable[Any]:
        what = "elements of a set"
        if len(elements) <= self.few or not self._vet(elements, what) or len(elements) <= _FEW:
            return elements
        # Sets have tables of their own kind.  Made from a dict, one is made in its final size at once.
        keys = dict.fromkeys(elements)
        self._probe_set(keys, what)
        return keys

    def _vet(self, keys: Sequence[Hashable], what: str) -> bool:
        """Refuse keys that collide, on the way into a dict; False if they are texts, which never do."""
        if len(keys) <= _FEW:
            # A table of a few keys is quick to build, unless comparing two of them takes long.
            if len(set(map(hash, keys))) < len(keys):
                self._probe_dict(keys, what)
        elif _TEXTS.issuperset(map(type, keys)):
            return False
        else:
            self._probe_dict(keys, what)
        return True

    def _probe_dict(self, keys: Sequence[Hashable], what: str) -> None:
        """Build a dict on paper, which grows to twice its size when it is two thirds full and one more key comes."""
        hashes = [value & _U64 for value in map(hash, keys)]
        size = _SMALLEST
        mask = size - 1
        table = [-1] * size  # indices of keys
        order: list[int] = []
        weights: dict[int, int] = {}
        left = self._left
        for index, value in enumerate(hashes):
            slot = value & mask
            found = table[slot]
            perturb = value
            while found >= 0:
                if hashes[found] == value:
                    for each in (found, index):
                        if each not in weights:
                            weights[each] = _weight(keys[each])
                        left -= weights[each]
                    if left < 0:
                        raise _collide(keys, what)
                    if keys[found] == keys[index]:
                        break
                left -= 1
                perturb >>= _SHIFT
                slot = (5 * slot + perturb + 1) & mask
                found = table[slot]
            if left < 0:
                raise _collide(keys, what)
            if found >= 0:
                continue  # the same key again
            order.append(index)
            left += _STEPS
            if len(order) <= size * 2 // 3:
                table[slot] = index
                continue
            size *= 2
            mask = size - 1
            table = [-1] * size
            for each in order:
                perturb = hashes[each]
                slot = perturb & mask
                while table[slot] >= 0:
                    left -= 1
                    perturb >>= _SHIFT
                    slot = (5 * slot + perturb + 1) & mask
                table[slot] = each
                left += _STEPS
                if left < 0:
                    raise _collide(keys, what)
        self._left = left

    def _probe_set(self, keys: dict[Hashable, None], what: str) -> None:
        """Build a set from a dict on paper, as ``set_update_internal`` does: no key twice, and no table before the last one."""
        size = 8
        while size <= 2 * len(keys):
            size *= 2
        mask = size - 1
        used = bytearray(size)
        left = self._left
        for value in map(hash, keys):
            perturb = value & _U64
            slot = perturb & mask
            # Ten neighbours are tried in a row, unless the table ends before.
            while (free := used.find(0, slot, slot + _LINEAR + 1 if slot + _LINEAR < size else slot + 1)) < 0:
                left -= 1
                perturb >>= _SHIFT
                slot = (5 * slot + 1 + perturb) & mask
            used[free] = 1
            left += _STEPS
            if left < 0:
                raise _collide(keys, what)
        self._left = left


def unpack_plain(data: Any, keys: Keys) -> Any:
    """``msgpack.unpackb`` for data without markers: arrays as tuples, keys of any kind.

    Raises:
        RemoteProtocolError: keys were chosen to collide.
        Exception: whatever msgpack raises, and TypeError for keys that can't be hashed.
    """
    try:
        # Nearly all maps have texts for keys, and this refuses all others, at no cost.
        return unpackb(data, raw=False, use_list=False)
    except ValueError as exc:
        if type(exc) is not ValueError:  # the subclasses tell of other things, a key of another kind has none of its own
            raise
    return unpackb(data, raw=False, use_list=False, strict_map_key=False, object_pairs_hook=keys.make_dict)


def _weight(key: Hashable) -> int:
    """How many steps it is worth to compare a key with one of the same hash: half of it, the other key is the other half.

    Two frozensets are compared by looking each element of one up in the other, where those in turn may collide; and an integer is
    compared with a Decimal by converting it.  Both take time that grows with the square of their size.
    """
    size = 0
    slow = False
    todo: list[Any] = [key]
    while todo:
        value = todo.pop()
        kind = type(value)
        size += 1
        if kind is tuple or kind is frozenset:
            slow = slow or kind is frozenset
            todo.extend(value)
        elif kind is int and value.bit_length() > 64:
            slow = True
            size += value.bit_length() // 64
    return 2 + (size * size // 64 if slow else size // 16)


def _collide(keys: Iterable[Hashable], what: str) -> RemoteProtocolError:
    kinds = ", ".join(sorted({type(key).__name__ for key in keys})[:4])
    return RemoteProtocolError(f"the {what} were chosen so that their hashes collide; they are of type {kinds}")
