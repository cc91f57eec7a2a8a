"""``trio-dcore call``, ``stream`` and ``ping``: the client's side."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import trio

from .. import coerce_to_address, rpc
from ._errors import FAILED, USAGE, CliError, explained
from ._output import OutputClosed, RowPrinter, parse_arguments, print_line, print_value, to_json
from ._progress import shown_progress, size
from ._security import security_of

__all__ = ["run_call", "run_ping", "run_stream"]

# Whoever types a command soon wants to know that nobody listens there; connect() itself goes on trying for 30 s.
_CONNECT = 5.0


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    if not args.op:
        raise CliError("OP is empty: give the name of a handler", USAGE)
    arguments = parse_arguments(args.arguments)
    for name in ("op", "comm", "reply", "close", "serializers", "deserializers"):
        if name in arguments:
            raise CliError(f"argument {name!r} can't be passed on: the protocol uses that name itself", USAGE)
    return arguments


def _connect_timeout(timeout: float) -> float:
    """Seconds for connecting, which end before ``timeout`` does: "connection refused" says more than "timed out"."""
    return min(_CONNECT, 0.9 * timeout)


def _remote(args: argparse.Namespace) -> Callable[[], rpc]:
    """What makes the client; whatever is wrong with the options shows now."""
    security = security_of(args)
    return lambda: rpc(coerce_to_address(args.address), security=security, timeout=_connect_timeout(args.timeout))


def run_call(args: argparse.Namespace) -> int:
    """Call a handler and print what it returns."""
    arguments = _arguments(args)
    connected = _remote(args)

    async def call() -> Any:
        with trio.fail_after(args.timeout):
            async with connected() as remote, shown_progress(lambda waited: _traffic(remote, waited), wanted=True):
                return await remote[args.op](**arguments)

    with explained(show_traceback=args.traceback):
        result = trio.run(call)
    try:
        print_value(result, args.format)
    except OutputClosed:
        return FAILED  # the result was asked for and has not been seen
    return 0


def _traffic(remote: rpc, waited: float) -> str:
    pool = remote.pool
    if not pool.bytes_read:
        return f"{waited:.0f} s: connecting to {remote.address}"
    return f"{waited:.0f} s: sent {size(pool.bytes_written)}, received {size(pool.bytes_read)}"


def run_stream(args: argparse.Namespace) -> int:
    """Print the items of a handler's stream as they come."""
    arguments = _arguments(args)
    connected = _remote(args)
    count = math.inf if args.count is None else args.count

    printed = 0
    rows = RowPrinter(args.format)

    def traffic(waited: float) -> str:
        return f"{waited:.0f} s: {printed} item{'s' * (printed != 1)}"

    async def stream() -> None:
        nonlocal printed
        with trio.fail_after(args.timeout):
            # On a terminal the items themselves show how it goes on.
            async with (
                connected() as remote,
                shown_progress(traffic, wanted=not sys.stdout.isatty()),
                remote[args.op].stream(**arguments) as items,
            ):
                async for item in items:
                    try:
                        rows.print(item)
                    except OutputClosed:
                        return  # `| head` has seen enough; leaving the block stops the handler
                    printed += 1
                    if printed >= count:
                        return

    with explained(show_traceback=args.traceback):
        trio.run(stream)
    return 0


def run_ping(args: argparse.Namespace) -> int:
    """Show who a server is, and how long it takes to connect and to echo."""

    connected = _remote(args)

    async def ping() -> None:
        address = coerce_to_address(args.address)
        with trio.fail_after(args.timeout):
            async with connected() as remote:
                began = trio.current_time()
                identity = await remote.identity()
                first = trio.current_time() - began
                took = []
                for n in range(args.count):
                    began = trio.current_time()
                    answer = await remote.echo(data=n)
                    took.append(trio.current_time() - began)
                    if type(answer) is not int or answer != n:
                        raise CliError(f"{address} answers an echo of {n!r} with {to_json(answer)}; is it a Dask server?", FAILED)
        if args.format == "json":
            times = {"identity": identity, "connect_seconds": first, "echo_seconds": took}
            print_line(to_json({"address": address, **times}))
            return
        print_line(f"{address} is {to_json(identity)}")
        print_line(f"connecting and asking took {first * 1e3:.2f} ms")
        print_line(f"{len(took)} echoes: fastest {min(took) * 1e3:.2f} ms, slowest {max(took) * 1e3:.2f} ms")

    with explained():
        trio.run(ping)
    return 0
