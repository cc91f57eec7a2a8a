"""Small things that every layer may use."""

from __future__ import annotations

from collections.abc import Iterator

import trio

__all__ = ["leaves", "to_raise"]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep; a single exception is its own leaf."""
    stack = [error]
    while stack:
        top = stack.pop()
        if isinstance(top, BaseExceptionGroup):
            stack.extend(reversed(top.exceptions))
        else:
            yield top


def to_raise(message: str, *errors: BaseException | None) -> BaseException | None:
    """What a public call raises for these: nothing, one exception, or a group where there were several.

    KeyboardInterrupt, SystemExit and the like win over everything else.  A Cancelled is only what remains if there is nothing else:
    it says that an enclosing scope was cancelled, and that scope needs no reminder when an error passes through it.
    """
    # By identity: whether two errors are equal is their classes' business.
    found = list({id(leaf): leaf for error in errors if error is not None for leaf in leaves(error)}.values())
    exits = [leaf for leaf in found if not isinstance(leaf, (Exception, trio.Cancelled))]
    if exits:
        return exits[0]
    failures = [leaf for leaf in found if isinstance(leaf, Exception)]
    if len(failures) > 1:
        return ExceptionGroup(message, failures)
    if failures:
        return failures[0]
    return found[0] if found else None
