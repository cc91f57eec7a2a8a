"""Pickles: what is chosen when, out-of-band buffers, hooks, and reading class references without loading them."""

from __future__ import annotations

import pickle
import sys
import threading
import types
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from distributed.protocol import pickle as stock_pickle
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import SerializationError
from trio_dcore.protocol import _registry as registry
from trio_dcore.protocol._pickle import class_pickle, class_reference, pickle_dumps, pickle_loads
from trio_dcore.protocol._registry import register_serialization


class Plain:
    def __init__(self, value: object) -> None:
        self.value = value


class Unpicklable:
    """Holds something that pickle refuses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()


@pytest.fixture
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_classes", "_names", "_references"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.setattr(registry, "_custom", False)


@pytest.fixture
def main_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickle finds in ``__main__``, as if it stood in the user's script."""
    cls = type("Scripted", (), {"__module__": "__main__", "shout": lambda self: "HA"})
    monkeypatch.setattr(sys.modules["__main__"], "Scripted", cls, raising=False)
    return cls


class TestDumps:
    @pytest.mark.parametrize("value", [None, 5, "x", (1, [2, {3}]), OrderedDict(a=1), len, Path("x")], ids=repr)
    @pytest.mark.parametrize("protocol", [4, 5])
    def test_as_stock(self, value: object, protocol: int) -> None:
        data, buffers = pickle_dumps(value, protocol=protocol)
        assert data == stock_pickle.dumps(value, protocol=protocol)
        assert buffers == []
        assert pickle_loads(data) == value

    def test_buffers_are_the_objects_own_memory_in_order(self) -> None:
        first, second = np.arange(4), np.asfortranarray(np.ones((2, 3)))
        data, buffers = pickle_dumps({"a": first, "b": second})
        expected: list[Any] = []
        assert data == stock_pickle.dumps({"a": first, "b": second}, buffer_callback=expected.append)
        assert [bytes(buffer) for buffer in buffers] == [bytes(buffer.raw()) for buffer in expected]
        assert all(buffer.ndim == 1 and buffer.format == "B" for buffer in buffers)
        assert np.shares_memory(np.frombuffer(buffers[0], "u1"), first)
        assert np.shares_memory(np.frombuffer(buffers[1], "u1"), second)
        back = pickle_loads(data, buffers)
        assert np.shares_memory(back["a"], first)
        assert back["b"].tolist() == second.tolist()

    def test_protocol_4_is_in_band(self) -> None:
        data, buffers = pickle_dumps(np.arange(4), protocol=4)
        assert data[:2] == b"\x80\x04"
        assert buffers == []

    def test_lambda_goes_by_cloudpickle(self) -> None:
        data, _ = pickle_dumps(lambda x: x + 1)
        assert pickle_loads(data)(1) == 2
        assert stock_pickle.loads(data)(1) == 2

    def test_buffers_of_a_failed_attempt_are_dropped(self) -> None:
        values = np.arange(5)
        data, buffers = pickle_dumps((values, lambda: values.sum()))
        loaded, function = pickle_loads(data, buffers)
        assert len(buffers) <= 2
        assert loaded.tolist() == values.tolist()
        assert function() == 10

    def test_class_of_main_goes_by_value(self, main_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
        data, _ = pickle_dumps(main_class())
        monkeypatch.delattr(sys.modules["__main__"], "Scripted")
        # As at a peer, where that class doesn't exist.
        assert pickle_loads(data).shout() == "HA"

    @pytest.mark.parametrize(
        "value", [b"__main__" * 200, "__main__" * 200, np.frombuffer(b"__main__" * 200, "u1")], ids=["bytes", "str", "array"]
    )
    def test_bulk_data_that_says_main_is_just_data(self, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cloudpickle, "dumps", lambda *args: pytest.fail("cloudpickle is slow for this"))
        assert np.array_equal(pickle_loads(pickle_dumps(value, protocol=4)[0]), value)

    def test_short_text_that_says_main_goes_by_cloudpickle_as_in_stock(self) -> None:
        assert pickle_dumps("__main__")[0] == stock_pickle.dumps("__main__")

    def test_module_registered_with_cloudpickle_goes_by_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("only_here")
        exec("class Thing:\n    def shout(self):\n        return 'HA'", module.__dict__)
        monkeypatch.setitem(sys.modules, "only_here", module)
        cloudpickle.register_pickle_by_value(module)
        try:
            data, _ = pickle_dumps(module.Thing())
            text, _ = pickle_dumps("only_here" * 200)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
        monkeypatch.delitem(sys.modules, "only_here")
        assert pickle_loads(data).shout() == "HA"
        assert pickle_loads(text) == "only_here" * 200

    def test_without_cloudpickle_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "cloudpickle")
        assert pickle_loads(pickle_dumps(Path("x"))[0]) == Path("x")

    def test_without_numpy_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "numpy")
        value = ["__main__" * 200]
        assert pickle_loads(pickle_dumps(value)[0]) == value

    def test_failure_names_the_type(self) -> None:
        with pytest.raises(SerializationError, match=r"type lock can't be pickled: cannot pickle '_thread\.lock'") as caught:
            pickle_dumps(threading.Lock())
        assert isinstance(caught.value.__cause__, TypeError)

    def test_too_deep(self) -> None:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        with pytest.raises(SerializationError):
            pickle_dumps(value)

    @pytest.mark.usefixtures("_fresh_registry")
    def test_registered_class_inside_another_object(self) -> None:
        register_serialization(
            Unpicklable,
            lambda value: ({"kind": "test"}, [value.name.encode(), memoryview(b"ab"), bytearray(b"c")]),
            rebuild,
        )
        data, buffers = pickle_dumps([Unpicklable("deep"), Plain(3)])
        assert buffers == []
        thing, plain = pickle_loads(data)
        assert (thing.name, plain.value) == ("deep-abc", 3)

    @pytest.mark.usefixtures("_fresh_registry")
    def test_registered_class_does_not_hide_what_cannot_be_pickled(self) -> None:
        register_serialization(Unpicklable, lambda value: ({}, []), rebuild)
        with pytest.raises(SerializationError, match="lock"):
            pickle_dumps([threading.Lock()])


def rebuild(header: dict[str, Any], frames: list[Any]) -> Unpicklable:
    assert header == {"kind": "test"}
    return Unpicklable(f"{bytes(frames[0]).decode()}-{bytes(frames[1]).decode()}{bytes(frames[2]).decode()}")


class TestLoads:
    def test_from_any_memory(self) -> None:
        data = pickle.dumps([1, 2])
        for form in (data, bytearray(data), memoryview(data)):
            assert pickle_loads(form) == [1, 2]

    @pytest.mark.parametrize(
        ("data", "cause"),
        [
            (b"", EOFError),
            (b"garbage", pickle.UnpicklingError),
            (pickle.dumps([1, 2])[:-3], pickle.UnpicklingError),
            (b"cno_such_module\nx\n.", ModuleNotFoundError),
        ],
    )
    def test_failure_has_the_cause(self, data: bytes, cause: type[Exception]) -> None:
        with pytest.raises(SerializationError, match="a pickle can't be loaded: " + cause.__name__) as caught:
            pickle_loads(data)
        assert isinstance(caught.value.__cause__, cause)

    def test_missing_buffers(self) -> None:
        data, _ = pickle_dumps(np.arange(4))
        with pytest.raises(SerializationError):
            pickle_loads(data, [])

    def test_hook_sees_every_global_and_may_replace_it(self) -> None:
        seen = []

        def hook(module: str, name: str) -> Any:
            seen.append((module, name))
            return Plain if name == "no_such_thing" else NotImplemented

        array_ = np.arange(3)
        code = b"(cbuiltins\nlen\nccollections\nno_such_thing\nl."
        assert pickle_loads(code, find_class=hook) == [len, Plain]
        assert seen == [("builtins", "len"), ("collections", "no_such_thing")]
        data, buffers = pickle_dumps(array_)
        assert pickle_loads(data, buffers, find_class=hook).tolist() == [0, 1, 2]

    def test_hook_may_refuse(self) -> None:
        def hook(module: str, name: str) -> Any:
            raise KeyError(name)

        with pytest.raises(SerializationError) as caught:
            pickle_loads(pickle.dumps(len), find_class=hook)
        assert isinstance(caught.value.__cause__, KeyError)


class Outer:
    class Inner:
        pass


class TestClassReferences:
    @pytest.mark.parametrize("protocol", [4, 5])
    @pytest.mark.parametrize(
        ("cls", "name"),
        [
            (bytes, "builtins.bytes"),
            (bytearray, "builtins.bytearray"),
            (memoryview, "builtins.memoryview"),
            (array, "array.array"),
            (np.ndarray, "numpy.ndarray"),
            (np.matrix, "numpy.matrix"),
            (np.ma.MaskedArray, "numpy.ma.MaskedArray"),
            (type(np.ma.masked), "numpy.ma.core.MaskedConstant"),
            (Path, "pathlib.Path"),
        ],
    )
    def test_of_known_classes(self, cls: type, name: str, protocol: int) -> None:
        assert class_reference(pickle.dumps(cls, protocol)) == name

    def test_without_memo_and_frame(self) -> None:
        assert class_reference(b"\x80\x04\x8c\x08builtins\x8c\x05bytes\x93.") == "builtins.bytes"

    @pytest.mark.parametrize(
        "data",
        [
            None,
            "text",
            b"",
            pickle.dumps(bytes, 2),
            pickle.dumps(bytes, 3),
            pickle.dumps(bytes) + b".",
            pickle.dumps(bytes)[:-1],
            pickle.dumps(len("x")) + b" " * 20,
            pickle.dumps([bytes]),
            pickle.dumps(Path("x")),
            pickle.dumps("builtins.bytes"),
            b"\x80\x05\x95\x17\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x05bytes\x94\x93\x94.",
            b"\x80\x05\x8c\x08builtin\xff\x94\x8c\x05bytes\x94\x93\x94.",
            b"\x80\x05\x8c\xffbuiltins\x94\x8c\x05bytes\x94\x93\x94.",
            b"\x80\x05X\x08\x00\x00\x00builtins\x94\x8c\x05bytes\x94\x93\x94.",
            pickle.dumps(bytes) * 100,
        ],
    )
    def test_anything_else_is_none(self, data: object) -> None:
        assert class_reference(data) is None

    @given(st.binary(max_size=60))
    def test_never_raises(self, tail: bytes) -> None:
        class_reference(b"\x80\x05\x8c\x08builtins\x94" + tail)

    @given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
    def test_what_is_accepted_is_a_reference(self, module: str, name: str) -> None:
        text = [part.encode()[:255] for part in (module, name)]
        code = b"\x80\x05" + b"".join(b"\x8c" + bytes([len(part)]) + part + b"\x94" for part in text) + b"\x93\x94."
        assert class_reference(code) in (f"{module}.{name}", None)

    def test_written_as_stock_does(self) -> None:
        for cls in (bytes, np.ndarray, Outer, Outer.Inner):
            data, by_name = class_pickle(cls)
            assert data == stock_pickle.dumps(cls)
            assert by_name

    def test_local_class_goes_by_value(self) -> None:
        class Local:
            pass

        data, by_name = class_pickle(Local)
        assert not by_name
        assert pickle_loads(data).__name__ == "Local"

    def test_class_of_main_goes_by_value(self, main_class: type) -> None:
        data, by_name = class_pickle(main_class)
        assert not by_name
        assert class_reference(data) is None
