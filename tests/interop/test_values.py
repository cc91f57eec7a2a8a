"""The same values through every pairing: stock client with our server, our client with a stock server, rpc and pool.

Each value goes there as an argument, is seen by the handler, and comes back as its result; both are compared.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import operator
import uuid
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
from distributed.core import Status as StockStatus
from distributed.protocol import to_serialize as stock_to_serialize

import trio_dcore

Check = Callable[[Any, Any], None]


@dataclass
class Point:
    """Neither side knows this class: it travels as a pickle."""

    x: int
    y: tuple[int, ...]


class Colour(enum.Enum):
    """An enum outside the packages whose enums have a form of their own on the wire."""

    RED = 1


Pair = namedtuple("Pair", "left right")  # arrives as the plain tuple that the wire has

# (what is sent, what arrives): Dask's msgpack knows no lists, and no difference between the kinds of bytes.
_VALUES: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "bool": (True, True),
    "int": (-7, -7),
    "int, 64 bits": (2**64 - 1, 2**64 - 1),
    "int, too long for msgpack": ({"n": decimal.Decimal(2**70)}, {"n": decimal.Decimal(2**70)}),
    "float": (1.5e300, 1.5e300),
    "str": ("grüß\n\0 漢字 😀", "grüß\n\0 漢字 😀"),
    "str, empty": ("", ""),
    "str, long": ("x" * 300_000, "x" * 300_000),
    "bytes": (b"\x00\xff", b"\x00\xff"),
    "bytes, long": (bytes(range(256)) * 4096, bytes(range(256)) * 4096),
    "bytearray": (bytearray(b"ab"), b"ab"),
    "memoryview": (memoryview(b"abc")[1:], b"bc"),
    "list": ([1, [2, "x"], []], (1, (2, "x"), ())),
    "tuple": ((1, (2,), ()), (1, (2,), ())),
    "namedtuple": (Pair(1, [2]), (1, (2,))),
    "set": ({1, "a", (2, 3)}, {1, "a", (2, 3)}),
    "set, empty": (set(), set()),
    "set, nested": ({"s": {1}, "l": [{2}]}, {"s": {1}, "l": ({2},)}),
    "frozenset": (frozenset({1, 2}), frozenset({1, 2})),
    "dict": ({"a": {"b": [1]}}, {"a": {"b": (1,)}}),
    "dict, keys of all kinds": (
        {1: "i", 2.5: "f", None: "n", b"b": "b", ("t", 1): "t"},
        {1: "i", 2.5: "f", None: "n", b"b": "b", ("t", 1): "t"},
    ),
    "dict subclass": (OrderedDict(a=1), {"a": 1}),
    "dict that looks like an error": ({"status": "error", "exception": "no"}, {"status": "error", "exception": "no"}),
    "OK": ("OK", "OK"),
    "datetime": (datetime.datetime(2026, 8, 1, 12, 30, 1, 5), datetime.datetime(2026, 8, 1, 12, 30, 1, 5)),
    "datetime, utc": (datetime.datetime(2026, 8, 1, tzinfo=datetime.UTC), datetime.datetime(2026, 8, 1, tzinfo=datetime.UTC)),
    "timedelta": (datetime.timedelta(days=1, microseconds=3), datetime.timedelta(days=1, microseconds=3)),
    "Decimal": (decimal.Decimal("1.10"), decimal.Decimal("1.10")),
    "Fraction": (fractions.Fraction(1, 3), fractions.Fraction(1, 3)),
    "complex": (1 + 2j, 1 + 2j),
    "UUID": (uuid.UUID(int=5), uuid.UUID(int=5)),
    "numpy scalar": (numpy.int64(5), numpy.int64(5)),
    "dataclass": (Point(1, (2, 3)), Point(1, (2, 3))),
    "objects inside": ([Point(1, ()), {"deep": [Point(2, ())]}], (Point(1, ()), {"deep": (Point(2, ()),)})),
    "function": (operator.itemgetter, operator.itemgetter),
    "class": (Point, Point),
}

_ARRAYS: dict[str, Any] = {
    "small": numpy.arange(3),
    "8 MB": numpy.arange(10**6, dtype="f8"),
    "8 MB, every second": numpy.arange(2 * 10**6, dtype="f8")[::2],
    "transposed": numpy.arange(12, dtype="i4").reshape(3, 4).T,
    "fortran": numpy.asfortranarray(numpy.arange(24, dtype="u2").reshape(2, 3, 4)),
    "backwards": numpy.arange(10)[::-1],
    "window": numpy.arange(100).reshape(10, 10)[2:5, 3:9:2],
    "broadcast": numpy.broadcast_to(numpy.arange(4, dtype="i2"), (3, 4)),
    "no dimension": numpy.array(2.5),
    "empty": numpy.empty((0, 3), dtype="f4"),
    "bool": numpy.array([True, False]),
    "big endian": numpy.arange(4, dtype=">i4"),
    "datetime64": numpy.array(["2026-08-01", "NaT"], dtype="M8[D]"),
    "text": numpy.array(["ab", "ü"]),
    "bytes": numpy.array([b"ab", b"c"]),
    "structured": numpy.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "objects": numpy.array([{"a": 1}, None, "x"], dtype=object),
}


@pytest.fixture(params=list(_VALUES))
def value(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return _VALUES[request.param]


@pytest.fixture(params=list(_ARRAYS))
def array(request: pytest.FixtureRequest) -> Any:
    return _ARRAYS[request.param]


class _Recorder:
    """A handler that remembers what it was called with and gives it back."""

    def __init__(self) -> None:
        self.seen: Any = None

    def handler(self, x: Any) -> Any:
        self.seen = x
        return x

    def stock_handler(self, x: Any) -> Any:
        # A stock server compares its result with a Status, which an array of more than one item does not survive.
        self.seen = x
        return stock_to_serialize(x) if isinstance(x, numpy.ndarray) else x


async def test_stock_client_sends_and_gets_values(stock: Any, ours: Any, kind: str, value: Any, same: Check) -> None:
    sent, arrives = value
    recorder = _Recorder()
    async with ours({"same": recorder.handler}) as server:
        back = await stock.call(kind, server.address, lambda remote: remote.same(x=sent))
    same(recorder.seen, arrives)
    same(back, arrives)


async def test_our_client_sends_and_gets_values(stock: Any, connected: Any, kind: str, value: Any, same: Check) -> None:
    sent, arrives = value
    recorder = _Recorder()
    async with stock.serve({"same": recorder.stock_handler}) as server, connected(kind, server.address) as remote:
        back = await remote.same(x=sent)
    same(recorder.seen, arrives)
    same(back, arrives)


@pytest.mark.parametrize("wrap", [stock_to_serialize, lambda x: x], ids=["to_serialize", "bare"])
async def test_stock_client_sends_and_gets_arrays(stock: Any, ours: Any, array: Any, wrap: Any, same: Check) -> None:
    recorder = _Recorder()
    async with ours({"same": recorder.handler}) as server:
        back = await stock.call("rpc", server.address, lambda remote: remote.same(x=wrap(array)))
    same(recorder.seen, array)
    same(back, array)


@pytest.mark.parametrize("wrap", [trio_dcore.to_serialize, lambda x: x], ids=["to_serialize", "bare"])
async def test_our_client_sends_and_gets_arrays(stock: Any, connected: Any, array: Any, wrap: Any, same: Check) -> None:
    recorder = _Recorder()
    async with stock.serve({"same": recorder.stock_handler}) as server, connected("rpc", server.address) as remote:
        back = await remote.same(x=wrap(array))
    same(recorder.seen, array)
    same(back, array)


async def test_arrays_inside_containers(stock: Any, ours: Any, connected: Any, same: Check) -> None:
    arrays: dict[str, Any] = {"first": numpy.arange(5.0), "rest": [numpy.arange(10**5), numpy.eye(3)[::2]]}
    recorder = _Recorder()
    async with ours({"same": recorder.handler}) as server:
        back = await stock.call("rpc", server.address, lambda remote: remote.same(x=arrays))
    async with stock.serve({"same": lambda x: stock_to_serialize(x)}) as server, connected("rpc", server.address) as remote:
        again = await remote.same(x=trio_dcore.to_serialize(back))
    for found in (recorder.seen, back, again):
        same(found["first"], arrays["first"])
        assert len(found["rest"]) == 2
        same(found["rest"][0], arrays["rest"][0])
        same(found["rest"][1], arrays["rest"][1])


async def test_objects_by_value(stock: Any, ours: Any, connected: Any) -> None:
    """A lambda has no name to be pickled by: cloudpickle takes it along, both ways."""
    factor = 3
    async with ours({"apply": lambda f, x: f(x), "make": lambda: functools.partial(lambda a, b: a * b, factor)}) as server:
        assert await stock.call("rpc", server.address, lambda remote: remote.apply(f=lambda x: x * factor, x=5)) == 15
        made = await stock.call("rpc", server.address, lambda remote: remote.make())
        assert made(7) == 21
    handlers = {"apply": lambda f, x: f(x), "make": lambda: functools.partial(lambda a, b: a * b, factor)}
    async with stock.serve(handlers) as server, connected("rpc", server.address) as remote:
        assert await remote.apply(f=lambda x: x * factor, x=5) == 15
        assert (await remote.make())(7) == 21


async def test_status_enums(stock: Any, ours: Any, connected: Any) -> None:
    """Dask's Status is read as ours and written as Dask's."""
    recorder = _Recorder()
    async with ours({"same": recorder.handler}) as server:
        back = await stock.call("rpc", server.address, lambda remote: remote.same(x=StockStatus.paused))
    assert recorder.seen is trio_dcore.Status.paused
    assert back is StockStatus.paused
    recorder = _Recorder()
    async with stock.serve({"same": recorder.handler}) as server, connected("rpc", server.address) as remote:
        back = await remote.same(x=trio_dcore.Status.closing)
    assert recorder.seen is StockStatus.closing
    assert back is trio_dcore.Status.closing


async def test_an_enum_of_the_application(stock: Any, ours: Any, connected: Any) -> None:
    """Stock sends its module and name, and ours looks it up only in packages that were named; ours sends it as a pickle."""
    security = trio_dcore.Security(enum_modules=("dask", "distributed", Colour.__module__.partition(".")[0]))
    recorder = _Recorder()
    async with ours({"same": recorder.handler}, security=security) as server:
        back = await stock.call("rpc", server.address, lambda remote: remote.same(x=Colour.RED))
    assert recorder.seen is back is Colour.RED
    async with (
        stock.serve({"same": recorder.handler}) as server,
        connected("rpc", server.address, security=security) as remote,
    ):
        back = await remote.same(x=Colour.RED)
    assert recorder.seen is back is Colour.RED


async def test_an_enum_from_elsewhere_is_refused(stock: Any, ours: Any, kind: str) -> None:
    """With an error that says so; the handler is not started."""
    recorder = _Recorder()

    async def refused(remote: Any) -> None:
        with pytest.raises(Exception, match="enum_modules"):
            await remote.same(x=Colour.RED)

    async with ours({"same": recorder.handler}) as server:
        await stock.call(kind, server.address, refused)
    assert recorder.seen is None


async def test_a_received_array_can_be_written_to(stock: Any, ours: Any, connected: Any) -> None:
    """As Dask has it: an array arrives writeable if it was sent from writeable memory."""
    seen = []

    def change(x: Any) -> Any:
        seen.append(x.flags.writeable)
        x[0] = 99
        return stock_to_serialize(x)

    def change_ours(x: Any) -> Any:
        seen.append(x.flags.writeable)
        x[0] = 99
        return x

    async with ours({"change": change_ours}) as server:
        data = numpy.arange(1000)
        back = await stock.call("rpc", server.address, lambda remote: remote.change(x=stock_to_serialize(data)))
        assert back[0] == 99
    async with stock.serve({"change": change}) as server, connected("rpc", server.address) as remote:
        data = numpy.arange(1000)
        back = await remote.change(x=data)
        assert back[0] == 99
        back[1] = 5
    assert seen == [True, True]
