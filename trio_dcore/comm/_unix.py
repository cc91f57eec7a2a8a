"""``unix://``: comms over Unix domain sockets, which only this machine's processes reach, and which tell who they are.

Taking a path
-------------
A socket file outlives a server that was killed, and it is in the way of the next one.  Whether it is stale shows when one connects to
it; but between that look and the removal it may have become the file of another server that starts at the same moment, and one that
is bound and doesn't listen yet looks stale as well.  So look, removal, bind and listen happen under a lock that every server of
this package takes: a file next to the socket, which is there for a fraction of a millisecond.  Its holder never waits.

A path is given back before its socket is closed: while we listen nobody takes it for stale, so it is ours if its inode is.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import socket
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from ..abc import CommSettings, Listener, Peer, Transport
from ..errors import AddressError
from ..protocol._limits import MiB
from ._comm import FramedComm
from ._credentials import unix_peer
from ._listener import BACKLOG, SocketListener
from ._pumps import SocketPump

if sys.platform != "win32":  # which has none
    import fcntl

__all__ = ["UnixTransport"]

_log = logging.getLogger("trio_dcore.comm")

# Bytes of a path or of an abstract name: sockaddr_un has 108 or, on BSD and macOS, 104, and a path ends with a zero.
_LONGEST = 107 if sys.platform == "linux" else 103
# What may be on its way in one direction.  The system's default, 208 KiB, makes large messages wait for their reader in small steps:
# with this an echo of 1 MiB is 1.7 times as fast.  TCP's buffers grow beyond it by themselves; the system may allow less.
_SEND_BUFFER = 1 * MiB
# Seconds that one attempt to connect waits for room in the listener's queue; behind that connect() makes another.
_QUEUE_PATIENCE = 1.0
_SHORTEST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05
# Seconds that a server waits for another one that is taking the same path.
_LOCK_PATIENCE = 5.0
# Looks at a path that is taken, which may be given back between a bind that fails and the look.
_BIND_TRIES = 5
_KINDS = {"d": "a directory", "l": "a symbolic link", "p": "a pipe", "b": "a device", "c": "a device"}

_numbers = itertools.count(1)


class UnixTransport(Transport):
    """Unix domain sockets, by path, or by name in Linux's abstract namespace (``unix://@name``)."""

    scheme = "unix"
    encrypted = True  # it isn't, but nothing leaves the machine

    async def connect(self, location: str, settings: CommSettings) -> FramedComm:
        name = socket_name(location)
        address = f"unix://{location}"
        await trio.lowlevel.checkpoint()
        sock = _new_socket()
        try:
            await _connect(sock, name, address)
        except BaseException:
            sock.close()
            raise
        return _make_comm(sock, settings, f"{address}#{os.getpid()}.{next(_numbers)}", address)

    async def listen(self, location: str, settings: CommSettings) -> Sequence[Listener]:
        socket_name(location)
        await trio.lowlevel.checkpoint()
        try:
            path = _absolute(location)
            if path is None:
                return [UnixListener(_listening(socket_name(location)), settings, location, None)]
            async with _locked(path):
                sock, inode = _take(socket_name(location), path)
        except OSError as error:
            raise OSError(error.errno, f"listening on unix://{location}: {error.strerror}") from error
        # Others may have another current directory.
        reachable = path if len(os.fsencode(path)) <= _LONGEST else location
        return [UnixListener(sock, settings, reachable, (path, inode))]


class UnixListener(SocketListener):
    """Accepts on one unix socket, which it owns, together with its file."""

    def __init__(
        self, sock: socket.socket, settings: CommSettings, location: str, file: tuple[str, tuple[int, int]] | None
    ) -> None:
        super().__init__(sock, settings)
        self._address = f"unix://{location}"
        self._file = file

    @property
    def listen_address(self) -> str:
        return self._address

    @property
    def contact_address(self) -> str:
        return self._address

    def _make_comm(self, sock: socket.socket) -> FramedComm:
        return _make_comm(sock, self._settings, self._address, None)

    def _retract(self) -> None:
        if self._file is not None:
            _remove(*self._file)


def socket_name(location: str) -> bytes:
    """What the system calls a location: a path, or an abstract name behind a zero byte.

    Raises:
        AddressError: it can't be one, or not on this system.
    """
    address = f"unix://{location}"
    if not hasattr(socket, "AF_UNIX"):  # pragma: no cover
        raise AddressError(f"address {address!r}: this system has no unix sockets; use tcp:// or tls://")
    if location in ("", "@"):
        raise AddressError(
            f"address {address!r} names no path; write for example 'unix:///run/user/1000/my.sock' or 'unix://@name'"
        )
    if "\0" in location:
        raise AddressError(f"address {address!r}: a zero byte can't be part of a path")
    try:
        name = os.fsencode(location)
    except UnicodeEncodeError as error:
        raise AddressError(f"address {address!r} can't be encoded as a path: {error}") from error
    if location.startswith("@"):
        if sys.platform != "linux":  # pragma: no cover
            raise AddressError(
                f"address {address!r}: only Linux has abstract names; for a file of this name write 'unix://./{location}'"
            )
        what, name = "name", b"\0" + name[1:]
        size = len(name) - 1
    else:
        what, size = "path", len(name)
    if size > _LONGEST:
        raise AddressError(
            f"address {address!r}: its {what} has {size} bytes, and a unix socket's may have {_LONGEST}; choose a shorter one"
        )
    return name


def _absolute(location: str) -> str | None:
    """The path of a location, wherever this process changes its directory to; None where it is no path."""
    return None if location.startswith("@") else os.path.join(os.getcwd(), location)


def _make_comm(sock: socket.socket, settings: CommSettings, local: str, remote: str | None) -> FramedComm:
    """Wrap a connected socket, which the comm then owns; if this fails the socket is closed.

    Clients have no address of their own, so one without a ``remote`` is told from others by its process and a number.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        uid, pid, trusted, reason = unix_peer(sock)
        if remote is None:
            remote = f"{local}#{pid or 0}.{next(_numbers)}"
        peer = Peer(remote, "unix", uid=uid, pid=pid, verify=lambda: (trusted, reason))
        return FramedComm(SocketPump(sock), local_address=local, peer=peer, settings=settings)
    except BaseException:
        sock.close()
        raise


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


async def _connect(sock: socket.socket, name: bytes, address: str) -> None:
    give_up = trio.current_time() + _QUEUE_PATIENCE
    pause = _SHORTEST_PAUSE
    while True:
        try:
            return sock.connect(name)
        except BlockingIOError as error:
            # The queue is full, and unlike TCP's such a connect can't be waited for (man 7 unix, man 2 connect: EAGAIN).
            if trio.current_time() >= give_up:
                raise OSError(error.errno, f"connecting to {address}: the server accepts nobody and its queue is full") from None
        except OSError as error:
            raise OSError(error.errno, f"connecting to {address}: {error.strerror}") from None
        # Many may be waiting: not all of them again at the same instant.
        await trio.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)


# -- taking a path and giving it back -------------------------------------------------------------------------------------------


def _listening(name: bytes) -> socket.socket:
    sock = _new_socket()
    try:
        sock.bind(name)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _take(name: bytes, path: str) -> tuple[socket.socket, tuple[int, int]]:
    """Bind and listen, in place of a stale file if there is one; return the socket and its file's identity.  Under the lock."""
    sock = _new_socket()
    inode = None
    try:
        for attempt in range(_BIND_TRIES):
            try:
                _bind_private(sock, name)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempt == _BIND_TRIES - 1:
                    raise
            _clear(name, path)
        found = os.lstat(path)
        inode = found.st_dev, found.st_ino
        if stat.S_IMODE(found.st_mode) != 0o600:  # an umask that takes our own permissions away as well
            os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except BaseException:
        if inode is not None:
            _remove(path, inode)
        sock.close()
        raise
    return sock, inode


def _bind_private(sock: socket.socket, name: bytes) -> None:
    """Bind to a path, whose file has the mode 0600 from the start."""
    if sys.platform == "linux":
        os.fchmod(sock.fileno(), 0o600)  # the file gets the socket's own mode, less the umask
        sock.bind(name)
        return
    before = os.umask(0o177)
    try:
        sock.bind(name)
    finally:
        os.umask(before)


def _clear(name: bytes, path: str) -> None:
    """Remove a stale socket.  Under the lock.

    Raises:
        OSError: the file is something else, somebody listens on it, or it can't be told or removed.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return  # it was given back just now
    if not stat.S_ISSOCK(found.st_mode):
        kind = _KINDS.get(stat.filemode(found.st_mode)[0], "a file")
        raise OSError(errno.EADDRINUSE, f"there is {kind} of that name, which is no socket and was left alone")
    with _new_socket() as probe:
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # a full queue is somebody's
        except OSError as error:
            raise OSError(
                errno.EADDRINUSE, f"there is a socket of that name, and whether it is in use can't be told: {error}"
            ) from error
    raise OSError(errno.EADDRINUSE, "another server listens on it")


def _remove(path: str, inode: tuple[int, int]) -> None:
    """Remove the file of a socket that still listens if it is still that one; so nobody else has taken its place since."""
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == inode:
            os.unlink(path)
    except FileNotFoundError:
        pass  # whoever removed it was faster
    except OSError as error:
        _log.warning("the socket %s could not be removed: %s", path, error)  # the next server replaces it


@asynccontextmanager
async def _locked(path: str) -> AsyncIterator[None]:
    """Be the only server that takes this path.  The block must not wait."""
    directory, name = os.path.split(path)
    lock = os.path.join(directory, f".{name}.lock")
    give_up = trio.current_time() + _LOCK_PATIENCE
    pause = _SHORTEST_PAUSE
    while (descriptor := _try_lock(lock)) is None:
        if trio.current_time() >= give_up:
            raise OSError(errno.EADDRINUSE, f"another process has held {lock} for {_LOCK_PATIENCE:g} s")
        await trio.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)
    try:
        yield
    finally:
        try:
            os.unlink(lock)  # by name while it is locked, so it is this one and nobody has it
        except OSError as error:
            _log.warning("the lock %s could not be removed: %s", lock, error)  # it works all the same, next time as well
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has a copy of the descriptor
        os.close(descriptor)


def _try_lock(lock: str) -> int | None:
    """Open and lock a file, made if need be; None if somebody else has it."""
    try:
        # Not through a link, nor stopped by a pipe, that somebody else has left there.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OSError(error.errno, f"its lock {lock} can't be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # locked by another, or removed by its last holder after we opened it
    return None
