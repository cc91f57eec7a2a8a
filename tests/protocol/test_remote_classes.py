"""The classes that are a RemoteError and another exception at once."""

from __future__ import annotations

import abc
import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any, ClassVar, Generic, TypeVar, cast

import pytest

from trio_dcore.protocol._errors import DcoreError, LimitExceeded, RemoteError, RemoteTraceback, ServerClosing, UnknownOp
from trio_dcore.protocol._remote_classes import BUILTINS, adapted, build, class_name, fields_of, group_message, restore, stood_for

T = TypeVar("T")


class Plain(ValueError):
    pass


class Picky(Exception):
    def __new__(cls, left: int, right: int) -> Picky:
        assert left < right
        return super().__new__(cls, left, right)

    def __init__(self, left: int, right: int) -> None:
        super().__init__(left + right)


class Odd(Exception):
    """Has an opinion on everything."""

    def __str__(self) -> str:
        raise RuntimeError("str")

    __repr__ = __str__

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")

    def __reduce__(self) -> Any:
        raise RuntimeError("reduce")

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RuntimeError("reduce_ex")

    def __setstate__(self, state: object) -> None:
        raise RuntimeError("setstate")

    @property
    def message(self) -> str:
        return "its own"

    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("args")


class WithRegistry(Exception):
    known: ClassVar[dict[str, type]] = {}
    code = "base"

    def __init_subclass__(cls, **kwargs: object) -> None:
        WithRegistry.known[cls.code] = cls


class NotFound(WithRegistry):
    code = "not found"


class Meta(type):
    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Meta:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)


class WithMeta(Exception, metaclass=Meta):
    pass


class Slotted(Exception):
    __slots__ = ("x",)


class EmptySlots(Exception):
    __slots__ = ()


class Abstract(Exception, abc.ABC):
    @abc.abstractmethod
    def f(self) -> None: ...


class Of(Exception, Generic[T]):
    pass


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Layout(OSError, KeyError):
    pass


class MyLimit(LimitExceeded):
    pass


class MyClosing(ServerClosing):
    pass


class Stop(StopIteration):
    pass


def mixed(kind: type[BaseException]) -> Any:
    cls = adapted(kind)
    assert cls is not None
    assert issubclass(cls, RemoteError)
    assert issubclass(cls, kind)
    return cls


@pytest.mark.parametrize("kind", sorted(set(BUILTINS.values()), key=lambda kind: kind.__name__))
def test_every_builtin_exception_can_be_mixed(kind: type[Exception]) -> None:
    error = build(mixed(kind), ("a",), {})
    assert isinstance(error, RemoteError)
    assert isinstance(error, kind)
    assert error.args == ("a",)
    assert repr(error) == f"RemoteError[{kind.__name__}]('a')"


def test_the_table_has_nothing_that_steers_or_ends() -> None:
    for name in (
        "SystemExit",
        "StopIteration",
        "StopAsyncIteration",
        "BaseException",
        "Exception",
        "ExceptionGroup",
        "eval",
        "object",
    ):
        assert f"builtins.{name}" not in BUILTINS
    assert BUILTINS["builtins.IOError"] is OSError


def test_classes_are_cached() -> None:
    assert mixed(Plain) is mixed(Plain)
    assert mixed(mixed(Plain)) is mixed(Plain)
    assert class_name(mixed(Plain)) == f"trio_dcore.RemoteError[{__name__}.Plain]"


def test_the_cache_is_bounded() -> None:
    kind: Any = type("Passing", (ValueError,), {})
    mixed(kind)
    gone = weakref.ref(kind)
    del kind
    for n in range(256):
        mixed(type(f"Other{n}", (ValueError,), {}))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", [Plain, Picky, Odd, NotFound, EmptySlots, Abstract, Of, Frozen, Layout, MyLimit, DcoreError])
def test_classes_that_can_be_mixed(kind: type[Exception]) -> None:
    error = build(mixed(kind), ("a", 1), {}, {"code": 3})
    assert cast(Any, RemoteError).args.__get__(error) == ("a", 1)
    error.type_name = "over.there"  # type: ignore[attr-defined]
    error.message = "what it said"  # type: ignore[attr-defined]
    assert str(error) == "what it said"
    assert repr(error).startswith("RemoteError[")
    assert vars(error)["code"] == 3
    with pytest.raises(kind) as caught:
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "kind",
    [
        Exception,
        BaseException,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        StopIteration,
        StopAsyncIteration,
        Stop,
        WithMeta,
        Slotted,
        RemoteError,
        UnknownOp,
        ServerClosing,
        MyClosing,
        RemoteTraceback,
    ],
)
def test_classes_that_can_not_or_should_not_be_mixed(kind: type[BaseException]) -> None:
    assert adapted(kind) is None


def test_a_type_that_can_not_be_made_is_no_error() -> None:
    kind: Any = type("Named", (ValueError,), {})
    kind.__qualname__ = "with\0null"
    assert adapted(kind) is None


def test_a_registry_of_subclasses_does_not_see_ours() -> None:
    mixed(NotFound)
    assert WithRegistry.known == {"not found": NotFound}


def test_a_metaclass_does_not_see_ours() -> None:
    assert adapted(WithMeta) is None
    assert Meta.made == ["WithMeta"]


def test_fields_in_c() -> None:
    exc = OSError(2, "no", "file", None, "other")
    assert fields_of(exc) == {"errno": 2, "strerror": "no", "filename": "file", "filename2": "other"}
    error = build(mixed(FileNotFoundError), (2, "no"), fields_of(exc))
    assert fields_of(error) == fields_of(exc)
    assert str(build(FileNotFoundError, (2, "no"), fields_of(exc))) == "[Errno 2] no: 'file' -> 'other'"
    assert fields_of(ValueError("v")) == {}
    assert fields_of(OSError("text")) == {}
    with pytest.raises(TypeError):
        build(mixed(UnicodeDecodeError), (), {"start": "x"})


def test_groups() -> None:
    cls = mixed(ExceptionGroup)
    leaves = [ValueError(1), KeyError(2)]
    error = build(cls, ("g", leaves), {})
    assert isinstance(error, ExceptionGroup)
    assert error.exceptions == tuple(leaves)
    assert group_message(error) == "g"
    with pytest.raises((TypeError, ValueError)):
        build(cls, ("g", []), {})


@pytest.mark.parametrize("kind", [Plain, Picky, Odd, NotFound, Frozen, MyLimit, KeyError, FileNotFoundError])
def test_pickle_and_copy(kind: type[Exception]) -> None:
    error: Any = build(mixed(kind), ("a", 1), {"errno": 5} if kind is FileNotFoundError else {}, {"code": 3})
    vars(error).update(type_name="t", message="m", remote_traceback="trace", original=lambda: 0)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert vars(again) == {"code": 3, "type_name": "t", "message": "m", "remote_traceback": "trace"}
        assert str(again) == "m"
        assert repr(again) == repr(error)
        assert getattr(again, "errno", None) == getattr(error, "errno", None)
        assert "trace" in str(again.__cause__)


def test_a_plain_remote_error_can_be_pickled() -> None:
    error = RemoteError("text")
    assert repr(pickle.loads(pickle.dumps(error))) == "RemoteError('text')"
    error.original = cast(Any, lambda: 0)
    error.message = "m"
    error.remote_traceback = "trace"
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.original, str(again)) == ("m", None, "m")
    assert isinstance(again.__cause__, RemoteTraceback)
    cause = KeyError("mine")
    again.__cause__ = cause
    again.__setstate__({})
    assert again.__cause__ is cause


def test_a_class_that_has_become_unfit_is_restored_as_plain() -> None:
    assert type(restore(Slotted, ("a",), {})) is RemoteError


def test_what_an_error_stands_for() -> None:
    error: Any = build(mixed(OSError), (2, "no"), {"errno": 2, "strerror": "no"}, {"code": 3})
    vars(error).update(type_name="t", message="m")
    meant = stood_for(error)
    assert type(meant) is OSError
    assert (meant.errno, vars(meant)) == (2, {"code": 3})
    error.original = KeyError("k")
    assert stood_for(error) is error.original
    plain = UnknownOp("u")
    assert stood_for(plain) is plain


def test_names() -> None:
    assert class_name(ValueError) == "builtins.ValueError"
    assert class_name(LimitExceeded) == "trio_dcore.LimitExceeded"
    assert class_name(Plain) == f"{__name__}.Plain"
    assert class_name(type("X", (), {"__module__": None})) == "?.X"
