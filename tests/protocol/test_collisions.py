"""Keys that a peer chose to collide are refused after little work; all others make the dict or set that they should."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgpack
import pytest

from trio_dcore.protocol import DecodeContext, EncodeContext, RemoteProtocolError, Serialize
from trio_dcore.protocol._collections import load as load_collection
from trio_dcore.protocol._collisions import Keys, unpack_plain
from trio_dcore.protocol._encoding import Encoder
from trio_dcore.protocol._extensions import encode_ext
from trio_dcore.protocol._families import deserialize
from trio_dcore.protocol._messages import Decoder, dumps, loads


def equal_hashes(count: int, length: int = 17) -> list[tuple[int, ...]]:
    """Tuples of one hash."""
    return list(itertools.islice(itertools.product((-1, -2), repeat=length), count))


def walkers(size: int, full: set[int], goal: set[int]) -> Iterator[int]:
    """Integers that are looked for at slots of ``full`` only, until nothing of the hash is left, and then at one of ``goal``."""

    def extend(value: int, bits: int, slot: int, shift: int) -> Iterator[int]:
        for digit in range(32) if bits < 56 else (0,):
            more = value | digit << bits
            following = (5 * slot + (more >> shift) + 1) % size
            if bits >= 56 and not more >> shift:
                if following in goal:
                    yield more
            elif following in full:
                yield from extend(more, bits + 5, following, shift + 5)

    for start in sorted(full):
        yield from itertools.islice(extend(start, size.bit_length() - 1, start, 5), 40)


def orbit(size: int, length: int) -> list[int]:
    """The slots that are tried one after the other once nothing of the hash is left."""
    slots = [0]
    while len(slots) < length:
        slots.append((5 * slots[-1] + 1) % size)
    return slots


def dict_attack() -> list[int]:
    """Integers, each with a hash of its own, that take hundreds of steps each in a dict of 2048 slots."""
    run = orbit(2048, 682)
    return list(dict.fromkeys([*run, *itertools.islice(walkers(2048, set(run), set(run[:100])), 600)]))


class CountedKey:
    """A key that counts what it takes to tell it from others."""

    comparisons = 0

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        CountedKey.comparisons += 1
        return self is other


HONEST: dict[str, list[Any]] = {
    "range": list(range(5000)),
    "negative": [-n for n in range(5000)],
    "one of each hash": [n for n in range(-40, 40)] + ["x", b"", None, 0.5, ()],
    "large steps": [n << 40 for n in range(5000)],
    "largest steps": [n << 48 for n in range(4096)],
    "nanoseconds": [n * 10**9 + 1_700_000_000 * 10**9 for n in range(5000)],
    "fractions": [n / 2**12 for n in range(5000)],
    "tenths": [n * 0.1 for n in range(5000)],
    "scrambled": [n * 0x9E3779B97F4A7C15 % 2**64 for n in range(5000)],
    "names of chunks": [("x-0a1b2c", n // 50, n % 50) for n in range(5000)],
    "offsets": list(itertools.product((-2, -1, 0, 1, 2), repeat=5)),
    "offsets in many dimensions": list(itertools.product((-2, -1, 0), repeat=6)),
    "mixed": [*range(-2, 500), *map(str, range(500)), *map(float, range(-5000, -4000)), True, None],
    "few of one hash": equal_hashes(64),
}


class TestHonest:
    @pytest.mark.parametrize("name", HONEST)
    def test_it_is_the_dict_or_set_that_it_should_be(self, name: str) -> None:
        keys = list(dict.fromkeys(HONEST[name]))
        pairs = [(key, n) for n, key in enumerate(keys)]
        assert list(Keys().make_dict(pairs).items()) == pairs
        assert Keys().make_set(keys) == set(keys)
        assert Keys().make_frozenset(keys) == frozenset(keys)
        assert type(Keys().make_set(keys)) is set
        assert type(Keys().make_frozenset(keys)) is frozenset

    @pytest.mark.parametrize("name", HONEST)
    def test_sent_and_read(self, name: str) -> None:
        message = {"data": dict.fromkeys(HONEST[name], 1)}
        frames = dumps(message)
        assert Decoder(DecodeContext()).head(frames[0]) == message
        assert loads(frames) == message
        assert loads(dumps({"data": set(HONEST[name])})) == {"data": set(HONEST[name])}

    def test_texts_are_never_looked_at(self) -> None:
        class Text(str):
            def __hash__(self) -> int:
                return 7

        texts = [Text(n) for n in range(500)]
        # By their class these are no texts; what msgpack makes is.
        with pytest.raises(RemoteProtocolError, match="type Text"):
            Keys().make_dict([(text, None) for text in texts])
        keys = [str(n) for n in range(500)] + [b"%d" % n for n in range(500)]
        assert Keys().make_dict([(key, 1) for key in keys]) == dict.fromkeys(keys, 1)
        assert Keys().make_set(keys) == set(keys)

    def test_the_last_of_equal_keys_counts(self) -> None:
        keys = [*range(300), *map(float, range(300)), *range(300)]
        pairs = [(key, n) for n, key in enumerate(keys)]
        assert Keys().make_dict(pairs) == dict(pairs)
        assert Keys().make_set(keys) == set(range(300))

    def test_what_can_not_be_hashed(self) -> None:
        for count in (1, 17):
            keys: list[Any] = [[n] for n in range(count)]
            with pytest.raises(TypeError, match="unhashable"):
                Keys().make_dict([(key, 1) for key in keys])
            with pytest.raises(TypeError, match="unhashable"):
                Keys().make_set(keys)

    def test_frozensets_of_one_hash(self) -> None:
        message = frozenset({frozenset({-1, 3}), frozenset({-2, 3}), frozenset({(-1, -2)}), frozenset({(-2, -1)})})
        frames = Encoder(EncodeContext(extensions=True)).encode(message)
        assert Decoder(DecodeContext(), extensions=True).head(frames[0]) == message


class TestAttacks:
    def test_the_work_is_little(self) -> None:
        keys = [CountedKey() for _ in range(50_000)]
        for make in (Keys().make_set, Keys().make_frozenset, lambda keys: Keys().make_dict([(key, 1) for key in keys])):
            CountedKey.comparisons = 0
            with pytest.raises(RemoteProtocolError, match="hashes collide; they are of type CountedKey"):
                make(keys)
            assert 1000 < CountedKey.comparisons < 60_000

    def test_also_behind_many_good_ones(self) -> None:
        keys: list[Any] = [*range(10_000), *(CountedKey() for _ in range(50_000))]
        CountedKey.comparisons = 0
        with pytest.raises(RemoteProtocolError, match="collide"):
            Keys().make_set(keys)
        assert CountedKey.comparisons < 200_000  # what the good ones left over is used up, and then it ends

    def test_no_time_is_gained_by_repeating_a_key(self) -> None:
        keys = [key for key in equal_hashes(90) for _ in range(2)] + equal_hashes(90)[-1:] * 10_000
        with pytest.raises(RemoteProtocolError, match="collide"):
            Keys().make_set(keys)

    def test_tuples_of_one_hash(self) -> None:
        data = b"\xdf" + (50_000).to_bytes(4, "big") + b"".join(msgpack.packb(key) + b"\xc0" for key in equal_hashes(50_000))
        assert len(data) > 10**6
        start = time.perf_counter()
        with pytest.raises(RemoteProtocolError, match="the keys of a map were chosen so that their hashes collide.* type tuple"):
            Decoder(DecodeContext()).head(data)
        assert time.perf_counter() - start < 2  # it takes 0.06 s; it used to take 22

    def test_long_tuples_of_one_hash(self) -> None:
        # Few, but each comparison goes through thousands of elements.
        keys = [(0,) * 5000 + key for key in equal_hashes(60)]
        with pytest.raises(RemoteProtocolError, match="collide"):
            Keys().make_dict([(key, 1) for key in keys])

    def test_integers_in_a_dict(self) -> None:
        keys = dict_attack()
        assert 1200 < len(keys) == len(set(map(hash, keys))) < 1365
        with pytest.raises(RemoteProtocolError, match="type int"):
            unpack_plain(msgpack.packb({key: None for key in keys}), Keys())
        # Each half alone does nothing.
        for half in (keys[:682], sorted(keys[682:])[::3]):
            assert len(Keys().make_dict([(key, None) for key in half])) == len(half)

    def test_sets_have_their_own_tables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_at: list[list[Any]] = []
        monkeypatch.setattr(Keys, "_probe_dict", lambda _self, keys, _what: looked_at.append(list(keys)))
        assert Keys().make_set(range(-500, 500)) == set(range(-500, 500))
        keys = [CountedKey() for _ in range(2000)]
        with pytest.raises(RemoteProtocolError, match="elements of a set .* type CountedKey"):
            Keys().make_set(keys)
        assert [len(keys) for keys in looked_at] == [1000, 2000]

    def test_frozensets_in_frozensets(self) -> None:
        # At most five elements each: but one comparison at the top is hundreds of thousands at the bottom.
        family: list[Any] = equal_hashes(5, 4)
        for _ in range(6):
            family = [frozenset(chosen) for chosen in itertools.combinations(family, 4)]
        frames = Encoder(EncodeContext(extensions=True)).encode({"op": "x", "data": family[0]})
        start = time.perf_counter()
        with pytest.raises(RemoteProtocolError, match="elements of a set .* type frozenset"):
            Decoder(DecodeContext(), extensions=True).head(frames[0])
        assert time.perf_counter() - start < 2

    def test_an_integer_like_a_decimal(self) -> None:
        # Two keys only: but to compare them takes the square of their length.
        large = 1 << 2_000_000
        large += (5 - large) % (2**61 - 1)
        assert hash(large) == hash(Decimal(5))
        for keys in ((large, Decimal(5)), (Decimal(5), large), ((1, large), (1, Decimal(5)))):
            packer = msgpack.Packer(default=encode_ext)
            data = packer.pack_map_header(2) + b"".join(packer.pack(key) + b"\xc0" for key in keys)
            start = time.perf_counter()
            with pytest.raises(RemoteProtocolError, match="collide"):
                Decoder(DecodeContext(), extensions=True).head(data)
            assert time.perf_counter() - start < 2


def the_map(keys: list[Any]) -> bytes:
    data: bytes = msgpack.packb({key: None for key in keys})
    return data


def payload(**header: Any) -> list[bytes]:
    """A message whose one payload has this header and no frames."""
    return [msgpack.packb({"x": {"__Serialized__": 1}}), msgpack.packb({"num-sub-frames": 0, **header})]


EMPTY = {"is-collection": True, "sub-headers": (), "frame-lengths": (), "type-serialized": "tuple", "num-sub-frames": 0}


def collection(name: str, keys: list[Any]) -> list[bytes]:
    subs = [{**EMPTY, "key": key} for key in keys]
    return payload(**{**EMPTY, "sub-headers": subs, "frame-lengths": (0,) * len(subs), "type-serialized": name})


EVERYWHERE: dict[str, Callable[[list[Any]], list[bytes]]] = {
    "frame 0": lambda keys: [the_map(keys)],
    "frame 0 with a marker": lambda keys: [msgpack.packb({"x": {"__Set__": True, "as-list": ()}, "y": dict.fromkeys(keys)})],
    "a set": lambda keys: [msgpack.packb({"x": {"__Set__": True, "as-list": keys}})],
    "a payload's header": lambda keys: payload(x=dict.fromkeys(keys)),
    "a set in a header": lambda keys: payload(x={"__Set__": True, "as-list": keys}),
    "a pickle's header": lambda keys: [msgpack.packb({"x": {"__Pickled__": 1}}), the_map(keys)],
    "a dict of payloads": lambda keys: collection("dict", keys),
}


class TestEverywhere:
    """Wherever a peer's keys are put into a table, they are looked at."""

    @pytest.mark.parametrize("place", EVERYWHERE)
    def test_resolving(self, place: str) -> None:
        with pytest.raises(RemoteProtocolError, match="collide"):
            loads(EVERYWHERE[place](equal_hashes(300)))

    def test_the_plain_family(self) -> None:
        header = {"serializer": "msgpack", "num-sub-frames": 1}
        for keys, refused in ((equal_hashes(300), True), ([*range(300), (1, 2)], False)):
            frames = [the_map(keys)]
            if refused:
                with pytest.raises(RemoteProtocolError, match="collide"):
                    deserialize(header, frames, DecodeContext())
            else:
                assert deserialize(header, frames, DecodeContext()) == dict.fromkeys(keys)

    def test_a_set_of_payloads(self) -> None:
        keys = iter(equal_hashes(300))
        header = {**EMPTY, "sub-headers": ({},) * 300, "frame-lengths": (0,) * 300, "type-serialized": "set"}
        with pytest.raises(RemoteProtocolError, match="collide"):
            load_collection(header, [], lambda _header, _frames: next(keys), Keys())

    @pytest.mark.parametrize("kind", [frozenset, lambda keys: {"__Set__": 1, **dict.fromkeys(keys)}])
    def test_extension_values(self, kind: Callable[[list[Any]], Any]) -> None:
        frames = Encoder(EncodeContext(extensions=True)).encode({"x": kind(equal_hashes(300))})
        with pytest.raises(RemoteProtocolError, match="collide"):
            Decoder(DecodeContext(), extensions=True).head(frames[0])

    def test_extension_values_as_keys(self) -> None:
        keys = [timedelta(*parts) for parts in itertools.product((-1, -2), range(5), range(5))]
        message = {"x": dict.fromkeys(keys), "y": dict.fromkeys([complex(n, -n) for n in range(100)])}
        frames = Encoder(EncodeContext(extensions=True)).encode(message)
        assert Decoder(DecodeContext(), extensions=True).head(frames[0]) == message
        # The hash of a complex number is that of its parts: real + 1000003 * imag.
        attack = [complex(n * 1000003, -n) for n in range(1000)]
        assert len(set(map(hash, attack))) < 10
        frames = Encoder(EncodeContext(extensions=True)).encode({"x": dict.fromkeys(attack)})
        with pytest.raises(RemoteProtocolError, match="type complex"):
            Decoder(DecodeContext(), extensions=True).head(frames[0])

    def test_a_payload_that_is_fine(self) -> None:
        message = {"x": Serialize({n: b"%d" % n for n in range(-50, 50)})}
        assert loads(dumps(message)) == {"x": message["x"].data}


class TestCost:
    def test_texts_take_the_short_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A message whose maps have texts for keys is read in one call, without a hook."""
        calls: list[dict[str, Any]] = []

        def counted(data: bytes, **settings: Any) -> Any:
            calls.append(settings)
            return msgpack.unpackb(data, **settings)

        monkeypatch.setattr("trio_dcore.protocol._decoding.unpackb", counted)
        decoder = Decoder(DecodeContext())
        decoder.head(msgpack.packb({"op": "add", "x": {"y": 1, b"z": (2, 3)}}))
        (settings,) = calls
        assert not {"object_hook", "object_pairs_hook"}.intersection(settings)
        decoder.head(msgpack.packb({"op": "add", "x": {1: 2}}))
        assert len(calls) == 3
