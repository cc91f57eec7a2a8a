"""Marker maps: the four keys that mean something, dicts that hold such a key by chance, and where in a message a value stands.

A receiver takes any map with one of the keys of :data:`RESERVED` for a marker (wire document, section 5.1); Dask has no way to
say that such a map is data.  So a dict of the user's with such a key is found before it is sent, and sent in another way.

Nothing here is on the path of a message that has neither markers nor faults.  Everything is iterative: messages nest up to a
thousand deep, and Python's stack may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from msgpack import ExtType

__all__ = [
    "ENUM",
    "PICKLED",
    "RESERVED",
    "SERIALIZED",
    "SET",
    "Escaped",
    "at",
    "escape",
    "find_path",
    "is_reserved",
    "render",
    "walk",
]

SET = "__Set__"
ENUM = "__Enum__"
SERIALIZED = "__Serialized__"
PICKLED = "__Pickled__"
RESERVED = frozenset({SET, ENUM, SERIALIZED, PICKLED})

# How a value is reached from the container that holds it.
_INDEX, _VALUE, _KEY, _MEMBER = range(4)
Step = tuple[int, Any]

# Steps and characters of a path that are shown; a path may be a thousand steps long, and its keys may be a peer's.
_SHOWN_STEPS = 12
_SHOWN_KEY = 60


# -- paths -----------------------------------------------------------------------------------------------------------------------


def walk(root: object) -> Iterator[tuple[list[Step], object, bool]]:
    """Visit a message's values in the order in which they are packed.

    Yields:
        the steps to the value (one list, changed in place), the value, and whether it is a container that holds itself.  What a
        container holds is visited once, however often the container occurs.
    """
    steps: list[Step] = []
    yield steps, root, False
    inner = _children(root)
    if inner is None:
        return
    stack = [(inner, id(root))]
    open_ids = {id(root)}
    seen = {id(root)}
    while stack:
        children, identity = stack[-1]
        for step, child in children:
            steps.append(step)
            again = id(child) in open_ids
            yield steps, child, again
            inner = None if again or id(child) in seen else _children(child)
            if inner is not None:
                stack.append((inner, id(child)))
                open_ids.add(id(child))
                seen.add(id(child))
                break
            steps.pop()
        else:
            stack.pop()
            open_ids.discard(identity)
            if steps:
                steps.pop()


def _children(value: object) -> Iterator[tuple[Step, object]] | None:
    if isinstance(value, dict):
        return _pairs(value)
    if isinstance(value, (list, tuple)):
        return None if isinstance(value, ExtType) else (((_INDEX, i), item) for i, item in enumerate(value))
    if isinstance(value, (set, frozenset)):
        return (((_MEMBER, None), item) for item in value)
    return None


def _pairs(value: dict[Any, Any]) -> Iterator[tuple[Step, object]]:
    # Not value.items(): a subclass may do anything there, and this runs while another error is handled.
    for key, item in dict.items(value):
        yield (_KEY, key), key
        yield (_VALUE, key), item


def find_path(root: object, match: Callable[[object], bool], most: int | None = None) -> str | None:
    """Return where the first value that ``match`` accepts stands in the message, or None if there is none.

    Args:
        root: the message.
        match: called with one value after the other.
        most: how many values are looked at; None for all.
    """
    try:
        for steps, value, _ in islice(walk(root), most):
            if match(value):
                return render(steps)
    except RuntimeError:  # somebody changes the message meanwhile; this is only about a better text
        pass
    return None


def render(steps: list[Step]) -> str:
    """Write the steps to a value as Python would, with the message's own keys as names: ``kwargs['when'][3]``."""
    parts = []
    for number, (kind, key) in enumerate(steps[:_SHOWN_STEPS]):
        if kind == _INDEX:
            parts.append(f"[{key}]")
        elif kind == _MEMBER:
            parts.append("{...}")
        elif kind == _KEY:
            parts.append(f"<key {_shown(key)}>")
        elif number == 0 and type(key) is str and key.isidentifier():
            parts.append(key[:_SHOWN_KEY])
        else:
            parts.append(f"[{_shown(key)}]")
    if len(steps) > _SHOWN_STEPS:
        parts.append("...")
    return "".join(parts)


def at(path: str, text: str) -> str:
    """Put the path, if there is one, before the text of an error."""
    return f"{path}: {text}" if path else text


def _shown(key: object) -> str:
    if isinstance(key, (str, bytes)):
        key = key[:_SHOWN_KEY]
    try:
        text = repr(key)
    except Exception:  # a repr of the user's, or of an int with more digits than Python prints
        return f"a {type(key).__name__}"
    return text if len(text) <= _SHOWN_KEY + 5 else text[:_SHOWN_KEY] + "..."


# -- dicts that look like markers ------------------------------------------------------------------------------------------------


class Escaped:
    """Stands in a message for a dict that holds a reserved key.

    Attributes:
        original: the dict.
        items: its keys and values in turn, with what they hold escaped as well.
    """

    __slots__ = ("items", "original")

    def __init__(self, original: dict[Any, Any], items: list[Any]) -> None:
        self.original = original
        self.items = items


def is_reserved(value: Mapping[Any, Any]) -> bool:
    """Whether a receiver would take this dict for a marker."""
    # The exact text of a str's subclass is what goes out, whatever it compares equal to.
    return any(isinstance(key, str) and str.__str__(key) in RESERVED for key in value)


def escape(root: Any) -> Any:
    """Return the message with every dict that holds a reserved key replaced by an :class:`Escaped`.

    It is the message itself if there is no such dict, and shares with it whatever holds none.  The message must have been packed
    before, so that it is known not to contain itself.
    """
    # Containers, each with the number of the one that holds it and its place there: a container stands behind the one it is in.
    found: list[tuple[Any, int, int]] = [(root, -1, 0)] if _items(root) is not None else []
    number = 0
    while number < len(found):
        for place, item in enumerate(_items(found[number][0]) or ()):
            if isinstance(item, (dict, list, tuple, set, frozenset)):
                found.append((item, number, place))
        number += 1
    changes: dict[int, dict[int, Any]] = {}
    while found:
        value, parent, place = found.pop()
        replacement = _rebuilt(value, changes.pop(len(found), None))
        if replacement is not value:
            if parent < 0:
                return replacement
            changes.setdefault(parent, {})[place] = replacement
    return root


def _items(value: object) -> list[Any] | None:
    """What a container holds, as one list; of a dict, keys and values in turn.  None: it is no container."""
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, ExtType):
        return list(value)
    return None


def _rebuilt(value: Any, changes: dict[int, Any] | None) -> Any:
    """A container with some of what it holds replaced, escaped if it must be; the container itself if nothing changed."""
    reserved = isinstance(value, dict) and is_reserved(value)
    if not changes and not reserved:
        return value
    items = _items(value) or []
    for place, item in (changes or {}).items():
        items[place] = item
    if reserved:
        return Escaped(value, items)
    if isinstance(value, dict):
        return dict(zip(items[::2], items[1::2], strict=True))
    if isinstance(value, list):
        return items
    if isinstance(value, tuple):
        return tuple(items)
    return (frozenset if isinstance(value, frozenset) else set)(items)
