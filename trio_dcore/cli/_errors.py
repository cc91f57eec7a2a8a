"""What went wrong, in one line, with advice; and the exit code that says which kind it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ..errors import (
    AddressError,
    CommClosedError,
    ConnectError,
    DcoreError,
    HandlerCancelled,
    Overloaded,
    RemoteError,
    ServerClosing,
    UnknownOp,
)

__all__ = ["FAILED", "TIMED_OUT", "USAGE", "CliError", "explained", "one_line"]

FAILED = 1
USAGE = 2
TIMED_OUT = 124  # as timeout(1) has it


class CliError(Exception):
    """An error that ends the program with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(one_line(message))
        self.code = code


def one_line(text: str) -> str:
    """Fold a text into a single line that is safe to show on a terminal."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@contextmanager
def explained(*, show_traceback: bool = False) -> Iterator[None]:
    """Turn the errors that a user can do something about into CliError; bugs keep their traceback.

    Args:
        show_traceback: put the remote traceback of a failed handler before the line.

    Raises:
        CliError: instead of a DcoreError, an OSError or trio's TooSlowError.
    """
    try:
        yield
    except (DcoreError, OSError, trio.TooSlowError) as exc:
        text, code = _explain(exc)
        error = CliError(text, code)
        if show_traceback and isinstance(exc, RemoteError) and exc.remote_traceback:
            error.args = ("\n".join((str(error), *map(_printable, exc.remote_traceback.rstrip().splitlines()))),)
        raise error from exc
    except BaseExceptionGroup as group:
        # From a nursery of ours.  Only a lone error has one explanation.
        if len(group.exceptions) != 1:
            raise
        with explained(show_traceback=show_traceback):
            raise group.exceptions[0] from None


def _explain(exc: Exception) -> tuple[str, int]:
    match exc:
        case trio.TooSlowError():
            return "timed out; give more time with --timeout", TIMED_OUT
        case AddressError():
            return str(exc), USAGE
        case ConnectError():
            return f"{exc}; is a server listening there?", FAILED
        case UnknownOp() | HandlerCancelled():
            return str(exc), FAILED
        case RemoteError():
            kind = exc.type_name.removeprefix("builtins.") or "an error"
            return f"the handler raised {kind}: {exc}", FAILED
        case ServerClosing() | Overloaded():
            return f"{str(exc) or type(exc).__name__}; the handler was not started, try again later", FAILED
        case CommClosedError():
            return f"{exc}; whether the call took effect is unknown", FAILED
        case _:
            return f"{type(exc).__name__}: {exc}", FAILED
