"""Which handler answers, and whether it may be asked; see test_connection.py for the same over connections."""

from __future__ import annotations

from typing import Any

import pytest

from trio_dcore import NotAllowed, Server, ServerClosing, UnknownOp
from trio_dcore.abc import Peer
from trio_dcore.server._admission import find_handler


def add(x: int) -> int:
    return x


def peer(trusted: bool = True) -> Peer:
    return Peer("memory://somebody", "memory", verify=lambda: (trusted, "because"))


def test_an_entry_is_made_once_and_again_when_the_handler_changes() -> None:
    server = Server({"add": add})
    entry = find_handler(server, peer(), "add")
    assert entry is not None
    assert entry.function is add
    assert find_handler(server, peer(), "add") is entry
    server.handlers["add"] = other = lambda x: x
    assert find_handler(server, peer(), "add").function is other  # type: ignore[union-attr]


@pytest.mark.parametrize("op", [None, 1, b"add", (), ["add"], {"add": 1}, type("Text", (str,), {})("add")])
def test_what_is_no_op(op: Any) -> None:
    with pytest.raises(ValueError, match="the request has"):
        find_handler(Server({"add": add}), peer(), op)


def test_refusals_in_order() -> None:
    server = Server({"add": add, "no": add}, blocked_handlers=["no"], authorize=lambda peer, op: False)
    with pytest.raises(UnknownOp):
        find_handler(server, peer(), "xyzzy")
    with pytest.raises(NotAllowed, match="blocked"):
        find_handler(server, peer(), "no")
    with pytest.raises(NotAllowed, match="memory://somebody may not call 'add'"):
        find_handler(server, peer(), "add")
    assert find_handler(server, peer(), "close") is None
    server.draining = True
    for op in ("add", "no", "xyzzy", "close"):
        with pytest.raises(ServerClosing):
            find_handler(server, peer(), op)
    assert server.statistics().refused == 6


def test_authorize_finds_the_verdict_about_trust_reached() -> None:
    verdicts = 0

    def verify() -> tuple[bool, str]:
        nonlocal verdicts
        verdicts += 1
        return False, "because"

    def authorize(peer: Peer, op: str) -> bool:
        assert verdicts == 1
        return not peer.trusted and op == "add"

    somebody = Peer("memory://somebody", "memory", verify=verify)
    server = Server({"add": add}, authorize=authorize)
    assert find_handler(server, somebody, "add") is not None
    assert find_handler(server, somebody, "add") is not None
    assert verdicts == 1


def test_authorize_with_any_truth() -> None:
    for verdict, allowed in (("yes", True), (0, False), ([], False), (None, False)):
        server = Server({"add": add}, authorize=lambda peer, op, verdict=verdict: verdict)  # type: ignore[misc]
        if allowed:
            assert find_handler(server, peer(), "add") is not None
        else:
            with pytest.raises(NotAllowed):
                find_handler(server, peer(), "add")
