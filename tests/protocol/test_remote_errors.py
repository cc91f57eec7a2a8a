"""Errors through the wire and back: to and from our own peers, and to and from real stock code."""

from __future__ import annotations

import builtins
import copy
import errno
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_dcore.protocol._errors import (
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    LocalProtocolError,
    NotAllowed,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    RemoteTraceback,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from trio_dcore.protocol._remote_errors import error_reply, error_value, exception_from_reply, exception_from_value

# The same examples in every run, and no verdict on how busy the machine is.
SOBER = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def yes() -> bool:
    return True


def no() -> bool:
    return False


def never() -> bool:
    raise AssertionError("asked although there was no pickle")


class Custom(ValueError):
    """The usual exception: takes other arguments than it passes on."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{where} [{code}]")
        self.code = code


class Simple(LookupError):
    pass


class OddFile(OSError):
    def __init__(self, name: str) -> None:
        super().__init__(errno.ENOENT, "no such file", name)
        self.extra = name.upper()


class Reduced(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__("reduced")
        self.both = (left, right)

    def __reduce__(self) -> Any:
        return Reduced, self.both


class MyLimit(LimitExceeded):
    pass


class Opaque:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<opaque>"


def over_the_wire(message: object) -> Any:
    return msgpack.unpackb(msgpack.packb(message, use_bin_type=True), use_list=False, strict_map_key=False)


def by_value(exc: BaseException, *, trusted: bool = False, **kwargs: Any) -> Any:
    """What a peer of ours raises for ``exc``."""
    value = over_the_wire(error_value(exc, trusted=trusted, **kwargs))
    return exception_from_value(value, allow_pickle=yes if trusted else never)


def by_reply(exc: BaseException, *, trusted: bool = False, **kwargs: Any) -> Any:
    """What a peer of ours that made a plain request raises for ``exc``."""
    reply = over_the_wire(error_reply(exc, trusted=trusted, extension=True, **kwargs))
    return exception_from_reply(reply, allow_pickle=yes if trusted else never)


def by_stock_client(exc: BaseException, *, trusted: bool = False, **kwargs: Any) -> BaseException:
    """What a stock client raises for ``exc``, by the function that it calls."""
    from distributed.core import clean_exception

    reply = over_the_wire(error_reply(exc, trusted=trusted, extension=False, **kwargs))
    assert sorted(reply) == ["exception", "exception_text", "status", "traceback", "traceback_text"]
    assert reply["status"] == "uncaught-error"
    _kind, raised, tb = clean_exception(**reply)
    assert tb is None
    assert raised is not None
    return raised


def by_stock_server(exc: BaseException, allow_pickle: Callable[[], bool] = yes) -> Any:
    """What we raise for an error of a stock server, by the functions that it calls."""
    from distributed.core import error_message
    from distributed.protocol import dumps, loads

    try:
        raise exc
    except BaseException:
        message = error_message(exc, "uncaught-error")
    return exception_from_reply(loads(dumps(message)), allow_pickle=allow_pickle)


def raised(exc: BaseException, cause: BaseException | None = None) -> Any:
    if cause is not None:
        exc.__cause__ = cause
    try:
        raise exc
    except BaseException as caught:
        return caught


def printed(exc: BaseException) -> str:
    return "".join(traceback.format_exception(exc))


# -- between our peers -----------------------------------------------------------------------------------------------------------


BUILTIN_EXAMPLES: list[BaseException] = [
    ValueError("nope"),
    ValueError(),
    ValueError("a", 1, None, 2.5, b"x", ("nested", True)),
    KeyError("key"),
    KeyError(("a", 1)),
    ZeroDivisionError("division by zero"),
    MemoryError(),
    RecursionError("deep"),
    TimeoutError("late"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    FileNotFoundError(errno.ENOENT, "no such file", "/tmp/x"),
    OSError(errno.EXDEV, "cross-device", "a", None, "b"),
    OSError("only text"),
    BlockingIOError(errno.EAGAIN, "again", 3),
    UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "invalid start byte"),
    UnicodeEncodeError("ascii", "\xff", 0, 1, "ordinal not in range"),
    UnicodeTranslateError("abc", 1, 2, "because"),
    UnicodeError("general"),
    SyntaxError("invalid syntax", ("<string>", 1, 3, "a b", 1, 4)),
    SyntaxError("just text"),
    ImportError("no module", name="thing", path="/lib/thing.py"),
    ModuleNotFoundError("no module", name="thing"),
    AttributeError("no attribute", name="x", obj=3),
    NameError("no name", name="y"),
    UserWarning("careful"),
    AssertionError(),
    EOFError("end"),
]
# A few keep something in C that is no part of args.
FIELDS = ("errno", "strerror", "filename", "filename2", "encoding", "object", "start", "end", "reason", "msg", "lineno", "text")


@pytest.mark.parametrize("way", [by_value, by_reply], ids=["value", "reply"])
@pytest.mark.parametrize("exc", BUILTIN_EXAMPLES, ids=repr)
def test_a_builtin_exception_needs_no_pickle(exc: BaseException, way: Callable[..., Any]) -> None:
    error = way(exc)
    assert isinstance(error, RemoteError)
    assert isinstance(error, type(exc))
    assert error.args == exc.args
    assert error.message == str(exc)
    assert str(error) == str(exc)
    assert error.type_name == f"builtins.{type(exc).__name__}"
    assert error.original is None
    for name in FIELDS:
        if name != "reason" or isinstance(exc, UnicodeError):
            assert getattr(error, name, None) == getattr(exc, name, None), name


def test_a_builtin_exception_is_caught_as_what_it_is_and_as_remote() -> None:
    with pytest.raises(ValueError, match="nope"):
        raise by_value(ValueError("nope"))
    with pytest.raises(RemoteError, match="nope"):
        raise by_value(ValueError("nope"))
    assert not isinstance(by_value(ValueError("nope")), TypeError)


def test_a_trusted_builtin_needs_no_pickle_either() -> None:
    assert "pickle" not in error_value(FileNotFoundError(2, "no", "x"), trusted=True)


def test_attributes_of_a_builtin_exception_travel() -> None:
    exc = ValueError("nope")
    exc.code = 7  # type: ignore[attr-defined]
    exc.hidden = Opaque()  # type: ignore[attr-defined]
    error = by_value(exc)
    assert error.code == 7
    assert not hasattr(error, "hidden")
    trusted = by_value(exc, trusted=True)
    assert trusted.hidden == Opaque()
    assert trusted.original.hidden == Opaque()


def test_many_attributes_take_a_pickle() -> None:
    exc = ValueError("nope")
    exc.__dict__.update({f"name{n}": n for n in range(40)})
    assert not hasattr(by_value(exc), "name32")
    assert by_value(exc).name31 == 31
    assert by_value(exc, trusted=True).name39 == 39


def test_a_class_of_a_trusted_peer_is_rebuilt() -> None:
    error = by_value(Custom(3, "here"), trusted=True)
    assert isinstance(error, Custom)
    assert isinstance(error, RemoteError)
    assert (error.args, error.code, str(error)) == (("here [3]",), 3, "here [3]")
    assert type(error.original) is Custom
    assert error.original.code == 3
    assert error.type_name == f"{__name__}.Custom"


@pytest.mark.parametrize("exc", [OddFile("name"), Reduced(1, 2), Simple("s"), MyLimit("m", limit="head", value=1)], ids=repr)
def test_more_classes_of_a_trusted_peer(exc: Exception) -> None:
    error = by_value(exc, trusted=True)
    assert isinstance(error, type(exc))
    assert error.args == exc.args
    assert str(error) == str(exc)
    # What went with the error itself is not the exception's own.
    own = {key: value for key, value in vars(error).items() if key not in RemoteError.__annotations__}
    assert own == vars(exc)
    assert getattr(error, "filename", None) == getattr(exc, "filename", None)


def test_a_class_of_an_untrusted_peer_is_its_nearest_builtin() -> None:
    error = by_value(Custom(3, "here"))
    assert isinstance(error, ValueError)
    assert not isinstance(error, Custom)
    assert (error.type_name, str(error), error.code) == (f"{__name__}.Custom", "here [3]", 3)
    assert error.original is None
    assert "pickle" not in error_value(Custom(3, "here"), trusted=False)


def test_a_pickle_is_not_loaded_from_a_peer_that_is_not_trusted() -> None:
    value = over_the_wire(error_value(Custom(3, "here"), trusted=True))
    assert isinstance(value["pickle"], bytes)
    error = exception_from_value(value, allow_pickle=no)
    assert isinstance(error, ValueError)
    assert not isinstance(error, Custom)


def test_a_class_without_builtin_bases_is_a_plain_remote_error() -> None:
    error = by_value(Reduced(1, 2))
    assert type(error) is RemoteError
    assert (error.type_name, error.message, str(error)) == (f"{__name__}.Reduced", "reduced", "reduced")
    assert repr(error) == f"RemoteError('{__name__}.Reduced: reduced')"


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "exc",
    [SystemExit(7), KeyboardInterrupt(), GeneratorExit(), BaseException("b"), StopIteration(4), StopAsyncIteration(5)],
    ids=repr,
)
def test_what_would_end_or_steer_the_caller_is_plain(exc: BaseException, trusted: bool) -> None:
    for error in (by_value(exc, trusted=trusted), by_reply(exc, trusted=trusted)):
        assert type(error) is RemoteError
        assert error.type_name == f"builtins.{type(exc).__name__}"
        assert error.message == str(exc)
        assert type(error.original) is (type(exc) if trusted else type(None))
    # Without a message it still says what it was.
    assert str(by_value(KeyboardInterrupt())) == "builtins.KeyboardInterrupt"


def test_errors_of_trio_and_about_our_own_comms_are_plain() -> None:
    import trio

    from trio_dcore.errors import CommClosedError

    for exc in (trio.EndOfChannel(), trio.ClosedResourceError("c"), trio.TooSlowError(), CommClosedError("gone")):
        for trusted in (False, True):
            error = by_value(exc, trusted=trusted)
            assert isinstance(error, RemoteError)
            assert not isinstance(error, (trio.EndOfChannel, trio.ClosedResourceError, trio.TooSlowError, CommClosedError))
            assert error.type_name.rpartition(".")[2] == type(exc).__name__
    assert by_value(CommClosedError("gone")).type_name == "trio_dcore.CommClosedError"


@pytest.mark.parametrize("exc", [LocalProtocolError("you"), RemoteProtocolError("they"), DcoreError("it")], ids=repr)
def test_a_broken_protocol_over_there_is_none_here(exc: Exception) -> None:
    error = by_value(exc, trusted=True)
    assert type(error) is RemoteError
    assert (error.type_name, error.message) == (f"trio_dcore.{type(exc).__name__}", str(exc))


@pytest.mark.parametrize("way", [by_value, by_reply], ids=["value", "reply"])
@pytest.mark.parametrize("cls", [ServerClosing, Overloaded, NotAllowed])
def test_a_refusal_is_raised_as_itself(cls: type[DcoreError], way: Callable[..., Any]) -> None:
    exc = cls("not now")
    exc.add_note("a note")
    error = way(exc)
    assert type(error) is cls
    assert not isinstance(error, RemoteError)
    assert str(error) == "not now"
    assert error.__notes__ == ["a note"]


def test_an_unknown_op() -> None:
    error = by_value(UnknownOp("no op 'ad'; did you mean 'add'?"))
    assert type(error) is UnknownOp
    assert str(error) == "no op 'ad'; did you mean 'add'?"


def test_a_cancelled_handler_says_why() -> None:
    exc = HandlerCancelled("the handler was cancelled: deadline")
    exc.reason = "deadline"
    for error in (by_value(exc), by_reply(exc), by_value(by_value(exc))):
        assert type(error) is HandlerCancelled
        assert error.reason == "deadline"
        assert str(error) == "the handler was cancelled: deadline"


@pytest.mark.parametrize(
    ("exc", "attributes"),
    [
        (LimitExceeded.of("head", 10, 20.5, "the head"), {"limit": "head", "value": 10, "seen": 20.5}),
        (LimitExceeded("short"), {"limit": "", "value": None, "seen": None}),
        (UnsafePayload("pickle", field="data['x']"), {"field": "data['x']"}),
        (SerializationError("can't", path="kwargs['when'][3]"), {"path": "kwargs['when'][3]"}),
    ],
    ids=repr,
)
def test_our_errors_keep_their_class_and_attributes(exc: DcoreError, attributes: dict[str, object]) -> None:
    for error in (by_value(exc), by_reply(exc), by_value(exc, trusted=True), by_value(by_value(exc))):
        assert isinstance(error, RemoteError)
        assert isinstance(error, type(exc))
        assert str(error) == str(exc)
        assert {name: getattr(error, name) for name in attributes} == attributes
        assert error.type_name == f"trio_dcore.{type(exc).__name__}"


def test_codes() -> None:
    codes = {
        type(exc).__name__: error_value(exc, trusted=False)["code"]
        for exc in (
            ValueError(),
            UnknownOp(),
            NotAllowed(),
            ServerClosing(),
            Overloaded(),
            HandlerCancelled(),
            LimitExceeded(""),
            UnsafePayload(""),
            SerializationError(""),
        )
    }
    assert codes == {
        "ValueError": "error",
        "UnknownOp": "unknown-op",
        "NotAllowed": "not-allowed",
        "ServerClosing": "closing",
        "Overloaded": "overloaded",
        "HandlerCancelled": "cancelled",
        "LimitExceeded": "limit",
        "UnsafePayload": "unsafe",
        "SerializationError": "serialization",
    }


# -- relays ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "exc",
    [ValueError("nope"), Custom(1, "x"), Reduced(1, 2), SystemExit(3), FileNotFoundError(2, "no", "f"), KeyError("k")],
    ids=repr,
)
def test_a_relayed_error_keeps_type_and_message(exc: BaseException, trusted: bool) -> None:
    once = by_value(exc, trusted=trusted)
    thrice = by_value(by_value(raised(once), trusted=trusted), trusted=trusted)
    assert type(thrice) is type(once)
    assert (thrice.type_name, thrice.message, thrice.args) == (once.type_name, once.message, once.args)
    assert type(thrice.original) is type(once.original)
    assert getattr(thrice, "errno", None) == getattr(exc, "errno", None)


def test_a_relay_that_is_not_trusted_by_the_last_one_loses_the_class_only() -> None:
    error = by_value(by_value(Custom(1, "x"), trusted=True))
    assert isinstance(error, ValueError)
    assert (error.type_name, str(error), error.code) == (f"{__name__}.Custom", "x [1]", 1)


def test_the_text_of_a_relay_has_every_hop() -> None:
    first = by_value(raised(ValueError("nope")))
    second = by_value(raised(first))
    assert second.remote_traceback.count("in raised") == 2
    assert "RemoteError" not in second.remote_traceback


def test_a_relay_that_hides_the_cause_does_not_lose_the_text() -> None:
    first = by_value(raised(ValueError("nope")))
    first.__cause__ = None  # what "raise error from None" does
    text = by_value(first).remote_traceback
    assert text.count("in raised") == 1
    assert text.index("in raised") < text.index("direct cause")


def test_a_relayed_error_to_a_stock_client() -> None:
    assert repr(by_stock_client(by_value(FileNotFoundError(2, "no", "f")))) == "FileNotFoundError(2, 'no')"
    again = by_stock_client(by_value(Custom(1, "x"), trusted=True), trusted=True)
    assert type(again) is Custom
    assert again.code == 1
    assert repr(by_stock_client(by_value(SystemExit(3)))) == "Exception('SystemExit: 3')"
    assert repr(by_stock_client(by_value(Reduced(1, 2)))) == f"Exception('{__name__}.Reduced: reduced')"


@pytest.mark.parametrize("cls", [ServerClosing, Overloaded, NotAllowed, UnknownOp])
def test_a_refusal_by_a_third_server_is_no_refusal_of_the_request(cls: type[DcoreError]) -> None:
    """The handler that got it had started: its caller must not think that trying again is safe."""
    refused = by_value(cls("no"))
    for error in (by_value(refused), by_reply(refused), by_value(cls("no"), started=True), by_reply(cls("no"), started=True)):
        assert type(error) is RemoteError
        assert (error.type_name, error.message) == (f"trio_dcore.{cls.__name__}", "no")
    assert not isinstance(by_stock_client(refused), (ConnectionError, ValueError, AttributeError))
    assert str(by_stock_client(refused)) == f"trio_dcore.{cls.__name__}: no"


# -- groups ----------------------------------------------------------------------------------------------------------------------


def test_a_group_keeps_its_leaves() -> None:
    group = raised(ExceptionGroup("several", [raised(ValueError("v")), ExceptionGroup("inner", [KeyError("k"), Custom(1, "c")])]))
    error = by_value(group, trusted=True)
    assert isinstance(error, RemoteError)
    assert isinstance(error, ExceptionGroup)
    assert str(error) == "several (2 sub-exceptions)"
    assert [type(leaf).__mro__[-4] for leaf in error.exceptions] == [ValueError, LookupError, ValueError]
    assert all(isinstance(leaf, RemoteError) for leaf in error.exceptions)
    assert error.exceptions[2].code == 1
    with pytest.raises(RemoteError):
        raise error
    caught = []
    try:
        raise error
    except* KeyError as matched:
        caught = [str(leaf) for leaf in matched.exceptions]
    except* ValueError:
        pass
    assert caught == ["'k'"]


def test_a_group_with_one_leaf_is_that_leaf() -> None:
    exc = ExceptionGroup("outer", [ExceptionGroup("inner", [raised(ValueError("v"))])])
    for error in (by_value(exc), by_reply(exc)):
        assert isinstance(error, ValueError)
        assert not isinstance(error, ExceptionGroup)
        assert "in raised" in error.remote_traceback
    assert repr(by_stock_client(exc)) == "ValueError('v')"
    assert isinstance(by_stock_server(exc), ValueError)


def test_a_group_of_base_exceptions_is_a_group_of_remote_errors() -> None:
    error = by_value(BaseExceptionGroup("stop", [KeyboardInterrupt(), ValueError("v")]))
    assert isinstance(error, ExceptionGroup)
    assert [leaf.type_name for leaf in error.exceptions] == ["builtins.KeyboardInterrupt", "builtins.ValueError"]
    assert error.type_name == "builtins.BaseExceptionGroup"


def test_a_refusal_in_a_group_is_a_member_like_others() -> None:
    error = by_value(ExceptionGroup("g", [ServerClosing("c"), LimitExceeded("l", limit="head")]))
    assert [leaf.type_name for leaf in error.exceptions] == ["trio_dcore.ServerClosing", "trio_dcore.LimitExceeded"]
    assert type(error.exceptions[0]) is RemoteError
    assert isinstance(error.exceptions[1], LimitExceeded)


def test_a_relayed_group() -> None:
    error = by_value(by_value(by_value(ExceptionGroup("g", [ValueError(1), Custom(2, "x")]), trusted=True)))
    assert isinstance(error, ExceptionGroup)
    assert error.args[0] == "g"
    assert str(error) == "g (2 sub-exceptions)"
    assert [leaf.type_name for leaf in error.exceptions] == ["builtins.ValueError", f"{__name__}.Custom"]


def test_a_group_to_a_stock_client() -> None:
    group = ExceptionGroup("g", [ValueError(1), Custom(2, "x")])
    group.add_note("a note")
    raised_there = by_stock_client(group)
    assert isinstance(raised_there, ExceptionGroup)
    assert repr(raised_there) == "ExceptionGroup('g', [ValueError(1), ValueError('x [2]')])"
    assert raised_there.__notes__ == ["a note"]
    trusted = by_stock_client(group, trusted=True)
    assert isinstance(trusted, ExceptionGroup)
    assert [type(leaf) for leaf in trusted.exceptions] == [ValueError, Custom]


def test_a_group_that_is_too_large_as_it_is() -> None:
    def large(n: int) -> Custom:
        exc = Custom(n, "x")
        exc.blob = b"x" * 100_000  # type: ignore[attr-defined]
        return exc

    assert type(by_stock_client(large(1), trusted=True)) is Custom
    group = by_stock_client(ExceptionGroup("g", [large(n) for n in range(5)]), trusted=True)
    assert isinstance(group, ExceptionGroup)
    assert [type(leaf) for leaf in group.exceptions] == [ValueError] * 5


def test_a_large_group_is_bounded() -> None:
    group = ExceptionGroup("many", [ValueError(n) for n in range(100_000)])
    error = by_value(group)
    assert len(error.exceptions) == 32
    assert "19967" in error.__notes__[0] or "more exceptions" in error.__notes__[0]
    assert len(msgpack.packb(error_value(group, trusted=False))) < 100_000
    stock = by_stock_client(group)
    assert isinstance(stock, ExceptionGroup)
    assert len(stock.exceptions) == 32
    assert "left out" in stock.__notes__[0]


# -- printing, copying -----------------------------------------------------------------------------------------------------------


def test_the_remote_traceback_is_printed_once() -> None:
    error = by_value(raised(ValueError("nope"), cause=KeyError("why")))
    text = printed(raised(error))
    assert text.count("in raised\n    raise exc\n") == 1 + 1  # once over there, once here
    assert text.count("KeyError: 'why'") == 1
    assert text.index("KeyError: 'why'") < text.index("ValueError: nope") < text.index("trio_dcore.RemoteError[ValueError]: nope")
    assert isinstance(error.__cause__, RemoteTraceback)
    assert error.remote_traceback in f"{error.__cause__}\n"


def test_causes_contexts_and_notes_are_in_the_text() -> None:
    try:
        try:
            raise KeyError("context")
        except KeyError:
            raise ValueError("nope")  # noqa: B904 - the context is what is wanted
    except ValueError as caught:
        exc = caught
    exc.add_note("a note")
    error = by_value(exc)
    assert "KeyError: 'context'" in error.remote_traceback
    assert "During handling" in error.remote_traceback
    assert error.remote_traceback.rstrip().endswith("ValueError: nope\na note")
    assert error.__notes__ == ["a note"]
    hidden = raised(ValueError("v"))
    hidden.__context__ = KeyError("hidden")
    hidden.__suppress_context__ = True
    assert "hidden" not in by_value(hidden).remote_traceback


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("exc", [*BUILTIN_EXAMPLES, Custom(1, "x"), OddFile("n"), Reduced(1, 2), SystemExit(3)], ids=repr)
def test_remote_errors_can_be_pickled_and_copied(exc: BaseException, trusted: bool) -> None:
    error = by_value(raised(exc), trusted=trusted)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert again.args == error.args
        assert str(again) == str(error)
        assert again.type_name == error.type_name
        assert again.remote_traceback == error.remote_traceback
        assert getattr(again, "filename", None) == getattr(error, "filename", None)
        assert getattr(again, "code", None) == getattr(error, "code", None)
        assert again.original is None
        assert printed(again) == printed(error)


@pytest.mark.parametrize(
    "exc",
    [
        ExceptionGroup("g", [ValueError(1), KeyError(2)]),
        LimitExceeded("l", limit="head", value=3),
        ServerClosing("c"),
        UnknownOp("u"),
    ],
    ids=repr,
)
def test_other_errors_can_be_pickled_and_copied(exc: Exception) -> None:
    error = by_value(exc)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert repr(again) == repr(error)
        assert getattr(again, "limit", None) == getattr(error, "limit", None)
        # A refusal that came from a peer is still known as that.
        assert by_value(again).type_name == by_value(error).type_name


# -- to stock peers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("exc", BUILTIN_EXAMPLES, ids=repr)
def test_a_stock_client_gets_builtin_exceptions_whole(exc: BaseException, trusted: bool) -> None:
    there = by_stock_client(raised(exc), trusted=trusted)
    assert type(there) is type(exc)
    assert there.args == exc.args
    assert str(there) == str(exc)
    for name in FIELDS:
        assert getattr(there, name, None) == getattr(exc, name, None), name


def test_a_trusted_stock_client_gets_the_class() -> None:
    there = by_stock_client(Custom(3, "here"), trusted=True)
    assert type(there) is Custom
    assert (there.args, there.code) == (("here [3]",), 3)
    assert type(by_stock_client(Reduced(1, 2), trusted=True)) is Reduced
    odd = by_stock_client(OddFile("name"), trusted=True)
    assert type(odd) is OddFile
    assert (odd.filename, odd.extra) == ("name", "NAME")


def test_a_stock_client_that_is_not_trusted_gets_the_nearest_builtin() -> None:
    for exc, there in [
        (Custom(3, "here"), "ValueError('here [3]')"),
        (Simple("s"), "LookupError('s')"),
        (OddFile("n"), "FileNotFoundError"),
        (Reduced(1, 2), f"Exception('{__name__}.Reduced: reduced')"),
        (type("Key", (KeyError,), {})("k"), "KeyError('k')"),
    ]:
        assert repr(by_stock_client(exc)) == there or type(exc) is OddFile
    assert repr(by_stock_client(OddFile("n"))) == "OSError(\"[Errno 2] no such file: 'n'\")"


@pytest.mark.parametrize(
    ("exc", "there"),
    [
        (UnknownOp("m"), "AttributeError('m')"),
        (SerializationError("m"), "TypeError('m')"),
        (UnsafePayload("m"), "ValueError('m')"),
        (LimitExceeded("m"), "ValueError('m')"),
        (MyLimit("m"), "ValueError('m')"),
        (NotAllowed("m"), "ValueError('m')"),
        (ServerClosing("m"), "ConnectionAbortedError('m')"),
        (Overloaded("m"), "ConnectionAbortedError('m')"),
        (HandlerCancelled("m"), "RuntimeError('m')"),
        (RemoteError("m"), "Exception('trio_dcore.RemoteError: m')"),
        (DcoreError(), "Exception('trio_dcore.DcoreError')"),
        (SystemExit(7), "Exception('SystemExit: 7')"),
        (StopIteration(7), "Exception('StopIteration: 7')"),
        (StopAsyncIteration(), "Exception('StopAsyncIteration')"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_a_stock_client_gets_for_ours(exc: BaseException, there: str, trusted: bool) -> None:
    assert repr(by_stock_client(exc, trusted=trusted)) == there


def test_no_class_of_ours_or_of_trio_goes_to_a_stock_client() -> None:
    import trio

    for exc in (trio.EndOfChannel("e"), ValueError(LimitExceeded("inside")), by_value(Simple("s"))):
        for trusted in (False, True):
            data = error_reply(exc, trusted=trusted, extension=False)["exception"]
            assert b"trio" not in data.replace(b"trio.EndOfChannel: e", b"")


def test_a_class_of_the_main_module_does_not_go_to_a_stock_client() -> None:
    """It would load here, where the check is made, and nowhere else."""
    kind = type("Mine", (ValueError,), {"__module__": "__main__"})
    assert repr(by_stock_client(kind("m"), trusted=True)) == "ValueError('m')"


def test_notes_go_to_a_stock_client() -> None:
    for exc in (ValueError("v"), Custom(1, "x")):
        exc.add_note("a note")
        for trusted in (False, True):
            assert by_stock_client(exc, trusted=trusted).__notes__ == ["a note"]


def test_arguments_that_are_not_plain() -> None:
    exc = ValueError(Opaque())
    assert by_stock_client(exc, trusted=True).args == (Opaque(),)
    assert repr(by_stock_client(exc)) == "ValueError('<opaque>')"
    error = by_value(exc)
    assert isinstance(error, ValueError)
    assert error.args == ("<opaque>",)
    assert by_value(exc, trusted=True).args == (Opaque(),)
    assert isinstance(by_stock_client(UnicodeDecodeError("utf-8", b"\xff" * 50_000, 0, 1, "bad")), UnicodeError)
    assert isinstance(by_value(UnicodeDecodeError("utf-8", b"\xff" * 50_000, 0, 1, "bad")), UnicodeError)


def test_a_class_that_changes_in_a_pickle_is_not_sent_as_one() -> None:
    class Local(ValueError):
        pass

    assert repr(by_stock_client(Local("l"), trusted=True)) == "ValueError('l')"
    assert isinstance(by_value(Local("l"), trusted=True), ValueError)
    assert "pickle" not in error_value(Local("l"), trusted=True)


def test_the_texts_of_a_reply() -> None:
    exc = raised(Custom(1, "x"), cause=KeyError("why"))
    reply = error_reply(exc, status="error", trusted=False, extension=False)
    assert reply["status"] == "error"
    assert reply["exception_text"] == "Custom('x [1]')"
    assert reply["traceback"] is None
    assert "KeyError: 'why'" in reply["traceback_text"]
    assert "in raised" in reply["traceback_text"]
    group = error_reply(ExceptionGroup("g", [raised(ValueError(1)), KeyError(2)]), trusted=False, extension=False)
    assert group["exception_text"] == "ExceptionGroup('g (2 sub-exceptions)')"
    assert "in raised" in group["traceback_text"]


def test_tblib_in_this_process_does_not_get_into_our_pickles() -> None:
    """distributed, run in the same process, makes every pickle of an exception class it met depend on tblib."""
    import copyreg

    import tblib.pickling_support

    class Tag(Exception):
        pass

    before = dict(copyreg.dispatch_table)
    try:
        tblib.pickling_support.install(ValueError("v"), Simple("s"))
        assert b"tblib" in pickle.dumps(ValueError("v"))
        for exc in (ValueError("v"), Simple("s")):
            assert b"tblib" not in error_reply(exc, trusted=True, extension=False)["exception"]
    finally:
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(before)
    assert Tag is not None


# -- from stock peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exc", [*BUILTIN_EXAMPLES, Custom(1, "x"), Simple("s"), OddFile("n"), Reduced(1, 2)], ids=repr)
def test_an_error_of_a_trusted_stock_server(exc: BaseException) -> None:
    error = by_stock_server(exc)
    assert isinstance(error, RemoteError)
    assert isinstance(error, type(exc))
    assert error.args == exc.args
    assert str(error) == str(exc)
    assert type(error.original) is type(exc)
    assert error.original.__traceback__ is None
    assert "in by_stock_server" in error.remote_traceback
    assert getattr(error, "code", None) == getattr(exc, "code", None)
    assert getattr(error, "filename", None) == getattr(exc, "filename", None)


# repr() shows args only, so the second file name, for one, is not there.
@pytest.mark.parametrize("exc", BUILTIN_EXAMPLES, ids=repr)
def test_an_error_of_a_stock_server_that_is_not_trusted(exc: BaseException) -> None:
    error = by_stock_server(exc, allow_pickle=no)
    assert isinstance(error, RemoteError)
    assert isinstance(error, type(exc))
    assert error.args == exc.args
    assert error.original is None
    assert getattr(error, "errno", None) == getattr(exc, "errno", None)


def test_a_class_that_is_unknown_here() -> None:
    error = by_stock_server(Custom(1, "x"), allow_pickle=no)
    assert type(error) is RemoteError
    assert (error.type_name, error.message) == ("Custom", "x [1]")


def test_cause_notes_and_groups_of_a_stock_server() -> None:
    exc = ValueError("nope")
    exc.__cause__ = KeyError("why")
    exc.add_note("a note")
    error = by_stock_server(exc)
    assert error.__notes__ == ["a note"]
    assert isinstance(error.original.__cause__, KeyError)
    text = printed(error)
    assert text.index("KeyError: 'why'") < text.index("in by_stock_server") < text.index("RemoteError[ValueError]: nope")
    group = by_stock_server(ExceptionGroup("g", [ValueError(1), Custom(2, "x")]))
    assert isinstance(group, ExceptionGroup)
    assert [type(leaf.original) for leaf in group.exceptions] == [ValueError, Custom]
    assert group.exceptions[1].code == 2
    assert all(isinstance(leaf, RemoteError) for leaf in group.exceptions)


def test_long_and_deep_errors_of_a_stock_server() -> None:
    long = by_stock_server(ValueError("x" * 50_000))
    assert isinstance(long, ValueError)
    assert long.args[0] == "Long error message"

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("deep")

    with pytest.raises(ValueError, match="deep") as caught:
        deep(300)
    assert isinstance(by_stock_server(caught.value), ValueError)


@pytest.mark.parametrize("exc", [SystemExit(7), KeyboardInterrupt(), StopIteration(1)], ids=repr)
@pytest.mark.parametrize("allow_pickle", [yes, no])
def test_a_stock_server_does_not_end_us(exc: BaseException, allow_pickle: Callable[[], bool]) -> None:
    error = by_stock_server(exc, allow_pickle)
    assert type(error) is RemoteError
    assert error.type_name == f"builtins.{type(exc).__name__}"


def test_an_error_of_ours_that_a_stock_server_relays() -> None:
    for exc in (by_value(ValueError("nope")), by_value(Custom(1, "x"), trusted=True), by_value(SystemExit(1)), UnknownOp("u")):
        error = by_stock_server(exc)
        assert error.message == str(exc)
        assert error.type_name == (exc.type_name or "trio_dcore.UnknownOp")
        assert type(error) is (RemoteError if isinstance(exc, UnknownOp) else type(exc))


# -- bounds ----------------------------------------------------------------------------------------------------------------------


class Hostile(Exception):
    def __str__(self) -> str:
        raise SystemExit("str")

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __reduce__(self) -> Any:
        raise GeneratorExit("reduce")


class Endless(Exception):
    def __str__(self) -> str:
        return "x" * 10_000_000

    __repr__ = __str__


class Text(str):
    def __getitem__(self, key: Any) -> str:
        raise AssertionError

    def __str__(self) -> str:
        return "lie"

    def __len__(self) -> int:
        return 0


class Lying(ValueError):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("args")

    def __str__(self) -> str:
        return Text("told " * 10_000)


def looped() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


def chained(length: int) -> Exception:
    exc: Exception = ValueError(0)
    for n in range(1, length):
        later = ValueError(n)
        later.__cause__ = exc
        exc = later
    return exc


def nested(length: int) -> Exception:
    exc: Exception = ValueError(0)
    for _ in range(length):
        exc = ExceptionGroup("g", [exc, KeyError(1)])
    return exc


def doubled(times: int) -> Exception:
    exc: Exception = ValueError(0)
    for _ in range(times):
        exc = ExceptionGroup("g", [exc, exc])
    return exc


def with_many_attributes() -> Exception:
    exc = ValueError("many")
    exc.__dict__.update({f"name{n}": "x" * 1000 for n in range(20_000)})
    exc.__notes__ = ["n" * 1000] * 100_000
    return exc


def with_odd_attributes() -> Exception:
    exc = ValueError("odd")
    exc.__notes__ = "not a list"  # type: ignore[assignment]
    exc.__dict__[3] = 4  # type: ignore[index]
    exc.__dict__["\udc80"] = 1
    return exc


HOSTILE: dict[str, Callable[[], BaseException]] = {
    "hostile": Hostile,
    "endless": Endless,
    "lying": Lying,
    "hostile inside": lambda: ValueError(Hostile()),
    "hostile in a group": lambda: ExceptionGroup("g", [Hostile(), Endless()]),
    "long text": lambda: ValueError("x" * 50_000_000),
    "long list": lambda: ValueError([0] * 5_000_000),
    "long bytes": lambda: ValueError(b"\xff" * 50_000_000),
    "long key": lambda: KeyError("k" * 5_000_000),
    "many args": lambda: ValueError(*range(1_000_000)),
    "large dict": lambda: ValueError({n: n for n in range(1_000_000)}),
    "dict of text keys": lambda: ValueError({str(n): n for n in range(100_000)}),
    "huge int": lambda: ValueError(10**5000),
    "looped": lambda: ValueError(looped()),
    "chain": lambda: chained(100_000),
    "nested groups": lambda: nested(900),
    "doubled groups": lambda: doubled(60),
    "surrogates": lambda: ValueError("\udcff file", b"\xff"),
    "str subclass": lambda: ValueError(Text("real")),
    "markers": lambda: ValueError({"__Pickled__": 1}),
    "int of 2**70": lambda: ValueError(2**70),
    "many attributes": with_many_attributes,
    "odd attributes": with_odd_attributes,
    "no module": lambda: type("NoModule", (ValueError,), {"__module__": None})("n"),
    "long name": lambda: type("N" * 10_000, (ValueError,), {})("n"),
    "name with newlines": lambda: type("N\n\x1b[31m", (ValueError,), {})("n"),
    "deep bases": lambda: deep_bases(100)("deep"),
}


def deep_bases(depth: int) -> type[Exception]:
    cls: type[Exception] = ValueError
    for n in range(depth):
        cls = type(f"Base{n}", (cls,), {})
    return cls


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", list(HOSTILE))
def test_encoding_never_fails_and_is_bounded(name: str, trusted: bool) -> None:
    exc = HOSTILE[name]()
    started = time.perf_counter()
    value = error_value(exc, trusted=trusted)
    reply = error_reply(exc, trusted=trusted, extension=True)
    assert time.perf_counter() - started < 5  # 100 times what it takes; without bounds some take minutes
    for message in (value, reply):
        assert len(msgpack.packb(message, use_bin_type=True)) < 700_000
    assert len(value["message"]) <= 10_000
    assert len(value["traceback"]) <= 10_000
    assert "can't be described" not in value["message"]
    assert type(value["message"]) is str
    assert isinstance(pickle.loads(reply["exception"]), Exception)
    for error in (by_value(exc, trusted=trusted), by_reply(exc, trusted=trusted)):
        assert isinstance(error, RemoteError)
        printed(error)
    assert isinstance(by_stock_client(exc, trusted=trusted), Exception)


def test_what_hostile_exceptions_say() -> None:
    assert by_value(Hostile()).message == f"<unprintable {__name__}.Hostile>"
    assert by_value(Endless()).message == "x" * 9_999 + "…"
    assert by_value(Lying("a")).message == ("told " * 2000)[:9_999] + "…"
    assert by_value(ValueError([0] * 5_000_000)).message.startswith("[0, 0, 0, 0, 0, 0, ...")
    assert by_value(ValueError(b"\xff" * 50_000_000)).message.endswith("...")
    assert by_value(ValueError("\udcff file")).message == "\\udcff file"
    assert by_value(ValueError("x" * 50_000)).args == ("x" * 9_999 + "…",)


@pytest.mark.parametrize("limit", [1, 2, 40, 500])
def test_the_limit_is_kept(limit: int) -> None:
    group = ExceptionGroup("g" * 1000, [raised(ValueError("v" * 1000)), raised(Custom(1, "c" * 1000))])
    for exc in (raised(ValueError("x" * 1000)), group, chained(20)):
        value = error_value(exc, trusted=True, limit=limit)
        assert len(value["message"]) <= limit
        assert len(value["traceback"]) <= limit
        reply = error_reply(exc, trusted=True, extension=False, limit=limit)
        assert len(reply["exception_text"]) <= limit
        assert len(reply["traceback_text"]) <= limit
        assert len(str(pickle.loads(reply["exception"]))) <= limit + 30


def test_a_large_limit_is_kept_as_well() -> None:
    for exc in (ValueError("\U0001f600" * 1_000_000), ExceptionGroup("g", [ValueError("v" * 1_000_000), KeyError(1)])):
        exc.add_note("n" * 1_000_000)
        reply = error_reply(exc, trusted=True, extension=False, limit=1_000_000)
        assert type(pickle.loads(reply["exception"])) is type(exc)
        assert len(reply["exception_text"]) <= 1_000_000


def test_a_limit_of_nothing_is_a_limit_of_one() -> None:
    assert len(error_value(ValueError("abc"), trusted=False, limit=0)["message"]) == 1


def test_a_long_traceback_keeps_its_ends() -> None:
    text = error_value(raised(ValueError("end"), cause=chained(5)), trusted=False, limit=200)["traceback"]
    assert len(text) <= 200
    assert "left out" in text
    assert text.endswith("ValueError: end\n")


def test_a_keyboard_interrupt_of_the_user_is_not_swallowed() -> None:
    class Slow(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        error_value(Slow(), trusted=False)
    with pytest.raises(KeyboardInterrupt):
        error_reply(Slow(), trusted=False, extension=False)


def test_what_can_not_be_described_at_all() -> None:
    class Meta(type):
        @property
        def __mro__(cls) -> Any:
            raise RuntimeError("no")

    class Undescribable(Exception, metaclass=Meta):
        pass

    value = error_value(Undescribable("u"), trusted=True)
    assert value["code"] == "error"
    assert isinstance(by_value(Undescribable("u")), RemoteError)
    assert isinstance(by_stock_client(Undescribable("u"), trusted=True), Exception)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.tuples(inner, inner) | st.tuples(inner),
    max_leaves=6,
)
builtin_kinds = st.sampled_from(
    [
        kind
        for kind in vars(builtins).values()
        if isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError, BaseExceptionGroup))
    ]
)


@settings(SOBER, max_examples=200)
@given(builtin_kinds, st.lists(plain_values, max_size=3))
def test_builtin_exceptions_of_any_plain_arguments(kind: type[Exception], args: list[Any]) -> None:
    try:
        exc = kind(*args)
    except TypeError:
        return  # SyntaxError("text", 5), for one
    error = by_value(exc)
    if issubclass(kind, (StopIteration, StopAsyncIteration)) or kind is Exception:
        assert type(error) is RemoteError
    else:
        assert isinstance(error, type(exc))
        assert error.args == exc.args
    assert error.message == str(exc)
    assert error.type_name == f"builtins.{type(exc).__name__}"
    assert isinstance(by_stock_client(exc), Exception)
