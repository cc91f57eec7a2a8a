"""The functions on addresses that ask a name server, as an asyncio program awaits them; the others have no flavour."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .. import comm
from ._carry import run_in_trio
from ._guest import acquire_portal

__all__ = ["get_local_address_for", "resolve_address"]


async def resolve_address(address: str) -> str:
    """Replace a host name in an address by its IP address; see :func:`trio_dcore.resolve_address`."""
    return await _ask(comm.resolve_address, address)


async def get_local_address_for(address: str) -> str:
    """Return an address to listen on that the machine at ``address`` can reach; see :func:`trio_dcore.get_local_address_for`."""
    return await _ask(comm.get_local_address_for, address)


async def _ask(function: Callable[[str], Awaitable[str]], address: str) -> str:
    portal = await acquire_portal()
    lease = portal.lease()
    try:
        return await run_in_trio(portal, function, address)
    finally:
        await lease.aclose()
