"""Schemes: what is registered works wherever addresses are taken."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import ConnectionPool, Server, connect, rpc
from trio_dcore.abc import Comm, CommSettings, Listener, Transport
from trio_dcore.comm import (
    FramedComm,
    _registry,
    coerce_to_address,
    get_address_host,
    get_address_host_port,
    get_local_address_for,
    get_transport,
    listen_address,
    register_transport,
    resolve_address,
)
from trio_dcore.errors import AddressError, LocalProtocolError

PATIENCE = 10.0


class Carrier(Listener):
    """A listener of a transport that a user wrote."""

    def __init__(self, transport: Pigeon, location: str, settings: CommSettings) -> None:
        self.transport = transport
        self.location = location
        self.settings = settings
        self.sender, self.receiver = trio.open_memory_channel[trio.abc.Stream](10)

    @property
    def listen_address(self) -> str:
        return f"{self.transport.scheme}://{self.location}"

    @property
    def contact_address(self) -> str:
        return self.listen_address

    async def accept(self) -> Comm:
        try:
            stream = await self.receiver.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None
        return self.transport.comm(stream, self.settings)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.transport.listeners.pop(self.location, None)


class Pigeon(Transport):
    """Over any trio stream, in memory here."""

    scheme = "pigeon"

    def __init__(self, over_stream: Any) -> None:
        self.over_stream = over_stream
        self.listeners: dict[str, Carrier] = {}

    def comm(self, stream: trio.abc.Stream, settings: CommSettings) -> FramedComm:
        comm: FramedComm = self.over_stream(stream, limits=settings.limits, security=settings.security)
        return comm

    async def connect(self, location: str, settings: CommSettings) -> Comm:
        await trio.lowlevel.checkpoint()
        if location not in self.listeners:
            raise ConnectionRefusedError("no loft there")
        ours, theirs = trio.testing.memory_stream_pair()
        await self.listeners[location].sender.send(theirs)
        return self.comm(ours, settings)

    async def listen(self, location: str, settings: CommSettings) -> list[Listener]:
        await trio.lowlevel.checkpoint()
        self.listeners[location] = made = Carrier(self, location, settings)
        return [made]


class Telegraph(Pigeon):
    scheme = "telegraph"
    host_port = True


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_transports", dict(_registry._transports))
    monkeypatch.setattr(_registry, "_unknown", set())


@pytest.fixture(params=[Pigeon, Telegraph])
def scheme(request: pytest.FixtureRequest, over_stream: Any) -> Iterator[str]:
    register_transport(request.param(over_stream))
    return request.param.scheme


def add(x: int, y: int) -> int:
    return x + y


async def numbers(count: int) -> Any:
    for n in range(count):
        yield n


async def test_a_server_and_its_clients(scheme: str) -> None:
    with trio.fail_after(PATIENCE):
        async with Server({"add": add, "numbers": numbers}) as server:
            address = await server.listen(f"{scheme}://loft:5")
            assert address == f"{scheme}://loft:5"
            async with rpc(address) as remote:
                assert await remote.add(x=1, y=2) == 3
                async with remote.numbers.stream(count=100) as stream:
                    assert [n async for n in stream] == list(range(100))
            async with ConnectionPool() as pool:
                assert await pool(address).add(x=3, y=4) == 7
            async with await connect(address) as comm:
                assert comm.peer.kind == "memory"
                await comm.write({"op": "add", "x": 5, "y": 6})
                assert await comm.read() == 11


async def test_addresses_without_a_host_are_left_as_they_are(over_stream: Any) -> None:
    register_transport(Pigeon(over_stream))
    for address in ("pigeon://", "pigeon://Loft/5 by the sea"):
        assert coerce_to_address(address) == address
        assert listen_address(address) == address
        assert await resolve_address(address) == address
    with pytest.raises(AddressError, match="has no host: pigeon:// locations are not host:port"):
        get_address_host("pigeon://loft")
    with pytest.raises(AddressError, match="has no host and port"):
        get_address_host_port("pigeon://loft")
    with pytest.raises(AddressError, match="can't be told"):
        await get_local_address_for("pigeon://loft")


async def test_addresses_with_a_host_are_checked_and_spelled_in_one_way(over_stream: Any) -> None:
    register_transport(Telegraph(over_stream))
    assert coerce_to_address("telegraph://[0:0::1]:05") == "telegraph://[::1]:5"
    assert listen_address("telegraph://loft") == "telegraph://loft:0"
    assert await resolve_address("telegraph://[0::1]:5") == "telegraph://[::1]:5"
    assert get_address_host("telegraph://loft:5") == "loft"
    assert get_address_host_port("telegraph://loft:5") == ("loft", 5)
    assert await get_local_address_for("telegraph://127.0.0.1:5") == "telegraph://127.0.0.1"
    with pytest.raises(AddressError, match="missing port"):
        coerce_to_address("telegraph://loft")


def test_an_unknown_scheme_names_those_that_are_known(over_stream: Any) -> None:
    for ask in (coerce_to_address, listen_address):
        with pytest.raises(AddressError, match=r"unknown scheme 'pigeon'; known are tcp://, tls://, unix://, inproc://"):
            ask("pigeon://loft")
    with pytest.raises(AddressError, match=r"unknown scheme 'pigeon'; known are .*inproc://.*tcp://"):
        get_transport("pigeon")
    register_transport(Telegraph(over_stream))
    with pytest.raises(AddressError, match="telegraph://"):
        coerce_to_address("pigeon://loft")
    with pytest.raises(AddressError, match="telegraph://"):
        get_transport("pigeon")


def test_a_scheme_has_one_transport(over_stream: Any) -> None:
    first, second = Pigeon(over_stream), Pigeon(over_stream)
    register_transport(first)
    with pytest.raises(LocalProtocolError, match="the scheme 'pigeon' is taken; pass replace=True to replace it"):
        register_transport(second)
    assert get_transport("pigeon") is first
    register_transport(second, replace=True)
    assert get_transport("pigeon") is second
    second.scheme = "tcp"
    with pytest.raises(LocalProtocolError, match="'tcp' is taken"):
        register_transport(second)


@pytest.mark.parametrize("scheme", ["", "a://b", "a b", "\n", None, 5])
def test_what_can_be_no_scheme(over_stream: Any, scheme: Any) -> None:
    transport = Pigeon(over_stream)
    transport.scheme = scheme
    with pytest.raises(LocalProtocolError, match="can't be the scheme of an address"):
        register_transport(transport)


@pytest.mark.parametrize("transport", [Pigeon, None, object()])
def test_what_is_no_transport(transport: Any) -> None:
    with pytest.raises(TypeError, match=r"register_transport\(\) takes an instance of trio_dcore\.abc\.Transport"):
        register_transport(transport)


class Installed(Pigeon):
    """What an entry point leads to: made without arguments, when its scheme is asked for."""

    scheme = "installed"
    made = 0

    def __init__(self) -> None:
        super().__init__(None)
        Installed.made += 1


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a package with an entry point for a transport: ``install("scheme = module:attribute")``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Installed, "made", 0)

    def write(entry_point: str) -> None:
        folder = tmp_path / "carriers-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: carriers\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[trio_dcore.transports]\n{entry_point}\n")
        importlib.invalidate_caches()

    return write


def test_an_installed_package_brings_a_scheme(install: Callable[[str], None]) -> None:
    install(f"installed = {__name__}:Installed")
    assert coerce_to_address("tcp://127.0.0.1:1") == "tcp://127.0.0.1:1"
    assert Installed.made == 0
    assert coerce_to_address("installed://loft") == "installed://loft"
    assert isinstance(get_transport("installed"), Installed)
    assert Installed.made == 1
    for _ in range(2):
        with pytest.raises(AddressError, match="unknown scheme 'other'"):
            get_transport("other")


def test_a_registered_transport_goes_before_an_installed_one(install: Callable[[str], None]) -> None:
    install(f"installed = {__name__}:Installed")
    mine = Installed()
    register_transport(mine)
    assert get_transport("installed") is mine
    assert Installed.made == 1


def test_an_entry_point_that_gives_something_else(install: Callable[[str], None]) -> None:
    install(f"elsewhere = {__name__}:Installed")
    with pytest.raises(LocalProtocolError, match=r"the entry point '.*:Installed' is for elsewhere://, and gave"):
        get_transport("elsewhere")


def test_unknown_schemes_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(*, group: str, name: str) -> list[Any]:
        asked.append(name)
        return []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(_registry, "_MOST_UNKNOWN", 2)
    for scheme in ("a", "b", "a", "b", "c", "c"):
        with pytest.raises(AddressError):
            get_transport(scheme)
    assert asked == ["a", "b", "c", "c"]  # no more than so many are remembered


def test_the_schemes_of_the_package() -> None:
    for scheme in ("tcp", "inproc"):
        assert get_transport(scheme).scheme == scheme
    assert (get_transport("tcp").encrypted, get_transport("tcp").host_port) == (False, True)
    assert (get_transport("inproc").encrypted, get_transport("inproc").host_port) == (True, False)
