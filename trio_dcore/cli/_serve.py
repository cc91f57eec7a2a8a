"""``trio-dcore serve``: find the handlers, listen, and stop in order when a signal comes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from .. import Security, Server
from ._errors import USAGE, CliError, explained, one_line
from ._output import OutputClosed, print_line
from ._security import security_of

__all__ = ["load_server", "run_serve"]

_WHAT = "a dict of handlers, a Server, a Server class, or a function without arguments that makes one of these"


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    security = security_of(args)
    server = load_server(args.target, security)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with explained():
        cut_by = trio.run(_serve, server, args.listen or [_default_address(security)], args.grace)
    return 0 if cut_by is None else 128 + cut_by  # as shells say it


def _default_address(security: Security | None) -> str:
    return "tcp://127.0.0.1:0" if security is None or security.tls_cert is None else "tls://127.0.0.1:0"


def load_server(target: str, security: Security | None = None) -> Server:
    """Make the server that ``MODULE:HANDLERS`` names.

    Args:
        target: where to find it.
        security: for a dict of handlers; a server that the module makes itself has its own.

    Raises:
        CliError: the module can't be imported, has no such name, or what it names is nothing that can be served.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise CliError(f"{target!r}: write MODULE:HANDLERS, for example my_module:handlers", USAGE)
    if module_name.endswith(".py") or "/" in module_name:
        advice = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise CliError(f"{module_name!r} is a file; write the module's name, {advice}:{path}", USAGE)
    found = _import(module_name)
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise CliError(f"module {module_name} has no {path!r}", USAGE) from None
    return _as_server(target, found, security)


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(exc.name + ".")):
            raise CliError(f"there is no module {name!r}, neither in {os.getcwd()} nor among the installed ones", USAGE) from exc
        raise CliError(_where(f"importing {name} failed", exc), USAGE) from exc
    except Exception as exc:
        raise CliError(_where(f"importing {name} failed", exc), USAGE) from exc


def _as_server(target: str, found: object, security: Security | None) -> Server:
    if callable(found) and not isinstance(found, (Server, Mapping)):
        if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
            raise CliError(f"{target} is an async function; {_WHAT} is needed", USAGE)
        try:
            found = found()
        except Exception as exc:
            raise CliError(_where(f"calling {target}() failed", exc), USAGE) from exc
    if isinstance(found, Server):
        if security is not None:
            raise CliError(f"{target} is a Server with a Security of its own; set it there, or name a dict of handlers", USAGE)
        return found
    if isinstance(found, Mapping):
        try:
            return Server(dict(found), security=security)
        except (TypeError, ValueError) as exc:
            raise CliError(f"{target} can't be served: {exc}", USAGE) from exc
    raise CliError(f"{target} is {one_line(repr(found))[:100]}; {_WHAT} is needed", USAGE)


def _where(what: str, exc: Exception) -> str:
    """One line instead of a traceback: the error, and the place that raised it."""
    last = traceback.extract_tb(exc.__traceback__)[-1]
    place = f"{last.filename}, line {last.lineno}"
    if isinstance(exc, SyntaxError) and exc.filename:
        place = f"{exc.filename}, line {exc.lineno}"
    return f"{what}: {type(exc).__name__}: {exc} ({place})"


async def _serve(server: Server, where: Sequence[str], grace: float | None) -> signal.Signals | None:
    """Serve until a signal comes; returns the second one, if any, which has cut short what the first let run on."""
    cut_by: signal.Signals | None = None
    # The receiver comes first: from here on no signal kills the process, and one that comes while we start is not lost.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            listening = trio.Event()

            async def stop_on_signals() -> None:
                nonlocal cut_by
                in_order = True
                async for number in signals:
                    name = signal.Signals(number).name
                    if not listening.is_set():
                        nursery.cancel_scope.cancel()  # there is nothing yet that would deserve an order
                    elif in_order:
                        print(
                            f"{name}: stopping; running handlers may finish. Once more to stop at once.",
                            file=sys.stderr,
                            flush=True,
                        )
                        server.stop(grace, reason=name)
                        in_order = False
                    elif cut_by is None:
                        cut_by = signal.Signals(number)
                        server.stop(0, reason=name)

            nursery.start_soon(stop_on_signals)
            addresses = await nursery.start(server.serve, *where)
            # `| head -1` has read what it wanted, and who has closed our stdout wants nothing; the log says where we listen, too.
            with suppress(OutputClosed, CliError):
                for address in addresses:
                    print_line(f"listening on {address}")
            listening.set()
            await server.finished()
            nursery.cancel_scope.cancel()
    return cut_by
