"""The pump of ``tls://``: TLS between a bare socket and a parser.

How it works
------------
OpenSSL works on two buffers in memory and never touches the socket (:class:`ssl.SSLObject`).  What comes from the socket goes into
one, and plain text is read out of the engine, for a large frame into its final place.  Plain text is written into the engine, a
bounded part at a time, and what appears in the other buffer goes to the socket.

What has been encrypted can't be taken back: ciphertext that the kernel didn't take is kept here and must go before anything else.
So :meth:`TLSPump.try_send` asks the kernel for room first.  If it then takes only some of a message's ciphertext, all of the message
but its last byte is reported as sent: the comm has to come back for that byte, before it sends anything else, and waits then.
:meth:`TLSPump.send` drops the byte, which was encrypted before, and sends what was kept.

TLS has messages of its own, which come at any time and are nothing to read for a comm; so :meth:`TLSPump.readable` looks what it is
that came, and keeps plain text for the next read.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from trio.lowlevel import cancel_shielded_checkpoint, checkpoint, wait_readable

from ..errors import CommClosedError, RemoteProtocolError
from ..protocol._context import Buffer
from ..protocol._frames import FrameParser, looks_like
from ..protocol._limits import KiB
from ._pace import writable_while_alive, writable_within
from ._pumps import YIELD_BYTES, Pump, SocketPump
from ._tls_hints import explain, plain_text

__all__ = ["TLSPump"]

# What a record holds at most; the engine gives out no more at once.
_RECORD = 16 * KiB
_SMALL_RECORD = 1 * KiB
_SMALL_READ = 4 * KiB
_LARGE_READ = 64 * KiB
# What is received at once for a large frame, and encrypted at once: more makes it no faster (measured).
_CHUNK = 256 * KiB
# An alert (RFC 8446, section 6): fatal, protocol_version.
_NO_TLS = b"\x15\x03\x01\x00\x02\x02\x46"
# Rounds that are spent on what may be messages of TLS's own.
_LOOKS = 16
# Bytes that TLS may have to say of its own while the peer takes none: its answers to 2000 requests for new keys.
_MOST_CONTROL = 64 * KiB
# Bytes kept to tell what it is that isn't TLS.
_FIRST = 64


class TLSPump(SocketPump):
    """A pump on a bare, connected, non-blocking stream socket, which it owns, and which :meth:`handshake` must make secure first.

    Args:
        sock: the socket.
        context: what to use and accept; it is shared with other pumps.
        server_side: whether this is the side that accepted.
        server_hostname: the name to ask the server for, and to check if the context says so; for the other side only.

    Raises:
        ValueError: ``server_hostname`` can't be the name of a host.
    """

    __slots__ = (
        "_ahead",
        "_answered",
        "_control",
        "_ended",
        "_engine",
        "_eof",
        "_established",
        "_failure",
        "_first",
        "_incoming",
        "_outgoing",
        "_roomy",
        "_short",
        "_unsent",
        "_waiting",
    )

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        super().__init__(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._engine = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname)
        self._established = False
        self._unsent = memoryview(b"")  # ciphertext that the kernel has not taken
        self._control = 0  # bytes of what waits to be sent that TLS says of its own, at most
        self._short = 0  # bytes that were encrypted and not reported as sent: none or one
        self._ahead: bytes | None = None  # plain text that was read to see whether there is any
        self._failure: Exception | None = None  # of such a look; for the next read
        self._first = b""  # what came first, during the handshake
        self._answered = False  # what came, during the handshake, was enough for the engine to say something
        self._eof = False  # the peer has closed its side of the connection
        self._ended = False  # ... or that of TLS
        self._waiting = False  # a task waits for something to read
        self._roomy: Callable[[int], object] = self._select
        if hasattr(select, "poll"):  # not on Windows
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            self._roomy = poll.poll

    # -- the handshake of TLS -----------------------------------------------------------------------------------------------------

    async def handshake(self) -> None:
        """Make the connection secure.

        Cancellation: the connection is of no use any more.

        Raises:
            RemoteProtocolError: the peer doesn't speak TLS, or one side doesn't accept the other.  It has been told.
            CommClosedError: the peer closed or broke the connection.
        """
        try:
            while True:
                try:
                    self._engine.do_handshake()
                except ssl.SSLWantReadError:
                    self._answered = self._answered or bool(self._first and self._outgoing.pending)
                    await self._flush(None)
                    if not await self._more():
                        raise CommClosedError(self._why_closed(None)) from None
                else:
                    await self._flush(None)
                    break
        except ssl.SSLError as error:
            raise self._failed(error) from error
        except CommClosedError:
            raise
        except OSError as error:
            raise CommClosedError(self._why_closed(error)) from error
        if self._engine.server_side and self._engine.session_reused:
            # Of TLS 1.2, whose sessions OpenSSL keeps, and Python can't tell it not to: nobody has looked at the certificate again,
            # which may have expired since.
            raise RemoteProtocolError("TLS failed: the peer resumes an earlier session instead of showing its certificate again")
        self._established = True
        self._first = b""

    def _why_closed(self, error: OSError | None) -> str:
        what = plain_text(self._first)
        if what is None:
            what = "it may not accept our certificate, or not speak TLS" if self._first else "does it speak TLS?"
        return f"the peer closed the connection during the TLS handshake{'' if error is None else f' ({error})'}: {what}"

    def certificate(self) -> dict[str, Any]:
        """The peer's, verified, once the handshake is done."""
        return dict(self._engine.getpeercert() or {})

    def _failed(self, error: ssl.SSLError) -> RemoteProtocolError:
        """What to raise for an error of the engine, which has a last word for the peer."""
        if not self._established and self._engine.server_side and looks_like(self._first) != "TLS" and not self._outgoing.pending:
            # OpenSSL says nothing then, and this is enough for a plain peer to see what it has met.
            self._unsent = memoryview(_NO_TLS)
        try:
            self._flush_now()
        except OSError:
            pass  # the peer was faster
        return RemoteProtocolError(f"TLS failed: {explain(error, self._first)}")

    def last_words(self) -> RemoteProtocolError | None:
        """Why the peer refuses TLS, if it has said so; what else has come is dropped.

        With TLS 1.3 the server judges the client's certificate when for the client the handshake is over.  Its answer is found by
        the next read, unless a write came first and failed.
        """
        try:
            for _ in range(_LOOKS):
                if self._decrypt() is None:
                    self._receive(_LARGE_READ)
                elif self._ended:
                    break
        except RemoteProtocolError as error:
            return error
        except OSError:
            pass  # nothing more will come, or has come yet
        return None

    # -- reading ------------------------------------------------------------------------------------------------------------------

    @property
    def heard(self) -> bool:
        """See ``BaseComm.heard``."""
        return self._answered or bool(self._ready(0))

    def _receive(self, size: int) -> int:
        """Take from the socket what is there, and return its size; BlockingIOError if that is nothing, 0 at the end."""
        data = self._recv(size)
        if not data:
            self._eof = True
            return 0
        if not self._established and len(self._first) < _FIRST:
            self._first += data[:_FIRST]
        self._incoming.write(data)
        return len(data)

    async def _more(self) -> bool:
        """Wait for more from the socket; False at its end."""
        while True:
            try:
                return self._receive(_LARGE_READ) > 0
            except BlockingIOError:
                await self._wait_readable()

    async def _wait_readable(self) -> None:
        self.unwaited = 0
        self._waiting = True
        try:
            await wait_readable(self.socket)
        finally:
            self._waiting = False

    def _decrypt(self) -> bytes | None:
        """Plain text that is here; b"" at the end, None if more must come before there is any."""
        if self._ended:
            return b""
        if self._failure is not None:
            raise self._failure
        size = self._incoming.pending + self._engine.pending()
        if size:
            waiting = self._outgoing.pending
            try:
                # Not more than there may be: the engine allocates it.  Not less than some either: it may have part of a record.
                data = self._engine.read(min(max(size, _SMALL_RECORD), _RECORD))
            except ssl.SSLWantReadError:
                pass  # part of a record, or a message of TLS's own
            except ssl.SSLError as error:
                raise self._failed(error) from error
            else:
                self._ended = not data
                return data
            finally:
                if self._outgoing.pending:
                    self._answer(waiting)
        if self._eof:
            # Tornado, and so Dask, closes without saying goodbye in TLS's way.  In the middle of a message the parser tells.
            self._ended = True
            return b""
        return None

    def _answer(self, waiting: int) -> None:
        """TLS may have something to say of its own, such as new keys; it goes now, or before the next message.

        Args:
            waiting: what was in the outgoing buffer before.

        Raises:
            RemoteProtocolError: the peer makes it say more and more, and takes none of it.
        """
        # What waited is ours to bound; of the answers among it no more can be left than there is.
        self._control = min(self._control, waiting + len(self._unsent)) + self._outgoing.pending - waiting
        try:
            if self._flush_now():
                return
        except OSError:
            pass  # whoever writes next is told; what the peer wrote before can still be read
        if self._control > _MOST_CONTROL and self._failure is None:
            # Kept, for who reads ahead does not tell.
            self._failure = RemoteProtocolError(
                "the peer keeps asking for answers of TLS's own, such as new keys, and takes none of them: "
                f"more than {_MOST_CONTROL} bytes wait to be sent"
            )
            raise self._failure

    def _decrypt_into(self, target: memoryview) -> int | None:
        """As :meth:`_decrypt`, straight into a buffer; returns the size."""
        size = len(target)
        done = 0
        if self._incoming.pending or self._engine.pending():
            waiting = self._outgoing.pending
            try:
                while done < size:
                    # typeshed's type of the buffer is too narrow
                    got: int = self._engine.read(size - done, target[done:] if done else target)  # type: ignore[assignment]
                    if not got:
                        self._ended = True
                        break
                    done += got
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise self._failed(error) from error
            finally:
                if self._outgoing.pending:
                    self._answer(waiting)
        if done:
            return done
        self._ended = self._ended or self._eof
        return 0 if self._ended else None

    async def pull(self, parser: FrameParser) -> list[Buffer] | None:
        # The path of a small message: as SocketPump's.
        if parser.mid_message or self._incoming.pending or self._engine.pending() or self._looked:
            return await Pump.pull(self, parser)
        ready = self._ready(0)
        while True:
            if not ready:
                await self._wait_readable()
            try:
                size = self._receive(self._size)
            except BlockingIOError:
                ready = False
                continue
            self._size = _LARGE_READ if size == self._size else _SMALL_READ
            data = self._decrypt()
            if data is None:
                ready = False
                continue
            self.unwaited += len(data)
            frames = parser.receive(data)
            if frames is not None or not data:
                return frames
            return await Pump.pull(self, parser)

    async def fill(self, parser: FrameParser) -> bool:
        rounds = 0
        while True:
            received = self._fill_now(parser)
            if received is not None:
                break
            rounds += 1
            if rounds % _LOOKS == 0:
                await checkpoint()  # a peer may say nothing but messages of TLS's own, without a pause
            try:
                self._receive(_LARGE_READ if parser.want() is None else _CHUNK)
            except BlockingIOError:
                await self._wait_readable()
        self.unwaited += received
        if self.unwaited >= YIELD_BYTES:
            self.unwaited = 0
            await cancel_shielded_checkpoint()
        return received > 0

    def _fill_now(self, parser: FrameParser) -> int | None:
        """Give the parser plain text that is here, and return its size; 0 at the end, None if more must come."""
        data, self._ahead = self._ahead, None
        target = parser.want()
        if data is None:
            if target is not None and not self._ended and self._failure is None:
                received = self._decrypt_into(target)
                if received:
                    parser.filled(received)
                return received
            data = self._decrypt()
            if data is None:
                return None
        parser.feed(data)
        return len(data)

    def fill_nowait(self, parser: FrameParser) -> bool:
        try:
            for _ in range(_LOOKS):
                received = self._fill_now(parser)
                if received is not None:
                    return received > 0
                self._receive(_LARGE_READ)
        except (OSError, RemoteProtocolError):
            pass  # a reset, or nothing there
        return False

    @property
    def _looked(self) -> bool:
        """Whether something for the next read has been found already, which the socket won't tell again."""
        return self._ended or self._ahead is not None or self._failure is not None

    def readable(self) -> bool:
        if self._looked:
            return True
        if not self._established or self._waiting:
            return bool(self._ready(0))  # what comes is for the task that waits
        try:
            for _ in range(_LOOKS):
                self._ahead = self._decrypt()
                if self._ahead is not None:
                    return True
                if not self._ready(0):
                    return False
                self._receive(_SMALL_READ)
        except BlockingIOError:
            return False
        except (OSError, RemoteProtocolError) as error:
            self._failure = error
        return True

    # -- writing ------------------------------------------------------------------------------------------------------------------

    def _encrypt(self, data: Buffer) -> None:
        """Encrypt all of the data; what comes of it is in the outgoing buffer."""
        try:
            size = self._engine.write(data)
            while size < len(data):
                data = memoryview(data)[size:]
                size = self._engine.write(data)
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS can't write any more: {explain(error, b'')}") from error

    def _flush_now(self) -> bool:
        """Hand ciphertext to the kernel; False if it didn't take all."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                sent = self._send(self._unsent)
            except BlockingIOError:
                return False
            self.taken += sent
            self._unsent = self._unsent[sent:]
            if self._unsent:
                return False

    async def _flush(self, stall: float | None) -> None:
        while not self._flush_now():
            await self._wait_writable(stall)

    async def _wait_writable(self, stall: float | None) -> None:
        self.unwaited = 0
        if stall is None:
            await writable_while_alive(self.socket, self.silence)
        else:
            await writable_within(self.socket, stall)

    def _select(self, _timeout: int) -> bool:
        return bool(select.select([], [self.socket], [], 0)[1])

    def try_send(self, data: bytes) -> int:
        if not self._roomy(0):
            return 0
        self._encrypt(data)
        if self._flush_now():
            return len(data)
        self._short = 1
        return len(data) - 1

    async def send(self, buffers: Sequence[Buffer], skip: int, stall: float | None = None) -> None:
        self.partial = skip > 0
        # Of other messages, or of the one whose last byte this is: nothing is lost yet if this is cancelled.
        await self._flush(stall)
        views = [memoryview(buffer) for buffer in buffers]
        views[0] = views[0][skip + self._short :]
        if any(map(len, views)) and not self._roomy(0):
            await self._wait_writable(stall)
        self._short = 0  # not before: if the wait is cancelled, the byte stands at the front of the next call, too
        since_wait = 0
        for view in views:
            for start in range(0, len(view), _CHUNK):
                if since_wait >= YIELD_BYTES:
                    # Not cancelled out of a message for nothing: cancellation is delivered where the kernel makes us wait.
                    since_wait = 0
                    await cancel_shielded_checkpoint()
                piece = view[start : start + _CHUNK]
                self._encrypt(piece)
                since_wait += len(piece)
                if self._outgoing.pending >= _CHUNK:
                    await self._send_all(stall)
        await self._send_all(stall)

    async def _send_all(self, stall: float | None) -> None:
        """Hand what was encrypted of this message to the kernel."""
        done = self._flush_now()
        self.partial = True  # also if the kernel took nothing: encrypted is as good as sent
        while not done:
            await self._wait_writable(stall)
            done = self._flush_now()

    # -- closing ------------------------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        if self._established and not self._unsent:
            try:
                self._engine.unwrap()
            except ssl.SSLError:
                pass  # it has said goodbye, and wants the peer's, which nobody waits for; or TLS has failed before
            try:
                self._flush_now()
            except OSError:
                pass  # the peer was faster
        await super().aclose()
