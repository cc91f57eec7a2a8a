"""What the two ends of a fresh comm say about themselves, and what they make of it (wire document, section 3).

Each side sends one map, then reads one.  The first three keys are Dask's; everything of ours stands under one more key, which a
stock peer stores and ignores.  Nothing here does I/O or knows the time: bounding the handshake is the comm layer's business.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from ._envelope import KEY
from ._errors import RemoteProtocolError

__all__ = ["FEATURES", "PING_PATIENCE", "VERSION", "Extension", "Negotiated", "local_handshake", "negotiate"]

#: The version of the wire extension that is spoken here (docs/wire-extension.md).
VERSION = 1

#: What this side can do beyond the plain Dask protocol.  A feature is used only where both sides name it.
FEATURES = ("calls", "streams", "deadlines", "types", "errors", "pings")

# Dask has said 5 ever since Python 3.8, 4 from scheduler to worker; CPython's is 5.  Far above either is not a protocol number.
_PICKLE_PROTOCOL = 5
_MAX_PICKLE_PROTOCOL = 100

# A name is a word, not a text, and there are few of them: whatever is longer is no handshake.
_MAX_NAME = 64
_MAX_NAMES = 64

# All that msgpack has.
_MAX_WINDOW = 2**64 - 1

# Seconds; beyond it nobody is in a hurry.
_MAX_PING = 1e6

#: Seconds in which a peer that doesn't say otherwise wants the answer to a ping.
PING_PATIENCE = 4.0


@dataclass(frozen=True, slots=True)
class Extension:
    """What both sides have of the wire extension.

    Args:
        version: the lower of the two versions; a higher one contains all that a lower one has.
        features: what both sides can do.
        window: items and bytes of one stream that the peer lets us send before it grants more.
        pooled: the peer makes nothing but calls on this comm, so it understands a goodbye at any time.
        ping: seconds in which it wants the answer to a ping, if it said so.
    """

    version: int
    features: frozenset[str]
    window: tuple[int, int]
    pooled: bool = False
    ping: float | None = None


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What two handshakes come to.

    Args:
        compression: the codec for payload frames that we send, None for none.
        pickle_protocol: the lower of the two; for the pickle family and numpy's object and void dtypes only.
        python: the peer's Python version, ``()`` where it did not say.
        extension: None towards a stock peer.
        remote: the peer's handshake as it came.
    """

    compression: str | None
    pickle_protocol: int
    python: tuple[int, ...]
    extension: Extension | None
    remote: dict[Any, Any]


def local_handshake(
    *, compression: str | None, window: tuple[int, int], pooled: bool = False, ping: float | None = None
) -> dict[str, Any]:
    """Build the map to send.

    Args:
        compression: the codec that we would like to use, None for none (Dask's value on one host).
        window: items and bytes that the peer may send us in each stream before we grant more.
        pooled: the comm is a pool's: only requests are made on it, so a goodbye may come at any time.
        ping: seconds in which we want the answer to a ping, if that is sooner than a server gives it anyway.
    """
    extension: dict[str, Any] = {"version": VERSION, "features": list(FEATURES), "window": [min(n, _MAX_WINDOW) for n in window]}
    if pooled:
        extension["pooled"] = True
    if ping is not None:
        extension["ping"] = ping
    return {
        "compression": compression,
        "python": list(sys.version_info[:3]),
        "pickle-protocol": _PICKLE_PROTOCOL,
        KEY: extension,
    }


def negotiate(local: Mapping[str, Any], remote: object) -> Negotiated:
    """Compare what we sent with what came.  Keys that are not known here are left alone, in both maps.

    Args:
        local: the map of :func:`local_handshake`; without our own key in it the extension is off.
        remote: the message that the peer sent first, whatever it is.

    Raises:
        RemoteProtocolError: it is no handshake; the text names the key and what was there.
    """
    if not isinstance(remote, dict):
        raise RemoteProtocolError(f"the peer's handshake is {_shown(remote)}, not a map; is it a Dask peer at all?")
    compression = _compression(remote)
    pickle_protocol = _integer(remote, "pickle-protocol", low=0, high=_MAX_PICKLE_PROTOCOL)
    ours = local["compression"]
    return Negotiated(
        compression=ours if ours == compression else None,
        pickle_protocol=min(local["pickle-protocol"], pickle_protocol),
        python=_python(remote.get("python", ())),
        extension=_extension(local[KEY], remote[KEY]) if KEY in local and KEY in remote else None,
        remote=remote,
    )


def _compression(remote: Mapping[object, object]) -> str | None:
    value = _required(remote, "compression")
    # A codec that we don't have is no error: it is then not the same as ours, and nothing gets compressed.
    if value is None or (isinstance(value, str) and len(value) <= _MAX_NAME):
        return value
    raise _wrong("compression", value, "the name of a codec or None")


def _python(value: object) -> tuple[int, ...]:
    # Nobody needs it, so its absence is fine; but whoever sends something else here does not speak this protocol.
    if isinstance(value, (list, tuple)) and len(value) <= 8 and all(_is_integer(v, 0, 2**16) for v in value):
        return tuple(value)
    raise _wrong("python", value, "a version such as [3, 11, 7]")


def _extension(local: Mapping[str, Any], remote: object) -> Extension:
    if not isinstance(remote, dict):
        raise _wrong(KEY, remote, "a map")
    version = _integer(remote, "version", low=1, high=2**31, within=KEY)
    features = _sequence(remote, "features")
    if len(features) > _MAX_NAMES or not all(isinstance(f, str) and len(f) <= _MAX_NAME for f in features):
        raise _wrong(f"{KEY}.features", features, f"at most {_MAX_NAMES} short names")
    window = _sequence(remote, "window")
    if len(window) != 2 or not all(_is_integer(n, 1, _MAX_WINDOW) for n in window):
        raise _wrong(f"{KEY}.window", window, "[items, bytes], both above 0")
    pooled = remote.get("pooled", False)
    if not isinstance(pooled, bool):
        raise _wrong(f"{KEY}.pooled", pooled, "a bool")
    ping = remote.get("ping")
    if ping is not None and not (type(ping) in (int, float) and 0 < ping < math.inf):
        raise _wrong(f"{KEY}.ping", ping, "a number of seconds above 0")
    return Extension(
        version=min(local["version"], version),
        features=frozenset(local["features"]).intersection(features),
        # What it lets us send, so a large one is harmless; and it may wait for half of that before it grants more.
        window=(window[0], window[1]),
        pooled=pooled,
        ping=None if ping is None else float(min(ping, _MAX_PING)),
    )


def _required(remote: Mapping[object, object], key: str, within: str = "") -> object:
    if key not in remote:
        name = f"{within}.{key}" if within else key
        raise RemoteProtocolError(f"the peer's handshake lacks the key {name!r}; it has {_shown(list(remote))}")
    return remote[key]


def _integer(remote: Mapping[object, object], key: str, *, low: int, high: int, within: str = "") -> int:
    value = _required(remote, key, within)
    if isinstance(value, int) and _is_integer(value, low, high):
        return value
    raise _wrong(f"{within}.{key}" if within else key, value, f"an integer from {low} to {high}")


def _sequence(remote: Mapping[object, object], key: str) -> Sequence[Any]:
    value = _required(remote, key, KEY)
    if isinstance(value, (list, tuple)):
        return value
    raise _wrong(f"{KEY}.{key}", value, "an array")


def _is_integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _wrong(key: str, value: object, wanted: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the peer's handshake has {_shown(value)} as {key!r}, where {wanted} belongs")


def _shown(value: object) -> str:
    """A peer's value for an error message, whatever its size."""
    # Of a map the size only: reprlib would sort all of its keys.
    try:
        text = f"a map of {len(value)}" if isinstance(value, dict) else short(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:199] + "…"
