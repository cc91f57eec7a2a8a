"""The tree of errors: what is caught by what, and what survives a pickle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import trio

import trio_dcore
from trio_dcore import errors
from trio_dcore.errors import (
    AddressError,
    CommClosedError,
    ConnectError,
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    LocalProtocolError,
    NotAllowed,
    Overloaded,
    ProtocolError,
    RemoteError,
    RemoteProtocolError,
    RPCClosed,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)

# The architecture document, section 3.4.
BASES: dict[type[Exception], set[type[BaseException]]] = {
    ProtocolError: {DcoreError},
    LocalProtocolError: {ProtocolError},
    RemoteProtocolError: {ProtocolError},
    LimitExceeded: {DcoreError},
    UnsafePayload: {DcoreError},
    SerializationError: {DcoreError},
    AddressError: {DcoreError, ValueError},
    ConnectError: {DcoreError, OSError},
    CommClosedError: {DcoreError, OSError, trio.BrokenResourceError},
    RPCClosed: {DcoreError, OSError},
    ServerClosing: {DcoreError},
    Overloaded: {DcoreError},
    NotAllowed: {DcoreError},
    RemoteError: {DcoreError},
    UnknownOp: {RemoteError},
    HandlerCancelled: {RemoteError},
}

MADE: list[Exception] = [
    ProtocolError("text"),
    LocalProtocolError("text"),
    RemoteProtocolError("text"),
    LimitExceeded("text", limit="head", value=5, seen=7),
    LimitExceeded("text"),
    UnsafePayload("text", field="data['x']"),
    SerializationError("text", path="kwargs['when'][3]"),
    AddressError("text"),
    ConnectError("text"),
    CommClosedError("text"),
    RPCClosed("text"),
    ServerClosing("text"),
    Overloaded("text"),
    NotAllowed("text"),
    RemoteError("text"),
    UnknownOp("text"),
    HandlerCancelled("text"),
]


def test_the_tree() -> None:
    everything = {getattr(errors, name) for name in errors.__all__}
    assert everything == {*BASES, DcoreError}
    for cls, bases in BASES.items():
        assert set(cls.__bases__) == bases
    assert DcoreError.__bases__ == (Exception,)


@pytest.mark.parametrize("name", errors.__all__)
def test_all_are_at_the_root_and_explained(name: str) -> None:
    cls = getattr(errors, name)
    assert getattr(trio_dcore, name) is cls
    assert cls.__doc__


def test_what_it_means_for_others() -> None:
    """Nothing of trio's meanings is lost or taken over by accident."""
    assert not issubclass(CommClosedError, (trio.ClosedResourceError, trio.EndOfChannel))
    for cls in (ConnectError, RPCClosed, ServerClosing):
        assert not issubclass(cls, (CommClosedError, trio.BrokenResourceError))
    assert not issubclass(RemoteError, OSError)


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_the_text_is_the_text(error: Exception) -> None:
    assert str(error) == "text"


@pytest.mark.parametrize("cls", [ConnectError, CommClosedError, RPCClosed])
def test_an_oserror_without_arguments_has_no_text(cls: type[Exception]) -> None:
    assert str(cls()) == ""


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_pickles_and_copies_keep_everything(error: Exception, again: Any) -> None:
    other = again(error)
    assert type(other) is type(error)
    assert (str(other), other.args, vars(other)) == ("text", error.args, vars(error))


def test_a_limit_says_what_to_change() -> None:
    error = LimitExceeded.of("head", 100, 200, "frame 0 of a message, in bytes,")
    assert str(error) == "frame 0 of a message, in bytes, is 200, over the limit of 100; change it with Limits(head=...)"
    assert (error.limit, error.value, error.seen) == ("head", 100, 200)


def test_where_it_stood() -> None:
    assert UnsafePayload("text").field == ""
    assert SerializationError("text").path == ""


def test_whether_anything_was_sent() -> None:
    assert CommClosedError("text").nothing_sent is False


def test_what_a_remote_error_is_printed_with() -> None:
    error = RemoteError("args")
    error.message = "over there"
    error.remote_traceback = "Traceback: there\n"
    error.original = ValueError("it")
    assert str(error) == "over there"
    other = pickle.loads(pickle.dumps(error))
    assert (other.message, other.remote_traceback, other.original) == ("over there", "Traceback: there\n", None)
    assert "Traceback: there" in str(other.__cause__)
    assert pickle.loads(pickle.dumps(RemoteError("plain"))).__cause__ is None
    assert HandlerCancelled("text").reason == ""
