"""What requests fail with that is not their handler's own."""

from __future__ import annotations

import pytest
import trio

from trio_dcore import CommClosedError, HandlerCancelled, LimitExceeded, RemoteProtocolError
from trio_dcore.server._failures import cancelled_because, it_streams, the_peers_doing

REFUSED = RemoteProtocolError("refused")
LIMIT = LimitExceeded("too much")
GONE = CommClosedError("gone")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (REFUSED, REFUSED),
        (LIMIT, LIMIT),
        (GONE, None),
        (ValueError("its own"), None),
        (ExceptionGroup("", [GONE, REFUSED, LIMIT]), REFUSED),
        (ExceptionGroup("", [trio.EndOfChannel(), ExceptionGroup("", [trio.ClosedResourceError(), LIMIT])]), LIMIT),
        (ExceptionGroup("", [GONE, GONE]), None),
        # What else has failed is not to be lost behind it.
        (ExceptionGroup("", [REFUSED, ValueError("its own")]), None),
    ],
)
def test_the_peers_doing(error: Exception, found: Exception | None) -> None:
    assert the_peers_doing(error) is found


def test_why_a_handler_was_cancelled() -> None:
    error = cancelled_because("deadline")
    assert type(error) is HandlerCancelled
    assert error.reason == "deadline"


def test_what_streams() -> None:
    assert str(it_streams("ticks")) == "'ticks' streams; use .stream()"
