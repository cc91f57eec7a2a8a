"""Errors that came from a peer: what is raised in the caller for a Dask error reply, or for the wire extension's error value.

Nothing here believes the peer.  Every key may be missing or hold anything; the result is an exception of this package, always.  A
peer that is not trusted chooses no more than one of the builtin exception classes; nothing of it is unpickled or imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from reprlib import repr as short
from typing import Any, cast

from ._envelope import KEY
from ._error_builtins import builtin_bases, from_parts, literals, qualified, template
from ._error_pickles import load
from ._error_text import attempt, clean, leaves_of, text_of, type_name_of
from ._errors import (
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    Overloaded,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from ._remote_classes import BUILTINS, adapted, args_of, build, fields_of, group_message

__all__ = ["exception_from_reply", "exception_from_value"]

_REFUSALS: dict[str, type[DcoreError]] = {"closing": ServerClosing, "overloaded": Overloaded, "not-allowed": NotAllowed}
_REMOTE: dict[str, type[RemoteError]] = {"unknown-op": UnknownOp, "cancelled": HandlerCancelled}
_MIXED: dict[str, type[DcoreError]] = {"limit": LimitExceeded, "unsafe": UnsafePayload, "serialization": SerializationError}
_MIXED_ATTRIBUTES: dict[str, dict[str, tuple[type, ...]]] = {
    "limit": {"limit": (str,), "value": (int, float), "seen": (int, float)},
    "unsafe": {"field": (str,)},
    "serialization": {"path": (str,)},
}

# What stands in the __dict__ of a remote error under these names is about the error, and not the exception's own.
_OWN_NAMES = frozenset({*RemoteError.__annotations__, "__notes__"})

# A peer cuts its texts at 10 000 characters unless told otherwise; what it was told may be more, but not without end.
_MAX_TEXT = 100_000
_MAX_NAME = 200
_MAX_LEAVES = 64
_MAX_NOTES = 64
_MAX_ARGS = 100
_MAX_ATTRIBUTES = 64

# The repr() of an exception, if it is of the usual form and not longer than what a peer sends as one.
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\((.*)\)", re.DOTALL)
_MAX_REPR = 20_000


@dataclass(slots=True)
class _Facts:
    """What is known of a remote exception in text."""

    type_name: str
    message: str
    traceback: str = ""
    notes: list[str] = field(default_factory=list)


def exception_from_reply(reply: object, *, allow_pickle: Callable[[], bool]) -> Exception:
    """The exception to raise for an error reply: that of a stock Dask peer, or a plain one of ours.

    Args:
        reply: the dict with ``status``; payloads may have been resolved or left as they are.
        allow_pickle: asked, if there is a pickle, whether it may be loaded.

    Returns:
        A RemoteError, or from a peer that speaks the extension also ServerClosing, Overloaded or NotAllowed.
    """
    if not isinstance(reply, dict):
        return _unreadable(reply)
    own = reply.get(KEY)
    if isinstance(own, dict):
        return exception_from_value(own, allow_pickle=allow_pickle)
    sent = reply.get("exception")
    loaded: object = None
    if isinstance(sent, (bytes, bytearray, memoryview)):
        loaded = load(bytes(sent)) if allow_pickle() else None
    elif isinstance(sent, BaseException):
        loaded = sent  # the codec has unpickled it, so it was allowed to
    traceback = _text(reply.get("traceback_text"))
    if isinstance(loaded, BaseException):
        facts = _Facts(type_name_of(loaded), text_of(loaded, _MAX_TEXT), traceback)
        return _from_original(loaded, facts)
    text = _text(reply.get("exception_text")) or _text(sent)
    return _from_repr(text, traceback) if text else _unreadable(reply)


def exception_from_value(value: object, *, allow_pickle: Callable[[], bool]) -> Exception:
    """The exception to raise for the value of an *error* envelope (docs/wire-extension.md).

    Args:
        value: what :func:`~trio_dcore.protocol._remote_errors.error_value` made over there, or anything else.
        allow_pickle: asked, if there is a pickle, whether it may be loaded.

    Returns:
        A RemoteError, or ServerClosing, Overloaded or NotAllowed.
    """
    code = value.get("code") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(code, str) and code in _REFUSALS:
        facts = _facts(value)
        refusal = _REFUSALS[code](facts.message)
        # A handler that lets this pass has been started: it must not look like a refusal to *its* caller.
        refusal.__dict__["from_peer"] = True
        for note in facts.notes:
            refusal.add_note(note)
        return refusal
    return _remote_error(value, allow_pickle, member=False)


def _remote_error(value: object, allow_pickle: Callable[[], bool], *, member: bool) -> RemoteError:
    """The RemoteError for ``value``; a ``member`` of a group is neither a group nor about the request."""
    if not isinstance(value, dict):
        return _unreadable(value)
    facts = _facts(value)
    if not facts.type_name and not facts.message:
        return _unreadable(value)
    code = value.get("code")
    code = code if isinstance(code, str) else "error"
    if code in _REMOTE and not member:
        made = _finish(_REMOTE[code](facts.message), facts)
        if isinstance(made, HandlerCancelled):
            made.reason = _text(value.get("reason"))
        return made
    errors = value.get("errors")
    if isinstance(errors, (list, tuple)) and errors and not member:
        leaves = [_remote_error(item, allow_pickle, member=True) for item in errors[:_MAX_LEAVES]]
        if len(errors) > _MAX_LEAVES:
            facts.notes.append(f"{len(errors) - _MAX_LEAVES} more exceptions of this group were left out")
        return _group(ExceptionGroup, _first_text(value.get("args"), facts.message), leaves, facts)
    original = _unpickled(value.get("pickle"), allow_pickle)
    if original is not None and not isinstance(original, BaseExceptionGroup):
        return _from_original(original, facts)
    if code in _MIXED:
        attributes = {name: value[name] for name, types in _MIXED_ATTRIBUTES[code].items() if isinstance(value.get(name), types)}
        cls = cast("type[RemoteError]", adapted(_MIXED[code]))
        unset = {"limit": "", "value": None, "seen": None} if code == "limit" else dict.fromkeys(_MIXED_ATTRIBUTES[code], "")
        return _finish(cast(RemoteError, build(cls, (facts.message,), {}, unset | attributes)), facts)
    return _from_names(value, facts)


def _facts(value: dict[Any, Any]) -> _Facts:
    notes = value.get("notes")
    return _Facts(
        _name(value.get("type")),
        _text(value.get("message")),
        _text(value.get("traceback")),
        [_text(note) for note in notes[:_MAX_NOTES] if isinstance(note, str)] if isinstance(notes, (list, tuple)) else [],
    )


def _text(value: object) -> str:
    return clean(value, _MAX_TEXT) if isinstance(value, str) else ""


def _name(value: object) -> str:
    """A class's name as a peer gives it: one printable line, since it ends up in logs."""
    if not isinstance(value, str):
        return ""
    name = value[:_MAX_NAME]
    return name if name.isprintable() else ascii(name)[1:-1][:_MAX_NAME]


def _first_text(args: object, default: str) -> str:
    return _text(args[0]) if isinstance(args, (list, tuple)) and args and isinstance(args[0], str) else default


def _unreadable(value: object) -> RemoteError:
    # Of a map the first keys only: reprlib would sort all of them.
    text = attempt(lambda: short([*islice(value, 8)] if isinstance(value, dict) else value), "?")
    return _finish(RemoteError(), _Facts("", f"the peer reported an error in a form that can't be read: {text}"))


def _finish(made: RemoteError, facts: _Facts, original: BaseException | None = None) -> RemoteError:
    """Put in what every remote error has."""
    if type(made) is RemoteError:
        made.args = (": ".join(filter(None, (facts.type_name, facts.message))),)
    made.type_name = facts.type_name
    made.message = facts.message
    made.remote_traceback = facts.traceback
    made.original = original
    if facts.notes:
        made.__notes__ = facts.notes
    # A cause, not a note: it prints in the order in which things happened, and a server that relays this error has it in the text
    # that it sends.  Causes of the original came along in its pickle; towards stock peers the text does not have them.
    chain = _cause_of(original) if original is not None else None
    if facts.traceback:
        made.__cause__ = RemoteTraceback(facts.traceback)
        made.__cause__.__cause__ = chain
    elif chain is not None:
        made.__cause__ = chain
    return made


def _cause_of(exc: BaseException) -> BaseException | None:
    return exc.__cause__ if exc.__cause__ is not None or exc.__suppress_context__ else exc.__context__


def _unpickled(data: object, allow_pickle: Callable[[], bool]) -> BaseException | None:
    if not isinstance(data, bytes) or not allow_pickle():
        return None
    loaded = load(data)
    return loaded if isinstance(loaded, BaseException) else None


def _from_original(original: BaseException, facts: _Facts) -> RemoteError:
    """The error for an exception that a trusted peer's pickle held."""
    if isinstance(original, BaseExceptionGroup):
        return _from_original_group(original, facts)
    if isinstance(original, RemoteError):
        # Somebody relays a remote error as a pickle; what it stands for is what counts, not that it was one before.
        facts = _Facts(original.type_name or facts.type_name, original.message or facts.message, facts.traceback, facts.notes)
        original = original.original or original
    cls = adapted(type(original))
    if cls is None:
        return _finish(RemoteError(), _with_notes(facts, original), original)
    state = {name: value for name, value in original.__dict__.items() if name not in _OWN_NAMES}
    made = attempt(partial(build, cls, args_of(original), fields_of(original), state), None)
    return _finish(made if isinstance(made, RemoteError) else RemoteError(), _with_notes(facts, original), original)


def _with_notes(facts: _Facts, original: BaseException) -> _Facts:
    notes = original.__dict__.get("__notes__")
    if isinstance(notes, (list, tuple)) and not facts.notes:
        facts.notes = [_text(note) for note in notes[:_MAX_NOTES] if isinstance(note, str)]
    return facts


def _from_original_group(original: BaseExceptionGroup[BaseException], facts: _Facts) -> RemoteError:
    found, count = leaves_of(original, _MAX_LEAVES)
    if count == 1:
        leaf = found[0]
        return _from_original(leaf, _Facts(type_name_of(leaf), text_of(leaf, _MAX_TEXT), facts.traceback))
    leaves = [_from_original(leaf, _Facts(type_name_of(leaf), text_of(leaf, _MAX_TEXT))) for leaf in found]
    facts = _with_notes(facts, original)
    if count > len(found):
        facts.notes.append(f"{count - len(found)} more exceptions of this group were left out")
    return _group(type(original), group_message(original), leaves, facts, original)


def _group(
    kind: type[BaseException],
    message: str,
    leaves: list[RemoteError],
    facts: _Facts,
    original: BaseException | None = None,
) -> RemoteError:
    if len(leaves) == 1:
        return leaves[0]
    cls = adapted(kind) or adapted(ExceptionGroup)
    return _finish(cast(RemoteError, build(cast("type[RemoteError]", cls), (message, leaves), {})), facts, original)


def _from_names(value: dict[Any, Any], facts: _Facts) -> RemoteError:
    """The error for a class that is known by name only: an instance of the nearest builtin class there is."""
    mro = value.get("mro")
    names = [facts.type_name, *(mro[:_MAX_NOTES] if isinstance(mro, (list, tuple)) else ())]
    args = value.get("args")
    if not isinstance(args, (list, tuple)) or len(args) > _MAX_ARGS:
        args = (facts.message,) if facts.message else ()
    attributes = value.get("attributes")
    if not isinstance(attributes, dict) or len(attributes) > _MAX_ATTRIBUTES:
        attributes = {}
    kinds = (BUILTINS[name] for name in names if isinstance(name, str) and name in BUILTINS)
    return _finish(from_parts(kinds, tuple(args), attributes) or RemoteError(), facts)


def _from_repr(text: str, traceback: str) -> RemoteError:
    """The error for ``exception_text``, the repr() of an exception, where no pickle could be loaded, or was allowed to be."""
    match = _NAMED.fullmatch(text) if len(text) <= _MAX_REPR else None
    if match is None:
        return _finish(RemoteError(), _Facts("", text, traceback))
    name, inner = match.groups()
    facts = _Facts(_name(qualified(name)), text, traceback)
    args = literals(inner)
    if args is not None and len(args) == 1 and isinstance(args[0], str):
        facts.message = _text(args[0])
    kind = BUILTINS.get(facts.type_name)
    if kind is None:
        return _finish(RemoteError(), facts)
    fields: dict[str, Any] = {}
    like = template(kind, args) if args is not None else None
    if like is not None:
        facts.message, fields = _text(like[0]), like[1]
    return _finish(from_parts(builtin_bases(kind), (text,) if args is None else args, fields) or RemoteError(), facts)
