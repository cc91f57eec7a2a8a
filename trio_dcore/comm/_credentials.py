"""Who is at the other end of a connection that does not leave this machine (security document, section 1).

How it works
------------
A unix socket tells: the kernel notes the credentials of who connected, or listened (:func:`unix_peer`).

A TCP connection over loopback does not, but both of its ends are sockets of this kernel, which lists them with the user who made
them and the inode by which processes hold them.  :func:`loopback_verdict` looks up the peer's end by the addresses of ours.  That
says less than it seems to, and each of these has been seen to fool a check that lacks it:

- A socket that was closed, or that its listener has not accepted yet, is listed with uid 0 and inode 0.  To a server of root a
  stranger that sends and hangs up looks like root.
- Users of another user namespace are all listed as the overflow uid (65534, "nobody").
- The socket may be held by a process that is not of its user any more, or of a container that shares our network only: so one of
  our user's processes that can be seen from here has to hold it.
- Once the connection was reset, somebody else may have got its port, and be listed in its place.  So our own end must be connected
  still *after* the look-up: as long as it is, the kernel lets nobody else complete a connection between the same addresses.

Whatever is not as expected means that the peer is not trusted, an error included; nothing here raises.

What it costs
-------------
The verdict is asked for once a connection and where the decoder can't wait, so all of this blocks.  Measured: 0.015 ms for the
kernel's row, 0.011 ms for a process's ``status``, and 0.003 ms for each descriptor that is looked at before the right one is found.
That makes 0.03 ms for a process that was found before (three times that if nothing of it is in the processor's caches), and 2 ms to
find a new one among 500.  Where netlink is forbidden, reading ``/proc/net/tcp`` adds 8 ms, and 2 ms for each thousand connections of
the machine.

So it is asked for early.  A server asks when the client's handshake has come, before it answers: a client of ours is there at this
moment, since it waits for that answer; later it may have sent its last message and left.  A client asks when it first has something
to say, or begins to read: until then the server waits for it.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

__all__ = ["Name", "Verdict", "loopback_verdict", "unix_peer"]

#: Whether a peer is trusted, and why, or why not.
Verdict = tuple[bool, str]
#: What getsockname() returns.
Name = tuple[str, int] | tuple[str, int, int, int]

_PROC = "/proc"
# From linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h and net/tcp_states.h.
_AF_NETLINK = 16
_NETLINK_SOCK_DIAG = 4
_NETLINK_TYPE = int(socket.SOCK_RAW) | getattr(socket, "SOCK_NONBLOCK", 0)  # which is Linux's
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_SOCK_DIAG_BY_FAMILY = 20
_ANY_STATE = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFF
_TCP_INFO = 11
_ESTABLISHED = 1
_CONNECTED = bytes([_ESTABLISHED])
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
# Header as above; family, protocol, extensions, states; ports, addresses, interface, cookie.
_QUESTION = struct.Struct("=IHHIIBBBxI4s16s16sIII")
_PORTS = struct.Struct("!HH")
_ROW = struct.Struct("=BBxx4s16s16s12x12xII")  # family, state, ports, addresses, uid, inode
_ERROR = struct.Struct("=i")
# What a sandbox, an old or a reduced kernel answers instead of looking: then /proc is asked.
_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EAFNOSUPPORT,
        errno.ECONNREFUSED,  # nothing in the kernel listens to these questions
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTONOSUPPORT,
    }
)
_LARGEST_ANSWER = 8192
_STRANGE = "the kernel's answer about whose its end is can't be read"
_KERNEL = (0, 0)  # as a netlink address: no process, no group
# Questions: their numbers, and the family that is asked for.
_SIX = ((1, socket.AF_INET6),)
_BOTH = ((1, socket.AF_INET), (2, socket.AF_INET6))
_MAPPED = b"\0" * 10 + b"\xff\xff"  # what stands before an IPv4 address inside of an IPv6 one
_LOOPBACK6 = b"\0" * 15 + b"\1"
# Rows of /proc/net/tcp that are read, and descriptors that are looked at (for some 0.25 s), before giving up.
_MOST_ROWS = 500_000
_MOST_DESCRIPTORS = 100_000
# Processes whose sockets were found lately, and under which number: they are asked first, and first for the numbers from there on,
# since a process that opens many connections mostly gets the next number each time, or the same again.
_MOST_RECENT = 16
_NEIGHBOURS = 8
_recent: dict[int, int] = {}


class _Row(NamedTuple):
    """What the kernel lists of a socket."""

    state: int
    uid: int
    inode: int


class _End(NamedTuple):
    """An end of a connection: its address as 16 bytes, IPv4 ones mapped into IPv6, and its port."""

    address: bytes
    port: int

    @property
    def is_ipv4(self) -> bool:
        return self.address.startswith(_MAPPED)

    @property
    def is_loopback(self) -> bool:
        return self.address == _LOOPBACK6 or (self.is_ipv4 and self.address[12] == 127)


class _Doubt(Exception):
    """The peer is not trusted, for the reason in the text."""


class _Refused(Exception):
    """Netlink does not answer here."""


# -- TCP -------------------------------------------------------------------------------------------------------------------------


def loopback_verdict(sock: socket.socket, names: tuple[Name, Name] | None = None) -> Verdict:
    """Whether the other end of a TCP connection over loopback is held by a process of our own user, and why, or why not.

    Blocks, for what the module's description says; never raises.  Only Linux tells; elsewhere the answer is no.

    Args:
        sock: our end.
        names: what its getsockname() and getpeername() have returned, if they were asked for already.
    """
    if sys.platform != "linux":
        return False, "this system does not tell whose a loopback connection is; use unix:// or tls://"
    try:
        return True, _vouched(sock, names)
    except _Doubt as doubt:
        return False, str(doubt)
    except (OSError, ValueError, struct.error) as error:
        return False, f"finding out who it is failed: {error}"


def _vouched(sock: socket.socket, names: tuple[Name, Name] | None) -> str:
    """Why the peer is trusted; raises if it isn't."""
    here, there = names or (sock.getsockname(), sock.getpeername())
    local, remote = _end(here), _end(there)
    if not (local.is_loopback and remote.is_loopback):
        raise _Doubt("it is not on this machine's loopback interface")
    uid = os.geteuid()
    if uid == _overflow_uid():
        raise _Doubt(f"this process runs as uid {uid}, as which users of other namespaces appear too")
    # Asked before as well, so that one that has left already costs little.
    _check_connected(sock)
    rows = _rows(local, remote)
    _check_connected(sock)
    if len(rows) > 1:
        raise _Doubt("the system lists more than one socket as its end")
    # A closed end is listed for a while, but not whose it was.
    if not rows or (row := rows.pop()).state != _ESTABLISHED or not row.inode:
        raise _Doubt("it has closed its end, or not accepted ours yet, so that the system does not tell who it is")
    if row.uid != uid:
        raise _Doubt(f"it is of uid {row.uid}, and this process of uid {uid}")
    pid = _holder(row.inode, uid)
    if pid is None:
        raise _Doubt(f"its end is of uid {uid}, but held by no process of that user that can be seen here")
    return f"it is process {pid} on this machine, of uid {uid} as this one"


def _end(name: Name) -> _End:
    host, port = name[:2]
    if ":" in host:
        return _End(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), port)
    return _End(_MAPPED + socket.inet_pton(socket.AF_INET, host), port)


def _check_connected(sock: socket.socket) -> None:
    # The first byte of struct tcp_info is the state.
    if sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1) != _CONNECTED:
        raise _Doubt("it has closed its end, so that the system does not tell who it was")


@functools.cache
def _overflow_uid() -> int:
    """As whom users appear who have no number in this user namespace.  (Asked for once: nobody changes it on a running system.)"""
    with open(f"{_PROC}/sys/kernel/overflowuid", "rb") as file:
        return int(file.read(32))


def _rows(local: _End, remote: _End) -> set[_Row]:
    """The kernel's rows for the peer's end: one, if all is well.  The same row twice, in both families, is one."""
    try:
        return _netlink_rows(local, remote)
    except _Refused:
        return _proc_rows(local, remote)


# -- netlink ---------------------------------------------------------------------------------------------------------------------


def _netlink_socket() -> socket.socket:
    # The kernel has answered when the question is sent, so there is nothing to wait for.
    return socket.socket(_AF_NETLINK, _NETLINK_TYPE, _NETLINK_SOCK_DIAG)


def _netlink_rows(local: _End, remote: _End) -> set[_Row]:
    # The kernel has one table for IPv4 and for IPv4 inside of IPv6, which it searches by the IPv4 addresses for either family.
    # Older ones don't for the second: hence that is asked where the first has no row.
    families = _BOTH if remote.is_ipv4 and local.is_ipv4 else _SIX
    try:
        with _netlink_socket() as netlink:
            for number, family in families:
                row = _ask(netlink, number, family, remote, local)
                if row is not None:
                    break
            else:
                if _ask(netlink, 3, families[0][1], local, remote) is None:
                    # Our own end is there.  Some kernels know the question, but lack the module that answers it for TCP.
                    raise _Refused
            try:
                netlink.recvfrom(1)
            except BlockingIOError:
                return set() if row is None else {row}
            raise _Doubt("the kernel answered more than it was asked about whose its end is")
    except OSError as error:
        if error.errno in _REFUSALS:
            raise _Refused from error
        raise


def _ask(netlink: socket.socket, number: int, family: int, this: _End, other: _End) -> _Row | None:
    """The kernel's row for the socket at ``this`` end that is connected to the ``other``; None if there is none."""
    addresses = this.address, other.address
    if family == socket.AF_INET:  # packing fills up with zeros
        addresses = addresses[0][12:], addresses[1][12:]
    ports = _PORTS.pack(this.port, other.port)
    question = _QUESTION.pack(
        *(_QUESTION.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, number, 0),
        *(family, socket.IPPROTO_TCP, 0, _ANY_STATE),
        *(ports, *addresses, 0, _NO_COOKIE, _NO_COOKIE),
    )
    netlink.sendto(question, _KERNEL)
    answer, _ancillary, flags, sender = netlink.recvmsg(_LARGEST_ANSWER)
    if sender != _KERNEL or flags & socket.MSG_TRUNC or len(answer) < _HEADER.size:
        raise _Doubt(_STRANGE)
    length, kind, _flags, echo, _port = _HEADER.unpack_from(answer)
    if echo != number or length != len(answer):  # longer: there is a second row
        raise _Doubt(_STRANGE)
    body = answer[_HEADER.size :]
    if kind == _NLMSG_ERROR and len(body) >= _ERROR.size:
        code = -_ERROR.unpack_from(body)[0]
        if code == errno.ENOENT:
            return None
        if code > 0:
            raise OSError(code, os.strerror(code))
    if kind != _SOCK_DIAG_BY_FAMILY or len(body) < _ROW.size:
        raise _Doubt(_STRANGE)
    found, state, *identity, uid, inode = _ROW.unpack_from(body)
    if found == socket.AF_INET:
        identity[1:] = [_MAPPED + address[:4] for address in identity[1:]]
    # Listening sockets are found where there is no connection; their row is about no peer at all.
    if found not in (socket.AF_INET, socket.AF_INET6) or (
        state == _ESTABLISHED and identity != [ports, this.address, other.address]
    ):
        raise _Doubt(_STRANGE)
    return _Row(state, uid, inode)


# -- /proc -----------------------------------------------------------------------------------------------------------------------


def _proc_rows(local: _End, remote: _End) -> set[_Row]:
    rows: set[_Row] = set()
    names = ["tcp", "tcp6"] if remote.is_ipv4 and local.is_ipv4 else ["tcp6"]
    for name in names:
        skip = 12 if name == "tcp" else 0
        wanted = " ".join(f"{_hexadecimal(end.address[skip:])}:{end.port:04X}" for end in (remote, local)).encode()
        try:
            with open(f"{_PROC}/net/{name}", "rb") as table:
                for number, line in enumerate(islice(table, _MOST_ROWS + 1)):
                    if number == _MOST_ROWS:
                        raise _Doubt("too many connections are open to find out who it is")
                    if wanted in line:
                        # Number, local, remote, state, queues, timer, retransmits, uid, timeout, inode, ...
                        fields = line.split()
                        rows.add(_Row(int(fields[3], 16), int(fields[7]), int(fields[9])))
        except FileNotFoundError:
            if name == "tcp":
                raise  # the other one lacks where IPv6 is turned off
        except IndexError:
            raise _Doubt(f"a row of {_PROC}/net/{name} can't be read") from None
    return rows


def _hexadecimal(address: bytes) -> str:
    """An address as the tables have it: 32 bits at a time, in this machine's byte order."""
    return "".join(f"{word:08X}" for (word,) in struct.iter_unpack("=I", address))


def _holder(inode: int, uid: int) -> int | None:
    """A process of the user that holds the socket, if there is one to be seen."""
    target = f"socket:[{inode}]"
    for pid, last in reversed(list(_recent.items())):
        found = _search_again(pid, last, target, uid)
        if found is not None:
            return _remember(pid, found)
    left = _MOST_DESCRIPTORS
    for pid in _candidates():
        size, found = _search(pid, target, uid)
        if found is not None:
            return _remember(pid, found)
        left -= size
        if left < 0:
            raise _Doubt("too many files are open on this machine to find the process that holds its end")
    return None


def _remember(pid: int, number: int) -> int:
    _recent.pop(pid, None)
    _recent[pid] = number
    while len(_recent) > _MOST_RECENT:
        _recent.pop(next(iter(_recent)), None)
    return pid


def _candidates() -> Iterator[int]:
    """Processes, the likely ones first: those found lately, this one, then all others from the newest on."""
    seen = [*reversed(list(_recent)), os.getpid()]
    yield from dict.fromkeys(seen)
    skip = set(seen)
    yield from sorted((pid for name in os.listdir(_PROC) if name.isdecimal() and (pid := int(name)) not in skip), reverse=True)


def _search_again(pid: int, last: int, target: str, uid: int) -> int | None:
    """:func:`_search` in the few likeliest descriptors of a process that was found lately."""
    own = pid == os.getpid()
    # ("self", since /proc may be that of a namespace in which our number is another's.)
    folder = f"{_PROC}/{'self' if own else pid}"
    status = -1
    try:
        if not own:
            # Opened before the descriptors are looked at and read afterwards, which fails if the process has ended.  So all of it
            # is about one process: nobody else has got its number in between.
            status = os.open(f"{folder}/status", os.O_RDONLY)
        for number in range(last, last + _NEIGHBOURS):
            try:
                found = os.readlink(f"{folder}/fd/{number}") == target
            except FileNotFoundError:
                continue
            if found:
                return number if own or _is_of(status, uid) else None
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # as below
    finally:
        if status >= 0:
            os.close(status)
    return None


def _search(pid: int, target: str, uid: int) -> tuple[int, int | None]:
    """How many descriptors of a process were looked at, and which is the socket, if one is and the process is the user's."""
    process = folder = status = -1
    own = pid == os.getpid()
    size = 0
    try:
        # By descriptor: so all of it is about one process, even if its number is given to another meanwhile.
        # ("self", since /proc may be that of a namespace in which our number is another's.)
        process = os.open(f"{_PROC}/{'self' if own else pid}", os.O_RDONLY | os.O_DIRECTORY)
        # That is its effective user; the others are looked at if it holds the socket.
        if not own and os.fstat(process).st_uid != uid:
            return size, None
        folder = os.open("fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=process)
        # Later ones first: of the descriptors of a process that has many, a new one is the likelier.
        for number in sorted(map(int, os.listdir(folder)), reverse=True):
            size += 1
            try:
                found = os.readlink(str(number), dir_fd=folder) == target
            except FileNotFoundError:
                continue  # closed meanwhile
            if found:
                # (This process may answer itself, whatever its other user ids are.)
                if own:
                    return size, number
                status = os.open("status", os.O_RDONLY, dir_fd=process)
                return size, number if _is_of(status, uid) else None
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it has ended, or we may not look into it
    finally:
        for descriptor in (process, folder, status):
            if descriptor >= 0:
                os.close(descriptor)
    return size, None


def _is_of(status: int, uid: int) -> bool:
    """Whether a process is of that user in every respect: real, effective, saved and for files; by its open ``status``."""
    # The name of the process stands before it, in which a line's end can't be: it is shown as \\n.
    line = os.read(status, 4096).partition(b"\nUid:")[2].partition(b"\n")[0]
    return line.split() == [b"%d" % uid] * 4


# -- unix sockets ----------------------------------------------------------------------------------------------------------------


def unix_peer(sock: socket.socket) -> tuple[int | None, int | None, bool, str]:
    """User and process at the other end of a unix socket, whether that is trusted, and why, or why not.

    They are those who connected, or who called ``listen()``.  Does not wait, and never raises.

    Args:
        sock: our end, connected.
    """
    uid: int | None = None
    pid: int | None = None
    try:
        uid, pid = _peer_credentials(sock)
        return uid, pid, True, _vouched_unix(uid, pid)
    except _Doubt as doubt:
        return uid, pid, False, str(doubt)
    except (OSError, ValueError, struct.error) as error:
        return uid, pid, False, f"finding out who it is failed: {error}"


def _peer_credentials(sock: socket.socket) -> tuple[int, int | None]:
    if sys.platform == "linux":
        pid, uid, _gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return uid, pid
    if sys.platform == "darwin":
        # SOL_LOCAL is 0; LOCAL_PEERCRED and LOCAL_PEERPID of sys/un.h, struct xucred of sys/ucred.h.
        version, uid = struct.unpack_from("=II", sock.getsockopt(0, 1, 76))
        if version != 0:
            raise _Doubt("the system tells who it is in a form that can't be read")
        return uid, sock.getsockopt(0, 2)
    raise _Doubt("this system does not tell who is at the other end of a unix socket; use tls://")


def _vouched_unix(uid: int, pid: int | None) -> str:
    ours = os.geteuid()
    if uid != ours:
        raise _Doubt(f"it is of uid {uid}, and this process of uid {ours}")
    if sys.platform == "linux" and uid == _overflow_uid():
        raise _Doubt(f"this process runs as uid {uid}, as which users of other namespaces appear too")
    if pid is None or pid <= 0:
        raise _Doubt(f"it is of uid {uid}, but its process can't be seen here")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise _Doubt(f"it is of uid {uid}, but its process {pid} has ended") from None
    except PermissionError:
        pass  # it exists
    return f"it is process {pid} on this machine, of uid {uid} as this one"
