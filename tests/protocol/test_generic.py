"""Objects that travel attribute by attribute, to and from stock Dask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.protocol import dumps as stock_dumps
from distributed.protocol import loads as stock_loads
from distributed.protocol import register_generic as stock_register_generic
from distributed.protocol.serialize import Serialize as StockSerialize
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    RemoteProtocolError,
    SerializationError,
    Serialize,
    Serialized,
    UnsafePayload,
    dumps,
    loads,
    register_generic,
)
from trio_dcore.protocol import _registry as registry
from trio_dcore.protocol._families import deserialize, serialize
from trio_dcore.protocol._pickle import class_pickle


def over_the_wire(header: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(header), use_list=False, strict_map_key=False)


UNTRUSTED = DecodeContext(allow_pickle=lambda: False)
NO_PICKLE = EncodeContext(allow_pickle=lambda: False)


class Model:
    """One that can't be made by calling its class."""

    def __init__(self, *needed: object) -> None:
        raise AssertionError("no constructor runs")


class Special(Model):
    """A subclass, registered by nobody."""


class Slotted:
    __slots__ = ("a",)


def model(cls: type = Model, **attributes: Any) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(attributes)
    return made


def full() -> Any:
    return model(
        name="x",
        count=3,
        shape=(1, 2),
        weights=np.arange(1000.0),
        layers={"a": np.ones(3), "b": {"c": np.zeros(2), "d": 1}},
        bias=[np.ones(2), "y"],
    )


def check(found: Any) -> None:
    assert type(found) is Model
    assert (found.name, found.count, found.shape) == ("x", 3, (1, 2))
    assert (found.weights == np.arange(1000.0)).all()
    assert (found.layers["a"] == 1).all()
    assert (found.layers["b"]["c"] == 0).all()
    assert found.layers["b"]["d"] == 1
    assert (found.bias[0] == 1).all()
    assert found.bias[1] == "y"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations of the test are undone after it, here and in stock."""
    for table in ("_classes", "_references"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    register_generic(Model)
    yield
    for dispatch in (dask_serialize, dask_deserialize):
        dispatch._lookup.pop(Model, None)


def test_both_ways() -> None:
    check(loads(dumps({"m": Serialize(full())}))["m"])


@pytest.mark.parametrize("codec", [None, "lz4"])
def test_ours_is_read_by_stock(codec: str | None) -> None:
    stock_register_generic(Model)
    header, frames = serialize(full(), EncodeContext(compression=codec, shard=1000))
    message = [msgpack.packb([{"__Serialized__": 1}]), msgpack.packb(header), *map(memoryview, frames)]
    check(stock_loads(message)[0])


def test_stock_is_read_by_ours() -> None:
    stock_register_generic(Model)
    check(loads([bytes(frame) for frame in stock_dumps([StockSerialize(full())])])[0])


def test_strangers() -> None:
    """No pickle is needed where no attribute needs one."""
    plain = model(a=1, b=np.arange(10), c={"d": np.ones(2)})
    header, frames = serialize(plain, NO_PICKLE)
    found = deserialize(over_the_wire(header), frames, UNTRUSTED)
    assert (found.b == np.arange(10)).all()
    assert (found.c["d"] == 1).all()
    with pytest.raises(UnsafePayload):
        serialize(model(a=object), NO_PICKLE)
    header, frames = serialize(model(a=object), EncodeContext())
    with pytest.raises(UnsafePayload):
        deserialize(over_the_wire(header), frames, UNTRUSTED)


def test_a_subclass() -> None:
    special = model(Special, a=np.ones(3))
    header, frames = serialize(special, EncodeContext())
    found = deserialize(over_the_wire(header), frames, DecodeContext())
    assert type(found) is Special
    assert (found.a == 1).all()
    with pytest.raises(UnsafePayload):
        deserialize(over_the_wire(header), frames, UNTRUSTED)


@pytest.mark.parametrize("value", [2**70, "\ud800", {"a": 2**70}, ["x"], {1: np.ones(2)}, {object: 1}, {}], ids=repr)
def test_attributes_of_all_kinds(value: Any) -> None:
    found = loads(dumps(Serialize(model(a=value)))).a
    assert str(found) == str(value)


def test_what_can_not_be() -> None:
    register_generic(Slotted)
    with pytest.raises(SerializationError, match="has no __dict__"):
        serialize(Slotted(), EncodeContext())
    with pytest.raises(SerializationError, match="attribute 'a' is a Serialized"):
        serialize(model(a=Serialized({}, [])), EncodeContext())
    looped: dict[str, Any] = {}
    looped["me"] = looped
    with pytest.raises(SerializationError, match="RecursionError"):
        serialize(model(a=looped), EncodeContext())
    with pytest.raises(TypeError, match="give a class"):
        register_generic("builtins.object")  # type: ignore[arg-type]


def changed(**parts: Any) -> tuple[Any, list[Any]]:
    header, frames = serialize(model(a=np.arange(3)), EncodeContext())
    header = over_the_wire(header)
    header["sub-header"].update(parts)
    return header, frames


INNER = {"header": {"serializer": "msgpack"}, "start": 0, "stop": 1}


@pytest.mark.parametrize(
    "parts",
    [
        {"simple": None},
        {"complex": []},
        {"complex": {"a": 1}},
        {"complex": {"a": {**INNER, "header": 1}}},
        {"complex": {"a": {**INNER, "start": 1}}},
        {"complex": {"a": {**INNER, "stop": 2}}},
        {"complex": {"a": {**INNER, "stop": -1}}},
        {"complex": {"a": {**INNER, "stop": True}}},
        {"complex": {"a": INNER, "b": INNER}},
        {"complex": {"a": {**INNER, "header": {"nested-dict": 1}}}},
        {"complex": {"a": {**INNER, "header": {"nested-dict": {}}}}},
        {"type-serialized": b"\x80\x04\x95\x14\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x03int\x94\x93\x94."},
        {"type-serialized": 5},
    ],
    ids=repr,
)
def test_headers_that_lie(parts: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        deserialize(*changed(**parts), DecodeContext())


def test_deep_headers() -> None:
    nested: Any = {"simple": {}, "complex": {}}
    for _ in range(5000):
        nested = {"simple": {}, "complex": {"a": {"header": {"nested-dict": nested}, "start": 0, "stop": 0}}}
    with pytest.raises(RemoteProtocolError, match="too deeply"):
        deserialize(*changed(**nested), DecodeContext())


def test_a_class_that_can_not_be_made() -> None:
    register_generic(int)
    header, frames = changed()
    header["type-serialized"] = header["sub-header"]["type-serialized"] = class_pickle(int)[0]
    with pytest.raises(SerializationError, match="can't be made"):
        deserialize(header, frames, UNTRUSTED)


def test_the_header_is_msgpack() -> None:
    header, _ = serialize(full(), EncodeContext())
    assert msgpack.unpackb(msgpack.packb(header), strict_map_key=False)
