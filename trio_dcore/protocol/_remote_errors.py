"""Errors on their way to a peer: Dask's error reply, and the pickle-free value of the wire extension.

A stock peer gets the dict that Dask's own servers send, with a pickle that loads everywhere (wire document, section 6.4;
architecture, section 3.4).  A peer that speaks the extension gets the facts as plain data and builds the class itself.  Encoding
never fails: an error that can't be described would leave its caller without an answer.

The way back is :mod:`._error_decoding`; its two functions are re-exported here.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

from ._envelope import KEY
from ._error_decoding import exception_from_reply, exception_from_value
from ._error_pickles import MAX_PICKLE, dump, load
from ._error_text import (
    NotPlain,
    Room,
    attempt,
    clean,
    display_name,
    leaves_of,
    plain,
    repr_of,
    text_of,
    traceback_of,
    type_name_of,
)
from ._errors import (
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    Overloaded,
    RemoteError,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from ._remote_classes import BUILTINS, args_of, build, class_name, fields_of, group_message, stood_for

__all__ = ["error_reply", "error_value", "exception_from_reply", "exception_from_value"]

# Our own classes, the code by which a peer of ours knows them, the builtin that a stock peer gets (architecture, section 3.4),
# and the attributes that are sent under their own names.
_CODES: tuple[tuple[type[DcoreError], str, type[Exception], tuple[str, ...]], ...] = (
    (UnknownOp, "unknown-op", AttributeError, ()),
    (HandlerCancelled, "cancelled", RuntimeError, ("reason",)),
    (ServerClosing, "closing", ConnectionAbortedError, ()),
    (Overloaded, "overloaded", ConnectionAbortedError, ()),
    (NotAllowed, "not-allowed", ValueError, ()),
    (LimitExceeded, "limit", ValueError, ("limit", "value", "seen")),
    (UnsafePayload, "unsafe", ValueError, ("field",)),
    (SerializationError, "serialization", TypeError, ("path",)),
)

# These tell the caller that its handler never started, which is true of a refusal made here and now, but not of one that a
# handler got from a third server: then the handler did start, and calling it again may do its work twice.
_NOT_STARTED = frozenset({"unknown-op", "closing", "overloaded", "not-allowed"})

_LEAVES = 32  # members of a group that are sent
_LEAF_TEXT = 500  # characters that a member's message or traceback may have, however many members there are
_NOTES = 20
_ATTRIBUTES = 32
_BASES = 32

# What stands in the __dict__ of an exception under these names is about its travels, or sent as something else.
_NOT_ATTRIBUTES = frozenset({*RemoteError.__annotations__, "__notes__", "from_peer"})

# A stock peer may lack these packages, and has a __main__ of its own.
_NOT_PORTABLE = frozenset({"__main__", "__mp_main__", "trio", "trio_dcore"})

_PORTABLE_BUILTINS = frozenset({*BUILTINS.values(), Exception})


def error_reply(
    exc: BaseException,
    *,
    status: str = "uncaught-error",
    trusted: bool,
    extension: bool,
    limit: int = 10_000,
    started: bool = False,
) -> dict[str, Any]:
    """Build the plain Dask error dict for ``exc``.  Never raises (but a KeyboardInterrupt passes).

    Args:
        exc: what went wrong; a handler's exception, or one of ours.
        status: ``"uncaught-error"`` makes the client raise; ``"error"`` is handed to it as data.
        trusted: the peer is trusted, so classes that are not builtin may be sent to it.
        extension: the peer speaks the wire extension: the dict gets one more key, with :func:`error_value`.
        limit: characters of each text.
        started: as for :func:`error_value`.
    """
    limit = max(1, limit)
    # The text in the place of an error that can't be described; a client without it would fail on our reply.
    reply: dict[str, Any] = {
        "status": status,
        "exception": dump(Exception(f"{display_name(exc)}, which can't be described")),
        "traceback": None,
        "exception_text": clean(f"{display_name(exc)}()", limit),
        "traceback_text": "",
    }
    nothing: dict[str, Any] = {}
    reply.update(attempt(lambda: _stock_parts(exc, trusted, limit, started), nothing))
    if extension:
        reply[KEY] = error_value(exc, trusted=trusted, limit=limit, started=started)
    return reply


def error_value(exc: BaseException, *, trusted: bool, limit: int = 10_000, started: bool = False) -> dict[str, Any]:
    """Describe ``exc`` in plain data, as the value of an *error* envelope (docs/wire-extension.md).  Never raises, as above.

    Args:
        exc: what went wrong; a handler's exception, or one of ours.
        trusted: the peer is trusted, so a pickle may be added where plain data does not tell all.
        limit: characters of each text; the rest is bounded likewise.
        started: the handler had started: then ServerClosing, Overloaded, NotAllowed and UnknownOp, wherever they come from, are
            reported as an error of the handler and not as a refusal of this request.

    Returns:
        A map with ``code``, ``type``, ``message``, ``traceback`` and ``mro`` (names of the class and its bases), and as they
        apply ``notes``, ``args``, ``attributes`` (fields and ``__dict__``, as far as they are plain), ``pickle``, ``errors`` (the
        members of a group, such maps themselves), ``reason``, ``limit``, ``value``, ``seen``, ``field`` and ``path``.
    """
    limit = max(1, limit)
    unknown: dict[str, Any] = {
        "code": "error",
        "type": type_name_of(exc),
        "message": "an error that can't be described",
        "traceback": "",
    }
    return attempt(lambda: _value(exc, trusted, limit, started), unknown)


def _value(exc: BaseException, trusted: bool, limit: int, started: bool) -> dict[str, Any]:
    leaves, count = leaves_of(exc, _LEAVES)
    if count <= 1:
        return _facts(leaves[0] if leaves else exc, trusted, limit, MAX_PICKLE, started)
    value = _facts(exc, False, limit, 0, True)
    share = _share(limit, len(leaves))
    value["args"] = [clean(group_message(exc), limit)]
    value["errors"] = [_facts(leaf, trusted, share, MAX_PICKLE // len(leaves), True) for leaf in leaves]
    if count > len(leaves):
        value.setdefault("notes", []).append(_left_out(count - len(leaves)))
    return value


def _share(limit: int, leaves: int) -> int:
    """The characters for each text of each member of a group."""
    return max(min(limit, _LEAF_TEXT), limit // leaves)


def _left_out(count: int) -> str:
    return f"{count} more exceptions of this group were left out"


def _facts(exc: BaseException, trusted: bool, limit: int, pickle_limit: int, started: bool) -> dict[str, Any]:
    code, _stock = _code(exc, started)
    subject = _subject(exc)
    value: dict[str, Any] = {
        "code": code,
        "type": type_name_of(exc),
        "message": text_of(exc, limit),
        "traceback": traceback_of(exc, limit),
        "mro": _bases(exc, subject),
    }
    notes = _notes(exc, limit)
    if notes:
        value["notes"] = notes
    value.update(_own_attributes(exc, limit))
    if isinstance(subject, BaseExceptionGroup) or class_name(type(subject)).startswith("trio_dcore."):
        return value  # a group's data are its members; ours are told by code and attributes
    complete = _add_data(value, subject, limit) and type(subject) in _PORTABLE_BUILTINS
    # A text that was cut stays cut: no pickle then.
    if trusted and not complete and len(value["message"]) < limit:
        data = _own_pickle(subject, pickle_limit)
        if data is not None:
            value["pickle"] = data
    return value


def _code(exc: BaseException, started: bool) -> tuple[str, type[Exception] | None]:
    """The code of ``exc`` for our peers, and its builtin for stock ones, None for what is not ours."""
    for cls, code, stock, _names in _CODES:
        if isinstance(exc, cls):
            relayed = exc.type_name != "" if isinstance(exc, RemoteError) else exc.__dict__.get("from_peer") is True
            if code in _NOT_STARTED and (started or relayed):
                break
            return code, stock
    return "error", None


def _subject(exc: BaseException) -> BaseException:
    """What to describe for ``exc``: for a remote error that is being relayed, the exception it stands for."""
    if not isinstance(exc, RemoteError):
        return exc
    as_sent: BaseException = exc
    return attempt(partial(stood_for, exc), as_sent)


def _bases(exc: BaseException, subject: BaseException) -> list[str]:
    names = [type_name_of(exc)]
    for cls in islice(type(subject).__mro__, _BASES):
        name = attempt(partial(class_name, cls), "?")
        if name not in ("builtins.object", *names):
            names.append(clean(name, 200))
    return names[:_BASES]


def _notes(exc: BaseException, limit: int) -> list[str]:
    notes = exc.__dict__.get("__notes__")
    if not isinstance(notes, (list, tuple)):
        return []
    texts = [note for note in notes[:_NOTES] if isinstance(note, str)]
    return [clean(text, max(1, limit // len(texts))) for text in texts]


def _own_attributes(exc: BaseException, limit: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls, _code, _stock, names in _CODES:
        if isinstance(exc, cls):
            for name in names:
                item = exc.__dict__.get(name)
                if isinstance(item, str):
                    found[name] = clean(item, limit)
                elif type(item) is float or (type(item) is int and abs(item) < 2**63):
                    found[name] = item
    return found


def _add_data(value: dict[str, Any], exc: BaseException, limit: int) -> bool:
    """Add what of the exception's own data is plain; returns whether that was all of it."""
    complete = True
    try:
        value["args"] = list(plain(args_of(exc), Room(limit)))
    except NotPlain:
        complete = False
    room = Room(limit)
    attributes: dict[str, Any] = {}
    items = fields_of(exc) | {name: item for name, item in exc.__dict__.items() if name not in _NOT_ATTRIBUTES}
    for name, item in islice(items.items(), _ATTRIBUTES):
        try:
            attributes[plain(name, room)] = plain(item, room)
        except NotPlain:
            complete = False
    if attributes:
        value["attributes"] = attributes
    return complete and len(items) <= _ATTRIBUTES


def _own_pickle(exc: BaseException, limit: int) -> bytes | None:
    """A pickle for a peer of ours, checked to load; None for classes of ours and trio's, which mean something else over there."""
    if class_name(type(exc)).startswith(("trio_dcore.", "trio.")):
        return None
    data = dump(exc, limit)
    return data if data is not None and type(load(data)) is type(exc) else None


def _stock_parts(exc: BaseException, trusted: bool, limit: int, started: bool) -> dict[str, Any]:
    leaves, count = leaves_of(exc, _LEAVES)
    most = MAX_PICKLE + 10 * limit  # room for the text and the notes at 4 bytes a character, if that is what was asked for
    if count <= 1:
        exc = leaves[0] if leaves else exc
        data = dump(_portable(exc, trusted, limit, started), most)
        text = traceback_of(exc, limit)
    else:
        # Each member may be small enough to go as it is, and all of them together too large.
        data = dump(_portable_group(exc, leaves, count, trusted, limit), most)
        data = data or dump(_portable_group(exc, leaves, count, False, limit), most)
        share = _share(limit, len(leaves))
        text = clean("\n".join([traceback_of(exc, limit), *(traceback_of(leaf, share) for leaf in leaves)]), limit)
    assert data is not None
    return {"exception": data, "exception_text": repr_of(exc, limit), "traceback_text": text}


def _portable_group(exc: BaseException, leaves: list[BaseException], count: int, trusted: bool, limit: int) -> Exception:
    share = _share(limit, len(leaves))
    group = ExceptionGroup(clean(group_message(exc), limit), [_portable(leaf, trusted, share, True) for leaf in leaves])
    if count > len(leaves):
        group.add_note(_left_out(count - len(leaves)))
    return _with_notes(group, _notes(exc, limit))


def _portable(exc: BaseException, trusted: bool, limit: int, started: bool) -> Exception:
    """What a stock peer can unpickle in the place of ``exc``."""
    subject = _subject(exc)
    text = text_of(exc, limit)
    if trusted and len(text) < limit and attempt(lambda: _goes_as_it_is(subject), False):
        assert isinstance(subject, Exception)
        return subject
    made = attempt(lambda: _same_builtin(subject, limit), None) if type(subject) in _PORTABLE_BUILTINS else None
    return _with_notes(made or _nearest_builtin(exc, subject, text, _code(exc, started)[1]), _notes(exc, limit))


def _with_notes(exc: Exception, notes: list[str]) -> Exception:
    for note in notes:
        exc.add_note(note)
    return exc


def _goes_as_it_is(exc: BaseException) -> bool:
    """Whether the class can be expected to be there, and can be raised there, and ``exc`` comes through a pickle unchanged."""
    if not isinstance(exc, Exception) or isinstance(exc, (StopIteration, StopAsyncIteration)):
        return False
    return not any(cls.__module__.partition(".")[0] in _NOT_PORTABLE for cls in type(exc).__mro__) and _survives(exc)


def _same_builtin(exc: BaseException, limit: int) -> Exception | None:
    """A copy of a builtin exception with nothing but plain data in it, which every peer may have and can unpickle."""
    try:
        args, fields = plain(args_of(exc), Room(limit)), plain(fields_of(exc), Room(limit))
    except NotPlain:
        return None
    made = build(type(exc), args, fields)
    return made if isinstance(made, Exception) and _survives(made) else None


def _survives(exc: Exception) -> bool:
    data = dump(exc)
    # Something of ours, or of the main module, inside it would load here and nowhere else.
    if data is None or b"trio_dcore" in data or b"__main__" in data:
        return False
    loaded = load(data)
    return type(loaded) is type(exc) and str(loaded) == str(exc)


def _nearest_builtin(exc: BaseException, subject: BaseException, text: str, stock: type[Exception] | None) -> Exception:
    for kind in (stock,) if stock is not None else type(subject).__mro__:
        if kind in _PORTABLE_BUILTINS and kind is not Exception:
            args = args_of(subject)
            # The text of a KeyError is the repr() of its key, and would be the repr() of that at the other end.
            plain_key = kind is KeyError and len(args) == 1 and type(args[0]) is str and len(args[0]) <= len(text)
            made = attempt(partial(kind, args[0] if plain_key else text), None)
            if isinstance(made, Exception):
                return made
    return Exception(f"{display_name(exc)}: {text}" if text else display_name(exc))
