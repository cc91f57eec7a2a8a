"""What is fed: each function takes arbitrary input, and lets pass only what is no fault of ours.

The rule (security document, section 3): anything at all, to the parser, gives a message or one of the errors of :data:`OURS`; any
other exception is a bug.  Where two ways of doing the same must agree, that they do is checked as well.
"""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgpack

from tests.fuzz.seeds import messages
from trio_dcore.comm import (
    coerce_to_address,
    get_address_host_port,
    listen_address,
    parse_address,
    parse_host_port,
    unparse_address,
    unparse_host_port,
)
from trio_dcore.errors import AddressError
from trio_dcore.protocol import (
    DecodeContext,
    Decoder,
    EncodeContext,
    Encoder,
    FrameParser,
    LimitExceeded,
    Limits,
    LocalProtocolError,
    RemoteProtocolError,
    SerializationError,
    Serialized,
    UnsafePayload,
    deserialize,
    error_reply,
    error_value,
    exception_from_reply,
    exception_from_value,
    local_handshake,
    negotiate,
)
from trio_dcore.protocol._envelope import KEY, parse_credit, parse_envelope, parse_request_header
from trio_dcore.protocol._families import needs_pickle
from trio_dcore.protocol._frames import HANDSHAKE, looks_like

__all__ = ["HEADERS", "OURS", "Found", "address", "decode", "decode_once", "harmless_pickles", "run", "stream"]

OURS = (RemoteProtocolError, LimitExceeded, UnsafePayload, SerializationError)

# Small, so that every limit is met, and that what slips through doesn't take the machine's memory.
LIMITS = Limits(
    message=2**19, message_trusted=2**20, head=2**14, head_trusted=2**16, frames=64, frames_trusted=256, error_text=200
)


# -- pickles ---------------------------------------------------------------------------------------------------------------------


class Found:
    """What a pickle names: it takes anything and does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        pass

    def __call__(self, *args: object) -> Found:
        return Found(*args)


class _Harmless(pickle._Unpickler):  # the one in Python: it takes no memory for a mere number
    def find_class(self, module: str, name: str) -> Any:
        kind = getattr(__import__("builtins"), name, None) if module == "builtins" else None
        return kind if isinstance(kind, type) and issubclass(kind, BaseException) else Found


def _load(data: Any, known: frozenset[bytes], buffers: Sequence[Any] = ()) -> Any:
    data = bytes(data)
    return pickle.loads(data, buffers=buffers) if data in known else _Harmless(io.BytesIO(data), buffers=buffers).load()


_known: frozenset[bytes] | None = None


def _seed_pickles() -> frozenset[bytes]:
    """The pickles that stand in the seeds."""
    global _known
    if _known is None:
        seen: set[bytes] = set()

        def loads(data: Any, buffers: Sequence[Any] = ()) -> Any:
            seen.add(bytes(data))
            return pickle.loads(data, buffers=buffers)

        with mock.patch("trio_dcore.protocol._pickle.pickle", SimpleNamespace(**{**vars(pickle), "loads": loads})):
            for frames in messages().values():
                _attempt(lambda frames=frames: Decoder(DecodeContext(), extensions=True).resolve(frames))  # type: ignore[misc]
        _known = frozenset(seen)
    return _known


@contextmanager
def harmless_pickles() -> Iterator[None]:
    """Inside it a trusted peer's pickles do nothing: those of the seeds are loaded, all others run past stand-ins.

    A peer that is trusted may run whatever it likes, so what a mutated pickle would do is no finding, and could be anything.
    """
    known = _seed_pickles()

    def loads(data: Any, buffers: Sequence[Any] = ()) -> Any:
        return _load(data, known, buffers)

    def load_error(data: bytes) -> object:
        try:
            return _load(data, known)
        except Exception:
            return None

    with (
        mock.patch("trio_dcore.protocol._pickle.pickle", SimpleNamespace(**{**vars(pickle), "loads": loads})),
        mock.patch("trio_dcore.protocol._error_decoding.load", load_error),
    ):
        yield


# -- targets ---------------------------------------------------------------------------------------------------------------------


def _allowed(error: Exception) -> bool:
    """Whether an error is one that the decoder may raise for what came."""
    if isinstance(error, OURS):
        return True
    if type(error) is not TypeError:
        return False
    # Stock's: a sender's own report that it could not serialize a value, and a family that the caller refused.
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.name == "_read_error" or (last.name == "_load" and "only able to deserialize" in str(error))


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        if not _allowed(error):
            raise
        str(error), repr(error)  # they hold what a peer sent
        return None, error


def _feed(data: bytes, sizes: Sequence[int], *, trusted: bool, first: int | None) -> tuple[list[list[bytes]], str]:
    """The messages in ``data``, which comes in pieces, and how it ended; no size at all means all at once."""
    parser = FrameParser(LIMITS, lambda: trusted, first=first)
    found: list[list[bytes]] = []
    position = number = 0
    try:
        while position < len(data):
            size = 1 + sizes[number % len(sizes)] % 600 if sizes else len(data)
            number += 1
            room = parser.want()
            if room is None:
                piece = data[position : position + size]
                if number % 2:
                    frames = parser.receive(piece)
                else:
                    parser.feed(piece)
                    frames = parser.next_message()
            else:
                piece = data[position : position + min(size, len(room))]
                room[: len(piece)] = piece
                parser.filled(len(piece))
                frames = parser.next_message()
            position += len(piece)
            assert parser.total == position
            while frames is not None:
                found.append([bytes(frame) for frame in frames])
                assert parser.last_size <= position
                frames = parser.next_message()
    except OURS as error:
        return found, type(error).__name__
    return found, "middle" if parser.mid_message else "end"


def stream(data: bytes, sizes: Sequence[int] = ()) -> list[list[bytes]]:
    """Feed a byte stream to parsers; returns the messages that came out."""
    found: list[list[bytes]] = []
    for trusted in (False, True):
        for first in (HANDSHAKE, None):
            found, end = _feed(data, (), trusted=trusted, first=first)
            again, other_end = _feed(data, sizes, trusted=trusted, first=first)
            assert again == found, "the same bytes in pieces are other messages"
            # In pieces a mistake may show before all of the message is there, or what the first mistake is differ.
            assert (other_end == end) or {end, other_end} <= {"RemoteProtocolError", "LimitExceeded"}, (end, other_end)
    looks_like(data[:64])
    return found


def _sound_headers() -> Iterator[dict[str, Any]]:
    seen = set()
    for frames in messages().values():
        for frame in frames[1:]:
            try:
                header = msgpack.unpackb(frame)
            except ValueError:
                continue
            if isinstance(header, dict) and "num-sub-frames" in header:
                sub_header = header.get("sub-header")
                kind = (
                    *header,
                    header.get("serializer"),
                    header.get("type"),
                    *(sub_header if isinstance(sub_header, dict) else ()),
                )
                if kind not in seen:
                    seen.add(kind)
                    yield header


_CONTEXTS = [
    DecodeContext(
        allow_pickle=lambda trusted=trusted: trusted,  # type: ignore[misc]
        deserialize=deserialize,
        deserializers=deserializers,
        max_message=lambda: LIMITS.message_trusted,
        max_head=lambda: LIMITS.head,
    )
    for trusted in (False, True)
    for deserialize, deserializers in ((True, None), (False, None), (True, ("dask", "msgpack")))
]
_DECODERS = [Decoder(context, extensions=extensions) for context in _CONTEXTS for extensions in (False, True)]
_ENCODERS = [
    Encoder(EncodeContext(extensions=extensions, allow_pickle=lambda: False, on_error=on_error))
    for extensions in (False, True)
    for on_error in ("raise", "message")
]
#: A sound header of each kind.
HEADERS = tuple(_sound_headers())
_LOCAL = local_handshake(compression="lz4", window=(16, 2**20))


def decode_once(frames: Sequence[bytes]) -> None:
    """:func:`decode` for one kind of peer, which the message itself chooses."""
    decode(frames, [sum(map(len, frames)) % len(_DECODERS)])


def decode(frames: Sequence[bytes], which: Sequence[int] = range(12)) -> None:
    """Decode a message in every way there is, and use what comes out in every way that a peer's messages are used."""
    for number in which:
        decoder = _DECODERS[number]
        head, refused = _attempt(lambda decoder=decoder: decoder.head(frames[0]))  # type: ignore[misc]
        if refused is None:
            _used_as_head(head)
        value, failed = _attempt(lambda decoder=decoder: decoder.resolve([frames[0], *map(bytearray, frames[1:])]))  # type: ignore[misc]
        if not decoder.has_markers(frames) and refused is None:
            assert failed is None, f"the head can be read, and the message can't: {failed!r}"
            assert _shown(value) == _shown(head)
        if failed is None:
            _used_as_value(value, trusted=number >= len(_DECODERS) // 2)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "?"


def _used_as_head(head: object) -> None:
    """What the layers above do with a message before they know more of it."""
    _attempt(lambda: negotiate(_LOCAL, head))
    found, _ = _attempt(lambda: parse_envelope(head))
    if found is not None:
        _attempt(lambda: parse_credit(found[2]))
    _attempt(lambda: parse_credit(head))
    _attempt(lambda: parse_request_header(head))
    if isinstance(head, dict) and KEY in head:
        _attempt(lambda: parse_request_header(head[KEY]))


def _used_as_value(value: Any, *, trusted: bool) -> None:
    for encoder in _ENCODERS if not trusted else _ENCODERS[-1:]:
        _attempt(lambda encoder=encoder: encoder.encode(value))  # type: ignore[misc]
    for each in value.values() if isinstance(value, dict) else [value]:
        if isinstance(each, Serialized):
            repr(each)
            needs_pickle(each.header)
            _attempt(lambda each=each: deserialize(each.header, each.frames, _CONTEXTS[0]))  # type: ignore[misc]
    for make in (exception_from_reply, exception_from_value):
        of = value[2] if isinstance(value, tuple) and len(value) == 3 else value
        error = make(of, allow_pickle=lambda: trusted)
        assert isinstance(error, Exception)
        assert not isinstance(error, RemoteProtocolError | LocalProtocolError)
        str(error), repr(error)
        "".join(traceback.format_exception(error))
        # What a handler got from there it may let pass, to a caller of its own.
        for encoder in _ENCODERS[1::2]:
            encoder.encode(error_reply(error, trusted=False, extension=True, limit=200))
            encoder.encode(error_value(error, trusted=False, limit=200))


def address(text: str) -> None:
    """Give a text to everything that parses addresses."""
    functions: list[Callable[[str], Any]] = [
        parse_address,
        lambda text: parse_address(text, strict=True),
        parse_host_port,
        lambda text: parse_host_port(text, 5),
        get_address_host_port,
        coerce_to_address,
        listen_address,
        lambda text: listen_address((text, "5")),
        lambda text: listen_address(("127.0.0.1", text)),
    ]
    for function in functions:
        try:
            function(text)
        except AddressError as error:
            str(error)
    try:
        host, port = parse_host_port(text)
    except AddressError:
        return
    assert parse_host_port(unparse_host_port(host, port)) == (host, port)
    scheme, location = parse_address(text)
    assert parse_address(unparse_address(scheme, location)) == (scheme, location)


def run(data: bytes) -> None:
    """What a coverage-guided fuzzer calls: the first byte says which target, the rest is for it."""
    kind, rest = (data[0], data[1:]) if data else (0, b"")
    match kind % 4:
        case 0:
            for frames in stream(rest, rest[:3]):
                decode_once(frames)
        case 1:
            decode([rest])
        case 2:
            # Any number of frames, each with two bytes that tell how long it is.
            frames = []
            while rest:
                size = int.from_bytes(rest[:2], "little")
                frames.append(rest[2 : 2 + size])
                rest = rest[2 + size :]
            if frames:
                decode(frames)
        case _:
            address(rest.decode("utf-8", errors="replace"))
