"""Pickles of exceptions, with real tblib at the other end."""

from __future__ import annotations

import copyreg
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from trio_dcore.protocol._error_pickles import MAX_PICKLE, dump, load


class Custom(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__(left + right)
        self.left = left


class CustomFile(OSError):
    def __init__(self, name: str) -> None:
        super().__init__(2, "no such file", name)


class CustomUnicode(UnicodeDecodeError):
    def __init__(self, data: bytes) -> None:
        super().__init__("utf-8", data, 0, 1, "bad")
        self.note = "n"


class Frozen(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__("frozen")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("frozen")


class Stateful(Exception):
    def __init__(self, left: int = 0) -> None:
        super().__init__("stateful")
        self.left = left

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        self.restored = True


class Exits:
    def __reduce__(self) -> Any:
        return exits, ()


def exits() -> None:
    raise SystemExit(3)


@pytest.fixture
def dispatch_table() -> Iterator[None]:
    before = dict(copyreg.dispatch_table)
    yield
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


def globals_of(data: bytes) -> set[str]:
    """The modules that a pickle names."""
    found = {
        str(arg).partition(".")[0] for op, arg, _ in pickletools.genops(data) if isinstance(arg, str) and "UNICODE" in op.name
    }
    return found & {"tblib", "trio_dcore", "copyreg"}


@pytest.mark.parametrize("exc", [ValueError("v"), Custom(1, 2), CustomFile("f"), OSError(2, "no", "f"), KeyError("k")], ids=repr)
def test_there_and_back_without_help(exc: Exception) -> None:
    exc.add_note("a note")
    data = dump(exc)
    assert data is not None
    assert globals_of(data) == set()
    for again in (load(data), pickle.loads(data)):
        assert isinstance(again, type(exc))
        assert type(again) is type(exc)
        assert (again.args, str(again), vars(again)) == (exc.args, str(exc), vars(exc))
        assert getattr(again, "filename", None) == getattr(exc, "filename", None)


def test_a_class_that_pickles_its_own_way_is_left_to_it() -> None:
    data = dump(Stateful(1))
    assert data is not None
    assert getattr(load(data), "restored", False)


def test_what_does_not_pickle() -> None:
    assert dump(ValueError(lambda: 0)) is None
    assert dump(Exits()) is not None
    assert load(dump(Exits()) or b"") is None


def test_the_size_is_bounded_before_the_memory_is_taken() -> None:
    assert dump(ValueError("x" * MAX_PICKLE)) is None
    assert dump(ValueError("x" * 1000), 500) is None
    assert dump(ValueError(*range(MAX_PICKLE))) is None
    assert len(dump(ValueError("x" * (MAX_PICKLE - 500))) or b"") > MAX_PICKLE - 500


@pytest.mark.usefixtures("dispatch_table")
def test_pickles_of_tblib() -> None:
    import tblib.pickling_support

    def fail(exc: Exception) -> Exception:
        try:
            raise exc
        except Exception as caught:
            return caught

    for make in (
        lambda: ValueError("v"),
        lambda: Custom(1, 2),
        lambda: CustomFile("f"),
        lambda: CustomUnicode(b"\xff"),
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        lambda: SyntaxError("bad", ("f", 1, 2, "a b", 1, 3)),
        lambda: Frozen(1, 2),
        lambda: ImportError("i", name="n"),
    ):
        exc = fail(make())
        if not isinstance(exc, Frozen):
            exc.add_note("a note")
        BaseException.__setattr__(exc, "__cause__", fail(KeyError("cause")))
        BaseException.__setattr__(exc, "__context__", fail(IndexError("context")))
        tblib.pickling_support.install(exc)
        data = pickle.dumps(exc)
        assert "tblib" in globals_of(data)
        again = load(data)
        assert isinstance(again, type(exc))
        assert (again.args, str(again)) == (exc.args, str(exc))
        assert vars(again) == vars(exc)
        assert (again.__traceback__, again.__suppress_context__) == (None, True)
        assert repr(again.__cause__) == "KeyError('cause')"
        assert repr(again.__context__) == "IndexError('context')"
        ours = dump(exc)
        assert ours is not None
        assert globals_of(ours) == set()


@pytest.mark.usefixtures("dispatch_table")
def test_a_pickled_traceback_and_frame_are_nothing() -> None:
    import tblib
    import tblib.pickling_support

    try:
        raise ValueError("v")
    except ValueError as exc:
        tb = exc.__traceback__
    tblib.pickling_support.install()
    assert load(pickle.dumps(tb)) is None
    kind = type(load(pickle.dumps(tblib.Traceback(tb))))
    assert kind.__module__ == "trio_dcore.protocol._error_pickles"
    assert type(load(b"ctblib\nAnythingNew\n(I1\nI2\ntR.")) is kind


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_pickles_of_older_versions_of_tblib(count: int) -> None:
    """They have fewer arguments; by hand, since only one version is installed."""
    arguments = (ValueError, ("v",), KeyError("cause"), None, None, True, ["a note"])[:count]

    class AsTblib:
        def __reduce__(self) -> Any:
            return stand_in, arguments

    data = pickle.dumps(AsTblib(), protocol=0)
    name = f"c{stand_in.__module__}\n{stand_in.__qualname__}\n".encode()
    assert name in data
    again = load(data.replace(name, b"ctblib.pickling_support\nunpickle_exception\n"))
    assert repr(again) == "ValueError('v')"
    assert isinstance(again, ValueError)
    assert repr(again.__cause__) == "KeyError('cause')"
    assert getattr(again, "__notes__", None) == (["a note"] if count == 7 else None)


def stand_in(*args: object) -> None:
    raise AssertionError


def test_a_call_of_a_stand_in_with_nonsense_is_no_exception() -> None:
    for arguments in (b"(t", b"(NNNNt", b"(I1\nI2\nI3\nI4\nI5\nI6\nI7\nt", b"(cbuiltins\nint\n(tNNt"):
        for name in (b"unpickle_exception", b"unpickle_exception_with_attrs", b"unpickle_traceback"):
            assert not isinstance(load(b"ctblib.pickling_support\n" + name + b"\n" + arguments + b"R."), BaseException)


def test_tblib_is_not_imported() -> None:
    """Also not if it is there."""
    data = b"ctblib.pickling_support\nunpickle_exception\n(cbuiltins\nValueError\n(Vv\ntNNtR."
    code = (
        "import sys\n"
        "from trio_dcore.protocol._error_pickles import load\n"
        f"print(repr(load({data!r})), [m for m in sys.modules if m.startswith('tblib')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split("\n")[0] == "ValueError('v') []"
