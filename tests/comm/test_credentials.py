"""Who is at the other end: each doubt is a no, and whom we know is found, on every kind of loopback address."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trio_dcore.comm import _credentials as credentials
from trio_dcore.testing import no_leaks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a loopback connection is")

ESTABLISHED, FIN_WAIT, LISTEN = 1, 5, 10
RST = struct.pack("ii", 1, 0)


@contextmanager
def connected(to: str = "127.0.0.1", listen: str | None = None, *, port: int = 0) -> Iterator[tuple[Any, Any, Any]]:
    """Client's end, server's end and listener of a connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in (listen or to) else socket.AF_INET))
        try:
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((listen or to, port))
            listener.listen()
            client = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET))
            client.bind((to, 0))  # a port of its own, which connect() alone may share with connections that have ended
            client.connect((to, listener.getsockname()[1]))
        except OSError as error:
            if ":" in (listen or "") + to and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                pytest.skip("this machine has no IPv6")
            raise
        yield client, stack.enter_context(listener.accept()[0]), listener


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(credentials, "_recent", {})
    with no_leaks():
        yield


@pytest.fixture
def server_end() -> Iterator[Any]:
    with connected() as (_client, server, _listener):
        yield server


def refused(code: int) -> Callable[[], Any]:
    def opener() -> Any:
        raise OSError(code, os.strerror(code))

    return opener


def expect_no(sock: Any, *words: str) -> None:
    trusted, reason = credentials.loopback_verdict(sock)
    assert trusted is False
    assert all(word in reason for word in words), reason


# -- whom we know -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["netlink", "/proc"])
@pytest.mark.parametrize(
    ("to", "listen"),
    [
        ("127.0.0.1", None),
        ("127.3.2.1", "0.0.0.0"),
        ("::1", None),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("::ffff:127.0.0.1", "::"),
    ],
)
def test_a_process_of_ours(to: str, listen: str | None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of every kind are known, also where netlink is refused."""
    if way == "/proc":
        monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    else:
        monkeypatch.setattr(credentials, "_proc_rows", None)
    with connected(to, listen) as (client, server, _listener):
        for end in (client, server):
            trusted, reason = credentials.loopback_verdict(end)
            assert trusted, reason
            assert reason == f"it is process {os.getpid()} on this machine, of uid {os.geteuid()} as this one"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT])
def test_a_sandbox_without_netlink(code: int, server_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_netlink_socket", refused(code))
    assert credentials.loopback_verdict(server_end)[0]


@pytest.mark.parametrize("ipv6", [True, False])
def test_a_machine_without_ipv6_has_no_table_of_it(
    ipv6: bool, server_end: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    (tmp_path / "net").mkdir()
    (tmp_path / ("net/tcp" if not ipv6 else "net/tcp6")).write_bytes(Path("/proc/net/tcp").read_bytes())
    monkeypatch.setattr(credentials, "_overflow_uid", lambda: 65534)
    monkeypatch.setattr(credentials, "_holder", lambda inode, uid: 5)
    monkeypatch.setattr(credentials, "_PROC", str(tmp_path))
    trusted, reason = credentials.loopback_verdict(server_end)
    assert trusted is not ipv6, reason


# -- whom we don't ----------------------------------------------------------------------------------------------------------------


def test_another_address_than_loopback() -> None:
    class Elsewhere:
        def getsockname(self) -> Any:
            return ("10.0.0.1", 80)

        def getpeername(self) -> Any:
            return ("127.0.0.1", 80)

    expect_no(Elsewhere(), "not on this machine's loopback interface")


def test_another_system(server_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "sys", SimpleNamespace(platform="darwin"))
    expect_no(server_end, "unix://")


@pytest.mark.parametrize("way", ["netlink", "/proc"])
def test_ends_that_are_no_more(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "/proc":
        monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    with connected() as (client, server, _listener):
        client.sendall(b"x")
        client.close()
        expect_no(server, "closed its end")
    with connected() as (client, server, _listener):
        client.shutdown(socket.SHUT_WR)
        expect_no(server, "closed its end")
        expect_no(client, "closed its end")
    with connected() as (client, server, _listener):
        client.sendall(b"x")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        client.close()
        expect_no(server, "finding out who it is failed")
        assert server.recv(1) == b"x"  # what it sent is there all the same
    with connected() as (_client, server, _listener):
        server.close()
        expect_no(server, "finding out who it is failed")


@pytest.mark.parametrize("way", ["netlink", "/proc"])
def test_a_close_during_the_look_up(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel lists a closed end without its inode, and older ones as root's."""
    if way == "/proc":
        monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    monkeypatch.setattr(credentials, "_check_connected", lambda sock: None)
    with connected() as (client, server, _listener):
        client.close()
        rows = credentials._rows(credentials._end(server.getsockname()), credentials._end(server.getpeername()))
        assert [row.inode for row in rows] == [0]
        expect_no(server, "closed its end")


def test_a_server_that_has_not_accepted_yet() -> None:
    with connected() as (_client, _server, listener), socket.socket() as early:
        early.connect(listener.getsockname())
        expect_no(early, "not accepted ours yet")
        with listener.accept()[0]:
            assert credentials.loopback_verdict(early)[0]


def test_somebody_else_on_the_port_of_one_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger sends, resets, and one of ours happens to get its port: the stranger's bytes are not ours for that."""
    look_up = credentials._rows
    found: list[Any] = []

    def swapped(local: Any, remote: Any) -> Any:
        port = client.getsockname()[1]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        client.close()
        newcomer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        newcomer.bind(("127.0.0.1", port))
        newcomer.connect(listener.getsockname())
        found.append(look_up(local, remote))
        return set(found[0])

    monkeypatch.setattr(credentials, "_rows", swapped)
    with connected() as (client, server, listener), socket.socket() as newcomer:
        expect_no(server, "closed its end")
        (row,) = found[0]
        assert (row.state, row.uid) == (ESTABLISHED, os.geteuid())
        assert credentials._holder(row.inode, row.uid) == os.getpid()


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (set(), "closed its end"),
        ({(FIN_WAIT, 0, 5)}, "closed its end"),
        ({(LISTEN, 0, 5)}, "closed its end"),
        ({(ESTABLISHED, 0, 0)}, "closed its end"),
        ({(ESTABLISHED, 1, 5)}, "it is of uid"),
        ({(ESTABLISHED, 0, 5), (ESTABLISHED, 0, 6)}, "more than one"),
        ({(ESTABLISHED, 0, 5), (ESTABLISHED, 1, 5)}, "more than one"),
        ({(ESTABLISHED, 0, 2**32 - 1)}, "no process of that user"),
    ],
)
def test_rows_that_prove_nothing(
    rows: set[tuple[int, int, int]], word: str, server_end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid()
    made = {credentials._Row(state, uid + other, inode) for state, other, inode in rows}
    monkeypatch.setattr(credentials, "_rows", lambda local, remote: made)
    expect_no(server_end, word)


def test_the_uid_of_other_namespaces(server_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_overflow_uid", os.geteuid)
    expect_no(server_end, "other namespaces")


def test_a_socket_that_no_process_holds() -> None:
    """It is on its way between processes; that it is of our uid says nothing about who takes it out."""
    left, right = socket.socketpair()
    with left, right, connected() as (client, server, _listener):
        socket.send_fds(left, [b"x"], [client.fileno()])
        client.close()
        expect_no(server, "held by no process")
        _, (taken,), _, _ = socket.recv_fds(right, 1, 1)
        with socket.socket(fileno=taken):
            assert credentials.loopback_verdict(server)[0]


def test_no_descriptors_left(server_end: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    for room in range(4):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, hard))
        try:
            trusted, reason = credentials.loopback_verdict(server_end)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if room == 0:
            assert "Too many open files" in reason
        assert trusted == (room == 3)  # the process, its folder, and that again to list it


def test_tables_without_end(server_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    monkeypatch.setattr(credentials, "_MOST_ROWS", 1)
    expect_no(server_end, "too many connections")


@pytest.mark.parametrize(
    "row", ["{addresses}", "{addresses} 01 0 0 0 0", "{addresses} xx 0 0 0 0 0 0 0", "{addresses} 01 q q q q q q"]
)
def test_a_table_that_can_not_be_read(row: str, server_end: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, remote = server_end.getsockname(), server_end.getpeername()
    addresses = f"0100007F:{remote[1]:04X} 0100007F:{local[1]:04X}"
    if sys.byteorder == "big":
        addresses = addresses.replace("0100007F", "7F000001")
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(f"header\n 0: {row.format(addresses=addresses)}\n")
    monkeypatch.setattr(credentials, "_netlink_socket", refused(errno.EPERM))
    monkeypatch.setattr(credentials, "_overflow_uid", lambda: 65534)
    monkeypatch.setattr(credentials, "_PROC", str(tmp_path))
    assert credentials.loopback_verdict(server_end)[0] is False


# -- the process that holds it ----------------------------------------------------------------------------------------------------


class Processes:
    """A folder that looks like /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, *targets: str, uids: str | None = None) -> None:
        fd = self.root / str(pid) / "fd"
        fd.mkdir(parents=True)
        for number, target in enumerate(targets):
            (fd / str(number)).symlink_to(target)
        uid = os.geteuid()
        (fd.parent / "status").write_text(f"Name:\tx\nUid:\t{uids or chr(9).join([str(uid)] * 4)}\nGid:\t1\t1\t1\t1\n")


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    monkeypatch.setattr(credentials, "_PROC", str(tmp_path))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    made = Processes(tmp_path)
    made.add(1)
    (tmp_path / "self").mkdir()
    return made


def test_who_holds_a_socket(processes: Processes) -> None:
    processes.add(7, "/dev/null", "socket:[78]", "pipe:[77]")
    processes.add(8, "socket:[77]")
    assert credentials._holder(77, os.geteuid()) == 8
    assert credentials._holder(78, os.geteuid()) == 7
    assert credentials._holder(7, os.geteuid()) is None


@pytest.mark.parametrize("which", range(4))
def test_a_process_that_is_ours_in_part(processes: Processes, which: int) -> None:
    """Such as one that runs a set-uid program, or has given up root and could take it back."""
    uids = [str(os.geteuid())] * 4
    uids[which] = "4711"
    processes.add(7, "socket:[77]", uids="\t".join(uids))
    assert credentials._holder(77, os.geteuid()) is None


def test_our_number_is_another_process_there(processes: Processes) -> None:
    """As where /proc is that of an outer namespace."""
    (processes.root / "1" / "fd" / "3").symlink_to("socket:[77]")
    assert credentials._holder(77, os.geteuid()) is None
    (processes.root / "self" / "fd").mkdir()
    (processes.root / "self" / "fd" / "3").symlink_to("socket:[78]")
    assert credentials._holder(78, os.geteuid()) == 1


def test_a_process_of_somebody_else(processes: Processes) -> None:
    processes.add(7, "socket:[77]")
    assert credentials._holder(77, os.geteuid() + 1) is None


def test_processes_without_status_or_descriptors(processes: Processes) -> None:
    processes.add(7, "socket:[77]")
    (processes.root / "7" / "status").unlink()
    (processes.root / "8").mkdir()
    assert credentials._holder(77, os.geteuid()) is None
    (processes.root / "7" / "status").write_text("Name:\tx\n")
    assert credentials._holder(77, os.geteuid()) is None


def test_the_search_ends(processes: Processes, server_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.add(7, "socket:[77]")
    processes.add(8, *["/dev/null"] * 5)
    monkeypatch.setattr(credentials, "_MOST_DESCRIPTORS", 4)
    monkeypatch.setattr(credentials, "_rows", lambda local, remote: {credentials._Row(ESTABLISHED, os.geteuid(), 77)})
    monkeypatch.setattr(credentials, "_overflow_uid", lambda: 65534)
    expect_no(server_end, "too many files")


def test_likely_processes_come_first(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those found lately, then this one, then the newest; and the memory of those found is short."""
    monkeypatch.setattr(credentials, "_MOST_RECENT", 2)
    for pid in (5, 30, 7, 200):
        processes.add(pid, f"socket:[{pid}]")
    assert list(credentials._candidates()) == [1, 200, 30, 7, 5]
    for pid in (5, 7, 5):
        assert credentials._holder(pid, os.geteuid()) == pid
    assert list(credentials._candidates()) == [5, 7, 1, 200, 30]
    credentials._holder(30, os.geteuid())
    assert list(credentials._recent) == [5, 30]
    assert credentials._holder(1, os.geteuid()) is None
    assert list(credentials._recent) == [5, 30]


# -- answers of netlink -----------------------------------------------------------------------------------------------------------


class Netlink:
    """A netlink socket whose answers are made up; each is a function of the question."""

    def __init__(self, *answers: Callable[[bytes], Any], after: list[bytes] | None = None) -> None:
        self._answers = iter(answers)
        self._question = b""
        self._after = iter(after or [])
        self.closed = False

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def sendto(self, data: bytes, address: tuple[int, int]) -> int:
        assert address == (0, 0)
        length, kind, flags, _sequence, port = struct.unpack_from("=IHHII", data)
        assert (length, kind, flags, port) == (len(data), 20, 1, 0)
        self._question = data
        return len(data)

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        answer = next(self._answers)(self._question)
        if isinstance(answer, Exception):
            raise answer
        data, flags, sender = (*answer, 0, (0, 0))[:3] if isinstance(answer, tuple) else (answer, 0, (0, 0))
        return data[:size], [], flags, sender

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        for data in self._after:
            return data, (0, 0)
        raise BlockingIOError


def message(question: bytes, kind: int, body: bytes, sequence: int | None = None) -> bytes:
    if sequence is None:
        sequence = struct.unpack_from("=I", question, 8)[0]
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 4711) + body


def row(
    question: bytes, *, state: int = ESTABLISHED, family: int | None = None, uid: int | None = None, inode: int = 77
) -> bytes:
    """The row that was asked for."""
    asked, identity = question[16], question[24:72]
    uid = os.geteuid() if uid is None else uid
    body = (
        struct.pack("=BBBB", asked if family is None else family, state, 0, 0)
        + identity
        + struct.pack("=5I", 0, 0, 0, uid, inode)
    )
    return message(question, 20, body + b"attributes..")


def error(code: int) -> Callable[[bytes], bytes]:
    return lambda question: message(question, 2, struct.pack("=i", -code) + question)


NONE = error(errno.ENOENT)


@pytest.fixture
def answering(server_end: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, str]]:
    """The verdict, given the answers of netlink."""
    monkeypatch.setattr(credentials, "_holder", lambda inode, uid: 5 if (inode, uid) == (77, os.geteuid()) else None)
    monkeypatch.setattr(credentials, "_proc_rows", lambda local, remote: {credentials._Row(ESTABLISHED, 99999, 1)})

    def verdict(*answers: Callable[[bytes], Any], after: list[bytes] | None = None) -> tuple[bool, str]:
        netlink = Netlink(*answers, after=after)
        monkeypatch.setattr(credentials, "_netlink_socket", lambda: netlink)
        try:
            return credentials.loopback_verdict(server_end)
        finally:
            assert netlink.closed

    return verdict


def test_answers_that_are_good(answering: Callable[..., tuple[bool, str]]) -> None:
    """The row is found in one family, or where that has none, in the other."""
    for answers in ((row,), (NONE, row)):
        assert answering(*answers)[0], answers


@pytest.mark.parametrize(("to", "listen"), [("::ffff:127.0.0.1", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1")])
def test_one_table_for_both_families(to: str, listen: str) -> None:
    """Hence the second family is asked only where the first has no row: it can't have another one."""
    with connected(to, listen) as (client, server, _listener), credentials._netlink_socket() as netlink:
        local, remote = credentials._end(server.getsockname()), credentials._end(server.getpeername())
        for this, other in ((remote, local), (local, remote)):
            four = credentials._ask(netlink, 1, socket.AF_INET, this, other)
            assert four is not None
            assert four.inode == os.fstat((client if this == remote else server).fileno()).st_ino
            assert four == credentials._ask(netlink, 2, socket.AF_INET6, this, other)


def test_answers_that_send_us_to_proc(answering: Callable[..., tuple[bool, str]]) -> None:
    """What the fake of /proc says shows that it was asked.  Without the kernel's module for TCP our own end isn't found either."""
    for answers in ((error(errno.EPERM),), (error(errno.EOPNOTSUPP),), (NONE, error(errno.EINVAL)), (NONE, NONE, NONE)):
        trusted, reason = answering(*answers)
        assert not trusted
        assert "99999" in reason


def test_no_row_but_for_our_own_end(answering: Callable[..., tuple[bool, str]]) -> None:
    trusted, reason = answering(NONE, NONE, row)
    assert not trusted
    assert "closed its end" in reason


def _other(question: bytes, place: int) -> bytes:
    changed = bytearray(row(question))
    changed[place] ^= 1
    return bytes(changed)


BAD_ANSWERS: dict[str, Callable[[bytes], Any]] = {
    "empty": lambda q: b"",
    "cut in the header": lambda q: row(q)[:15],
    "cut in the row": lambda q: row(q)[:-13],
    "another length": lambda q: struct.pack("=I", 88) + row(q)[4:],
    "only a header": lambda q: message(q, 20, b""),
    "a short row": lambda q: message(q, 20, row(q)[16:87]),
    "two rows": lambda q: row(q) * 2,
    "another question's": lambda q: message(q, 20, row(q)[16:], sequence=99),
    "done": lambda q: message(q, 3, b"\0\0\0\0"),
    "no operation": lambda q: message(q, 1, b""),
    "acknowledged": error(0),
    "an error that is none": error(-5),
    "a short error": lambda q: message(q, 2, b"\0"),
    "any error": error(errno.ENOMEM),
    "interrupted": error(errno.EINTR),
    "an error without a name": error(99999),
    "not from the kernel": lambda q: (row(q), 0, (4711, 0)),
    "to a group": lambda q: (row(q), 0, (0, 1)),
    "too long": lambda q: (row(q), socket.MSG_TRUNC),
    "no answer": lambda q: BlockingIOError(errno.EAGAIN, "nothing there"),
    "overrun": lambda q: OSError(errno.ENOBUFS, "no buffer space"),
    "another family": lambda q: row(q, family=1),
    "another port": lambda q: _other(q, 21),
    "another port of ours": lambda q: _other(q, 23),
    "another address": lambda q: _other(q, 27 if q[16] == socket.AF_INET else 39),
    "another address of ours": lambda q: _other(q, 43 if q[16] == socket.AF_INET else 55),
    "another uid": lambda q: row(q, uid=os.geteuid() + 1),
    "another inode": lambda q: row(q, inode=78),
    "no inode": lambda q: row(q, inode=0),
    "closing": lambda q: row(q, state=FIN_WAIT),
    "listening": lambda q: row(q, state=LISTEN),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_answers_that_are_bad(name: str, answering: Callable[..., tuple[bool, str]]) -> None:
    """Whatever is wrong with one of the two, the other doesn't make good for it."""
    bad = BAD_ANSWERS[name]
    for answers in ((bad, row), (NONE, bad, row), (bad, NONE, NONE), (NONE, bad, NONE)):
        trusted, reason = answering(*answers)
        assert trusted is False, answers
        assert reason


def test_more_answers_than_questions(answering: Callable[..., tuple[bool, str]]) -> None:
    trusted, reason = answering(row, after=[b"x"])
    assert not trusted
    assert "more than it was asked" in reason


@given(data=st.binary(max_size=200), flags=st.sampled_from([0, 0, 0, 32]), keep=st.integers(0, 124))
@example(data=b"", flags=0, keep=124)
@settings(deadline=None, max_examples=200)
def test_any_answer(data: bytes, flags: int, keep: int) -> None:
    """Random bytes behind the beginning of a good answer: a verdict, never an exception, and no trust but for the very row."""
    end = credentials._End(b"\0" * 15 + b"\1", 80)
    netlink = Netlink(lambda question: (row(question)[:keep] + data, flags))
    try:
        found = credentials._ask(netlink, 1, socket.AF_INET6, end, end)  # type: ignore[arg-type]
    except (credentials._Doubt, OSError):
        return
    assert found is None or keep + len(data) >= 88


# -- unix sockets -----------------------------------------------------------------------------------------------------------------


class UnixSocket:
    """Somebody is at its other end."""

    def __init__(self, pid: int, uid: int) -> None:
        self.pid, self.uid = pid, uid

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if level == 0:  # macOS
            return self.pid if option == 2 else struct.pack("=IIhxx16I", 0, self.uid, 1, *[0] * 16)
        return struct.pack("=iII", self.pid, self.uid, 5)


def test_unix_ours() -> None:
    left, right = socket.socketpair()
    with left, right:
        uid, pid, trusted, reason = credentials.unix_peer(left)
    assert (uid, pid, trusted) == (os.geteuid(), os.getpid(), True)
    assert reason == f"it is process {pid} on this machine, of uid {uid} as this one"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_unix_doubts(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "sys", SimpleNamespace(platform=platform))
    me, us = os.getpid(), os.geteuid()
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(child, 0)
    made: Any = UnixSocket(me, us)
    assert credentials.unix_peer(made)[:3] == (us, me, True)
    for pid, uid, word in [
        (me, us + 1, f"uid {us + 1}"),
        (0, us, "can't be seen"),
        (-1, us, "can't be seen"),
        (child, us, "has ended"),
    ]:
        made = UnixSocket(pid, uid)
        found_uid, found_pid, trusted, reason = credentials.unix_peer(made)
        assert (found_uid, found_pid, trusted) == (uid, pid, False)
        assert word in reason


def test_unix_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_overflow_uid", os.geteuid)
    made: Any = UnixSocket(os.getpid(), os.geteuid())
    assert credentials.unix_peer(made)[2:] == (
        False,
        f"this process runs as uid {os.geteuid()}, as which users of other namespaces appear too",
    )


def test_unix_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "sys", SimpleNamespace(platform="sunos5"))
    made: Any = UnixSocket(os.getpid(), os.geteuid())
    assert credentials.unix_peer(made)[:3] == (None, None, False)


def test_unix_closed_and_of_another_kind(server_end: Any) -> None:
    left, right = socket.socketpair()
    with right:
        left.close()
        assert credentials.unix_peer(left)[:3] == (None, None, False)
    # A TCP socket has no credentials: pid 0 and uid -1.
    assert credentials.unix_peer(server_end)[2] is False
