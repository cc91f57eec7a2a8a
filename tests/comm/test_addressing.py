from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.comm import _addressing as addressing
from trio_dcore.comm import _hosts as hosts
from trio_dcore.errors import AddressError


class NoLookups(trio.abc.HostnameResolver):
    """A resolver that knows a few names and fails on everything else, as a name server would."""

    def __init__(self, names: dict[str, list[tuple[int, str]]]) -> None:
        self.names = names
        self.asked: list[str] = []

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        await trio.lowlevel.checkpoint()
        name = host.decode()
        self.asked.append(name)
        if name not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(fam, socket.SOCK_STREAM, 6, "", (ip, 0)) for fam, ip in self.names[name]]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://127.0.0.1:8786", ("tcp", "127.0.0.1:8786")),
        ("127.0.0.1:8786", ("tcp", "127.0.0.1:8786")),
        ("tls://[::1]", ("tls", "[::1]")),
        ("unix:///tmp/x.sock", ("unix", "/tmp/x.sock")),
        ("inproc://10.0.0.5/4711/1", ("inproc", "10.0.0.5/4711/1")),
        ("inproc://", ("inproc", "")),
        ("", ("tcp", "")),
        # the last :// splits, as in Dask
        ("a://b://c:1", ("a://b", "c:1")),
    ],
)
def test_parse_address(address: str, parts: tuple[str, str]) -> None:
    assert addressing.parse_address(address) == parts
    if "://" in address:
        assert addressing.parse_address(address, strict=True) == parts
        assert addressing.unparse_address(*parts) == address


def test_parse_address_strict_wants_a_scheme_and_says_which() -> None:
    with pytest.raises(AddressError, match=r"'1\.2\.3\.4:5' has no scheme.*'tcp://1\.2\.3\.4:5'"):
        addressing.parse_address("1.2.3.4:5", strict=True)
    with pytest.raises(ValueError, match="no scheme"):
        addressing.parse_address("", True)


@pytest.mark.parametrize("wrong", [None, 8786, b"tcp://x:1", ("x", 1)])
def test_parse_address_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="an address is a str"):
        addressing.parse_address(wrong)


def test_normalize_address() -> None:
    assert addressing.normalize_address("[::1]") == "tcp://[::1]"
    assert addressing.normalize_address("tls://[::1]") == "tls://[::1]"
    assert addressing.normalize_address("host:1") == "tcp://host:1"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("localhost:123", ("localhost", 123)),
        ("127.0.0.1:456", ("127.0.0.1", 456)),
        ("tcp://127.0.0.1:456", ("127.0.0.1", 456)),
        ("[::1]:123", ("::1", 123)),
        ("tls://[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
        (":8786", ("", 8786)),
        ("host:00080", ("host", 80)),
        (("127.0.0.1", 456), ("127.0.0.1", 456)),
        (("::1", "456"), ("::1", 456)),
        (("[::1]", 456), ("::1", 456)),
    ],
)
def test_parse_host_port(address: Any, parts: tuple[str, int]) -> None:
    assert addressing.parse_host_port(address) == parts
    assert addressing.parse_host_port(address, 1) == parts


@pytest.mark.parametrize(
    ("address", "host"), [("localhost", "localhost"), ("[::1]", "::1"), ("tcp://10.0.0.5", "10.0.0.5"), ("", "")]
)
def test_parse_host_port_with_the_default_port(address: str, host: str) -> None:
    assert addressing.parse_host_port(address, 80) == (host, 80)
    assert addressing.parse_host_port(address, "80") == (host, 80)
    with pytest.raises(AddressError, match="missing port") as caught:
        addressing.parse_host_port(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "::1",  # bare IPv6
        "::1:123",
        "[::1",
        "[::1]x",
        "[::1]123",
        "[]:1",
        "[localhost]:1",
        "[127.0.0.1]:1",
        "[::zz]:1",
        "host:",
        "host:-1",
        "host:+1",
        "host: 1",
        "host:1_0",
        "host:٣",
        "host:65536",
        "host:99999999999999999999",
        "host:*",
        "ho st:1",
        "host\n:1",
        "host\0:1",
        "user@host:1",
        "host/path:1",
        "host:1/path",
        ("host", 65536),
        ("host", -1),
        ("host", True),
        ("ho st", 1),
        ("a:b", 1),
    ],
)
def test_parse_host_port_of_what_is_none(address: Any) -> None:
    with pytest.raises(AddressError) as caught:
        addressing.parse_host_port(address, 80)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 8786, ("host",), ("host", 1, 2), ("host", 1.0), (1, "host"), [1, 2]])
def test_parse_host_port_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected an address"):
        addressing.parse_host_port(wrong)


@given(st.one_of(st.text(max_size=20), st.text(alphabet="[]:./%@1a ", max_size=20)))
def test_parse_host_port_never_fails_otherwise(text: str) -> None:
    try:
        host, port = addressing.parse_host_port(text, 80)
    except AddressError:
        return
    assert 0 <= port <= 65535
    if host or "://" not in text:
        assert addressing.parse_host_port(addressing.unparse_host_port(host, port)) == (host, port)


def test_unparse_host_port() -> None:
    assert addressing.unparse_host_port("localhost") == "localhost"
    assert addressing.unparse_host_port("localhost", 123) == "localhost:123"
    assert addressing.unparse_host_port("localhost", "*") == "localhost:*"
    assert addressing.unparse_host_port("::1", 123) == "[::1]:123"
    assert addressing.unparse_host_port("[::1]", 0) == "[::1]:0"
    assert addressing.unparse_host_port("::1") == "[::1]"


def test_get_address_host_port() -> None:
    assert addressing.get_address_host_port("tcp://127.0.0.1:456") == ("127.0.0.1", 456)
    assert addressing.get_address_host_port("tls://[::1]:456", strict=True) == ("::1", 456)
    assert addressing.get_address_host_port("localhost:456") == ("localhost", 456)
    with pytest.raises(AddressError, match="no scheme"):
        addressing.get_address_host_port("localhost:456", strict=True)
    with pytest.raises(AddressError, match="'inproc://x' has no host and port"):
        addressing.get_address_host_port("inproc://x")
    with pytest.raises(AddressError, match=r"unknown scheme 'http'; known are tcp://, tls://, unix://, inproc://"):
        addressing.get_address_host_port("http://x:1")


def test_get_address_host() -> None:
    assert addressing.get_address_host("tcp://127.0.0.1:123") == "127.0.0.1"
    assert addressing.get_address_host("[::1]:123") == "::1"
    assert addressing.get_address_host("inproc://10.0.0.5/4711/1") == "10.0.0.5"
    assert addressing.get_address_host("inproc://name") == hosts.get_ip()
    assert addressing.get_address_host("unix:///tmp/x") == hosts.get_ip()
    with pytest.raises(AddressError, match="unknown scheme"):
        addressing.get_address_host("a://b://c:1")


@pytest.mark.parametrize(
    ("address", "resolved"),
    [
        ("tcp://127.0.0.1:123", "tcp://127.0.0.1:123"),
        ("127.0.0.2:789", "tcp://127.0.0.2:789"),
        ("tls://0.0.0.0:456", "tls://0.0.0.0:456"),
        ("tcp://[0:0::1]:456", "tcp://[::1]:456"),
        ("inproc://x", "inproc://x"),
        ("unix:///tmp/x", "unix:///tmp/x"),
        ("tcp://both.example:1", "tcp://10.1.1.1:1"),
        ("tcp://six.example:1", "tcp://[2001:db8::5]:1"),
    ],
)
async def test_resolve_address(address: str, resolved: str) -> None:
    resolver = NoLookups(
        {
            "both.example": [(socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "10.1.1.1")],
            "six.example": [(socket.AF_INET6, "2001:db8::5")],
        }
    )
    trio.socket.set_custom_hostname_resolver(resolver)
    with trio.testing.assert_checkpoints():
        assert await addressing.resolve_address(address) == resolved
    assert resolver.asked == ([addressing.parse_host_port(address)[0]] if "example" in address else [])


async def test_resolve_address_localhost() -> None:
    assert await addressing.resolve_address("localhost:123") in ("tcp://127.0.0.1:123", "tcp://[::1]:123")


@pytest.mark.parametrize("host", ["nobody.example", "x..y", "a" * 70])
async def test_an_unknown_name_is_an_address_error_with_its_cause(host: str) -> None:
    trio.socket.set_custom_hostname_resolver(NoLookups({}))
    with pytest.raises(AddressError, match="can't be resolved") as caught:
        await addressing.resolve_address(f"tcp://{host}:1")
    assert host in str(caught.value)
    assert isinstance(caught.value.__cause__, (OSError, UnicodeError))


async def test_resolve_address_of_an_unknown_scheme() -> None:
    with pytest.raises(AddressError, match="unknown scheme 'http'"):
        await addressing.resolve_address("http://127.0.0.1:1")


async def test_resolve_address_can_be_cancelled() -> None:
    class Silent(NoLookups):
        async def getaddrinfo(self, *args: Any, **kwargs: Any) -> list[Any]:
            await trio.sleep_forever()
            raise AssertionError

    trio.socket.set_custom_hostname_resolver(Silent({}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(addressing.resolve_address, "tcp://slow.example:1")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    trio.socket.set_custom_hostname_resolver(NoLookups({"slow.example": [(socket.AF_INET, "10.0.0.9")]}))
    assert await addressing.resolve_address("tcp://slow.example:1") == "tcp://10.0.0.9:1"


async def test_get_local_address_for() -> None:
    assert await addressing.get_local_address_for("tcp://127.0.0.1:8786") == "tcp://127.0.0.1"
    assert await addressing.get_local_address_for("tls://127.0.0.1:8786") == "tls://127.0.0.1"
    first = await addressing.get_local_address_for("inproc://10.0.0.5/1/1")
    assert first.startswith("inproc://")
    assert await addressing.get_local_address_for("inproc://10.0.0.5/1/1") != first
    with pytest.raises(AddressError, match="local path"):
        await addressing.get_local_address_for("unix:///tmp/x")
    with pytest.raises(AddressError, match="unknown scheme"):
        await addressing.get_local_address_for("http://127.0.0.1:1")


@pytest.mark.skipif(not socket.has_ipv6, reason="built without IPv6")
async def test_get_local_address_for_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    assert await addressing.get_local_address_for("tcp://[::1]:8786") == "tcp://[::1]"


async def test_get_local_address_for_a_place_without_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addressing, "get_local_ip_towards", lambda host: None)
    with pytest.raises(AddressError, match=r"'tcp://10\.9\.9\.9:1': this machine has no route to 10\.9\.9\.9"):
        await addressing.get_local_address_for("tcp://10.9.9.9:1")


def test_new_inproc_addresses_have_dasks_form_and_differ() -> None:
    one, other = addressing.new_inproc_address(), addressing.new_inproc_address()
    assert one != other
    ip, pid, number = addressing.parse_address(one)[1].split("/")
    assert (ip, pid) == (hosts.get_ip(), str(os.getpid()))
    assert number.isdecimal()


@pytest.mark.parametrize(
    ("given_as", "address"),
    [
        (("127.0.0.1", 8786), "tcp://127.0.0.1:8786"),
        (("127.0.0.1", "8786"), "tcp://127.0.0.1:8786"),
        (["127.0.0.1", 8786], "tcp://127.0.0.1:8786"),
        (("::1", 8786), "tcp://[::1]:8786"),
        ("127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("127.0.0.1:08786", "tcp://127.0.0.1:8786"),
        ("tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("tls://[0:0::1]:1", "tls://[::1]:1"),
        ("localhost:1", "tcp://localhost:1"),
        ("inproc://anything at all", "inproc://anything at all"),
        ("unix:///tmp/x.sock", "unix:///tmp/x.sock"),
    ],
)
def test_coerce_to_address(given_as: Any, address: str) -> None:
    assert addressing.coerce_to_address(given_as) == address


@pytest.mark.parametrize("wrong", ["", "host", ":8786", ("", 8786), "tcp://", "http://x:1", "a://b://c:1", "::1:80", "127.0.0.1"])
def test_coerce_to_address_of_what_can_not_be_called(wrong: Any) -> None:
    with pytest.raises(AddressError) as caught:
        addressing.coerce_to_address(wrong)
    if wrong:
        assert str(wrong if isinstance(wrong, str) else wrong[1]).removeprefix("tcp://") in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 8786, ("host",), {"host": "x"}])
def test_coerce_to_address_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError):
        addressing.coerce_to_address(wrong)


@pytest.mark.parametrize(
    ("given_as", "address"),
    [
        (None, "tcp://:0"),
        (8786, "tcp://:8786"),
        (0, "tcp://:0"),
        (("127.0.0.1", 8786), "tcp://127.0.0.1:8786"),
        (("::", "0"), "tcp://[::]:0"),
        ("127.0.0.1", "tcp://127.0.0.1:0"),
        ("127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        (":8786", "tcp://:8786"),
        ("", "tcp://:0"),
        ("tcp://", "tcp://:0"),
        ("tcp://:8786", "tcp://:8786"),
        ("tcp://0.0.0.0", "tcp://0.0.0.0:0"),
        ("[::1]", "tcp://[::1]:0"),
        ("tls://localhost:1", "tls://localhost:1"),
        ("inproc://", "inproc://"),
        ("inproc://name", "inproc://name"),
        ("unix:///tmp/x.sock", "unix:///tmp/x.sock"),
    ],
)
def test_listen_address(given_as: Any, address: str) -> None:
    assert addressing.listen_address(given_as) == address


def test_listen_address_uses_the_defaults_it_is_given() -> None:
    def listen(where: Any) -> str:
        return addressing.listen_address(where, default_host="127.0.0.1", default_port=8786, default_scheme="tls")

    assert listen(None) == "tls://127.0.0.1:8786"
    assert listen("") == "tls://127.0.0.1:8786"
    assert listen(1) == "tls://127.0.0.1:1"
    assert listen("10.0.0.5") == "tls://10.0.0.5:8786"
    assert listen(("10.0.0.5", 0)) == "tls://10.0.0.5:0"
    assert listen("tcp://10.0.0.5") == "tcp://10.0.0.5:8786"
    assert listen("inproc://") == "inproc://"


@pytest.mark.parametrize("wrong", [-1, 65536, "8786", "tcp://8786", "::1", "http://x", ("host", "x"), "host:x"])
def test_listen_address_of_what_is_none(wrong: Any) -> None:
    with pytest.raises(AddressError, match=r"address|scheme|port"):
        addressing.listen_address(wrong)


@pytest.mark.parametrize("wrong", [True, 1.5, b"x", ("host",), object()])
def test_listen_address_of_another_type(wrong: Any) -> None:
    with pytest.raises(TypeError):
        addressing.listen_address(wrong)


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("", 456, "tcp://:456"),
        (None, None, "tcp://:8786"),
        ("", None, "tcp://:8786"),
        ("localhost", 456, "tcp://localhost:456"),
        ("localhost:456", None, "tcp://localhost:456"),
        ("localhost:456", 456, "tcp://localhost:456"),
        ("localhost:456", "456", "tcp://localhost:456"),
        ("localhost:456", 0, "tcp://localhost:456"),
        ("localhost:0", 456, "tcp://localhost:0"),
        ("tls://localhost", None, "tls://localhost:8786"),
        ("[::1]", 456, "tcp://[::1]:456"),
        ("192.168.1.2", 0, "tcp://192.168.1.2:0"),
    ],
)
def test_uri_from_host_port(host: str | None, port: Any, address: str) -> None:
    assert addressing.uri_from_host_port(host, port, 8786) == address


def test_uri_from_host_port_contradicting_itself() -> None:
    with pytest.raises(AddressError, match="port number given twice: host 'localhost:456' and port 457"):
        addressing.uri_from_host_port("localhost:456", 457, 8786)


class TlsOnly:
    require_encryption = True


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({}, ""),
        ({"port": 8786}, "tcp://:8786"),
        ({"host": "10.0.0.5"}, "tcp://10.0.0.5:0"),
        ({"host": "10.0.0.5", "default_port": 8786}, "tcp://10.0.0.5:8786"),
        ({"host": "10.0.0.5", "protocol": "tls"}, "tls://10.0.0.5:0"),
        ({"host": "10.0.0.5", "protocol": "tls://", "port": "8786"}, "tls://10.0.0.5:8786"),
        ({"host": "tcp://10.0.0.5", "protocol": "tls"}, "tls://10.0.0.5:0"),
        ({"protocol": "tls"}, "tls://"),
        ({"host": "10.0.0.5", "security": TlsOnly()}, "tls://10.0.0.5:0"),
        ({"host": "10.0.0.5", "security": TlsOnly(), "protocol": "tcp"}, "tcp://10.0.0.5:0"),
        ({"host": "unix:///run/a:b.sock"}, "unix:///run/a:b.sock"),
        ({"host": "unix://@name", "protocol": "unix", "default_port": 8786}, "unix://@name"),
        ({"host": "unix:///run/a.sock", "security": TlsOnly()}, "unix:///run/a.sock"),
        ({"protocol": "inproc"}, "inproc://"),
        ({"protocol": "inproc://"}, "inproc://"),
    ],
)
def test_address_from_user_args(options: dict[str, Any], address: str) -> None:
    assert addressing.address_from_user_args(**options) == address


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "inproc", "host": "10.0.0.5"},
        {"protocol": "inproc", "port": 1},
        {"host": "unix:///run/a.sock", "port": 1},
        {"host": "unix:///run/a.sock", "protocol": "tls"},
        {"host": "unix:///run/a.sock", "interface": "lo"},
        {"interface": "lo", "host": "10.0.0.5"},
        {"host": "10.0.0.5:1", "port": 2},
    ],
)
def test_address_from_user_args_contradicting_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(AddressError):
        addressing.address_from_user_args(**options)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's ioctl")
def test_address_from_an_interface() -> None:
    assert addressing.address_from_user_args(interface="lo", port=8786) == "tcp://127.0.0.1:8786"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's ioctl")
@pytest.mark.parametrize("name", ["", "no-such-one", "x" * 100, "lo\0"])
def test_an_unknown_interface_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(AddressError, match=r"this machine has: .*\blo\b") as caught:
        hosts.interface_ip(name)
    assert repr(name) in str(caught.value)


def test_wildcards_become_addresses_that_others_can_use() -> None:
    for wildcard in ("", "0.0.0.0"):
        assert hosts.concrete_host(wildcard) == hosts.get_ip()
    for wildcard in ("::", "0::0"):
        assert hosts.concrete_host(wildcard) == hosts.get_ipv6()
    for concrete in ("127.0.0.1", "::1", "localhost", "0.0.0.1"):
        assert hosts.concrete_host(concrete) == concrete
    # what get_ip() says must be an address of this very machine: one that can be bound
    with socket.socket() as sock:
        sock.bind((hosts.get_ip(), 0))


def test_without_a_network_it_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    assert hosts.get_ip() == "127.0.0.1"
    assert hosts.get_ipv6() == "::1"
    assert hosts.get_local_ip_towards("192.0.2.1") is None
