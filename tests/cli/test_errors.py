from __future__ import annotations

import pytest
import trio

from trio_dcore.cli._errors import FAILED, TIMED_OUT, USAGE, CliError, explained, one_line
from trio_dcore.errors import (
    AddressError,
    CommClosedError,
    ConnectError,
    LimitExceeded,
    NotAllowed,
    RemoteError,
    ServerClosing,
    UnknownOp,
)


def remote_error() -> RemoteError:
    error = RemoteError("no such colour")
    error.type_name = "my_module.ColourError"
    error.message = "no such colour"
    error.remote_traceback = "Traceback (most recent call last):\n  over there\n"
    return error


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (trio.TooSlowError(), "timed out; give more time with --timeout", TIMED_OUT),
        (AddressError("address 'x' is bad"), "address 'x' is bad", USAGE),
        (ConnectError("can't connect to tcp://x:1"), "can't connect to tcp://x:1; is a server listening there?", FAILED),
        (CommClosedError("the peer has gone"), "the peer has gone; whether the call took effect is unknown", FAILED),
        (UnknownOp("no handler 'ad'; did you mean 'add'?"), "no handler 'ad'; did you mean 'add'?", FAILED),
        (remote_error(), "the handler raised my_module.ColourError: no such colour", FAILED),
        (ServerClosing(), "ServerClosing; the handler was not started, try again later", FAILED),
        (NotAllowed("not for you"), "NotAllowed: not for you", FAILED),
        (LimitExceeded("too\nlarge"), "LimitExceeded: too large", FAILED),
        (OSError(98, "Address already in use"), "OSError: [Errno 98] Address already in use", FAILED),
    ],
)
def test_errors_become_one_line_and_a_code(error: Exception, line: str, code: int) -> None:
    with pytest.raises(CliError) as caught, explained():
        raise error
    assert (str(caught.value), caught.value.code) == (line, code)
    assert caught.value.__cause__ is error


def test_a_lone_error_from_a_nursery_is_explained() -> None:
    with pytest.raises(CliError, match="not for you"), explained():
        raise ExceptionGroup("nursery", [ExceptionGroup("inner", [NotAllowed("not for you")])])


def test_several_errors_and_bugs_are_not_touched() -> None:
    with pytest.raises(ExceptionGroup), explained():
        raise ExceptionGroup("nursery", [NotAllowed("one"), NotAllowed("two")])
    with pytest.raises(ZeroDivisionError), explained():
        raise ZeroDivisionError


def test_the_remote_traceback_comes_only_if_asked_for() -> None:
    with pytest.raises(CliError) as caught, explained(show_traceback=True):
        raise remote_error()
    assert str(caught.value).splitlines() == [
        "the handler raised my_module.ColourError: no such colour",
        "Traceback (most recent call last):",
        "  over there",
    ]


def test_one_line_is_safe_to_show() -> None:
    assert one_line(" a\n b\t\x1b[31mred\x07 ") == "a b ?[31mred?"
