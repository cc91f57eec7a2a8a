"""tls://: connecting and listening, who is there, and what is said where it fails."""

from __future__ import annotations

import dataclasses
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from tests.comm.raw_tls import RawTLS
from tests.reference.identities import ours, theirs
from trio_dcore import (
    CommClosedError,
    ConnectError,
    Limits,
    LocalProtocolError,
    RemoteProtocolError,
    Security,
    Server,
    connect,
    rpc,
)
from trio_dcore.abc import CommSettings
from trio_dcore.comm import BaseComm, get_transport
from trio_dcore.comm._tls import TLSTransport
from trio_dcore.errors import AddressError
from trio_dcore.protocol import dumps
from trio_dcore.protocol._frames import single_frame

PATIENCE = 10.0

# The server's certificate is judged by the client at the end of the handshake of TLS, whatever the version; the client's, with 1.3,
# when the client believes to be done.
versions = pytest.mark.parametrize("version", [1.2, 1.3])


def of_version(security: Security, version: float) -> Security:
    return dataclasses.replace(security, tls_max_version=version)


class Accepting:
    """A listener whose comms shake hands, in a task for each; what comes of it is kept."""

    def __init__(self) -> None:
        self.comms: list[BaseComm] = []
        self.errors: list[BaseException] = []
        self.ended = trio.Event()

    async def run(self, security: Security, task_status: trio.TaskStatus[str]) -> None:
        (listener,) = await TLSTransport().listen("127.0.0.1:0", CommSettings(security=security))
        try:
            async with trio.open_nursery() as nursery:
                task_status.started(listener.contact_address)
                while True:
                    comm = await listener.accept()
                    assert isinstance(comm, BaseComm)
                    self.comms.append(comm)
                    nursery.start_soon(self._shake, comm)
        finally:
            listener.close()
            for comm in self.comms:
                comm.abort()

    async def _shake(self, comm: BaseComm) -> None:
        try:
            await comm.handshake()
        except Exception as error:
            self.errors.append(error)
            await comm.aclose()
        self.ended.set()


async def attempt(server: Security, client: Security, **options: Any) -> tuple[Any, Accepting]:
    """One connect(): what it returned or raised, and the server's side of it."""
    accepting = Accepting()
    found: Any
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(accepting.run, server)
            began = trio.current_time()
            try:
                found = await connect(address, security=client, **options)
            except ConnectError as error:
                found = error
                assert trio.current_time() - began < 1
            await accepting.ended.wait()
            if isinstance(found, BaseComm):
                found.abort()
            nursery.cancel_scope.cancel()
    return found, accepting


def check_failure(found: Any, accepting: Accepting, client: str, server: str) -> None:
    """That both sides said what they should, in errors of ours, and that there was one attempt."""
    assert type(found) is ConnectError
    assert type(found.__cause__) is RemoteProtocolError
    assert client in str(found.__cause__)
    assert client in str(found)
    (error,) = accepting.errors
    assert type(error) is RemoteProtocolError
    assert server in str(error)
    assert len(accepting.comms) == 1


# -- what works ------------------------------------------------------------------------------------------------------------------


@versions
async def test_who_is_there(version: float) -> None:
    found, accepting = await attempt(of_version(ours().security(), version), ours().security())
    (server,) = accepting.comms
    for comm in (found, server):
        peer = comm.peer
        assert (peer.kind, peer.uid, peer.pid) == ("tls", None, None)
        assert peer.address.startswith("tls://127.0.0.1:")
        assert ("DNS", "localhost") in peer.certificate["subjectAltName"]
        assert peer.trusted
        assert peer.reason == "its certificate was signed by the CA in tls_ca_file"
    assert found.local_address == server.peer_address
    assert accepting.errors == []


async def test_nobody_is_trusted_before_the_handshake(two_ends: Callable[..., Awaitable[Any]]) -> None:
    settings = CommSettings(security=ours().security())
    client, server = await two_ends("tls://127.0.0.1:0", settings, settings)
    for comm in (client, server):
        assert not comm.peer.trusted
        assert comm.peer.reason == "it has not shown its certificate yet"
        assert comm.peer.certificate is None
        comm.abort()


async def test_only_some_of_those_with_a_certificate_are_trusted() -> None:
    server = ours().security(trusted_subjects=("worker*.example.org",))
    for names, trusted in ((("worker1.example.org", "worker"), True), (("other.example.org",), False)):
        found, accepting = await attempt(server, ours(*names).security())
        assert found.peer.trusted
        assert accepting.comms[0].peer.trusted is trusted
        assert f"DNS:{names[0]}" in accepting.comms[0].peer.reason


async def test_pickle_never_is_never() -> None:
    found, accepting = await attempt(ours().security(pickle="never"), ours().security())
    assert found.allows_pickle()
    assert not accepting.comms[0].allows_pickle()


@pytest.mark.parametrize(
    ("role", "order"),
    [("listen", ("", "scheduler_", "worker_", "client_")), ("connect", ("", "client_", "worker_", "scheduler_"))],
)
async def test_which_of_dasks_certificates_is_shown(role: str, order: tuple[str, ...]) -> None:
    """All roles have one; then the first is taken away, and so on."""
    for i in range(len(order)):
        options = {}
        for name in order[i:]:
            identity = ours(f"{name or 'own'}.example.org".replace("_", ""))
            options |= {f"tls_{name}cert": identity.certificate, f"tls_{name}key": identity.key}
        many = Security(tls_ca_file=ours().authority, **options)
        one = ours().security()
        found, accepting = await attempt(*((many, one) if role == "listen" else (one, many)))
        seen = (found if role == "listen" else accepting.comms[0]).peer.certificate
        assert seen["subjectAltName"] == (("DNS", f"{order[i] or 'own'}.example.org".replace("_", "")),)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_the_name_of_the_host_is_checked_if_asked_for(host: str) -> None:
    async with Server(security=ours().security()) as server:
        address = (await server.listen("tls://127.0.0.1:0")).replace("127.0.0.1", host)
        async with rpc(address, security=ours().security(check_hostname=True)) as remote:
            assert await remote.echo(data=1) == 1


async def test_another_name_to_ask_for() -> None:
    client = ours().security(check_hostname=True, extra_conn_args={"server_hostname": "node1.example.org"})
    found, accepting = await attempt(ours("node1.example.org").security(), client)
    assert found.peer.trusted
    found, accepting = await attempt(ours().security(), client)
    check_failure(
        found, accepting, "it doesn't name the host that was connected to", "is it for the name that the peer connected to?"
    )


async def test_a_temporary_security_is_enough_for_everything() -> None:
    security = Security.temporary(check_hostname=True)
    async with Server(security=security) as server:
        for host in ("127.0.0.1", "localhost"):
            address = await server.listen(f"tls://{host}:0")
            async with rpc(address, security=security) as remote:
                assert await remote.echo(data={"a": [1, 2]}) == {"a": (1, 2)}


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
async def test_ipv6() -> None:
    async with Server(security=Security.temporary()) as server:
        address = await server.listen("tls://[::1]:0")
        assert address.startswith("tls://[::1]:")
        async with rpc(address, security=server.settings.security) as remote:
            assert await remote.echo(data=1) == 1


async def test_what_the_transport_is() -> None:
    transport = get_transport("tls")
    assert isinstance(transport, TLSTransport)
    assert transport.encrypted
    (listener,) = await transport.listen("0.0.0.0:0", CommSettings(security=ours().security()))
    assert listener.listen_address.startswith("tls://0.0.0.0:")
    assert listener.contact_address.startswith("tls://")
    assert "0.0.0.0" not in listener.contact_address
    listener.close()


async def test_encryption_may_be_required() -> None:
    security = ours().security(require_encryption=True)
    async with Server(security=security) as server:
        with pytest.raises(LocalProtocolError, match="require_encryption"):
            await server.listen("tcp://127.0.0.1:0")
        address = await server.listen("tls://127.0.0.1:0")
        with pytest.raises(LocalProtocolError, match="require_encryption"):
            await connect(address.replace("tls://", "tcp://"), security=security)
        async with rpc(address, security=security) as remote:
            assert await remote.echo(data=1) == 1


# -- what can't work --------------------------------------------------------------------------------------------------------------


async def test_without_certificates() -> None:
    with pytest.raises(LocalProtocolError, match=r"Security\(tls_ca_file=...\) is not set"):
        await connect("tls://127.0.0.1:1")
    async with Server() as server:
        with pytest.raises(LocalProtocolError, match=r"Security\(tls_ca_file=...\) is not set"):
            await server.listen("tls://127.0.0.1:0")


@pytest.mark.parametrize("name", [".example.org", "a\0b"])
async def test_names_that_no_server_has(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tls://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AddressError, match="can't be the name of a server"):
            await connect(address, security=ours().security(extra_conn_args={"server_hostname": name}))


@versions
async def test_a_server_of_another_ca(version: float) -> None:
    found, accepting = await attempt(of_version(theirs().security(), version), ours().security())
    check_failure(
        found,
        accepting,
        "the peer's certificate is not accepted: it was not signed by the CA in Security(tls_ca_file=...) of this side",
        "the peer refused our certificate: it was not signed by a CA that the peer knows",
    )


@versions
async def test_a_client_of_another_ca(version: float) -> None:
    client = Security(tls_ca_file=ours().authority, tls_cert=theirs().certificate, tls_key=theirs().key)
    found, accepting = await attempt(of_version(ours().security(), version), client)
    check_failure(
        found,
        accepting,
        "the peer refused our certificate: it was not signed by a CA that the peer knows; compare tls_cert here with tls_ca_file there",
        "the peer's certificate is not accepted: it was not signed by the CA",
    )


@versions
async def test_a_server_whose_certificate_has_expired(version: float) -> None:
    found, accepting = await attempt(of_version(ours(expired=True).security(), version), ours().security())
    check_failure(
        found, accepting, "the peer's certificate is not accepted: it has expired", "it has expired, or the peer's clock"
    )


@versions
async def test_a_client_whose_certificate_has_expired(version: float) -> None:
    found, accepting = await attempt(of_version(ours().security(), version), ours(expired=True).security())
    check_failure(
        found, accepting, "it has expired, or the peer's clock is wrong", "the peer's certificate is not accepted: it has expired"
    )


@versions
async def test_a_server_on_another_host(version: float) -> None:
    found, accepting = await attempt(of_version(ours("example.org").security(), version), ours().security(check_hostname=True))
    check_failure(found, accepting, "it doesn't name the IP address that was connected to", "the peer refused our certificate")


@pytest.mark.parametrize(("server", "client"), [(1.2, 1.3), (1.3, 1.2)])
async def test_no_common_version(server: float, client: float) -> None:
    found, accepting = await attempt(
        ours().security(tls_min_version=server, tls_max_version=server),
        ours().security(tls_min_version=client, tls_max_version=client),
    )
    hint = "there is no version of TLS that both sides accept; see Security(tls_min_version=..., tls_max_version=...)"
    check_failure(found, accepting, hint, hint)


async def test_no_common_cipher() -> None:
    server = ours().security(tls_max_version=1.2, tls_ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")
    client = ours().security(tls_max_version=1.2, tls_ciphers="ECDHE-ECDSA-AES256-GCM-SHA384")
    found, accepting = await attempt(server, client)
    check_failure(found, accepting, "the peer found nothing that both sides accept", "there is no cipher that both sides accept")


@versions
async def test_a_client_without_a_certificate(version: float) -> None:
    accepting = Accepting()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(accepting.run, of_version(ours().security(), version))
            raw = await RawTLS.connect(address, ours().context("client", certificate=False))
            with pytest.raises(ssl.SSLError, match="(?i)alert"):
                await raw.handshake()
                await raw.receive()  # with TLS 1.3 the client is told now
            await accepting.ended.wait()
            raw.close()
            nursery.cancel_scope.cancel()
    (error,) = accepting.errors
    assert type(error) is RemoteProtocolError
    assert "the peer has no certificate, and both sides must show one" in str(error)


async def test_a_session_is_not_resumed() -> None:
    """TLS 1.2: nobody would look at the client's certificate, which may have expired since."""
    context = ours().context("client")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    accepting = Accepting()
    session = None
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(accepting.run, ours().security())
            for count in (1, 2):
                raw = await RawTLS.connect(address, context)
                if session is not None:
                    raw.engine.session = session
                await raw.handshake()
                assert raw.engine.session_reused is (count == 2)
                session = raw.engine.session
                if count == 2:
                    with pytest.raises((EOFError, OSError)):
                        await raw.receive()
                raw.close()
                while len(accepting.errors) < count:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    first, second = accepting.errors
    assert type(first) is CommClosedError  # it left behind the handshake of TLS
    assert type(second) is RemoteProtocolError
    assert "resumes an earlier session" in str(second)
    assert not accepting.comms[1].peer.trusted


@pytest.mark.parametrize("reset", [False, True])
async def test_a_server_that_refuses_us_behind_the_handshake(two_ends: Callable[..., Awaitable[Any]], reset: bool) -> None:
    """TLS 1.3: for the client the handshake is over by then.  The refusal is found also if a write has failed before it was read."""
    server = ours().security()
    client = Security(tls_ca_file=ours().authority, tls_cert=theirs().certificate, tls_key=theirs().key)
    ours_, theirs_ = await two_ends("tls://127.0.0.1:0", CommSettings(security=client), CommSettings(security=server))
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def refuse() -> None:
                with pytest.raises(RemoteProtocolError, match="not accepted"):
                    await theirs_.handshake()
                if reset:
                    linger = b"\1\0\0\0\0\0\0\0"
                    theirs_._pump.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                theirs_.abort()

            nursery.start_soon(refuse)
            await ours_._pump.handshake()
        with pytest.raises(
            RemoteProtocolError, match="the peer refused our certificate: it was not signed by a CA that the peer knows"
        ):
            await ours_.handshake()
    ours_.abort()


# -- what isn't TLS ----------------------------------------------------------------------------------------------------------------


async def play(*answers: bytes, read: int = 1, security: Security | None = None) -> ConnectError:
    """connect() with tls:// to somebody who answers with these bytes and closes."""
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    attempts = 0

    async def answer() -> None:
        nonlocal attempts
        while True:
            sock, _ = await listener.accept()
            attempts += 1
            with sock:
                if read:
                    await sock.recv(2**16)
                for data in answers:
                    await sock.send(data)

    with listener, trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            began = trio.current_time()
            with pytest.raises(ConnectError) as caught:
                await connect(f"tls://127.0.0.1:{listener.getsockname()[1]}", security=security or ours().security())
            assert trio.current_time() - began < 1
            nursery.cancel_scope.cancel()
    assert attempts == 1
    return caught.value


PLAIN_HANDSHAKE = single_frame(dumps({"compression": None, "python": (3, 11, 7), "pickle-protocol": 5})[0])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (PLAIN_HANDSHAKE, "what came is a handshake without TLS: the peer uses tcp://, and this side tls://"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what came is no TLS, and looks like HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what came is no TLS, and looks like SSH"),
        (b"\xff" * 100, "WRONG_VERSION_NUMBER"),
    ],
)
async def test_servers_that_speak_no_tls(answer: bytes, hint: str) -> None:
    error = await play(answer)
    assert hint in str(error)
    assert type(error.__cause__) is RemoteProtocolError


@pytest.mark.parametrize(
    ("answer", "hint"), [(b"", "does it speak TLS?"), (b"\x16\x03\x03", "it may not accept our certificate, or not speak TLS")]
)
async def test_servers_that_close(answer: bytes, hint: str) -> None:
    error = await play(answer)
    assert f"the peer closed the connection during the TLS handshake: {hint}" in str(error)


async def test_a_server_that_resets() -> None:
    error = await play(b"", read=0)
    assert "the peer closed the connection during the TLS handshake" in str(error)


@pytest.mark.parametrize(
    ("first", "hint"),
    [
        (PLAIN_HANDSHAKE, "what came is a handshake without TLS: the peer uses tcp://, and this side tls://"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "what came is no TLS, and looks like HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what came is no TLS, and looks like SSH"),
        (b"\x00" * 64, "TLS failed: what came is no TLS ("),
        (b"\xff" * 64, "TLS failed: what came is no TLS ("),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "TLS failed"),
    ],
)
async def test_clients_that_speak_no_tls(first: bytes, hint: str) -> None:
    accepting = Accepting()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(accepting.run, ours().security())
            stream = await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2]))
            await stream.send_all(first)
            answer = b""
            while data := await stream.receive_some():
                answer += data
            await accepting.ended.wait()
            await stream.aclose()
            nursery.cancel_scope.cancel()
    (error,) = accepting.errors
    assert type(error) is RemoteProtocolError
    assert hint in str(error)
    assert answer[:2] == b"\x15\x03"  # an alert


async def test_plain_to_tls() -> None:
    """The server's alert tells our own clients what they have met."""
    async with Server(security=ours().security()) as server:
        address = await server.listen("tls://127.0.0.1:0")
        began = trio.current_time()
        with pytest.raises(ConnectError, match="what came looks like TLS") as caught:
            await connect(address.replace("tls://", "tcp://"))
        assert type(caught.value.__cause__) is RemoteProtocolError
        assert trio.current_time() - began < 1


async def test_tls_to_plain(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="trio_dcore.server")
    async with Server() as server:
        address = await server.listen("tcp://127.0.0.1:0")
        with pytest.raises(ConnectError, match="does it speak TLS"):
            await connect(address.replace("tcp://", "tls://"), security=ours().security())
    assert "what came looks like TLS" in caplog.text


async def test_a_server_that_closes_behind_the_handshake_of_tls(two_ends: Callable[..., Awaitable[Any]]) -> None:
    settings = CommSettings(security=ours().security())
    client, server = await two_ends("tls://127.0.0.1:0", settings, settings)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def shake() -> None:
                await server._pump.handshake()
                await server._pump.aclose()

            nursery.start_soon(shake)
            with pytest.raises(CommClosedError, match="closed the comm during the handshake|writing to .* failed"):
                await client.handshake()
    client.abort()
    server.abort()


# -- silence -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"])
async def test_a_client_that_never_says_hello_holds_nothing_up(first: bytes) -> None:
    """Shutdown document, F05."""
    async with Server(security=ours().security()) as server:
        address = await server.listen("tls://127.0.0.1:0")
        stream = await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2]))
        if first:
            await stream.send_all(first)
        while server.statistics().handshaking < 1:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.001)
        began = trio.current_time()
        await server.aclose()
        assert trio.current_time() - began < 0.05 * 3
    await stream.aclose()


async def test_the_limit_for_handshakes_is_for_tls_too() -> None:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener:
        with pytest.raises(ConnectError, match="Limits.handshake_timeout.*stayed silent"):
            await connect(
                f"tls://127.0.0.1:{listener.getsockname()[1]}",
                security=ours().security(),
                limits=Limits(handshake_timeout=0.05),
            )


async def test_a_connect_that_is_cancelled_leaves_nothing_behind() -> None:
    """Shutdown document, D01; the fixture sees to the descriptors."""
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener:
        with trio.move_on_after(0.05) as scope:
            await connect(f"tls://127.0.0.1:{listener.getsockname()[1]}", security=ours().security())
        assert scope.cancelled_caught


# -- the life of a comm -----------------------------------------------------------------------------------------------------------


@versions
async def test_calls_errors_and_streams(version: float) -> None:
    async def fail() -> None:
        raise ValueError("nope")

    async def count(n: int) -> Any:
        for i in range(n):
            yield i

    security = of_version(ours().security(), version)
    async with Server({"fail": fail, "count": count, "size": lambda data: len(data)}, security=security) as server:
        address = await server.listen("tls://127.0.0.1:0")
        async with rpc(address, security=ours().security()) as remote:
            assert await remote.echo(data={1, 2}) == {1, 2}
            with pytest.raises(ValueError, match="nope"):
                await remote.fail()
            async with remote.count.stream(n=5) as stream:
                assert [item async for item in stream] == [0, 1, 2, 3, 4]
            assert await remote.size(data=bytes(2**20)) == 2**20
            assert server.statistics().connections == 1  # one comm for all of it: it was never taken for stale


async def test_a_peer_that_goes_stops_the_handler() -> None:
    stopped = trio.Event()

    async def forever() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()

    async with Server({"forever": forever}, security=ours().security()) as server:
        address = await server.listen("tls://127.0.0.1:0")
        async with rpc(address, security=ours().security()) as remote:
            with trio.move_on_after(0.05):
                await remote.forever()
            with trio.fail_after(1):
                await stopped.wait()
