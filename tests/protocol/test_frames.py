"""Framing: golden bytes, every legal layout in every partition, hostile numbers, and what it costs in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_dcore.protocol import _frames
from trio_dcore.protocol._buffers import join
from trio_dcore.protocol._errors import LimitExceeded, RemoteProtocolError
from trio_dcore.protocol._frames import HANDSHAKE, FrameParser, allocate, join_small, looks_like, pack_prelude, single_frame
from trio_dcore.protocol._limits import GiB, KiB, Limits, MiB

SOBER = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
OFF = Limits(message=None, head=None, frames=None)
PATIENCE = 30.0


def wire(frames: Sequence[Any], counted: int | None = None, extra: bytes = b"") -> bytes:
    """A message, by the wire document alone: ``outer`` counts that many frames, or all of them and ``extra`` behind the last."""
    lengths = [memoryview(frame).nbytes for frame in frames]
    inside = sum(lengths[:counted]) if counted is not None else sum(lengths) + len(extra)
    prelude = pack(f"<{2 + len(frames)}Q", 8 + 8 * len(frames) + inside, len(frames), *lengths)
    return b"".join((prelude, *frames, extra))


def take_all(parser: FrameParser) -> list[list[Any]]:
    """What the parser has by now."""
    found = []
    while (frames := parser.next_message()) is not None:
        found.append(frames)
    return found


def by_feeding(parser: FrameParser, pieces: Iterable[bytes]) -> list[list[Any]]:
    """Every piece is fed, and the parser is asked after each."""
    found = []
    for piece in pieces:
        parser.feed(piece)
        found += take_all(parser)
    return found


def by_receiving(parser: FrameParser, pieces: Iterable[bytes]) -> list[list[Any]]:
    """As by feeding, in one step."""
    found = []
    for piece in pieces:
        if (frames := parser.receive(piece)) is not None:
            found.append(frames)
            found += take_all(parser)
    return found


def as_a_pump_does(parser: FrameParser, pieces: Iterable[bytes]) -> list[list[Any]]:
    """Where the parser offers a buffer it is filled in place, as far as the piece goes."""
    found = []
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            target = parser.want()
            if target is None:
                parser.feed(bytes(rest))
                rest = rest[len(rest) :]
            else:
                size = min(len(target), len(rest))
                target[:size] = rest[:size]
                parser.filled(size)
                rest = rest[size:]
            found += take_all(parser)
    return found


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def plain(messages: Iterable[Sequence[Any]]) -> list[list[bytes]]:
    return [[bytes(frame) for frame in message] for message in messages]


class TestGolden:
    """Bytes of the wire document's appendix, which a recording proxy took between stock peers."""

    def test_a_reply_of_three(self) -> None:
        assert single_frame(b"\x03").hex() == "11000000000000000100000000000000010000000000000003"
        assert pack_prelude([b"\x03"]) + b"\x03" == single_frame(b"\x03")

    def test_none_is_25_bytes(self) -> None:
        assert len(single_frame(b"\xc0")) == 25

    def test_a_handshake(self) -> None:
        frame = bytes.fromhex("83ab") + b"compression" + b"\xc0\xa6python\x93\x03\x0b\x07\xafpickle-protocol\x05"
        assert single_frame(frame)[:24].hex() == "3a0000000000000001000000000000002a00000000000000"
        assert len(single_frame(frame)) == 66

    def test_one_array_is_counted(self) -> None:
        prelude = pack_prelude([bytes(38), bytes(209), memoryview(bytearray(24))])
        assert prelude == pack("<5Q", 303, 3, 38, 209, 24)

    def test_the_second_of_two_arrays_is_not(self) -> None:
        prelude = pack_prelude([bytes(20), bytes(423), bytearray(200_000), bytearray(200_000)])
        assert prelude == pack("<6Q", 200_483, 4, 20, 423, 200_000, 200_000)

    def test_an_array_behind_many_bytes_is_not(self) -> None:
        prelude = pack_prelude([bytes(300_000), bytearray(4_000_000)])
        assert prelude == pack("<4Q", 24 + 300_000, 2, 300_000, 4_000_000)

    def test_shards_of_one_array_are(self) -> None:
        shards = memoryview(bytearray(150))
        frames = [b"head", shards[:64], shards[64:128], shards[128:]]
        assert pack_prelude(frames)[:8] == pack("<Q", 8 + 8 * 4 + 4 + 150)


def _frame(kind: str, size: int) -> Any:
    data = bytes(size)
    match kind:
        case "bytes":
            return data
        case "view of bytes":
            return memoryview(data)
        case "bytearray":
            return bytearray(data)
        case _:
            return memoryview(bytearray(data))


class TestOuter:
    @SOBER
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["bytes", "view of bytes", "bytearray", "view"]),
                st.sampled_from([0, 1, 20, 100, 2_000, 2_020, 2_048, 2_049, 10_000, 41_000, 41_021, 70_000]),
            ),
            min_size=1,
            max_size=6,
        ),
        st.booleans(),
    )
    def test_the_rule_of_a_stock_sender(self, made_of: list[tuple[str, int]], sharded: bool) -> None:
        stock = pytest.importorskip("distributed.comm.tcp")
        frames = [_frame(kind, size) for kind, size in made_of]
        if sharded:
            frames += [memoryview(frames[-1])[:10], memoryview(frames[-1])[10:]]
        theirs, _, _ = stock._add_frames_header(frames)
        prelude = pack_prelude(frames)
        assert prelude == b"".join(map(bytes, theirs))[: len(prelude)]

    def test_numpy_arrays(self) -> None:
        stock = pytest.importorskip("distributed.comm.tcp")
        numpy = pytest.importorskip("numpy")
        one, two = numpy.zeros(1000), numpy.ones((10, 10))
        for frames in ([b"x", memoryview(one), memoryview(two)], [b"x", memoryview(one)[:500], memoryview(one)[500:]]):
            prelude = pack_prelude(frames)
            assert prelude == b"".join(map(bytes, stock._add_frames_header(frames)[0]))[: len(prelude)]


class TestJoin:
    def test_little_is_joined(self) -> None:
        frames = [b"head", bytearray(b"payload"), b""]
        assert join_small(b"prelude", frames) == [b"preludeheadpayload"]

    def test_many_small_frames_are_joined(self) -> None:
        frames = [b"x" * 20 * KiB] * 100
        assert join_small(b"p", frames) == [b"p" + b"x" * 2000 * KiB]

    def test_large_payloads_pass_untouched(self) -> None:
        first, second = bytearray(MiB), bytearray(MiB)
        joined = join_small(b"prelude", [b"head", first, b"header", b"", second, b"tail"])
        assert [bytes(joined[0]), bytes(joined[2]), bytes(joined[4])] == [b"preludehead", b"header", b"tail"]
        assert (joined[1].obj, joined[3].obj) == (first, second)
        assert joined[1].obj is first
        assert joined[3].obj is second

    def test_a_large_head_passes_untouched(self) -> None:
        head = bytes(MiB)
        joined = join_small(b"prelude", [head])
        assert joined[0] == b"prelude"
        assert joined[1].obj is head

    def test_what_is_sent_has_its_length_in_bytes(self) -> None:
        numpy = pytest.importorskip("numpy")
        array = numpy.arange(100_000, dtype="i8")
        joined = join_small(b"prelude", [b"head", memoryview(array)])
        assert list(map(len, joined)) == [11, 800_000]

    @SOBER
    @given(st.lists(st.sampled_from([0, 1, 1000, 32 * KiB - 1, 32 * KiB, 100 * KiB, 130 * KiB]), min_size=1, max_size=6))
    def test_nothing_is_lost_or_moved(self, sizes: list[int]) -> None:
        frames = [bytes([65 + n]) * size for n, size in enumerate(sizes)]
        joined = join_small(b"prelude", frames)
        assert b"".join(joined) == b"prelude" + b"".join(frames)
        assert all(len(buffer) for buffer in joined)


SIZES = st.sampled_from([0, 1, 2, 7, 100, 4095, 4096, 4097, 9000])


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """(frames, their bytes on the wire in any legal layout)."""
    sizes = [draw(SIZES.filter(bool)), *draw(st.lists(SIZES, max_size=4))]
    fill = draw(st.integers(0, 255))
    frames = [bytes([(fill + n) % 256]) * size for n, size in enumerate(sizes)]
    if draw(st.booleans()):
        return frames, wire(frames, extra=bytes(draw(SIZES)))
    return frames, wire(frames, counted=draw(st.integers(0, len(frames))))


class TestParser:
    @SOBER
    @given(
        st.lists(messages(), min_size=1, max_size=3),
        st.one_of(st.just([]), st.lists(st.integers(1, 30_000), max_size=12)),
        st.sampled_from([by_feeding, by_receiving, as_a_pump_does]),
    )
    def test_any_layout_in_any_partition(
        self,
        sent: list[tuple[list[bytes], bytes]],
        steps: list[int],
        deliver: Callable[[FrameParser, Iterable[bytes]], list[list[Any]]],
    ) -> None:
        data = b"".join(encoded for _, encoded in sent)
        pieces, position = [], 0
        for step in steps:
            pieces.append(data[position : position + step])
            position += step
        pieces.append(data[position:])
        parser = FrameParser()
        found = deliver(parser, pieces)
        assert plain(found) == [frames for frames, _ in sent]
        assert not parser.mid_message
        assert (parser.buffered, parser.received) == (0, 0)
        assert parser.total == len(data)
        assert parser.last_size == len(sent[-1][1])
        for frame0, *others in found:
            assert type(frame0) is bytes
            for frame in others:
                assert not memoryview(frame).readonly

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 23, 24, 25])
    @pytest.mark.parametrize("deliver", [by_feeding, by_receiving, as_a_pump_does])
    def test_in_small_pieces(self, size: int, deliver: Callable[..., list[list[Any]]]) -> None:
        expected = [
            [b"only"],
            [b"head", b"", b"x" * 5000, b""],
            [b"h" * 5000, b"y" * 4096],
            [b"\xc0"],
            [b"head", b"z"],
        ]
        data = b"".join(
            (
                single_frame(b"only"),
                wire(expected[1], counted=2),
                wire(expected[2], counted=0),
                wire(expected[3], counted=0),
                wire(expected[4], extra=b"ignored" * 3),
            )
        )
        parser = FrameParser()
        assert plain(deliver(parser, cut(data, size))) == expected
        assert not parser.mid_message

    def test_a_message_counts_as_begun_from_its_first_byte_to_its_last(self) -> None:
        data = wire([b"head", b"x" * 5000], extra=b"ab")
        parser = FrameParser()
        assert not parser.mid_message
        for byte in cut(data[:-1], 1):
            parser.feed(byte)
            assert parser.next_message() is None
            assert parser.mid_message
        parser.feed(data[-1:] + b"\x11")
        assert parser.next_message() is not None
        assert parser.mid_message  # of the next
        assert parser.buffered == 1
        assert parser.next_message() is None

    def test_what_was_received_of_the_message_under_way(self) -> None:
        parser = FrameParser()
        parser.feed(wire([b"head", bytes(100_000)])[:50])
        assert parser.next_message() is None
        assert parser.received == 50
        parser.feed(bytes(10))
        assert parser.next_message() is None
        assert parser.received == 60
        target = parser.want()
        assert target is not None
        parser.filled(1000)
        assert parser.received == 1060

    def test_an_empty_piece_is_harmless(self) -> None:
        parser = FrameParser()
        parser.feed(b"")
        assert not parser.mid_message
        parser.feed(single_frame(b"x")[:10])
        parser.feed(b"")
        parser.feed(single_frame(b"x")[10:])
        assert parser.next_message() == [b"x"]

    def test_a_message_that_comes_alone_and_whole(self) -> None:
        parser = FrameParser()
        for counted in (0, 1):
            data = wire([b"frame"], counted=counted)
            assert parser.receive(data) == [b"frame"]
            assert (parser.last_size, parser.mid_message, parser.buffered) == (len(data), False, 0)
        assert parser.total == 2 * len(data)
        assert parser.receive(b"") is None
        assert parser.receive(data[:5]) is None
        assert parser.receive(data[5:]) == [b"frame"]

    def test_pipelined_messages_come_one_at_a_time(self) -> None:
        parser = FrameParser()
        parser.feed(b"".join(single_frame(bytes([n])) for n in range(100)))
        assert [parser.next_message() for _ in range(101)] == [*([bytes([n])] for n in range(100)), None]


class Counted(bytes):
    """Bytes that tell how many are copied when they are appended to others."""

    copied = 0

    def __radd__(self, other: bytes) -> bytes:
        Counted.copied += len(other) + len(self)
        return bytes(other) + bytes(self)


class TestCost:
    @pytest.mark.parametrize(
        "frames", [[b"head", *[b"x"] * 20_000], [b"head", *[b"x" * 4000] * 40], [b"h" * 200_000, b"y" * 200_000]]
    )
    def test_gathering_small_pieces_copies_little(self, frames: list[bytes]) -> None:
        data = wire(frames)
        parser = FrameParser(OFF)
        Counted.copied = 0
        found = by_feeding(parser, [Counted(piece) for piece in cut(data, 16)])
        assert plain(found) == [frames]
        # A frame that is shorter than 4 KiB may be copied with every piece of it; nothing longer.
        assert Counted.copied < 150 * len(data)

    def test_a_large_frame_is_filled_in_its_final_place(self) -> None:
        parser = FrameParser()
        parser.feed(wire([b"head", bytes(MiB)])[:1000])
        assert parser.next_message() is None
        target = parser.want()
        assert target is not None
        assert len(target) == MiB - (1000 - 32 - 4)
        target[:] = b"y" * len(target)
        parser.filled(len(target))
        message = parser.next_message()
        assert message is not None
        assert message[1].obj is target.obj
        assert bytes(message[1][-10:]) == b"y" * 10

    def test_no_buffer_is_offered_for_little(self) -> None:
        parser = FrameParser()
        assert parser.want() is None
        parser.feed(wire([b"head", bytes(100 * KiB)])[:-1000])
        assert parser.next_message() is None
        assert parser.want() is None
        parser.feed(bytes(1000))
        assert parser.next_message() is not None

    def test_frames_have_memory_of_their_own(self) -> None:
        """One that is kept must not keep the others, nor the bytes behind it, and may be written to."""
        sizes = [100, 5000, 70_000, 2 * MiB, 0]
        data = wire([b"head", *map(bytes, sizes)]) * 2
        parser = FrameParser()
        first, second = as_a_pump_does(parser, cut(data, 64 * KiB))
        buffers = [memoryview(frame) for frame in first[1:] + second[1:]]
        assert [len(memoryview(buffer.obj)) for buffer in buffers] == sizes * 2
        assert len({id(buffer.obj) for buffer in buffers}) == len(buffers)
        for buffer in buffers:
            buffer[:1] = b"\xff"[: len(buffer)]
        assert [sum(buffer[1:2]) for buffer in buffers] == [0] * 10

    @pytest.mark.parametrize("feed", [by_feeding, by_receiving, as_a_pump_does])
    @pytest.mark.parametrize("size", [64 * KiB, 10**7])
    def test_pieces_of_an_array_lie_in_one_buffer(self, feed: Any, size: int) -> None:
        """As stock Dask sends one of more than 64 MiB, where ``outer`` counts them; behind them may come a header and another array."""
        pieces = [bytes([n]) * (MiB + n) for n in range(3)] + [b"end"]
        other = [b"header", bytes(2 * MiB), bytes(MiB)]
        parser = FrameParser(OFF)
        data = wire([b"head", b"header", *pieces, *other], counted=2 + len(pieces)) + wire([b"head", *pieces])
        first, second = feed(parser, cut(data, size))
        for frames in (first[2:6], second[1:]):
            assert [bytes(frame) for frame in frames] == pieces
            assert len({id(frame.obj) for frame in frames}) == 1
            joined: Any = join(frames)
            assert joined.obj is frames[0].obj
            assert bytes(joined) == b"".join(pieces)
            joined[0] = 77
            assert frames[0][0] == 77
        assert [bytes(frame) for frame in first[6:]] == other
        assert len({id(memoryview(frame).obj) for frame in [*first[1:3], *first[6:], second[1]]}) == 6

    def test_large_frames_that_are_not_counted_have_memory_of_their_own(self) -> None:
        parser = FrameParser(OFF)
        (frames,) = by_feeding(parser, cut(wire([b"head", *[bytes(2 * MiB)] * 4], counted=2), 64 * KiB))
        assert len({id(memoryview(frame).obj) for frame in frames[1:]}) == 4

    @SOBER
    @given(st.lists(st.binary(max_size=30), min_size=1, max_size=8), st.data())
    def test_any_run_of_pieces(self, frames: list[bytes], drawn: Any) -> None:
        frames[0] = frames[0] or b"x"
        counted = drawn.draw(st.integers(0, len(frames)))
        data = wire(frames, counted) + wire(frames)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_frames, "_PIECE", drawn.draw(st.integers(1, 12)))
            patch.setattr(_frames, "_DIRECT", 1)
            feed = drawn.draw(st.sampled_from([by_feeding, by_receiving, as_a_pump_does]))
            found = feed(FrameParser(OFF), cut(data, drawn.draw(st.integers(1, 40))))
        assert [[bytes(frame) for frame in message] for message in found] == [frames, frames]

    def test_no_memory_from_a_number(self) -> None:
        """What is claimed costs address space; memory is taken only by what comes."""
        before = _resident()
        parser = FrameParser(OFF)
        parser.feed(pack("<4Q", 24 + 4, 2, 4, 2 * GiB) + b"head" + b"x" * 1000)
        assert parser.next_message() is None
        assert parser.want() is not None
        assert _resident() - before < 8 * MiB

    def test_allocated_memory_is_zeroed_and_writable(self) -> None:
        for size in (0, 1, MiB, MiB + 1, 5 * MiB):
            memory = allocate(size)
            assert len(memory) == size
            assert bytes(memory[-3:]) == bytes(min(3, size))
            memory[-1:] = b"\x01"[:size]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_writes_to_memory_of_its_own(self) -> None:
        script = (
            "import os\n"
            "from trio_dcore.protocol._frames import allocate\n"
            "memory = allocate(2 * 2**20)\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    memory[:5] = b'child'\n"
            "    os._exit(0)\n"
            "os.waitpid(child, 0)\n"
            "print(bytes(memory[:5]))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert done.stdout.strip() == repr(bytes(5))

    def test_systems_without_huge_pages_or_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(_frames.mmap, "MADV_HUGEPAGE", raising=False)
        monkeypatch.setattr(_frames, "_FLAGS", {})
        memory = allocate(8 * MiB)
        memory[:4] = b"data"
        assert bytes(memory[:5]) == b"data\0"


def _resident() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("needs /proc")


def numbers(*values: int) -> bytes:
    return pack(f"<{len(values)}Q", *values)


BIG = 2**63
HUGE = 2**64 - 1

REFUSED = {
    "zero frames": (numbers(8, 0), "zero frames"),
    "zero frames and an absurd outer": (numbers(HUGE, 0), "zero frames"),
    "outer below its prelude": (numbers(15, 1, 0), "less than its prelude"),
    "outer zero": (numbers(0, 1, 4) + b"head", "less than its prelude"),
    "frame 0 empty": (numbers(16, 1, 0), "frame 0 of a message is empty"),
    "frame 0 empty before others": (numbers(24, 2, 0, 5), "frame 0 of a message is empty"),
    "outer ends inside frame 0": (numbers(16 + 2, 1, 4) + b"he", "ends inside a frame"),
    "outer ends inside frame 1": (numbers(24 + 5, 2, 4, 4) + b"headab", "ends inside a frame"),
    "outer ends inside the last frame": (numbers(32 + 9, 3, 4, 4, 4) + b"headabcd", "ends inside a frame"),
    # Any other text is taken for numbers.
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "limit"),
    "tls": (bytes.fromhex("16030100c8010000c40303") + bytes(100), "limit"),
}

OVER = {
    "outer just over": (numbers(64 * MiB + 1, 1, 1), "message"),
    "outer 2**63": (numbers(BIG, 1, 1), "message"),
    "outer 2**64-1": (numbers(HUGE, 1, HUGE - 16), "message"),
    "a small outer and a large frame": (numbers(24, 2, 1, 64 * MiB), "message"),
    "frames that add up": (numbers(8 + 8 * 4, 4, 1, 30 * MiB, 30 * MiB, 30 * MiB), "message"),
    "frames that add up to over 2**64": (numbers(8 + 8 * 4, 4, 1, BIG, BIG, BIG), "message"),
    "too many frames": (numbers(8 + 8 * 1025, 1025), "frames"),
    "2**40 frames": (numbers(HUGE, 2**40), "frames"),
    "2**64-1 frames": (numbers(HUGE, HUGE), "frames"),
    "a large head": (numbers(16, 1, MiB + 1), "head"),
    "a large head that is counted": (numbers(16 + MiB + 1, 1, MiB + 1), "head"),
    "a large head before another frame": (numbers(24, 2, MiB + 1, 5), "head"),
}


class TestHostile:
    @pytest.mark.parametrize("data", [value[0] for value in REFUSED.values()], ids=REFUSED)
    @pytest.mark.parametrize("size", [1, 7, 1000])
    @pytest.mark.parametrize("deliver", [by_feeding, by_receiving])
    def test_is_refused_and_stays_so(self, data: bytes, size: int, deliver: Callable[..., list[list[Any]]]) -> None:
        text = next(text for sample, text in REFUSED.values() if sample == data)
        parser = FrameParser()
        with pytest.raises((RemoteProtocolError, LimitExceeded), match=text):
            deliver(parser, cut(data, size))
        with pytest.raises((RemoteProtocolError, LimitExceeded), match=text):
            parser.next_message()

    @pytest.mark.parametrize(("data", "field"), OVER.values(), ids=OVER)
    @pytest.mark.parametrize("size", [1, 1000])
    def test_over_a_limit_nothing_is_allocated(self, data: bytes, field: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(size: int) -> memoryview:
            raise AssertionError(f"{size} bytes were allocated")

        monkeypatch.setattr(_frames, "allocate", refuse)
        parser = FrameParser()
        pieces = cut(data, size)
        tracemalloc.start()
        try:
            with pytest.raises(LimitExceeded, match=rf"Limits\({field}=...\)") as caught:
                by_feeding(parser, pieces)
            assert tracemalloc.get_traced_memory()[1] < 64 * KiB
        finally:
            tracemalloc.stop()
        assert caught.value.limit == field
        assert caught.value.value == getattr(Limits(), field)
        assert caught.value.seen is not None
        assert caught.value.seen > caught.value.value

    def test_what_is_just_within_the_limits(self) -> None:
        limits = Limits(message=10_000, head=100, frames=3)
        frames = [b"h" * 100, b"x" * (10_000 - 8 - 24 - 100), b""]
        parser = FrameParser(limits)
        assert plain(by_feeding(parser, [wire(frames)])) == [frames]
        single = b"h" * 100
        assert by_feeding(parser, [wire([single]), wire([single], counted=0)]) == [[single], [single]]

    @pytest.mark.parametrize("trusted", [True, False])
    def test_garbage_behind_the_last_frame_counts(self, trusted: bool) -> None:
        limits = Limits(message=1000, message_trusted=2000)
        asked = []
        parser = FrameParser(limits, lambda: (asked.append(1), trusted)[1])
        data = wire([b"head"], extra=bytes(1500))
        if trusted:
            assert by_feeding(parser, cut(data, 100)) == [[b"head"]]
            assert parser.last_size == len(data)
        else:
            with pytest.raises(LimitExceeded):
                by_feeding(parser, cut(data, 100))
        assert asked == [1]

    @SOBER
    @given(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from([0, 1, 2, 8, 16, 24, 40, 2**32, BIG, HUGE]), max_size=8)))
    def test_anything_at_all(self, data: bytes | list[int]) -> None:
        data = data if isinstance(data, bytes) else numbers(*data)
        parser = FrameParser(Limits(message=4096, head=100, frames=5))
        try:
            found = by_feeding(parser, cut(data, 5))
        except (RemoteProtocolError, LimitExceeded):
            return  # typed; anything else fails the test
        assert all(frames[0] for frames in found)

    def test_without_limits_only_contradictions_are_refused(self) -> None:
        parser = FrameParser(OFF)
        parser.feed(numbers(HUGE, 2**40))
        assert parser.next_message() is None
        parser = FrameParser(OFF)
        with pytest.raises(RemoteProtocolError):
            by_feeding(parser, [numbers(5, 1, 4)])

    @pytest.mark.parametrize("size", [2**47, 2**62, 2**63, 2**64 - 1])
    @pytest.mark.parametrize("count", [1, 2])
    def test_what_the_system_has_no_memory_for(self, size: int, count: int) -> None:
        """Without limits it is the system that refuses."""
        parser = FrameParser(OFF)
        # What is behind frame 0 needs not be counted.
        prelude = numbers(24 + 4, 2, 4, size) if count == 2 else numbers(16, 1, size)
        parser.feed(prelude + b"head")
        with pytest.raises(RemoteProtocolError, match=f"no memory can be had for a frame of {size} bytes"):
            parser.next_message()


STRANGERS = [
    (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "HTTP"),
    (b"POST /api HTTP/1.1\r\n", "HTTP"),
    (b"OPTIONS * HTTP/1.1\r\n", "HTTP"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP"),
    (b"GET", "HTTP"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
    (b"SSH", "SSH"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
    (b"\x16\x03\x03", "TLS"),
    (b"\x16\x03\x00\x00\x55\x01\x00\x00", "TLS"),
    (b"\x15\x03\x03\x00\x02\x02\x28", "TLS"),
    (b"220 mail.example.org ESMTP\r\n", "text"),
    (b"hello\n", "text"),
    (b"GETTING STARTED\r\n", "text"),
    (b"\xff" * 100, None),
    (b"caf\xc3\xa9\n", None),
    (b"\x16\x03", None),
    (b"GE", None),
    (b"", None),
]


class TestFirst:
    """The first message of a comm is a handshake, and what isn't one is refused as soon as that can be seen."""

    def parser(self) -> FrameParser:
        return FrameParser(Limits(), first=HANDSHAKE)

    @pytest.mark.parametrize(("data", "kind"), STRANGERS)
    def test_looks_like(self, data: bytes, kind: str | None) -> None:
        assert looks_like(data) == kind

    @pytest.mark.parametrize(("data", "kind"), [case for case in STRANGERS if len(case[0]) >= 5 or case[1] == "TLS"])
    def test_strangers(self, data: bytes, kind: str | None) -> None:
        text = f"what came looks like {kind}" if kind else "the first message tells of"
        with pytest.raises(RemoteProtocolError, match=f"^{text}.* a handshake has at most 65536$"):
            self.parser().receive(data)
        parser = self.parser()
        parser.feed(data)
        with pytest.raises(RemoteProtocolError, match=text):
            parser.next_message()

    def test_three_letters_are_enough(self) -> None:
        parser = self.parser()
        assert by_feeding(parser, [b"G", b"E"]) == []
        with pytest.raises(RemoteProtocolError, match="HTTP"):
            by_feeding(parser, [b"T"])

    def test_other_messages_wait_for_the_whole_prelude(self) -> None:
        parser = FrameParser(Limits())
        assert by_feeding(parser, [b"GET / HTTP/1.1"]) == []
        parser = self.parser()
        parser.feed(single_frame(b"hello") + b"GET / HTTP/1.1")
        assert take_all(parser) == [[b"hello"]]

    def test_no_outer_length_is_below_16(self) -> None:
        parser = self.parser()
        assert by_feeding(parser, [bytes(7)]) == []
        with pytest.raises(RemoteProtocolError, match="the outer length of a message, 0, is less than any prelude"):
            by_feeding(parser, [b"\0"])

    @pytest.mark.parametrize("counted", [None, 0])
    @pytest.mark.parametrize("frames", [1, 2])
    def test_its_size(self, counted: int | None, frames: int) -> None:
        prelude = 8 + 8 * frames
        for excess in (0, 1):
            sizes = [HANDSHAKE - prelude + excess] if frames == 1 else [100, HANDSHAKE - prelude - 100 + excess]
            data = wire([b"x" * size for size in sizes], counted)
            for take in (by_feeding, by_receiving):
                for step in (len(data), 8, 4096):
                    parser = self.parser()
                    pieces = [data[start : start + step] for start in range(0, len(data), step)]
                    if excess:
                        with pytest.raises(RemoteProtocolError, match=f"tells of {HANDSHAKE + 1} bytes"):
                            take(parser, pieces)
                    else:
                        assert [[len(frame) for frame in found] for found in take(parser, pieces)] == [sizes]

    def test_bytes_behind_its_last_frame_count(self) -> None:
        with pytest.raises(RemoteProtocolError, match="handshake"):
            by_feeding(self.parser(), [numbers(HANDSHAKE + 1, 1, 5) + b"hello"])

    @pytest.mark.parametrize("frames", [[b"hello"], [b"hello", b"there"]])
    def test_the_second_has_the_usual_limits(self, frames: list[bytes]) -> None:
        large = wire([b"x" * (HANDSHAKE + 1)])
        for take in (by_feeding, by_receiving):
            parser = self.parser()
            assert len(take(parser, [wire(frames), large, single_frame(b"z")])) == 3
            with pytest.raises(LimitExceeded) as caught:
                take(parser, [numbers(2**20 + 17, 1, 2**20 + 1)])
            assert caught.value.limit == "head"

    def test_the_limits_hold_for_it_as_well(self) -> None:
        with pytest.raises(LimitExceeded) as caught:
            FrameParser(Limits(head=100), first=HANDSHAKE).receive(single_frame(b"x" * 101))
        assert caught.value.limit == "head"

    def test_nobody_is_asked_whether_to_trust_for_it(self) -> None:
        def ask() -> bool:
            raise AssertionError

        with pytest.raises(RemoteProtocolError, match="HTTP"):
            FrameParser(Limits(), ask, first=HANDSHAKE).receive(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")


class TestTrust:
    LIMITS = Limits(message=1000, message_trusted=5000, head=100, head_trusted=500, frames=2, frames_trusted=4)

    def parser(self, trusted: bool) -> tuple[FrameParser, list[int]]:
        asked: list[int] = []

        def ask() -> bool:
            asked.append(1)
            return trusted

        return FrameParser(self.LIMITS, ask), asked

    def test_nobody_asks_for_little(self) -> None:
        parser, asked = self.parser(True)
        by_feeding(parser, [wire([b"h" * 100, b"x" * 800]), single_frame(b"h" * 100)])
        assert asked == []

    @pytest.mark.parametrize(
        ("frames", "field"),
        [([b"head", bytes(2000)], "message"), ([b"h" * 200], "head"), ([b"head", b"", b""], "frames")],
    )
    def test_it_is_asked_once(self, frames: list[bytes], field: str) -> None:
        parser, asked = self.parser(True)
        assert plain(by_feeding(parser, [wire(frames)] * 3)) == [frames] * 3
        assert asked == [1]
        parser, asked = self.parser(False)
        for _ in range(2):
            with pytest.raises(LimitExceeded) as caught:
                by_feeding(parser, [wire(frames)])
            assert caught.value.limit == field
        assert asked == [1]

    @pytest.mark.parametrize(
        ("frames", "field"),
        [([b"head", bytes(6000)], "message_trusted"), ([b"h" * 600], "head_trusted"), ([b"head", *[b""] * 4], "frames_trusted")],
    )
    def test_the_trusted_have_limits_too(self, frames: list[bytes], field: str) -> None:
        parser, _ = self.parser(True)
        with pytest.raises(LimitExceeded, match=rf"Limits\({field}=...\)") as caught:
            by_feeding(parser, [wire(frames)])
        assert caught.value.limit == field
        assert caught.value.value == getattr(self.LIMITS, field)

    def test_nobody_is_trusted_unless_somebody_says_so(self) -> None:
        with pytest.raises(LimitExceeded):
            by_feeding(FrameParser(self.LIMITS), [wire([b"h" * 200])])
