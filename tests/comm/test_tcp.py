"""tcp://: sockets that are made, and closed whatever goes wrong."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import Security
from trio_dcore.abc import CommSettings
from trio_dcore.comm import FramedComm, _tcp
from trio_dcore.comm._tcp import TCPListener, TCPTransport
from trio_dcore.errors import AddressError
from trio_dcore.protocol._limits import Limits

PATIENCE = 10.0
SETTINGS = CommSettings()
HAS_V6 = socket.has_ipv6


def _v6_works() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_v6 = pytest.mark.skipif(not _v6_works(), reason="this machine has no IPv6")


class Names(trio.abc.HostnameResolver):
    """A resolver that knows what a test tells it."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        await trio.lowlevel.checkpoint()
        found = []
        for ip in self.names.get(host.decode(), []):
            if ":" in ip:
                found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0)))
            else:
                found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)))
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
def transport() -> TCPTransport:
    return TCPTransport()


async def listen(location: str) -> list[TCPListener]:
    found = await TCPTransport().listen(location, SETTINGS)
    assert all(isinstance(listener, TCPListener) for listener in found)
    return list(found)  # type: ignore[arg-type]


def close_all(*things: Any) -> None:
    for thing in things:
        getattr(thing, "abort", thing.close)()


def port_of(listener: TCPListener) -> int:
    return int(listener.listen_address.rpartition(":")[2])


class TestConnecting:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "localhost", pytest.param("[::1]", marks=needs_v6), pytest.param("[::1%lo]", marks=needs_v6)]
    )
    async def test_a_connection(self, transport: TCPTransport, host: str) -> None:
        (listener, *others) = await listen(f"{host.replace('%lo', '')}:0")
        client = await transport.connect(f"{host}:{port_of(listener)}", SETTINGS)
        with trio.move_on_after(PATIENCE):
            server = await listener.accept()
        assert client.peer_address in [each.contact_address for each in (listener, *others)]
        assert server.peer_address == client.local_address
        assert (client.peer.kind, server.peer.kind) == ("loopback", "loopback")
        for comm in (client, server):
            assert isinstance(comm, FramedComm)
            # Only Linux tells whose it is (test_credentials has the details).
            assert comm.peer.trusted == (sys.platform == "linux"), comm.peer.reason
        close_all(client, server, listener, *others)

    async def test_the_options_of_dasks_comms(self, transport: TCPTransport) -> None:
        for host in ("127.0.0.1", "localhost"):
            (listener, *others) = await listen(f"{host}:0")
            client = await transport.connect(f"{host}:{port_of(listener)}", SETTINGS)
            server = await listener.accept()
            for comm in (client, server):
                sock = comm._pump.socket  # type: ignore[attr-defined]

                def option(name: str, sock: socket.socket = sock) -> int:
                    return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))

                assert not sock.getblocking()
                assert option("TCP_NODELAY")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if sys.platform == "linux":
                    assert (option("TCP_KEEPIDLE"), option("TCP_KEEPINTVL"), option("TCP_KEEPCNT")) == (10, 2, 10)
                    # Only for stock peers: it kills one that lives and isn't reading.
                    assert option("TCP_USER_TIMEOUT") == 0
                    # What trio's own streams set costs a quarter of the rate.
                    assert option("TCP_NOTSENT_LOWAT") == 0
            close_all(client, server, listener, *others)

    async def test_systems_that_have_fewer_options(self, transport: TCPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_NOTSENT_LOWAT"):
            monkeypatch.delattr(socket, name, raising=False)
        (listener, *others) = await listen("localhost:0")
        client = await transport.connect(f"localhost:{port_of(listener)}", SETTINGS)
        close_all(client, listener, *others)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("[::1]", marks=needs_v6)])
    async def test_nobody_there(self, transport: TCPTransport, host: str) -> None:
        (listener, *others) = await listen(f"{host}:0")
        port = port_of(listener)
        close_all(listener, *others)
        with pytest.raises(OSError, match=f"connecting to .*{port}|all attempts to connect to"):
            await transport.connect(f"{host}:{port}", SETTINGS)

    async def test_a_port_that_connects_to_itself(self, transport: TCPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        """TCP's simultaneous open: a client may be given the port that it tries to connect to."""
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert sock.getsockname() == sock.getpeername()

        async def itself(host: str, port: int) -> socket.socket:
            await trio.lowlevel.checkpoint()
            return sock

        monkeypatch.setattr(_tcp, "open_socket", itself)
        with pytest.raises(ConnectionRefusedError, match=r"nobody listens on tcp://127\.0\.0\.1:"):
            await transport.connect("127.0.0.1:1", SETTINGS)
        assert sock.fileno() == -1

    async def test_cancelled(self, transport: TCPTransport) -> None:
        # Behind a full backlog a connection waits.
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            location = "{}:{}".format(*full.getsockname())
            waiting = [await transport.connect(location, SETTINGS)]
            with trio.move_on_after(0.1) as scope:
                for _ in range(4):
                    waiting.append(await transport.connect(location, SETTINGS))
            assert scope.cancelled_caught
            close_all(*waiting)

    async def test_a_name_with_several_addresses(self, transport: TCPTransport) -> None:
        """The first that answers is taken."""
        (listener,) = await listen("127.0.0.1:0")
        trio.socket.set_custom_hostname_resolver(Names(several=["127.0.0.77", "127.0.0.1"]))
        client = await transport.connect(f"several:{port_of(listener)}", SETTINGS)
        assert client.peer_address == f"tcp://127.0.0.1:{port_of(listener)}"
        close_all(client, listener)
        with pytest.raises(OSError, match="all attempts"):
            await transport.connect(f"several:{port_of(listener)}", SETTINGS)

    @pytest.mark.parametrize("name", ["x" * 64 + ".example", "a..b"])
    async def test_what_can_be_no_name(self, transport: TCPTransport, name: str) -> None:
        with pytest.raises(AddressError, match="can't be the name of a host"):
            await transport.connect(f"{name}:1", SETTINGS)

    async def test_an_unknown_name_may_be_known_later(self, transport: TCPTransport) -> None:
        trio.socket.set_custom_hostname_resolver(Names())
        with pytest.raises(OSError, match="not known"):
            await transport.connect("nowhere:1", SETTINGS)

    @needs_v6
    async def test_zones(self, transport: TCPTransport) -> None:
        with pytest.raises(OSError, match="no interface"):
            await transport.connect("[fe80::1%nosuchzone]:1", SETTINGS)
        with pytest.raises(AddressError, match="there is no interface 99999999999"):
            await transport.connect("[fe80::1%99999999999]:1", SETTINGS)
        (listener,) = await listen("[::1]:0")
        client = await transport.connect(f"[::1%{socket.if_nametoindex('lo')}]:{port_of(listener)}", SETTINGS)
        close_all(client, listener)

    async def test_a_zone_is_no_part_of_ipv4(self, transport: TCPTransport) -> None:
        """Given to the socket as it is, such a text would be looked up, and everything would wait for that."""
        trio.socket.set_custom_hostname_resolver(Names())
        with pytest.raises(OSError, match="not known"):
            await transport.connect("127.0.0.1%lo:1", SETTINGS)

    @pytest.mark.parametrize("location", ["", "127.0.0.1", ":x", "127.0.0.1:99999", "::1:5"])
    async def test_no_location(self, transport: TCPTransport, location: str) -> None:
        with pytest.raises(AddressError):
            await transport.connect(location, SETTINGS)


class TestComms:
    """make_comm owns the socket from the start."""

    @pytest.mark.parametrize("step", ["getsockname", "getpeername", "set_options", "socket_address", "SocketPump", "FramedComm"])
    def test_a_failure_closes_the_socket(self, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())

        class Failing:
            def __getattr__(self, name: str) -> Any:
                if name == step:
                    raise OSError(errno.ENOTCONN, "not connected")
                return getattr(sock, name)

        def fail(*args: object, **kwargs: object) -> None:
            raise MemoryError

        if not step.startswith("get"):
            monkeypatch.setattr(_tcp, step, fail)
        with pytest.raises((OSError, MemoryError)):
            _tcp.make_comm(Failing(), SETTINGS)  # type: ignore[arg-type]
        assert sock.fileno() == -1

    def test_a_socket_that_is_not_connected(self) -> None:
        sock = socket.socket()
        with pytest.raises(OSError, match="not connected") as caught:
            _tcp.make_comm(sock, SETTINGS)
        assert caught.value.errno == errno.ENOTCONN
        assert sock.fileno() == -1

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [
            ("127.0.0.1", True),
            ("127.5.6.7", True),
            ("::1", True),
            ("::1%lo", True),
            ("::ffff:127.0.0.1", True),
            ("::ffff:10.0.0.1", False),
            ("10.0.0.1", False),
            ("0.0.0.0", False),
            ("fe80::1%eth0", False),
            ("::", False),
        ],
    )
    def test_what_is_loopback(self, host: str, loopback: bool) -> None:
        assert _tcp.is_loopback(host) is loopback

    def test_who_is_trusted(self) -> None:
        with socket.socket() as sock:
            trusted, reason = _tcp._verdict(sock, False, True)
            assert not trusted
            assert "not on this machine's loopback interface" in reason
            assert _tcp._verdict(sock, True, False) == (False, "Security(trust_loopback=False) is set")
            assert not _tcp._verdict(sock, True, True)[0]  # it isn't connected

    async def test_loopback_may_be_distrusted(self, transport: TCPTransport) -> None:
        (listener,) = await listen("127.0.0.1:0")
        client = await transport.connect(
            listener.contact_address.removeprefix("tcp://"), CommSettings(security=Security(trust_loopback=False))
        )
        assert not client.peer.trusted
        assert not client.allows_pickle()
        close_all(client, listener)

    @pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
    @pytest.mark.parametrize("extension", [True, False])
    async def test_the_user_timeout_is_for_stock_peers(self, extension: bool, two_ends: Any, handshakes: Any) -> None:
        from trio_dcore.testing import ManualPeer

        (listener,) = await listen("127.0.0.1:0")
        peer = await ManualPeer.connect(listener.contact_address)
        comm = await listener.accept()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.handshake)
            await peer.handshake(extension=extension)
        found = comm._pump.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)  # type: ignore[attr-defined]
        assert found == (0 if extension else 30_000)
        await peer.aclose()
        close_all(comm, listener)

    async def test_it_may_be_off(self, two_ends: Any) -> None:
        from trio_dcore.testing import ManualPeer

        (listener,) = await TCPTransport().listen("127.0.0.1:0", CommSettings(limits=Limits(tcp_user_timeout=None)))
        peer = await ManualPeer.connect(listener.contact_address)
        comm: Any = await listener.accept()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.handshake)
            await peer.handshake()
        assert comm._pump.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        await peer.aclose()
        close_all(comm, listener)


class TestListening:
    async def test_a_free_port(self) -> None:
        (listener,) = await listen("127.0.0.1:0")
        assert listener.listen_address == listener.contact_address
        assert port_of(listener) > 0
        close_all(listener)

    @pytest.mark.parametrize("host", ["", "localhost"])
    async def test_several_addresses_have_one_port(self, host: str) -> None:
        listeners = await listen(f"{host}:0")
        assert len({port_of(listener) for listener in listeners}) == 1
        # IPv4 first: its address is the one to hand out.
        assert listeners[0].listen_address.startswith("tcp://0.0.0.0:" if not host else "tcp://127.0.0.1:")
        if _v6_works() and not host:
            assert len(listeners) == 2
        close_all(*listeners)

    async def test_a_wildcard_has_a_contact_address(self, transport: TCPTransport) -> None:
        for location in ("", "0.0.0.0:0", *(["[::]:0"] if _v6_works() else [])):
            for listener in await listen(location):
                assert listener.listen_address.split(":")[1] in ("//0.0.0.0", "//[")
                host = listener.contact_address.removeprefix("tcp://").rpartition(":")[0]
                assert host not in ("0.0.0.0", "[::]", "")
                client = await transport.connect(listener.contact_address.removeprefix("tcp://"), SETTINGS)
                close_all(client, listener)

    async def test_a_port_that_is_taken(self) -> None:
        (listener,) = await listen("127.0.0.1:0")
        with pytest.raises(OSError, match=rf"listening on 127\.0\.0\.1:{port_of(listener)}: Address already in use") as caught:
            await listen(f"127.0.0.1:{port_of(listener)}")
        assert caught.value.errno == errno.EADDRINUSE
        close_all(listener)

    @needs_v6
    async def test_all_or_none(self) -> None:
        """The port is free on the first address and taken on the second."""
        (listener,) = await listen("[::1]:0")
        port = port_of(listener)
        trio.socket.set_custom_hostname_resolver(Names(both=["127.0.0.1", "::1"]))
        with pytest.raises(OSError, match="Address already in use"):
            await listen(f"both:{port}")
        (first,) = await listen(f"127.0.0.1:{port}")
        close_all(listener, first)

    @needs_v6
    async def test_a_chosen_port_that_is_taken_elsewhere_is_chosen_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = _tcp._bind_all
        tries = 0

        def unlucky(addresses: Any, port: int) -> list[socket.socket]:
            nonlocal tries
            tries += 1
            if tries < 5:
                raise OSError(errno.EADDRINUSE, "Address already in use")
            return real(addresses, port)

        monkeypatch.setattr(_tcp, "_bind_all", unlucky)
        listeners = await listen("localhost:0")
        assert tries == 5
        close_all(*listeners)
        tries = -10
        with pytest.raises(OSError, match="listening on localhost:0: Address already in use"):
            await listen("localhost:0")
        assert tries == -5

    async def test_an_address_of_another_machine(self) -> None:
        with pytest.raises(OSError, match=r"listening on 192\.0\.2\.77:0: ") as caught:
            await listen("192.0.2.77:0")
        assert caught.value.errno == errno.EADDRNOTAVAIL

    async def test_a_name_of_which_some_addresses_are_here(self) -> None:
        trio.socket.set_custom_hostname_resolver(Names(mixed=["192.0.2.77", "127.0.0.1"], away=["192.0.2.77", "192.0.2.78"]))
        (listener,) = await listen("mixed:0")
        assert listener.listen_address.startswith("tcp://127.0.0.1:")
        close_all(listener)
        with pytest.raises(OSError, match="none of the host's addresses is available here"):
            await listen("away:0")

    @needs_v6
    @pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EMFILE])
    async def test_a_family_that_is_not_there(self, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is passed over; what else goes wrong is not."""
        real = socket.socket

        class Sockets:
            def __getattr__(self, name: str) -> Any:
                return getattr(socket, name)

            def socket(self, family: int = socket.AF_INET, *rest: Any) -> socket.socket:
                if family == socket.AF_INET6:
                    raise OSError(code, "no")
                return real(family, *rest)

        monkeypatch.setattr(_tcp, "socket", Sockets())
        if code == errno.EAFNOSUPPORT:
            (listener,) = await listen(":0")
            close_all(listener)
            with pytest.raises(OSError, match="no"):
                await listen("[::1]:0")
        else:
            with pytest.raises(OSError, match="no"):
                await listen(":0")

    @pytest.mark.parametrize("name", ["nowhere", "x" * 64 + ".example", "a..b"])
    async def test_a_name_that_is_none(self, name: str) -> None:
        if name == "nowhere":
            trio.socket.set_custom_hostname_resolver(Names())
        with pytest.raises(AddressError, match=f"the host '{name}' to listen on can't be resolved"):
            await listen(f"{name}:0")

    async def test_a_name_without_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Nothing(Names):
            async def getaddrinfo(self, *args: Any, **kwargs: Any) -> list[Any]:
                await trio.lowlevel.checkpoint()
                return []

        trio.socket.set_custom_hostname_resolver(Nothing())
        with pytest.raises(AddressError, match="the host 'empty' has no address to listen on"):
            await listen("empty:0")

    async def test_addresses_are_not_taken_from_others_where_reuse_means_that(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Windows:
            platform = "win32"

        monkeypatch.setattr(_tcp, "sys", Windows)
        (listener,) = await listen("127.0.0.1:0")
        assert not listener._socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        close_all(listener)


@pytest.fixture
async def listener() -> Any:
    (made,) = await listen("127.0.0.1:0")
    yield made
    made.close()


@pytest.fixture
def clients(listener: TCPListener) -> Iterator[Any]:
    """Make connections that nobody serves."""
    made: list[socket.socket] = []
    name = listener._socket.getsockname()

    def connect() -> socket.socket:
        made.append(socket.create_connection(name))
        return made[-1]

    yield connect
    for sock in made:
        sock.close()


class TestAccepting:
    async def test_it_waits_and_may_be_cancelled(self, listener: TCPListener, clients: Any) -> None:
        for _ in range(3):
            with trio.move_on_after(0.01) as scope:
                await listener.accept()
            assert scope.cancelled_caught
        client = clients()
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
        comm = await listener.accept()
        assert comm.peer_address == "tcp://{}:{}".format(*client.getsockname())
        comm.abort()

    async def test_connections_that_died_in_the_queue(self, listener: TCPListener, clients: Any, monkeypatch: Any) -> None:
        real = _tcp.make_comm
        codes = [errno.ECONNABORTED, errno.ENOTCONN, errno.EPROTO]

        def failing(sock: socket.socket, settings: CommSettings) -> FramedComm:
            if codes:
                sock.close()
                raise OSError(codes.pop(), "it died")
            return real(sock, settings)

        monkeypatch.setattr(_tcp, "make_comm", failing)
        for _ in range(4):
            clients()
        with trio.fail_after(PATIENCE):
            comm = await listener.accept()
        comm.abort()

    async def test_one_that_was_reset_before_it_was_accepted(self, listener: TCPListener, clients: Any) -> None:
        first = clients()
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01" + bytes(7))
        first.close()
        clients()
        with trio.fail_after(PATIENCE):
            comm = await listener.accept()
        comm.abort()

    async def test_errors_of_the_system_are_the_callers(self, listener: TCPListener, clients: Any, monkeypatch: Any) -> None:
        def no_more(sock: socket.socket, settings: CommSettings) -> FramedComm:
            sock.close()
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(_tcp, "make_comm", no_more)
        clients()
        with pytest.raises(OSError, match="Too many open files"):
            await listener.accept()
        monkeypatch.undo()
        clients()
        comm = await listener.accept()
        comm.abort()

    async def test_many_are_accepted_without_starving_others(self, listener: TCPListener, clients: Any) -> None:
        turns = 0

        class Turns(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                nonlocal turns
                turns += task.name == "accepting"

        async def accept() -> None:
            for _ in range(64):
                (await listener.accept()).abort()

        for _ in range(64):
            clients()
        trio.lowlevel.add_instrument(Turns())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, name="accepting")
        assert 4 <= turns <= 6

    async def test_a_dead_queue_does_not_starve_others(self, listener: TCPListener, monkeypatch: Any) -> None:
        """Whatever it is that goes on failing: others have their turn, and a cancellation of theirs can end it."""

        class Dead:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def accept(self) -> None:
                raise OSError(errno.EPROTO, "Protocol error")

        real = listener._socket
        monkeypatch.setattr(listener, "_socket", Dead())
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await listener.accept()

            nursery.start_soon(run)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            listener.close()

    async def test_closing(self, listener: TCPListener, clients: Any) -> None:
        waiting = clients()

        async def accept() -> None:
            (await listener.accept()).abort()
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked(0.01)
            listener.close()
            listener.close()
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()
        assert waiting.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            clients()
        await listener.aclose()

    async def test_aclose_is_a_checkpoint_that_always_closes(self, listener: TCPListener) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.aclose()
        assert scope.cancelled_caught
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()
