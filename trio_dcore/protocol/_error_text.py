"""Describing an exception within bounds, whatever it holds: its text, its traceback, the plain part of its data, its leaves.

The exception is a handler's, so it is anybody's code: ``str()`` may raise, ``args`` may hold a million numbers, a chain of causes
or a group may have 100 000 members.  Nothing here raises (but for a KeyboardInterrupt, which may be the user's), and what is made
is no larger than the limit given.  Only the time that a foreign ``__str__`` takes for itself can't be bounded.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from reprlib import Repr
from typing import Any, TypeVar

from ._errors import RemoteError, RemoteTraceback
from ._remote_classes import args_of, class_name

__all__ = [
    "NotPlain",
    "Room",
    "attempt",
    "clean",
    "display_name",
    "leaves_of",
    "plain",
    "repr_of",
    "text_of",
    "traceback_of",
    "type_name_of",
]

T = TypeVar("T")

_MAX_NAME = 200
_CHAIN = 8  # causes and contexts shown: enough for any honest chain, and a retry loop can make one of any length
_FRAMES = 64  # innermost frames shown of each; repeated ones are folded by the traceback module
_LEAF_LINES = 15  # members of a group that its own text names; what traceback.print_exception shows
_NODES = 20_000  # members of a group that are counted: groups may hold groups, also the same one many times
_WEIGHT = 20_000  # characters and members up to which a value is small enough for the plain str() or repr()
_DEPTH = 8

_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


class NotPlain(Exception):
    """A value that can't go into a message without pickle, or not within the bounds."""


class _ShortRepr(Repr):
    """reprlib's, which slices strings before it makes their repr(), doing the same to bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_bytes(self, value: bytes, level: int) -> str:
        text = repr(bytes(value[: self.maxstring]))
        return text if len(value) <= self.maxstring else text + "..."

    repr_bytearray = repr_bytes


_short = _ShortRepr()


def attempt(function: Callable[[], T], default: T) -> T:
    """What ``function`` returns; ``default`` if it raises anything but the user's own Ctrl-C."""
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException:  # SystemExit and the like out of a __str__ or __reduce__: foreign code, run for its text only
        return default


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``, as an exact str."""
    if str.__len__(text) <= limit:
        return str.__str__(text)
    return str.__getitem__(text, slice(limit - 1)) + "…"


def _cut_middle(text: str, limit: int) -> str:
    """Cut a traceback: its end says most, its beginning comes next."""
    if len(text) <= limit:
        return text
    mark = f"\n… {len(text) - limit} characters left out …\n"
    kept = limit - len(mark)
    if kept < len(mark):
        return text[len(text) - limit :]
    return text[: kept // 4] + mark + text[len(text) - (kept - kept // 4) :]


def clean(text: str, limit: int) -> str:
    """Cut ``text`` and write lone surrogates (undecodable file names) as escapes, since UTF-8 has none."""
    text = _cut(text, limit)
    try:
        text.encode()
    except UnicodeEncodeError:
        return _cut(text.encode("utf-8", "backslashreplace").decode(), limit)
    return text


def type_name_of(exc: BaseException) -> str:
    """The qualified name of the class; for an error that came from a peer, of the class there."""
    if isinstance(exc, RemoteError) and exc.type_name:
        return clean(exc.type_name, _MAX_NAME)
    return attempt(lambda: clean(class_name(type(exc)), _MAX_NAME), "?")


def display_name(exc: BaseException) -> str:
    """The name as a traceback shows it."""
    return type_name_of(exc).removeprefix("builtins.")


def text_of(exc: BaseException, limit: int) -> str:
    """``str(exc)`` in at most ``limit`` characters."""
    if isinstance(exc, RemoteError) and exc.type_name:
        return clean(exc.message, limit)
    return attempt(lambda: clean(_str(exc), limit), f"<unprintable {display_name(exc)}>"[:limit])


def _str(exc: BaseException) -> str:
    args = args_of(exc)
    method = type(exc).__str__
    if method in (BaseException.__str__, KeyError.__str__) and not _small(args):
        # What str() would do, but for the time and memory that the repr() of a million numbers takes.
        if len(args) == 1 and isinstance(args[0], str) and method is BaseException.__str__:
            return args[0]
        return _short.repr(args[0] if len(args) == 1 else args)
    return str(exc)


def repr_of(exc: BaseException, limit: int) -> str:
    """``repr(exc)`` in at most ``limit`` characters: what Dask sends as ``exception_text``."""
    if not isinstance(exc, (RemoteError, BaseExceptionGroup)) and attempt(lambda: _small(args_of(exc)), False):
        text = attempt(lambda: clean(repr(exc), limit), "")
        if text:
            return text
    name = display_name(exc).rpartition(".")[2]
    return clean(f"{name}({text_of(exc, limit)!r})", limit)


def _small(value: object) -> bool:
    """Whether ``str()`` and ``repr()`` of ``value`` are surely short, objects of foreign classes left aside."""
    weight = 0
    pending = [value]
    while pending:
        item = pending.pop()
        weight += 1
        if isinstance(item, (str, bytes, bytearray)):
            weight += len(item)
        elif isinstance(item, (list, tuple, set, frozenset, dict)):
            if len(item) > _WEIGHT:
                return False
            pending.extend(item)
            if isinstance(item, dict):
                pending.extend(item.values())
        elif isinstance(item, BaseException):
            pending.extend(args_of(item))
        if weight > _WEIGHT:  # also ends the walk round a list that holds itself
            return False
    return True


class Room:
    """The bytes that are left for plain data."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


def plain(value: object, room: Room) -> Any:
    """``value`` as data that msgpack has natively, in about as many bytes as there is room for; these are taken from the room.

    Raises:
        NotPlain: it is not such data, or too much or too deep; the room is as it was.
    """
    before = room.left
    try:
        return _plain(value, room, _DEPTH)
    except NotPlain:
        room.left = before
        raise


def _plain(value: object, room: Room, depth: int) -> Any:
    room.left -= 1 + (len(value) if isinstance(value, (str, bytes)) else 0)
    if room.left < 0 or depth == 0:
        raise NotPlain
    if value is None or type(value) in (bool, float, bytes):
        return value
    if type(value) is int and -(2**63) <= value < 2**64:
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotPlain from None
        return text
    if type(value) is list:
        return [_plain(item, room, depth - 1) for item in value]
    if type(value) is tuple:
        return tuple([_plain(item, room, depth - 1) for item in value])
    if type(value) is dict:
        if len(value) > room.left or any(type(key) is not str or key.startswith("__") for key in value):
            raise NotPlain  # "__Set__" and its like would be read as markers (wire document, section 5.1)
        return {_plain(key, room, depth - 1): _plain(item, room, depth - 1) for key, item in value.items()}
    raise NotPlain


def leaves_of(exc: BaseException, most: int) -> tuple[list[BaseException], int]:
    """The exceptions in a group, those of inner groups included: the first ``most`` of them, and how many there are.

    An exception that is no group is its own only leaf.  Counting ends at 20 000.
    """
    leaves: list[BaseException] = []
    count = 0
    open_groups: list[Iterator[BaseException]] = [iter((exc,))]
    for _ in range(_NODES):
        while open_groups:
            item = next(open_groups[-1], None)
            if item is not None:
                break
            open_groups.pop()
        else:
            break
        if isinstance(item, BaseExceptionGroup):
            open_groups.append(iter(item.exceptions))
            continue
        count += 1
        if len(leaves) < most:
            leaves.append(item)
    return leaves, count


def traceback_of(exc: BaseException, limit: int) -> str:
    """The traceback's text with causes and contexts, oldest first, in at most ``limit`` characters.

    Of a group it has the group's own frames and one line for each of the first members.
    """
    return attempt(lambda: clean(_cut_middle(_chain_text(exc, limit), limit), limit), "")


def _chain_text(exc: BaseException, limit: int) -> str:
    parts: list[str] = []
    seen: set[int] = set()
    while True:
        seen.add(id(exc))
        parts.append(_link_text(exc, limit))
        is_cause = exc.__cause__ is not None or exc.__suppress_context__
        earlier = exc.__cause__ if is_cause else exc.__context__
        if earlier is None or id(earlier) in seen:
            break
        parts.append(_CAUSE if is_cause else _CONTEXT)
        if len(seen) == _CHAIN:
            parts.append("… earlier exceptions left out …\n")
            break
        exc = earlier
    return "".join(reversed(parts))


def _link_text(exc: BaseException, limit: int) -> str:
    if isinstance(exc, RemoteTraceback):
        return _cut_middle("".join(map(str, exc.args)), limit).rstrip() + "\n"
    frames = attempt(lambda: "".join(traceback.format_list(traceback.extract_tb(exc.__traceback__, -_FRAMES))), "")
    text = ("Traceback (most recent call last):\n" + frames if frames else "") + _line(exc, limit)
    if isinstance(exc, RemoteError) and exc.remote_traceback and not isinstance(exc.__cause__, RemoteTraceback):
        # Somebody raised it anew with another cause, or from None, but what happened over there still happened first.
        text = _cut_middle(exc.remote_traceback, limit).rstrip() + "\n" + _CAUSE + text
    notes: object = exc.__dict__.get("__notes__")
    if isinstance(notes, (list, tuple)):
        text += "".join(clean(note, limit) + "\n" for note in notes[:_LEAF_LINES] if isinstance(note, str))
    if isinstance(exc, BaseExceptionGroup):
        leaves, count = leaves_of(exc, _LEAF_LINES)
        text += "".join(f"  - {_line(leaf, 500)}" for leaf in leaves)
        if count > len(leaves):
            text += f"  - and {count - len(leaves)} more\n"
    return text


def _line(exc: BaseException, limit: int) -> str:
    text = text_of(exc, limit)
    return f"{display_name(exc)}: {text}\n" if text else f"{display_name(exc)}\n"
