"""The wrappers: plain data with equality, a readable repr, and no room for anything else."""

from __future__ import annotations

import pickle

import pytest

from trio_dcore.protocol import Pickled, Serialize, Serialized, ToPickle, to_serialize

WRAPPERS = [Serialize, ToPickle]
PARTS = [Serialized, Pickled]


@pytest.mark.parametrize("cls", WRAPPERS)
def test_a_wrapper_holds_its_data_and_compares_by_it(cls: type) -> None:
    assert cls([1]).data == [1]
    assert cls([1]) == cls([1])
    assert cls([1]) != cls([2])
    assert cls(1) != 1
    assert repr(cls([1])) == f"{cls.__name__}([1])"
    assert hash(cls((1, 2))) == hash(cls((1, 2)))
    with pytest.raises(AttributeError):
        cls(1).other = 2


def test_the_two_wrappers_are_different() -> None:
    assert Serialize(1) != ToPickle(1)
    assert len({Serialize(1), ToPickle(1)}) == 2


@pytest.mark.parametrize("cls", WRAPPERS)
def test_a_wrapper_of_unhashable_data_is_unhashable(cls: type) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(cls([]))


def test_to_serialize_is_dasks_name_for_it() -> None:
    assert to_serialize is Serialize


@pytest.mark.parametrize("cls", PARTS)
def test_parts_compare_by_header_and_bytes(cls: type) -> None:
    one = cls({"serializer": "dask"}, [b"abc", memoryview(b"de")])
    assert one == cls({"serializer": "dask"}, [bytearray(b"abc"), b"de"])
    assert one == cls({"serializer": "dask"}, [b"abc", b"de"], trusted=False)
    assert one != cls({"serializer": "pickle"}, [b"abc", b"de"])
    assert one != cls({"serializer": "dask"}, [b"abc"])
    assert one != cls({"serializer": "dask"}, [b"abc", b"dE"])
    assert one != (one.header, one.frames)
    assert one.trusted
    assert not cls({}, [], False).trusted


def test_the_two_kinds_of_parts_are_different() -> None:
    assert Serialized({}, []) != Pickled({}, [])


@pytest.mark.parametrize("cls", PARTS)
def test_parts_are_mutable_and_so_not_hashable(cls: type) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(cls({}, []))
    with pytest.raises(AttributeError):
        cls({}, []).other = 1


def test_the_repr_of_parts_tells_size_and_origin_and_no_contents() -> None:
    assert repr(Serialized({"serializer": "dask"}, [b"abc", memoryview(b"de")])) == "<Serialized 'dask', 2 frames, 5 bytes>"
    assert repr(Serialized({"type-serialized": "list"}, [], False)) == "<Serialized 'list', 0 frames, 0 bytes, untrusted>"
    assert repr(Pickled({"pickled-obj": b"secret"}, [])) == "<Pickled 0 frames, 0 bytes>"


@pytest.mark.parametrize("value", [Serialize([1]), ToPickle((1,)), Serialized({"a": 1}, [b"x"], False), Pickled({}, [b"y"])])
def test_a_pickle_keeps_everything(value: object) -> None:
    copy = pickle.loads(pickle.dumps(value))
    assert copy == value
    assert getattr(copy, "trusted", None) == getattr(value, "trusted", None)
