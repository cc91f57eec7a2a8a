"""Enums on the wire: who is written as a marker, and that reading one imports nothing and finds nothing but members."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterator

import pytest

from trio_dcore.protocol import RemoteProtocolError, _enums
from trio_dcore.protocol._enums import enum_marker, enum_member, register_enum


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1
    BLUE = "blue"


class Holder:
    class Inner(enum.Enum):
        A = 1


class Bits(enum.Flag):
    A = 1
    B = 2


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_enums, "_by_name", dict(_enums._by_name))
    monkeypatch.setattr(_enums, "_by_class", dict(_enums._by_class))


@pytest.fixture
def stock() -> Iterator[type[enum.Enum]]:
    """An enum that looks as if it were Dask's."""
    module = types.ModuleType("dask.pretended")
    cls = enum.Enum("Mode", {"FAST": 1, "SLOW": 2}, module="dask.pretended")
    module.Mode = cls  # type: ignore[attr-defined]
    module.helper = len  # type: ignore[attr-defined]
    module.__getattr__ = lambda name: pytest.fail(f"looked for {name}")  # type: ignore[method-assign]
    sys.modules["dask.pretended"] = module
    yield cls
    del sys.modules["dask.pretended"]


def marker(module: object = "dask.pretended", name: object = "Mode", member: object = "FAST") -> dict[str, object]:
    return {"__Enum__": True, "name": member, "__module__": module, "__name__": name}


@pytest.mark.usefixtures("registry")
def test_a_registered_enum_has_another_name_on_the_wire() -> None:
    register_enum("distributed.core", "Farbe", Colour)
    register_enum("distributed.core", "Farbe", Colour)
    wire = enum_marker(Colour.BLUE)
    assert wire == {"__Enum__": True, "name": "BLUE", "__module__": "distributed.core", "__name__": "Farbe"}
    assert enum_member(wire, ()) is Colour.BLUE


@pytest.mark.usefixtures("registry")
def test_a_name_stands_for_one_class_and_a_class_has_one_name() -> None:
    register_enum("distributed.core", "Farbe", Colour)
    with pytest.raises(ValueError, match="already read as"):
        register_enum("distributed.core", "Farbe", Bits)
    with pytest.raises(ValueError, match=r"already written as distributed\.core\.Farbe"):
        register_enum("distributed.core", "Colour", Colour)
    assert enum_marker(Bits.A) is None


def test_stock_enums_are_written_as_they_are(stock: type[enum.Enum]) -> None:
    wire = enum_marker(stock["SLOW"])
    assert wire == marker(member="SLOW")
    assert enum_member(wire, ("dask",)) is stock["SLOW"]


def test_an_enum_of_anybody_is_written_only_where_there_is_no_other_way() -> None:
    assert enum_marker(Colour.RED) is None
    assert enum_marker(Colour.CRIMSON, everything=True) == marker(__name__, "Colour", "RED")
    assert enum_member(marker(__name__, "Colour", "CRIMSON"), (__name__.partition(".")[0],)) is Colour.RED


def test_what_the_wire_has_no_name_for_is_not_written() -> None:
    assert enum_marker(Holder.Inner.A, everything=True) is None
    assert enum_marker(Bits.A | Bits.B, everything=True) is None
    assert enum_marker(Bits(0), everything=True) is None
    assert enum_marker(Bits.A, everything=True) is not None


def test_a_root_package_that_is_not_listed_is_refused_with_its_name_and_the_setting(stock: type[enum.Enum]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"'dask\.pretended\.Mode'.*'dask'.*Security\(enum_modules="):
        enum_member(marker(), ("distributed", "das"))


def test_a_module_is_never_imported() -> None:
    name = "this.is"  # prints when imported
    sys.modules.pop("this", None)
    with pytest.raises(RemoteProtocolError, match=r"'this\.is\.Mode', whose module is not imported here"):
        enum_member(marker(name), ("this",))
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ["helper", "absent", "Mode.FAST", "__class__", "__getattr__"])
@pytest.mark.usefixtures("stock")
def test_what_is_no_enum_is_not_touched(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="not an enum here"):
        enum_member(marker(name=name), ("dask",))


@pytest.mark.parametrize("member", ["fast", "__class__", "mro", "_member_map_", "", "x" * 10_000])
@pytest.mark.usefixtures("stock")
def test_a_class_is_only_asked_for_its_members(member: str) -> None:
    with pytest.raises(RemoteProtocolError, match="has no member") as caught:
        enum_member(marker(member=member), ("dask",))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"__Enum__": True},
        marker(module=None),
        marker(name=1),
        marker(member=b"FAST"),
        marker(member=("FAST",)),
    ],
)
@pytest.mark.usefixtures("stock")
def test_a_malformed_marker(bad: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match="lacks"):
        enum_member(bad, ("dask",))
