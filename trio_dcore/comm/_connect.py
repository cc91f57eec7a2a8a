"""connect(): one comm to one address, with retries, back-off and one timeout for all of it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import trio

from .._security import Security
from ..abc import OFFLOAD, Comm, CommSettings, check_timeout
from ..errors import AddressError, CommClosedError, ConnectError, LimitExceeded, LocalProtocolError, RemoteProtocolError
from ..protocol._limits import Limits
from ._addressing import AddressLike, coerce_to_address, parse_address
from ._base import BaseComm
from ._registry import get_transport

__all__ = ["check_encryption", "connect", "connect_with"]

# The longest pause before the k-th attempt is 10 ms · 2^k, as in distributed.comm.core.connect.
_FIRST_PAUSE = 0.01


async def connect(
    address: AddressLike,
    *,
    security: Security | None = None,
    limits: Limits | None = None,
    deserialize: bool = True,
    timeout: float | None = 30.0,
    serializers: Sequence[str] | None = None,
    deserializers: Sequence[str] | None = None,
    compression: str | None = None,
    offload: int | None = OFFLOAD,
) -> Comm:
    """Connect to an address and exchange handshakes.

    Args:
        address: e.g. ``"tcp://127.0.0.1:8786"``; without a scheme it is ``tcp://``.  Also ``(host, port)``.
        security: whom to trust, and what ``tls://`` uses; the default trusts this process and those of this user on this machine.
        limits: what is accepted of the peer.
        deserialize: False leaves ``Serialize`` payloads as ``Serialized`` objects, to be passed on unchanged.
        timeout: seconds for connecting *and* the handshake, all attempts together; None for ever.
        serializers: families for ``Serialize`` payloads, in order of preference; default ``("dask", "pickle")``.
        deserializers: families accepted in ``Serialize`` payloads; default all.
        compression: of the payloads that we send.  None is none.  The name of a codec ("lz4", "snappy", "zlib", "zstd") means that one,
            wherever the peer is and whatever it would like, since every receiver obeys what the payload says.  "auto" is Dask's
            rule: lz4, or else snappy, if it is installed at both ends and both ask for it, and never on one host.
        offload: bytes of work from which on a message is encoded or decoded in a worker thread; None is never.

    An attempt that fails is repeated after a random pause of up to 10 ms · 2^k until the time is up (as
    ``distributed.comm.core.connect``).  A handshake that fails or takes longer than ``Limits.handshake_timeout`` is not repeated.

    Cancellation: leaves nothing behind.

    Raises:
        ConnectError: no comm could be made in time; ``__cause__`` is the last attempt's error.
        AddressError: the address is no address.
        LocalProtocolError: the address and the settings contradict each other.
    """
    settings = CommSettings.of(
        security, limits, deserialize, serializers, deserializers, compression=compression, offload=offload
    )
    return await connect_with(coerce_to_address(address), settings, check_timeout(timeout))


def check_encryption(scheme: str, settings: CommSettings) -> None:
    """Refuse a scheme that isn't encrypted where encryption is required."""
    if settings.security.require_encryption and not get_transport(scheme).encrypted:
        raise LocalProtocolError(f"{scheme}:// isn't encrypted, and Security(require_encryption=True) is set")


async def connect_with(address: str, settings: CommSettings, timeout: float | None) -> BaseComm:
    """:func:`connect` for an address from :func:`coerce_to_address` and settings made once."""
    scheme, location = parse_address(address)
    check_encryption(scheme, settings)
    transport = get_transport(scheme)
    last_error: Exception | None = None
    attempt = 0
    give_up = math.inf if timeout is None else trio.current_time() + timeout
    while True:
        # A first attempt that hangs (a lost SYN) must not use up all the time (as Dask's connect).
        patience = timeout / 5 if attempt == 0 and timeout is not None else math.inf
        comm = None
        with trio.CancelScope(deadline=min(give_up, trio.current_time() + patience)) as scope:
            try:
                comm = await transport.connect(location, settings)
            except AddressError:
                raise
            except OSError as error:
                last_error = error
            if comm is not None:
                if not isinstance(comm, BaseComm):
                    comm.abort()
                    raise TypeError(f"the transport for {scheme}:// made {comm!r}, which is no trio_dcore.comm.BaseComm")
                limit = settings.limits.handshake_timeout
                scope.deadline = give_up if limit is None else min(give_up, trio.current_time() + limit)
                comm.asking = True
                last_error = TimeoutError("the peer accepted the connection and stayed silent")
                await _handshake(comm, address)
                return comm
        if comm is not None or trio.current_time() >= give_up:
            break
        if last_error is None:
            last_error = TimeoutError(f"no answer within {patience:.3g} s")
        attempt += 1
        with trio.CancelScope(deadline=give_up) as pause:
            await trio.sleep(random.uniform(0, _FIRST_PAUSE * 2 ** min(attempt, 10)))
        if pause.cancelled_caught:
            break
    if comm is not None and scope.deadline < give_up:
        seconds, setting = settings.limits.handshake_timeout, "Limits.handshake_timeout"
    else:
        seconds, setting = timeout, "timeout"
    why = last_error or "no answer"
    raise ConnectError(f"could not connect to {address} within {seconds} s ({setting}): {why}") from last_error


async def _handshake(comm: BaseComm, address: str) -> None:
    try:
        await comm.handshake()
    except (CommClosedError, RemoteProtocolError, LimitExceeded) as error:
        comm.abort()
        raise ConnectError(f"could not connect to {address}: the handshake failed: {error}") from error
    except BaseException:
        comm.abort()
        raise
