"""Remote calls that look like method calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from trio_dcore import ConnectionPool, rpc
from trio_dcore.client import PooledRPC, RemoteOp, RemoteStream


def remote() -> Any:
    return rpc("tcp://127.0.0.1:8786")


def test_attributes_and_items_are_ops() -> None:
    there = remote()
    assert isinstance(there.add, RemoteOp)
    assert isinstance(there["add"], RemoteOp)
    assert repr(there.add) == repr(there["add"]) == "<remote op 'add' at tcp://127.0.0.1:8786>"
    assert there.add is there.add  # found, not made, the second time


def test_names_that_are_no_ops() -> None:
    there = remote()
    for name in ("_private", "__len__", "__wrapped__"):
        with pytest.raises(AttributeError, match=r"for an op of that name write remote\["):
            getattr(there, name)
    assert repr(there["_private"]) == "<remote op '_private' at tcp://127.0.0.1:8786>"


@pytest.mark.parametrize("op", ["", 1, None, b"add"])
def test_what_is_no_op(op: Any) -> None:
    there = remote()
    with pytest.raises(TypeError, match="an op is a non-empty str"):
        there[op]()
    with pytest.raises(TypeError, match="an op is a non-empty str"):
        there[op].stream()


def test_arguments_have_names() -> None:
    with pytest.raises(TypeError):
        remote().add(1, 2)


def test_a_proxy_of_a_pool() -> None:
    pool = ConnectionPool()
    there = pool(("127.0.0.1", 8786))
    assert isinstance(there, PooledRPC)
    assert repr(there) == "<PooledRPC tcp://127.0.0.1:8786>"
    assert repr(there.add) == "<remote op 'add' at tcp://127.0.0.1:8786>"
    assert isinstance(there.add.stream(), RemoteStream)


def test_copying_does_not_call_anything() -> None:
    there = ConnectionPool()("tcp://127.0.0.1:8786")
    assert copy.copy(there)._address == there._address
