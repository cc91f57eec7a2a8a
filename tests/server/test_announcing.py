"""The line that says where a server listens, who is trusted there, and what may be called."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from trio_dcore import LocalProtocolError, Security, Server
from trio_dcore.abc import Listener
from trio_dcore.server._announcing import announce
from trio_dcore.testing import memory_network

OURS = f"local processes of uid {os.geteuid()}" if hasattr(os, "geteuid") else "local processes of this user"
LOOPBACK = OURS if sys.platform == "linux" else "nobody"


class Bound(Listener):
    """A listener that is nowhere."""

    def __init__(self, address: str) -> None:
        self._address = address

    @property
    def listen_address(self) -> str:
        return self._address

    contact_address = listen_address

    async def accept(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def lines(caplog: pytest.LogCaptureFixture, *addresses: str, **options: Any) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO, "trio_dcore.server")
    announce(Server({"add": len}, name="Adder", **options), [Bound(address) for address in addresses])
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def test_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, "tcp://127.0.0.1:8786", blocked_handlers=["echo"]) == [
        f"INFO Adder listens on tcp://127.0.0.1:8786: not encrypted; pickles are accepted from {LOOPBACK}; ops: add, identity"
    ]


def test_authorize_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines(caplog, "tcp://127.0.0.1:8786", authorize=lambda peer, op: True)
    assert line.endswith("; ops, as far as authorize() allows them: add, echo, identity")


def test_streams_are_an_op(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines(caplog, "tcp://127.0.0.1:8786", stream_handlers={"note": len})
    assert line.endswith("; ops: add, connection_stream, echo, identity; ops of streams: note")
    handlers: dict[str, Any] = {"b": len, "c": len, "a": len}
    (line,) = lines(caplog, "tcp://127.0.0.1:8786", stream_handlers=handlers, blocked_handlers=["b", "echo"])
    assert line.endswith("; ops: add, connection_stream, identity; ops of streams: a, c")
    (line,) = lines(caplog, "tcp://127.0.0.1:8786", stream_handlers={"note": len}, blocked_handlers=["note"])
    assert line.endswith("; ops of streams: none")


@pytest.mark.parametrize(
    ("addresses", "options", "who"),
    [
        (["tcp://127.0.0.1:1"], {}, LOOPBACK),
        (["tcp://127.9.9.9:1"], {}, LOOPBACK),
        (["tcp://[::1]:1"], {}, LOOPBACK),
        (["tcp://0.0.0.0:1", "tcp://[::]:1"], {}, LOOPBACK),
        (["tcp://[::ffff:127.0.0.1]:1"], {}, LOOPBACK),
        (["tcp://192.0.2.1:1"], {}, "nobody"),
        (["tcp://[fe80::1%lo]:1"], {}, "nobody"),
        (["tcp://127.0.0.1:1"], {"trust_loopback": False}, "nobody"),
        (["tcp://127.0.0.1:1"], {"pickle": "never"}, "nobody"),
        (["tcp://127.0.0.1:1"], {"pickle": "always"}, "everybody"),
        (["inproc://x"], {}, "this process"),
        (["inproc://x"], {"pickle": "never"}, "nobody"),
        (["memory://x"], {}, "whom memory:// vouches for"),
        (["unix:///run/x"], {}, OURS),
        (["tls://0.0.0.0:1"], {"tls_ca_file": "ca.pem"}, "whoever has a certificate of the CA in ca.pem"),
        (["tls://0.0.0.0:1"], {"tls_ca_file": "-----\nPEM\n"}, "whoever has a certificate of the CA that was given as text"),
        (
            ["tls://0.0.0.0:1"],
            {"tls_ca_file": "ca.pem", "trusted_subjects": ("worker*", "DNS:front")},
            "whoever has a certificate of the CA in ca.pem and a name like worker* or DNS:front",
        ),
        (["tls://0.0.0.0:1"], {"tls_ca_file": "ca.pem", "trusted_subjects": ()}, "nobody"),
    ],
)
def test_who_is_trusted(addresses: list[str], options: dict[str, Any], who: str, caplog: pytest.LogCaptureFixture) -> None:
    first, *_ = lines(caplog, *addresses, security=Security(**options))
    assert f"; pickles are accepted from {who}; ops: " in first


@pytest.mark.parametrize(
    ("address", "how"),
    [
        ("tcp://127.0.0.1:1", "not encrypted"),
        ("tls://127.0.0.1:1", "encrypted"),
        ("inproc://x", "on this machine only"),
        ("unix:///x", "on this machine only"),
    ],
)
def test_encryption(address: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert f" listens on {address}: {how}; " in lines(caplog, address)[0]


@pytest.mark.parametrize(
    ("addresses", "warned"),
    [
        (["tcp://127.0.0.1:1"], False),
        (["tcp://[::1]:1", "tcp://127.0.0.1:1"], False),
        (["inproc://x"], False),
        (["unix:///x"], False),
        (["tcp://0.0.0.0:1", "tcp://[::]:1"], True),
        (["tcp://127.0.0.1:1", "tcp://192.0.2.1:1"], True),
        (["tcp://[2001:db8::1]:1"], True),
        (["tls://192.0.2.1:1"], True),
    ],
)
def test_a_warning_where_everybody_may_run_code(addresses: list[str], warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    _, *more = lines(caplog, *addresses, security=Security(pickle="always"))
    assert len(more) == warned
    if warned:
        assert more[0].startswith("WARNING Adder unpickles what anyone sends to ")
        assert addresses[0] in more[0]
        assert "closed networks only" in more[0]
    for pickle in ("trusted", "never"):
        assert len(lines(caplog, *addresses, security=Security(pickle=pickle))) == 1


async def test_it_is_said_at_each_listen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_dcore.server")
    with memory_network():
        async with Server() as server:
            for where in ("tcp://127.0.0.1:0", "memory://", "inproc://"):
                address = await server.listen(where)
                assert f"Server listens on {address}: " in caplog.records[-1].getMessage()
            assert len(caplog.records) == 3


async def test_the_scheme_where_encryption_is_required() -> None:
    """An address without a scheme is then one of tls://, and one with another scheme is refused."""
    async with Server(security=Security(require_encryption=True)) as server:
        with pytest.raises(LocalProtocolError, match="tls"):
            await server.listen(("127.0.0.1", 0))  # it lacks certificates
        with pytest.raises(LocalProtocolError, match="tcp:// isn't encrypted"):
            await server.listen("tcp://127.0.0.1:0")
        assert server.addresses == ()
