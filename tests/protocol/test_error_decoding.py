"""Whatever a peer says about an error, the caller gets an error of ours, and nothing else."""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trio_dcore.protocol._error_decoding import exception_from_reply, exception_from_value
from trio_dcore.protocol._errors import (
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    Overloaded,
    RemoteError,
    ServerClosing,
    UnknownOp,
)
from trio_dcore.protocol._types import Serialized

# The same examples in every run, and no verdict on how busy the machine is.
SOBER = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

ran: list[str] = []


class Canary:
    """Unpickling it runs something."""

    def __reduce__(self) -> Any:
        return sing, ()


def sing() -> None:
    ran.append("unpickled")


class Exits:
    def __reduce__(self) -> Any:
        return exits, (7,)


def exits(code: int) -> None:
    raise SystemExit(code)


class Interrupts:
    def __reduce__(self) -> Any:
        return interrupts, ()


def interrupts() -> None:
    raise KeyboardInterrupt


class NeedsArguments(Exception):
    """Python itself can't unpickle it again."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__("one argument")


def yes() -> bool:
    return True


def no() -> bool:
    return False


def never() -> bool:
    raise AssertionError("asked although there was no pickle")


def check(error: object, *, refusals: bool = False) -> None:
    """An error of ours that can be printed, pickled and caught as any other."""
    assert isinstance(error, (RemoteError, ServerClosing, Overloaded, NotAllowed) if refusals else RemoteError)
    assert not isinstance(error, (StopIteration, StopAsyncIteration))
    assert isinstance(error, Exception)
    "".join(traceback.format_exception(error))
    assert isinstance(str(error), str)
    assert isinstance(repr(error), str)
    if isinstance(error, RemoteError):
        for text in (error.type_name, error.message, error.remote_traceback):
            assert type(text) is str
            assert len(text) <= 100_000
        assert error.type_name.isprintable()
    assert type(pickle.loads(pickle.dumps(error))) is type(error)


def reply(exception: object = None, **more: object) -> dict[str, object]:
    return {"status": "uncaught-error", "exception": exception, "traceback": None, **more}


# -- Dask's replies ----------------------------------------------------------------------------------------------------------


def test_a_reply_with_a_pickle() -> None:
    error = exception_from_reply(reply(pickle.dumps(ValueError("nope")), exception_text="ignored"), allow_pickle=yes)
    assert isinstance(error, ValueError)
    check(error)
    assert str(error) == "nope"


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_the_pickle_may_be_any_buffer(kind: Callable[[bytes], object]) -> None:
    assert isinstance(exception_from_reply(reply(kind(pickle.dumps(ValueError("nope")))), allow_pickle=yes), ValueError)


def test_a_pickle_of_an_untrusted_peer_is_not_loaded() -> None:
    ran.clear()
    error = exception_from_reply(reply(pickle.dumps(Canary()), exception_text="KeyError('k')"), allow_pickle=no)
    assert isinstance(error, KeyError)
    value = {"code": "error", "type": "x", "message": "m", "pickle": pickle.dumps(Canary())}
    assert type(exception_from_value(value, allow_pickle=no)) is RemoteError
    group = {"code": "error", "type": "g", "message": "m", "errors": (value, value)}
    check(exception_from_value(group, allow_pickle=no))
    assert ran == []
    exception_from_value(value, allow_pickle=yes)
    assert ran == ["unpickled"]  # so the canary does sing


def test_trust_is_not_asked_for_without_need() -> None:
    for message in ({}, reply("text"), reply(exception_text="ValueError()"), {"trio-dcore": {"code": "closing"}}):
        check(exception_from_reply(message, allow_pickle=never), refusals=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x05.",
        pickle.dumps(Exits()),
        pickle.dumps(Canary()),
        pickle.dumps("not an exception"),
        pickle.dumps(ValueError),
        pickle.dumps(NeedsArguments(1, 2)),
        b"cno.such.module\nError\n.",
        b"cbuiltins\nno_such_name\n.",
        b"cbuiltins\nValueError\n(I1\nI2\nd\x81.",
        pickle.dumps(ValueError("x"))[:-5],
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f",
    ],
)
def test_a_pickle_that_can_not_be_loaded_leaves_the_text(data: bytes) -> None:
    error = exception_from_reply(reply(data, exception_text="Odd('text')", traceback_text="the trace"), allow_pickle=yes)
    assert type(error) is RemoteError
    check(error)
    assert (error.type_name, error.message, error.remote_traceback) == ("Odd", "text", "the trace")
    value = {"code": "error", "type": "builtins.KeyError", "message": "m", "pickle": data}
    assert isinstance(exception_from_value(value, allow_pickle=yes), KeyError)


def test_a_keyboard_interrupt_passes_since_it_may_be_the_users() -> None:
    with pytest.raises(KeyboardInterrupt):
        exception_from_reply(reply(pickle.dumps(Interrupts())), allow_pickle=yes)


@pytest.mark.parametrize(
    "exc", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1), BaseException()], ids=repr
)
def test_a_pickled_exception_that_must_not_be_raised(exc: BaseException) -> None:
    error = exception_from_reply(reply(pickle.dumps(exc)), allow_pickle=yes)
    assert type(error) is RemoteError
    check(error)
    assert error.type_name == f"builtins.{type(exc).__name__}"
    assert type(error.original) is type(exc)


@pytest.mark.parametrize(
    "exception",
    [
        None,
        "a text",
        7,
        ValueError,
        Serialized({"serializer": "dask"}, [b"x"]),
        {"__Serialized__": 1},
        ["list"],
        ...,
    ],
    ids=repr,
)
def test_an_exception_that_is_none(exception: object) -> None:
    message = reply(exception, exception_text="ValueError('nope')", traceback_text="  File ...")
    if exception is ...:
        del message["exception"]
    error = exception_from_reply(message, allow_pickle=never)
    assert isinstance(error, ValueError)
    check(error)
    assert str(error) == "nope"


def test_an_exception_that_the_codec_has_unpickled() -> None:
    error = exception_from_reply(reply(ValueError("nope")), allow_pickle=never)
    assert isinstance(error, ValueError)
    assert type(error.original) is ValueError


def test_a_text_only_reply() -> None:
    error = exception_from_reply(reply("what happened"), allow_pickle=never)
    assert type(error) is RemoteError
    assert (str(error), error.type_name) == ("what happened", "")


@pytest.mark.parametrize("message", [None, 7, "text", [], (), b"x", {}, {"status": "uncaught-error"}, reply(7, exception_text=7)])
def test_a_reply_that_says_nothing(message: Any) -> None:
    error = exception_from_reply(message, allow_pickle=never)
    assert type(error) is RemoteError
    check(error)
    assert "can't be read" in str(error)


@pytest.mark.parametrize(
    ("text", "kind", "args", "message"),
    [
        ("ValueError('nope')", ValueError, ("nope",), "nope"),
        ("ValueError()", ValueError, (), ""),
        ('ValueError("it\'s")', ValueError, ("it's",), "it's"),
        ("KeyError(('a', 1))", KeyError, (("a", 1),), "('a', 1)"),
        ("FileNotFoundError(2, 'No such file')", FileNotFoundError, (2, "No such file"), "[Errno 2] No such file"),
        ("OSError(2, 'No such file')", OSError, (2, "No such file"), "[Errno 2] No such file"),
        ("UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'bad')", UnicodeDecodeError, ("utf-8", b"\xff", 0, 1, "bad"), None),
        ("UnicodeDecodeError('utf-8', b'\\xff', -9, -8, 'bad')", UnicodeError, ("utf-8", b"\xff", -9, -8, "bad"), None),
        ("UnicodeDecodeError('utf-8')", UnicodeError, ("utf-8",), "utf-8"),
        ("SyntaxError('bad', ('f', 1, 2, 'a b', 1, 3))", SyntaxError, ("bad", ("f", 1, 2, "a b", 1, 3)), "bad (f, line 1)"),
        ("SyntaxError('bad', 5)", SyntaxError, ("bad", 5), None),
        ("ValueError(Decimal('1'))", ValueError, ("ValueError(Decimal('1'))",), "ValueError(Decimal('1'))"),
        ("ValueError(<object at 0x7f>)", ValueError, ("ValueError(<object at 0x7f>)",), "ValueError(<object at 0x7f>)"),
        ("IOError('x')", OSError, ("x",), "x"),
        ("MyError('nope')", RemoteError, None, "nope"),
        ("MyError(1, 2)", RemoteError, None, "MyError(1, 2)"),
        ("SystemExit(7)", RemoteError, None, "SystemExit(7)"),
        ("StopIteration(7)", RemoteError, None, "StopIteration(7)"),
        ("Exception('plain')", RemoteError, None, "plain"),
        ("ExceptionGroup('g', [ValueError(1)])", RemoteError, None, "ExceptionGroup('g', [ValueError(1)])"),
        ("eval('1')", RemoteError, None, "1"),
        ("__import__('os')", RemoteError, None, "os"),
        ("<unprintable>", RemoteError, None, "<unprintable>"),
        ("ValueError('unclosed", RemoteError, None, "ValueError('unclosed"),
        ("not an expression at all", RemoteError, None, "not an expression at all"),
        ("ValueError('" + "x" * 30_000 + "')", RemoteError, None, "ValueError('" + "x" * 30_000 + "')"),
    ],
)
def test_the_repr_of_an_exception(text: str, kind: type[Exception], args: tuple[object, ...] | None, message: str | None) -> None:
    error = exception_from_reply(reply(exception_text=text), allow_pickle=never)
    check(error)
    assert isinstance(error, kind)
    assert type(error) is RemoteError or kind is not RemoteError
    assert isinstance(error, RemoteError)
    if args is not None:
        assert error.args == args
    if message is not None:
        assert str(error) == message


def test_the_name_in_a_repr_is_a_name_only() -> None:
    for text, name in [("SystemExit(7)", "builtins.SystemExit"), ("eval('1')", "eval"), ("MyError()", "MyError"), ("?(1)", "")]:
        error = exception_from_reply(reply(exception_text=text), allow_pickle=never)
        assert isinstance(error, RemoteError)
        assert error.type_name == name


def test_our_own_value_goes_before_the_pickle() -> None:
    message = reply(b"garbage") | {"trio-dcore": {"code": "overloaded", "message": "busy"}}
    assert type(exception_from_reply(message, allow_pickle=never)) is Overloaded
    assert isinstance(exception_from_reply(reply(exception_text="KeyError(1)") | {"trio-dcore": 7}, allow_pickle=never), KeyError)


# -- our values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eval", "SystemExit", "BaseException", "KeyboardInterrupt", "StopIteration", "Exception", "open"]
)
def test_names_that_are_not_taken_for_classes(name: str) -> None:
    for value in (
        {"code": "error", "type": f"builtins.{name}", "message": "m", "args": (1,)},
        {"code": "error", "type": "odd.Error", "message": "m", "mro": ("odd.Error", f"builtins.{name}")},
        {"code": "error", "type": f"builtins.{name}", "message": "m", "mro": ("builtins.object",)},
    ):
        error = exception_from_value(value, allow_pickle=never)
        assert type(error) is RemoteError
        check(error)


@pytest.mark.parametrize("name", ["os.path", "subprocess.CalledProcessError", "json.JSONDecodeError", "trio_dcore.ServerClosing"])
def test_no_class_is_looked_up_in_a_module(name: str) -> None:
    value = {"code": "error", "type": name, "message": "m", "mro": (name, "builtins.ValueError")}
    error = exception_from_value(value, allow_pickle=never)
    assert type(error).__mro__[4] is ValueError
    check(error)


def test_an_unknown_code_is_an_error() -> None:
    error = exception_from_value({"code": "teapot", "type": "builtins.KeyError", "message": "'k'"}, allow_pickle=never)
    assert isinstance(error, KeyError)


@pytest.mark.parametrize("code", ["closing", "overloaded", "not-allowed"])
def test_a_refusal_needs_no_text(code: str) -> None:
    check(exception_from_value({"code": code}, allow_pickle=never), refusals=True)


def test_values_that_miss_their_parts() -> None:
    limit = exception_from_value({"code": "limit", "message": "m", "limit": 7, "value": "x", "seen": 3}, allow_pickle=never)
    assert isinstance(limit, LimitExceeded)
    assert (limit.limit, limit.value, limit.seen) == ("", None, 3)
    check(limit)
    cancelled = exception_from_value({"code": "cancelled", "message": "m", "reason": 5}, allow_pickle=never)
    assert isinstance(cancelled, HandlerCancelled)
    assert cancelled.reason == ""
    assert type(exception_from_value({"code": "unknown-op", "message": "m"}, allow_pickle=never)) is UnknownOp


def test_names_are_one_printable_line() -> None:
    for name in ("a\nb", "a\0b", "\x1b[31m", "x" * 1000, "\u2028"):
        error = exception_from_value({"code": "error", "type": name, "message": "m"}, allow_pickle=never)
        assert isinstance(error, RemoteError)
        check(error)
        assert len(error.type_name) <= 200


def test_attributes_can_not_replace_what_an_exception_has() -> None:
    attributes = {
        "with_traceback": 1,
        "add_note": 2,
        "__notes__": 3,
        "__class__": 4,
        "args": 5,
        "message": 6,
        "original": 7,
        "errno": "x",
        "filename": 1.5,
        "_private": 8,
        "not a name": 9,
        10: 11,
        "code": 12,
    }
    value = {"code": "error", "type": "builtins.OSError", "message": "m", "attributes": attributes}
    error: Any = exception_from_value(value, allow_pickle=never)
    check(error)
    assert isinstance(error, OSError)
    assert (error.code, error.message, error.original, error.errno, error.filename) == (12, "m", None, None, None)
    assert error.args == ("m",)
    error.add_note("works")
    assert set(vars(error)) == {"code", "type_name", "message", "remote_traceback", "original", "__notes__"}
    many = dict.fromkeys((f"name{n}" for n in range(100)), 1)
    assert not hasattr(exception_from_value(value | {"attributes": many}, allow_pickle=never), "name0")


@pytest.mark.parametrize(
    "attributes",
    [
        {"msg": "m", "filename": "f", "lineno": 1, "offset": 10**9, "text": "a b", "end_lineno": 1, "end_offset": 10**9},
        {"msg": "m", "filename": "f", "lineno": 10**30, "offset": 1, "text": 7},
        {"msg": 1, "filename": b"f", "lineno": "1", "offset": -5, "text": None, "end_offset": 10**9},
        {"text": "a b", "lineno": 1, "offset": 4, "end_offset": -1},
    ],
)
def test_printing_a_remote_syntax_error_is_safe(attributes: dict[str, object]) -> None:
    value = {"code": "error", "type": "builtins.SyntaxError", "message": "m", "args": ("m",), "attributes": attributes}
    error = exception_from_value(value, allow_pickle=never)
    assert isinstance(error, SyntaxError)
    check(error)
    assert len("".join(traceback.format_exception(error))) < 1000


@pytest.mark.parametrize(
    "args", [("utf-8", b"x", -9, -8, "r"), ("utf-8", b"x", 0, 5, "r"), ("utf-8", "x", 0, 1, "r"), (1,), ("utf-8",)]
)
def test_a_unicode_error_with_wrong_positions_is_a_general_one(args: tuple[object, ...]) -> None:
    """Its text is made in C, and some versions of Python read outside of the object there."""
    value = {
        "code": "error",
        "type": "builtins.UnicodeDecodeError",
        "message": "m",
        "args": args,
        "mro": ("builtins.UnicodeDecodeError", "builtins.UnicodeError", "builtins.ValueError"),
    }
    error = exception_from_value(value, allow_pickle=never)
    check(error)
    assert isinstance(error, UnicodeError)
    assert not isinstance(error, UnicodeDecodeError)


def test_a_group_with_odd_members() -> None:
    value = {
        "code": "error",
        "type": "builtins.ExceptionGroup",
        "message": "g",
        "args": (7,),
        "errors": (
            None,
            {},
            5,
            {"type": "builtins.KeyError", "message": "k", "errors": ({}, {})},
            {"code": "closing", "message": "c"},
        ),
    }
    error = exception_from_value(value, allow_pickle=never)
    check(error)
    assert isinstance(error, ExceptionGroup)
    assert len(error.exceptions) == 5
    assert isinstance(error.exceptions[3], KeyError)
    assert type(error.exceptions[4]) is RemoteError
    one = exception_from_value(value | {"errors": ({"type": "builtins.KeyError", "message": "k"},)}, allow_pickle=never)
    assert isinstance(one, KeyError)


def test_a_group_with_too_many_members_is_cut() -> None:
    value = {"code": "error", "type": "g", "message": "g", "errors": ({"type": "t", "message": "m"},) * 1_000_000}
    error = exception_from_value(value, allow_pickle=never)
    check(error)
    assert isinstance(error, ExceptionGroup)
    assert len(error.exceptions) == 64
    assert error.__notes__ == ["999936 more exceptions of this group were left out"]


def test_a_large_pickled_group_is_cut() -> None:
    group = ExceptionGroup("g", [ValueError(n) for n in range(1000)])
    error = exception_from_reply(reply(pickle.dumps(group)), allow_pickle=yes)
    check(error)
    assert isinstance(error, ExceptionGroup)
    assert len(error.exceptions) == 64
    assert error.__notes__ == ["936 more exceptions of this group were left out"]


class MyGroup(ExceptionGroup[Exception]):
    def derive(self, excs: Any) -> Any:
        return MyGroup(self.message, excs)


def plain_pickle(value: object) -> bytes:
    """A pickle as Python itself makes it, also where distributed is loaded: its tblib replaces how exceptions are pickled, for all of the
    process, and pickles a BaseExceptionGroup in a form that nobody can load."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out)
    pickler.dispatch_table = {}
    pickler.dump(value)
    return out.getvalue()


def test_a_pickled_group_of_another_class() -> None:
    group = MyGroup("g", [ValueError(1), SystemError("s")])
    group.add_note("a note")
    error = exception_from_reply(reply(pickle.dumps(group)), allow_pickle=yes)
    assert isinstance(error, MyGroup)
    assert isinstance(error, RemoteError)
    assert error.__notes__ == ["a note"]
    assert [type(leaf.original) for leaf in error.exceptions] == [ValueError, SystemError]  # type: ignore[union-attr]
    base = exception_from_reply(reply(plain_pickle(BaseExceptionGroup("b", [ValueError(1), SystemExit(2)]))), allow_pickle=yes)
    assert isinstance(base, ExceptionGroup)
    check(base)
    one = exception_from_reply(
        reply(pickle.dumps(ExceptionGroup("one", [KeyError("k")])), traceback_text="trace"), allow_pickle=yes
    )
    assert isinstance(one, KeyError)
    assert one.remote_traceback == "trace"  # type: ignore[attr-defined]


def test_a_value_has_no_group_in_its_pickle() -> None:
    value = {
        "code": "error",
        "type": "x.Group",
        "message": "m",
        "pickle": pickle.dumps(ExceptionGroup("g", [ValueError(1), KeyError(2)])),
    }
    assert type(exception_from_value(value, allow_pickle=yes)) is RemoteError


class SlottedGroup(ExceptionGroup[Exception]):
    __slots__ = ("extra",)


def test_a_pickled_group_of_a_class_that_can_not_be_mixed() -> None:
    error = exception_from_reply(reply(pickle.dumps(SlottedGroup("g", [ValueError(1), KeyError(2)]))), allow_pickle=yes)
    assert isinstance(error, ExceptionGroup)
    assert not isinstance(error, SlottedGroup)
    check(error)


def test_causes_of_the_original_are_shown_without_a_text() -> None:
    exc = ValueError("v")
    exc.__cause__ = KeyError("why")
    error = exception_from_reply(reply(exc), allow_pickle=never)
    assert "KeyError: 'why'" in "".join(traceback.format_exception(error))
    exc.__cause__ = None
    exc.__suppress_context__ = False
    exc.__context__ = IndexError("context")
    assert "context" in "".join(traceback.format_exception(exception_from_reply(reply(exc), allow_pickle=never)))


def test_texts_are_cut() -> None:
    value = {"code": "error", "type": "t", "message": "m" * 10**6, "traceback": "t" * 10**6, "notes": ("n" * 10**6,) * 100}
    error = exception_from_value(value, allow_pickle=never)
    check(error)
    assert len(error.__notes__) == 64
    assert {len(note) for note in error.__notes__} == {100_000}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=30)
    | st.sampled_from(
        [
            "builtins.ValueError",
            "builtins.OSError",
            "builtins.UnicodeDecodeError",
            "builtins.SyntaxError",
            "builtins.ImportError",
            "builtins.SystemExit",
            "builtins.eval",
            "builtins.BaseException",
            "ValueError('x')",
            "OSError(1, 2, 3, 4, 5)",
            "BlockingIOError(1, 'x', 'y')",
            "KeyError({[]: 1})",
            "TypeError((((((((((1))))))))))",
        ]
    )
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=6).map(tuple)
        | st.dictionaries(scalars.filter(lambda v: v == v), inner, max_size=5)
    ),
    max_leaves=20,
)
fields = {
    "code": st.sampled_from(
        ["error", "closing", "overloaded", "not-allowed", "unknown-op", "cancelled", "limit", "unsafe", "serialization"]
    ),
    "type": scalars,
    "message": scalars,
    "traceback": scalars,
    "mro": st.lists(scalars, max_size=4).map(tuple),
    "args": st.lists(anything, max_size=6).map(tuple),
    "attributes": st.dictionaries(
        st.sampled_from(["errno", "filename", "lineno", "text", "offset", "msg", "object", "start", "name", "code", "add_note"]),
        anything,
    ),
    "errors": st.lists(anything, max_size=3).map(tuple),
    "notes": anything,
    "pickle": anything,
    "reason": anything,
    "limit": anything,
    "value": anything,
    "seen": anything,
    "field": anything,
    "path": anything,
}
values = st.fixed_dictionaries({}, optional={name: strategy | anything for name, strategy in fields.items()})
replies = st.fixed_dictionaries(
    {},
    optional={
        "status": anything,
        "exception": anything,
        "traceback": anything,
        "exception_text": anything,
        "traceback_text": anything,
        "trio-dcore": values | anything,
    },
)


@settings(SOBER, max_examples=200)
@given(values | anything)
@example({"code": "error", "type": "x", "message": "m", "errors": [{"errors": [{}]}] * 3})
def test_any_value_is_an_error_of_ours(value: object) -> None:
    check(exception_from_value(value, allow_pickle=no), refusals=True)


@settings(SOBER, max_examples=200)
@given(replies | anything)
def test_any_reply_is_an_error_of_ours(message: object) -> None:
    check(exception_from_reply(message, allow_pickle=no), refusals=True)


@settings(SOBER, max_examples=200)
@given(st.text(max_size=60) | st.builds("{}({})".format, st.sampled_from(["ValueError", "OSError", "X"]), st.text(max_size=60)))
def test_any_text_is_an_error_of_ours(text: str) -> None:
    check(exception_from_reply(reply(exception_text=text), allow_pickle=never))


@settings(SOBER, max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_error_of_ours(data: bytes) -> None:
    # Not random opcodes that happen to name a callable: those are what trust is about.
    if b"c" in data or b"\x93" in data or b"i" in data:
        return
    check(exception_from_reply(reply(data, exception_text="x"), allow_pickle=yes))


@pytest.mark.parametrize("of", ["builtins.OSError", "builtins.KeyError", "x.Y"])
def test_integers_that_can_not_be_printed(of: str) -> None:
    """Whoever logs the error must not get another one from its repr()."""
    huge = 1 << 20_000
    value = {"type": of, "message": "m", "args": (huge, "b"), "attributes": {"errno": huge, "a": (huge,)}}
    error = exception_from_value(value, allow_pickle=never)
    check(error)
    assert repr(error).endswith("(<int>, 'b')" if of != "x.Y" else "('x.Y: m')")


def test_deep_nesting() -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = {"errors": (deep, deep), "type": "t", "args": (deep,)}
    for message in (deep, {"trio-dcore": deep}, {"exception": deep}):
        error = exception_from_reply(message, allow_pickle=never)
        assert isinstance(error, DcoreError)
    del error, message
    while deep:  # not all at once: freeing is recursive too
        deep = deep["args"][0]
