"""Reading ahead: pings are taken out, everything else is kept as it came, and no more of it than there is room for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio

from trio_dcore import RemoteProtocolError
from trio_dcore.comm._ahead import ReadAhead, find_goodbye
from trio_dcore.comm._pumps import MESSAGE_WEIGHT, YIELD_BYTES
from trio_dcore.comm._watch import READ_AHEAD
from trio_dcore.protocol import Serialize
from trio_dcore.protocol._context import DecodeContext, EncodeContext
from trio_dcore.protocol._envelope import GOODBYE, ITEM, PING, PONG, WINDOW
from trio_dcore.protocol._frames import FrameParser, pack_prelude
from trio_dcore.protocol._messages import Decoder, Encoder

#: The request whose pings are meant.
ID = 7
FOR_EVER = 2**40


def packed(*messages: object) -> bytes:
    encoder = Encoder(EncodeContext())
    return b"".join(_one(encoder.encode(message)) for message in messages)


def _one(frames: list[Any]) -> bytes:
    return pack_prelude(frames) + b"".join(map(bytes, frames))


class FakePump:
    """Gives a piece of what has come for each read that does not wait."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.unwaited = 0

    def fill_nowait(self, parser: FrameParser) -> bool:
        if not self.pieces:
            return False
        parser.feed(self.pieces.pop(0))
        return True


class Ahead:
    """A ReadAhead, what it reads, and the pump behind that."""

    def __init__(self, *pieces: bytes) -> None:
        self.parser = FrameParser()
        self.decoder = Decoder(DecodeContext(), extensions=True)
        self.ahead = ReadAhead(self.parser, self.decoder)
        self.pump: Any = FakePump(*pieces)

    def read(self, most: int = FOR_EVER) -> tuple[bool, bool]:
        return self.ahead.read(ID, most, self.pump)

    def take_all(self) -> list[object]:
        found = []
        while self.ahead.ready:
            found.append(self.decoder.resolve(self.ahead.take()))
        return found


# -- what is taken out -----------------------------------------------------------------------------------------------------------


def test_pings_and_pongs_of_the_request_are_taken_out() -> None:
    ahead = Ahead(packed("a", (PING, ID, None), "b", (PONG, ID, None), "c"))
    assert ahead.read() == (True, True)
    assert ahead.take_all() == ["a", "b", "c"]
    assert ahead.ahead.size == 0


@pytest.mark.parametrize(("kind", "pinged"), [(PING, True), (PONG, False)])
def test_only_a_ping_wants_an_answer(kind: int, pinged: bool) -> None:
    ahead = Ahead(packed((kind, ID, None)))
    assert ahead.read() == (pinged, True)
    assert not ahead.ahead.ready


def test_that_there_was_a_ping_is_not_forgotten_with_what_comes_behind_it() -> None:
    ahead = Ahead(packed((PING, ID, None)), packed("a"), packed("b"))
    assert ahead.read() == (True, True)
    assert ahead.take_all() == ["a", "b"]
    assert ahead.read() == (False, True)


@pytest.mark.parametrize(
    "message",
    [
        (PING, ID + 1, None),
        (ITEM, ID, None),
        (PING, ID),
        [PING, ID, None, None],
        (float(PING), ID, None),
        (PING, float(ID), None),
        (True, ID, None),
        {"op": "ping"},
        (PING, ID, "a value that no ping has"),
        PING,
    ],
)
def test_what_is_no_such_ping_is_kept(message: object) -> None:
    ahead = Ahead(packed(message))
    assert ahead.read() == (False, True)
    (kept,) = ahead.take_all()
    assert kept == (tuple(message) if isinstance(message, list) else message)


def test_frames_and_unreadable_heads_are_for_who_reads_them() -> None:
    payload = packed({"x": Serialize(b"payload")})
    ahead = Ahead(payload + packed("a").replace(packed("a")[-2:], b"\xc1\xc1"))
    assert ahead.read() == (False, True)
    assert len(ahead.ahead.take()) == 3
    assert ahead.parser.last_size == len(payload)
    with pytest.raises(RemoteProtocolError):
        ahead.decoder.resolve(ahead.ahead.take())


# -- order, sizes and errors -----------------------------------------------------------------------------------------------------


def test_messages_keep_their_order_and_their_size() -> None:
    messages = ["a", "bb" * 100, "ccc"]
    ahead = Ahead(*map(packed, messages))
    ahead.read()
    assert ahead.ahead.size == sum(len(packed(each)) for each in messages)
    for each in messages:
        assert ahead.decoder.resolve(ahead.ahead.take()) == each
        assert ahead.parser.last_size == len(packed(each))
    assert ahead.ahead.size == 0


def test_the_beginning_of_a_message_counts_as_well() -> None:
    ahead = Ahead(packed("a") + packed("b")[:5])
    ahead.read()
    assert ahead.ahead.size == len(packed("a")) + 5
    ahead.pump.pieces.append(packed("b")[5:])
    ahead.read()
    assert ahead.take_all() == ["a", "b"]


def test_an_error_stands_in_its_place_for_good() -> None:
    ahead = Ahead(packed("a") + bytes(16), packed("never read"))  # a message of zero frames
    assert ahead.read() == (False, False)
    assert ahead.decoder.resolve(ahead.ahead.take()) == "a"
    assert not ahead.ahead.ready
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="zero frames"):
            ahead.ahead.take()
    assert ahead.read() == (False, False)
    assert ahead.pump.pieces == [packed("never read")]


def test_a_ping_in_front_of_an_error_still_has_its_answer() -> None:
    ahead = Ahead(packed((PING, ID, None)) + bytes(16))
    assert ahead.read()[0]


# -- how much --------------------------------------------------------------------------------------------------------------------


def test_a_flood_of_pings_is_read_a_few_times_in_a_row() -> None:
    ahead = Ahead(*[packed((PING, ID, None))] * 100)
    assert ahead.read() == (True, True)
    assert len(ahead.pump.pieces) == 96


def test_without_a_pump_only_what_the_parser_has() -> None:
    ahead = Ahead(packed("b"))
    ahead.parser.feed(packed("a"))
    assert ahead.ahead.read(ID, FOR_EVER) == (False, True)
    assert ahead.take_all() == ["a"]
    assert ahead.pump.pieces


def test_the_message_that_makes_it_too_much_may_be_of_any_size() -> None:
    large = b"x" * 10 * READ_AHEAD
    ahead = Ahead(packed("a"), packed(large), packed((PING, ID, None)), packed("behind"))
    pinged, room = ahead.read(most=1000)
    assert pinged  # a ping is seen behind it
    assert room  # since what came behind it is small
    assert ahead.take_all() == ["a", large, "behind"]


def test_behind_that_there_is_room_for_little() -> None:
    first = b"x" * 2000
    piece = b"y" * (READ_AHEAD // 4)
    ahead = Ahead(packed(first), *[packed(piece)] * 20)
    for _ in range(5):
        _, room = ahead.read(most=1000)
    assert not room
    kept = len(ahead.ahead.kept)
    assert kept == 1 + 3  # and one that the parser has
    assert len(ahead.pump.pieces) == 21 - kept - 1
    assert ahead.ahead.size < len(first) + READ_AHEAD + len(piece)
    # Whoever reads makes room again.
    for _ in range(4):
        ahead.ahead.take()
    assert ahead.read(most=1000)[1] is False
    assert len(ahead.ahead.kept) == 1 + 3


def test_what_the_parser_has_begun_counts_as_room_that_is_used() -> None:
    ahead = Ahead(packed(b"x" * 2000), packed(b"y" * 2 * READ_AHEAD)[: READ_AHEAD + 100])
    assert ahead.read(most=1000) == (False, False)


# -- taking it -------------------------------------------------------------------------------------------------------------------


async def test_the_next_head() -> None:
    ahead = Ahead(packed("a", {"x": Serialize(b"payload")}, {"__x": 1}))
    ahead.read()
    assert await ahead.ahead.next_head(ahead.pump) == ("a", None)
    _, frames = await ahead.ahead.next_head(ahead.pump)
    assert frames is not None
    assert len(frames) == 3
    _, frames = await ahead.ahead.next_head(ahead.pump)
    assert frames is not None  # there may be a marker in it
    assert len(frames) == 1
    assert ahead.pump.unwaited == 3 * MESSAGE_WEIGHT


async def test_others_run_every_so_many_messages() -> None:
    count = YIELD_BYTES // MESSAGE_WEIGHT
    ahead = Ahead(packed(*range(4 * count)))
    ahead.read()
    turns = []

    async def other() -> None:
        for _ in range(2):
            turns.append(taken)
            await trio.lowlevel.checkpoint()

    taken = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        while ahead.ahead.ready:
            await ahead.ahead.next_head(ahead.pump)
            taken += 1
    assert turns[0] <= 2 * count  # who of two that can run goes first is left to chance
    assert turns[1] <= 3 * count
    assert ahead.pump.unwaited == 0


async def test_a_message_that_was_taken_is_not_lost_by_a_cancellation() -> None:
    ahead = Ahead(packed("a"))
    ahead.read()
    ahead.pump.unwaited = YIELD_BYTES
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await ahead.ahead.next_head(ahead.pump) == ("a", None)


# -- a goodbye -------------------------------------------------------------------------------------------------------------------


def found(*pieces: bytes) -> float:
    ahead = Ahead(*pieces)
    return find_goodbye(ahead.parser, ahead.pump, ahead.decoder)


def test_a_goodbye_is_found_behind_what_may_stand_in_front_of_it() -> None:
    assert found(packed((GOODBYE, 5, None))) == 5
    assert found(packed((PONG, 4, None), (WINDOW, 4, (1, 10))), packed((GOODBYE, 5, None))) == 5
    assert found(packed((GOODBYE, 5, None))[:9], packed((GOODBYE, 5, None))[9:]) == 5


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [packed((PONG, 4, None))],
        [packed((GOODBYE, 5, None))[:-1]],
        [packed("no envelope", (GOODBYE, 5, None))],
        [bytes(16), packed((GOODBYE, 5, None))],
        [packed((GOODBYE, -5, None))],
        [packed(*[(PONG, 4, None)] * 64, (GOODBYE, 5, None))],
    ],
    ids=["nothing", "none", "not whole", "no envelope before", "no message before", "no id", "far behind"],
)
def test_there_is_none(pieces: list[bytes]) -> None:
    assert found(*pieces) == math.inf
