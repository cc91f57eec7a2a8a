"""One call: request out, answer in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from ..abc import Comm, family_names
from ..comm import BaseComm
from ..errors import (
    CommClosedError,
    HandlerCancelled,
    LocalProtocolError,
    RemoteProtocolError,
    RPCClosed,
    SerializationError,
    ServerClosing,
    UnsafePayload,
)
from ..protocol._context import Buffer
from ..protocol._envelope import ERROR, GOODBYE, KEY, PING, PONG, REPLY, parse_envelope
from ..protocol._remote_errors import exception_from_reply, exception_from_value

if TYPE_CHECKING:
    from ._pool import ConnectionPool

__all__ = ["call", "checked", "closed_error", "map_error", "notify", "send_recv"]


class _NeverStarted(Exception):
    """The server said goodbye: it shuts down and has not started this request."""


async def call(pool: ConnectionPool, address: str, op: str, kwargs: dict[str, Any]) -> Any:
    """Call ``op`` and return its result; see :class:`trio_dcore.rpc`."""
    reply = kwargs.pop("reply", True)
    if not reply:
        return await notify(pool, address, op, kwargs)
    close = kwargs.get("close", False)
    serializers, deserializers = pool.families
    if "serializers" in kwargs or "deserializers" in kwargs or deserializers is not None:
        serializers, deserializers = families(pool, kwargs)
    await checkpoint_if_cancelled()
    said_goodbye = False
    while True:
        comm = None if said_goodbye else pool.reuse(address, op)
        fresh = False
        if comm is None:
            comm, fresh = await pool.acquire(address, op, anew=said_goodbye)
        unsent = None
        try:
            if comm.extension is None:
                unsent = comm.start({"op": op, **kwargs, "reply": True}, serializers)
                if unsent is not None:
                    await comm.finish(unsent)
                    unsent = None
                answer = await _plain_answer(comm, op, deserializers)
            else:
                comm.last_id += 1
                header: dict[str, Any] = {"id": comm.last_id}
                deadline = trio.current_effective_deadline()
                if deadline != math.inf and "deadlines" in comm.extension.features:
                    header["deadline"] = deadline - trio.current_time()
                unsent = comm.start({"op": op, **kwargs, "reply": True, KEY: header}, serializers)
                if unsent is not None:
                    await comm.finish(unsent)
                    unsent = None
                found = await comm.next_head()
                head = None if found is None or found[1] is not None else found[0]
                if type(head) is tuple and len(head) == 3 and head[0] == REPLY and head[1] == comm.last_id:
                    answer = head[2]  # what nearly all answers are
                else:
                    answer = await _enveloped_answer(comm, op, deserializers, found)
        except (SerializationError, UnsafePayload):
            # Ours: nothing was sent.  Or of the answer: it was read whole.  Either way the comm is as before.
            _give_back(pool, comm, close)
            raise
        except (_NeverStarted, CommClosedError, trio.ClosedResourceError) as error:
            never_started = type(error) is _NeverStarted or comm.take_goodbye(comm.last_id)
            pool.discard(comm)
            if pool.closed:
                raise RPCClosed(f"the pool was closed while {op!r} was in flight to {address}") from error
            if never_started:
                if said_goodbye:
                    raise ServerClosing(f"{address} is shutting down and did not start {op!r}") from None
                said_goodbye = True
                continue
            if getattr(error, "nothing_sent", False) and not fresh:
                continue  # it died while it was idle, and nothing of the request left
            raise closed_error(op, address, error) from error
        except trio.Cancelled:
            if unsent is None:
                pool.discard(comm)
            else:
                pool.release(comm)  # which discards it, unless nothing of the request has left
            raise
        except BaseException:
            pool.discard(comm)
            raise
        if isinstance(answer, _Failure):
            _give_back(pool, comm, close or answer.last)
            if type(answer.error) is HandlerCancelled and answer.error.reason == "deadline":
                # Mostly ours, which the other side has noticed first: then our own scope is to have it.
                await checkpoint()
            raise answer.error
        _give_back(pool, comm, close)
        return answer


def families(pool: ConnectionPool, kwargs: dict[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Take ``serializers`` and ``deserializers`` out of a call's keywords; as in Dask, put what the server may use into ``serializers``.

    Returns (families for the request, families accepted in the answer); None for the comm's own.
    """
    own_serializers, own_deserializers = pool.settings.serializers, pool.settings.deserializers
    serializers = family_names("serializers", kwargs.pop("serializers", None))
    deserializers = family_names("deserializers", kwargs.pop("deserializers", None))
    # Dask's order: which families a call sends says nothing about what a pool that was told what to accept accepts.
    for default in (own_deserializers, own_serializers, serializers):
        if deserializers is None:
            deserializers = default
    if deserializers is not None:
        kwargs["serializers"] = deserializers
    return serializers, deserializers


class _Failure:
    """An answer that says that the handler failed; after the last one the server closes the comm."""

    __slots__ = ("error", "last")

    def __init__(self, error: Exception, *, last: bool = False) -> None:
        self.error = error
        self.last = last


def _give_back(pool: ConnectionPool, comm: BaseComm, close: bool) -> None:
    if close:
        pool.discard(comm)
    else:
        pool.release(comm)


async def _plain_answer(comm: BaseComm, op: str, deserializers: Sequence[str] | None) -> Any:
    found = await comm.next_head()
    if found is None:
        raise CommClosedError("it closed the comm without an answer")
    head, frames = found
    answer = head if frames is None else await comm.unpack(frames, deserializers)
    if type(answer) is dict and answer.get("status") == "uncaught-error":
        return _Failure(exception_from_reply(answer, allow_pickle=comm.allows_pickle))
    return answer


async def _enveloped_answer(
    comm: BaseComm, op: str, deserializers: Sequence[str] | None, found: tuple[Any, list[Buffer] | None] | None
) -> Any:
    """The answer to the last request; ``found`` is the first message that came."""
    identity = comm.last_id
    while True:
        if found is None:
            raise CommClosedError("it closed the comm without an answer")
        head, frames = found
        message = head if frames is None else await comm.unpack(frames, deserializers)
        if type(message) is dict:
            return _Failure(map_error(message, comm.allows_pickle), last=True)
        kind, of, value = parse_envelope(message)
        if of > identity:
            raise RemoteProtocolError(f"an answer to request {of} while {identity} is the last")
        if of == identity:
            if kind == REPLY:
                return value
            if kind == ERROR:
                return _Failure(exception_from_value(value, allow_pickle=comm.allows_pickle))
            if kind == PING:
                comm.write_soon((PONG, identity, None))
            elif kind != PONG:
                raise RemoteProtocolError(f"an envelope of kind {kind} in answer to a call of {op!r} that takes one reply")
        elif kind == GOODBYE:
            raise _NeverStarted
        # else it is left over from an earlier request on this comm
        await checkpoint_if_cancelled()  # a read that need not wait delivers no cancellation, and more may be here
        found = await comm.next_head()


def map_error(message: dict[Any, Any], allow_pickle: Callable[[], bool]) -> Exception:
    """The error in a map that came where an envelope belongs: the server couldn't tell which request was meant, and closes."""
    if message.get("status") != "uncaught-error":
        raise RemoteProtocolError("expected an envelope [kind, id, value], got a map that is no error")
    return exception_from_reply(message, allow_pickle=allow_pickle)


async def notify(pool: ConnectionPool, address: str, op: str, kwargs: dict[str, Any]) -> None:
    """Have ``op`` run without an answer; returns when the request is with the kernel."""
    if kwargs.pop("deserializers", None) is not None:
        raise TypeError("deserializers= has no meaning where no answer comes")
    serializers = family_names("serializers", kwargs.pop("serializers", None))
    close = kwargs.get("close", False)
    await checkpoint_if_cancelled()
    said_goodbye = False
    while True:
        comm, fresh = await pool.acquire(address, op, anew=said_goodbye)
        try:
            await comm.put({"op": op, **kwargs, "reply": False}, serializers)
        except (SerializationError, UnsafePayload):
            pool.release(comm)
            raise
        except (CommClosedError, trio.ClosedResourceError) as error:
            dismissed = comm.take_goodbye(comm.last_id + 1)
            pool.discard(comm)
            if pool.closed:
                raise RPCClosed(f"the pool was closed while {op!r} was sent to {address}") from error
            if dismissed and said_goodbye:
                raise ServerClosing(f"{address} is shutting down and did not start {op!r}") from None
            said_goodbye = said_goodbye or dismissed
            if dismissed:
                continue
            if getattr(error, "nothing_sent", False) and not fresh:
                continue
            raise closed_error(op, address, error) from error
        except trio.Cancelled:
            pool.release(comm)  # which discards it, unless nothing of the request has left
            raise
        except BaseException:
            pool.discard(comm)
            raise
        # The handler may run for long, and the next request on this comm would wait for it: use it last.
        if close:
            pool.discard(comm)
        else:
            pool.release(comm, last=True)
        return


def checked(op: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, if they may be such."""
    if "op" in kwargs or "comm" in kwargs or KEY in kwargs:
        raise TypeError(f"'op', 'comm' and {KEY!r} can't be arguments of a call: they have a meaning of their own")
    if type(op) is not str or not op:
        raise TypeError(f"an op is a non-empty str, not {op!r}")
    return kwargs


def closed_error(op: str, address: str, error: BaseException) -> CommClosedError:
    """A CommClosedError that names what was being done."""
    return CommClosedError(f"calling {op!r} at {address}: {error}")


async def send_recv(
    comm: Comm,
    *,
    op: str,
    reply: bool = True,
    close: bool = False,
    serializers: Sequence[str] | None = None,
    deserializers: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Make one plain request on a comm and return its answer (``distributed.core.send_recv``).

    Args:
        comm: from :func:`trio_dcore.connect`; nobody else may use it meanwhile.
        op: the handler's name.
        reply: False returns None at once, and the handler runs without an answer.
        close: have the server close the connection after its answer.
        serializers: families for ``Serialize`` payloads of the request.
        deserializers: families for those of the answer, which the server is told; by default those that the comm was made with, and
            if it was made without, ``serializers``.
        **kwargs: the handler's arguments.

    Cancellation: closes the comm, which cancels the handler at a trio_dcore server.

    Raises:
        RemoteError: what the handler raised; the comm is usable.
        CommClosedError: the comm ended or broke.
        SerializationError, UnsafePayload: the request can't be sent, or the answer can't be read; the comm is usable.
    """
    if not isinstance(comm, BaseComm):
        raise LocalProtocolError(f"send_recv() needs a comm from connect(), not {comm!r}")
    request = {"op": op, **kwargs, "reply": reply}
    if close:
        request["close"] = True
    if deserializers is None:
        own = comm.settings.deserializers
        deserializers = serializers if own is None else own
    if deserializers is not None:
        request["serializers"] = tuple(deserializers)
    answer = None
    try:
        await comm.write(request, on_error="raise", serializers=serializers)
        if reply:
            answer = await _plain_answer(comm, op, deserializers)
    except (SerializationError, UnsafePayload):
        raise
    except (CommClosedError, trio.ClosedResourceError) as error:
        comm.cut()
        raise closed_error(op, comm.peer_address, error) from error
    except BaseException:
        comm.cut()
        raise
    if close:
        await comm.aclose()
    if isinstance(answer, _Failure):
        raise answer.error
    return answer
