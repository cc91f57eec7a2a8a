"""Anything at all, to the parser and to what stands behind it: a value, or one of our typed errors (security document, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.mutations import BYTE_STEPS, FRAME_STEPS, Step, mutate_bytes, mutate_frames
from tests.fuzz.seeds import conversations, frames_in, messages, wire
from tests.fuzz.strategies import SIZES, conversation, frames, packed, some, values
from trio_dcore.protocol import DecodeContext, Decoder

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(autouse=True, scope="module")
def _harmless() -> Iterator[None]:
    with targets.harmless_pickles():
        yield


@given(data=st.binary(max_size=300), sizes=SIZES)
@some(150)
def test_any_bytes_to_the_parser(data: bytes, sizes: list[int]) -> None:
    targets.stream(data, sizes)


@given(numbers=st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=8), rest=st.binary(max_size=80), sizes=SIZES)
@some(150)
def test_any_lengths_to_the_parser(numbers: list[int], rest: bytes, sizes: list[int]) -> None:
    targets.stream(b"".join(number.to_bytes(8, "little") for number in numbers) + rest, sizes)


@given(given=conversation(), sizes=SIZES)
@some(150)
def test_changed_conversations_to_the_parser(given: tuple[bytes, list[Step], bool], sizes: list[int]) -> None:
    data, steps, _ = given
    for each in targets.stream(mutate_bytes(data, steps), sizes):
        targets.decode_once(each)


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("counted", [0, 1, 2, 3])
def test_large_frames_to_the_parser(counted: int, extra: int) -> None:
    """They are filled in place, and come in pieces that end anywhere."""
    frames = [b"\x81\xa1x\x01", b"y" * 200_000, b"z" * 100_000]
    prelude = bytearray(wire(frames)[:40])
    outer = 32 + sum(map(len, frames[:counted])) + (extra if counted == 3 else 0)
    prelude[:8] = outer.to_bytes(8, "little")
    data = bytes(prelude) + b"".join(frames) + b"!" * (extra if counted == 3 else 0) + wire([b"\xc0"])
    for sizes in ([], [599], [70_000], [0, 100, 599, 66_000]):
        assert targets.stream(data, sizes) == [frames, [b"\xc0"]]


@given(data=st.binary(max_size=200))
@some(100)
def test_any_bytes_as_frame_0(data: bytes) -> None:
    targets.decode([data])


@given(given=frames())
@some(200)
def test_changed_messages(given: tuple[list[bytes], list[Step]]) -> None:
    targets.decode(mutate_frames(*given))


@given(value=values(), headers=st.lists(values(), max_size=2), payload=st.lists(st.binary(max_size=40), max_size=3))
@some(120)
def test_made_up_messages(value: Any, headers: list[Any], payload: list[bytes]) -> None:
    targets.decode([packed(value), *map(packed, headers), *payload])


@given(
    header=st.dictionaries(st.text(max_size=3), values(), max_size=1),
    payload=st.lists(st.binary(max_size=40), max_size=3),
    marker=st.sampled_from(["__Serialized__", "__Pickled__"]),
    sound=st.sampled_from(targets.HEADERS),
    key=st.integers(0, 20),
    value=values(),
)
@some(160)
def test_made_up_headers(
    header: dict[str, Any], payload: list[bytes], marker: str, sound: dict[str, Any], key: int, value: Any
) -> None:
    """A marker that leads to a header which is right but for a key or two."""
    changed = sorted(sound)[key % len(sound)]
    header = {**sound, **header, "num-sub-frames": len(payload), changed: value}
    targets.decode([packed({"x": {marker: 1}}), packed(header), *payload])


@given(text=st.text(max_size=30) | st.from_regex(r"[a-z]{0,6}(://)?[\[\]0-9a-fx:.%@/ ]{0,20}:?[0-9٣]{0,6}", fullmatch=True))
@some(200)
def test_any_text_as_an_address(text: str) -> None:
    targets.address(text)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_the_corpus(path: Path) -> None:
    """What the coverage-guided runs of atheris_target.py start from, and what they have found."""
    targets.run(path.read_bytes())


# -- the tools themselves --------------------------------------------------------------------------------------------------------


def test_seeds_are_valid() -> None:
    """What is changed is right before: only then are changes small steps into what isn't."""
    assert len(messages()) > 100
    assert len(conversations()) > 50
    for data in conversations().values():
        found = list(frames_in(data))
        assert sum(len(wire(frames)) for frames in found) == len(data)
        assert targets.stream(data) == found


@pytest.mark.parametrize("kind", range(len(BYTE_STEPS)))
def test_every_byte_step_changes_something(kind: int) -> None:
    data = wire([b"\x93\x01\x02\x03", b"abc"])
    assert any(mutate_bytes(data, [(kind, where, what)]) != data for where in range(20) for what in range(20))
    assert mutate_bytes(data, [(kind, 9, 9)], 16)[:16] == data[:16]
    assert mutate_bytes(b"", [(kind, 9, 9)]) == b""


@pytest.mark.parametrize("kind", range(len(FRAME_STEPS)))
def test_every_frame_step_changes_something(kind: int) -> None:
    frames = [b"\x82\xa1x\x01\xa1y\x93\x01\x02\x03", b"\x81\xa1z\x05", b"abc"]
    assert any(mutate_frames(frames, [(kind, where, what)]) != frames for where in range(20) for what in range(20))
    assert mutate_frames([b""], [(kind, 9, 9)] * 3)


def test_an_untyped_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this module can fail."""

    def fail(*args: object, **kwargs: object) -> Any:
        raise KeyError("num-sub-frames")

    monkeypatch.setattr("trio_dcore.protocol._decoding.deserialize", fail)
    with pytest.raises(KeyError):
        targets.decode([b"\x81\xae__Serialized__\x01", b"\x81\xaenum-sub-frames\x00"])
    monkeypatch.setattr("trio_dcore.protocol._frames.FrameParser._begin", fail)
    with pytest.raises(KeyError):
        targets.stream(b"\1" * 40)


def test_a_mutated_pickle_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever a trusted message's pickle names, it isn't called."""
    pickled = b"cos\nsystem\n(S'echo sung'\ntR."
    frames = [b"\x81\xab__Pickled__\x01", packed({"pickled-obj": pickled, "num-sub-frames": 0})]
    targets.decode(frames)
    found = Decoder(DecodeContext()).resolve(frames)
    assert isinstance(found, targets.Found)
    assert capfd.readouterr().out == ""
