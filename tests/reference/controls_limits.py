"""Broken limits, handshakes, trust and paths; see controls.py."""

from __future__ import annotations

import errno
import math
import os
from typing import Any

import pytest
import trio

from tests.reference.controls import by, control, wrap
from trio_dcore import RemoteProtocolError
from trio_dcore.abc import Peer
from trio_dcore.comm import FramedComm, _pumps, _unix
from trio_dcore.comm import _connect as connecting
from trio_dcore.comm._tls import TLSTransport
from trio_dcore.comm._tls_pump import TLSPump
from trio_dcore.protocol import Decoder, FrameParser, MiB, _frames
from trio_dcore.server import _accepting
from trio_dcore.server._connection import Connection
from trio_dcore.server._room import Room
from trio_dcore.server._throttle import Throttle

# -- handshakes ------------------------------------------------------------------------------------------------------------------


@control("A server waits for a handshake for ever.", by("f01_silent_clients_are_closed_in_time", "m", "hang: "))
def waits_for_handshakes_for_ever(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_handshake")
    async def handshake(original: Any, connection: Connection) -> bool:
        await connection.comm.handshake()
        connection.handshaking = False
        connection.server._room.shaken(connection)
        return True


@control(
    "Silent connections never give way to others.",
    by("f01_silent_ones_do_not_keep_an_honest_client_out", "m", r"assert \d+\.\d+ <= 2|ConnectError: .* stayed silent"),
)
def lets_silent_ones_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Room, "_close_handshake", lambda *args: math.inf)


@control(
    "A client waits for a handshake for ever.", by("f02_connecting_to_a_silent_server_ends", "m", "DID NOT RAISE ConnectError")
)
def connects_for_ever(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, connecting, "_handshake")
    async def handshake(original: Any, comm: Any, address: str) -> None:
        with trio.move_on_after(1000, shield=True):  # for ever would be for ever here as well
            await original(comm, address)


@control(
    "Each part of a handshake gets the whole time.",
    by("f03_a_server_may_take_its_time", "m", "DID NOT RAISE ConnectError"),
)
def is_too_patient_with_handshakes(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, connecting, "_handshake")
    async def handshake(original: Any, comm: Any, address: str) -> None:
        with trio.move_on_after(2 * comm.settings.limits.handshake_timeout, shield=True):
            await original(comm, address)


@control(
    "Connections in the middle of their handshake get the grace.",
    by("f04_handshakes_are_aborted_at_the_stop", "m", "instead of 0 s"),
)
def lets_handshakes_use_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "retire")
    def retire(original: Any, connection: Connection) -> None:
        if not connection.handshaking:
            original(connection)


@control(
    "Closing a connection shakes hands first, as a bare SSLStream does.",
    by("f05_closing_does_not_wait_for_a_client_hello", "l", r"hang: |assert \d+\.\d+ < 0\.05"),
)
def shakes_hands_to_close(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, TLSPump, "aclose")
    async def aclose(original: Any, pump: TLSPump) -> None:
        try:
            await pump.handshake()
        finally:
            await original(pump)


@control(
    "A certificate that is not right is tried again and again.",
    by("f07_a_server_of_another_authority", "l", "hang: "),
    by("f07_certificates_that_have_expired", "l", "hang: "),
)
def tries_bad_certificates_again(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, TLSTransport, "connect")
    async def connect(original: Any, *args: Any) -> Any:
        comm = await original(*args)
        try:
            await comm._pump.handshake()
        except RemoteProtocolError as error:
            comm.abort()
            raise OSError(str(error)) from error
        return comm


@control(
    "The end of a connection without TLS's own goodbye is an error.",
    by("f08_a_server_that_closes_without_close_notify", "l", "CommClosedError: "),
)
def insists_on_close_notify(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, TLSPump, "pull")
    async def pull(original: Any, pump: TLSPump, parser: Any) -> Any:
        found = await original(pump, parser)
        if found is None:
            raise OSError("the peer closed without close_notify")
        return found


# -- bytes -----------------------------------------------------------------------------------------------------------------------


@control(
    "Lengths are believed, whatever the limits say.",
    by("g01_absurd_numbers_for_a_client", "m", "instead of 0 s"),
)
def believes_lengths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FrameParser, "_check_message", lambda parser, size: None)


@control(
    "Memory is filled as soon as somebody claims that he will send that much.",
    by("g02_a_claim_and_then_silence", "m", r"\d+\.\d MiB"),
    by("g02_a_server_that_promises_and_is_silent", "m", r"\d+\.\d MiB"),
)
def reserves_what_is_claimed(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _frames, "allocate")
    def allocate(original: Any, size: int) -> memoryview:
        view: memoryview = original(size)
        some = min(size, 20 * MiB)  # enough to be seen, and not to be felt
        view[:some] = bytes(some)
        return view


@control(
    "A message may take for ever.",
    by("g02_a_server_that_promises_and_is_silent", "t", "hang: "),
    by("g04_a_byte_now_and_then_is_too_slow", "m", "hang: |TooSlowError|assert .* <= "),
)
def waits_for_the_rest_for_ever(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _pumps, "pull_rest")
    async def pull_rest(original: Any, fill: Any, parser: Any, timeout: float, rate: float | None) -> Any:
        return await original(fill, parser, math.inf, None)


@control(
    "A byte now and then keeps a connection: silence alone is measured.",
    by("g04_a_byte_now_and_then_is_too_slow", "m", "hang: |TooSlowError|assert .* <= "),
)
def measures_silence_only(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _pumps, "pull_rest")
    async def pull_rest(original: Any, fill: Any, parser: Any, timeout: float, rate: float | None) -> Any:
        return await original(fill, parser, timeout, None)


@control(
    "Who is slow but steady is cut off: the time for a whole message is limited.",
    by("g04_slow_but_steady_is_not", "m", "BrokenResourceError|CommClosedError"),
)
def limits_the_time_of_a_message(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _pumps, "pull_rest")
    async def pull_rest(original: Any, fill: Any, parser: Any, timeout: float, rate: float | None) -> Any:
        return await original(fill, parser, timeout, math.inf)


@control(
    "What a decoder fails with gets out as it is.",
    by("g06_requests_that_are_no_msgpack", "m", "not enough values|ValueError"),
    by("g06_answers_that_are_no_msgpack", "m", "ValueError"),
)
def raises_what_decoders_raise(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Decoder, "head")
    def head(original: Any, decoder: Decoder, frame: Any) -> Any:
        try:
            return original(decoder, frame)
        except RemoteProtocolError as error:
            raise ValueError("not translated") from error


@control(
    "A request that can't be understood ends its connection without a word.",
    by("g07_messages_that_are_no_requests", "m", "BrokenResourceError|CommClosedError"),
)
def hangs_up_on_nonsense(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_send_failure")
    async def send_failure(original: Any, connection: Connection, *args: Any, started: bool = False) -> None:
        if started:
            await original(connection, *args, started=started)
        else:
            connection.comm.abort()


@control(
    "Everybody is trusted.",
    by("g08_a_strangers_pickles_are_not_run", "m", "TypeError|AssertionError"),
    by("g09_a_strange_servers_pickles_are_not_run", "m", "DID NOT RAISE UnsafePayload|AssertionError"),
    by("g08_a_strangers_pickles_are_not_run", "l", "TypeError|AssertionError"),
)
def trusts_everybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Peer, "trusted", property(lambda peer: True))


@control("What is compressed may grow to any size.", by("g11_a_bomb_is_not_blown_up", "m", r"\d+\.\d MiB"))
def blows_bombs_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FramedComm, "_max_message", lambda comm: None)


# -- resources -------------------------------------------------------------------------------------------------------------------


@control("Connections are accepted beyond the limit.", by("h01_or_accepting_pauses", "t", "assert 4 == 3"))
def accepts_beyond_the_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Room, "make", lambda room, now: now)


@control("Idle connections make no room.", by("h01_idle_connections_make_room", "t", "hang: "))
def keeps_idle_connections(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Room, "_close_idle", lambda room, now, most: now + 3600)


@control("A server that is out of descriptors ends.", by("h02_out_of_descriptors", "t", "Too many open files"))
def dies_of_exhaustion(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_accepting, "_BROKEN", {errno.EMFILE})


@control("What strangers do is logged each time.", by("h02_out_of_descriptors", "t", "Too many open files"))
def logs_every_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Throttle, "due", lambda throttle: "")


@control(
    "A peer that takes nothing is waited for.",
    by("h03_replies_that_nobody_reads", "t", "hang: "),
    by("h04_a_stream_that_stalls_is_a_typed_error", "u", "hang: "),
)
def waits_out_stalls(patch: pytest.MonkeyPatch) -> None:
    async def writable_within(sock: Any, seconds: float) -> None:
        await trio.lowlevel.wait_writable(sock)

    patch.setattr(_pumps, "writable_within", writable_within)


@control(
    "Writes don't wait: what the peer doesn't take is kept.",
    by("h03_a_client_that_reads_nothing", "t", r"\d+\.\d MiB|assert 300 < 75|assert 0 == 1"),
    by("h04_a_server_that_reads_nothing", "t", r"\d+\.\d MiB|assert .*cancelled_caught"),
)
def keeps_what_nobody_takes(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "finish")
    async def finish(original: Any, comm: FramedComm, *args: Any) -> None:
        async def later() -> None:
            try:
                await original(comm, *args)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # nobody is there who could be told

        trio.lowlevel.spawn_system_task(later)
        await trio.lowlevel.checkpoint()


# -- unix paths ------------------------------------------------------------------------------------------------------------------


@control(
    "A server removes whatever stands at its path.", by("m02_only_our_own_file_is_removed", "u", "AssertionError: assert False")
)
def removes_the_files_of_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_unix, "_remove", lambda path, inode: os.unlink(path))


@control(
    "A server leaves its path behind.",
    by("m02_a_path_is_given_back_whatever_ends_the_server", "u", "AssertionError: "),
    by("a02_reply_delivered_within_grace", "u", "left behind: the files"),
)
def leaves_its_path(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_unix, "_remove", lambda path, inode: None)


@control("Everybody may connect to a path.", by("m02_only_we_may_connect_from_the_start", "u", "assert 438 == 384"))
def lets_everybody_connect(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _unix, "_take")
    def take(original: Any, name: bytes, path: str) -> Any:
        found = original(name, path)
        os.chmod(path, 0o666)
        return found


@control(
    "Whatever stands at a path is replaced.",
    by("m02_what_is_not_ours_is_left_alone", "u", "DID NOT RAISE OSError|AssertionError"),
)
def replaces_what_is_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_unix, "_clear", lambda name, path: os.unlink(path))
