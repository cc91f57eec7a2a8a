"""asyncio inside a trio program: an event loop that runs on trio, for as long as a block lasts.

How it is built
---------------
::

    async with open_loop()            in the user's task: the body is cancelled as any other trio code
      └─ _hold                        a task that outlives it, shielded: cleanup of the body may still need the loop
           └─ trio_asyncio.open_loop()     the event loop; the trio tasks that asyncio code starts with trio-asyncio's own functions
                └─ portal's nursery        the trio tasks that asyncio code starts through trio_dcore.aio

trio-asyncio brings the loop.  What is different here: the body is not shielded from the scopes around it, so that their deadlines are
seen in it; standard executors work; an error in a stray asyncio task is logged, as asyncio does, and ends nothing; a SystemExit or
KeyboardInterrupt in asyncio code ends the block instead of hanging it; and the end of the block gives every asyncio task that is left a
cancellation that is repeated, and waits for it.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import trio
from trio.lowlevel import checkpoint_if_cancelled, enable_ki_protection

from .._util import to_raise
from ..errors import LocalProtocolError
from ._carry import REDELIVER
from ._executors import Executors
from ._guest import hosting_loop
from ._portal import Portal, current_portal
from ._strays import Strays, report_tasks

__all__ = ["open_loop", "redeliver_of", "running_loop"]


# How many callbacks that are ready are called before other trio tasks take their turn: as many as messages of a comm.
_CALLBACKS = 16


class open_loop:
    """An asyncio event loop for the block: ``async with open_loop() as loop:``, in a trio program.

    Inside, :func:`run_asyncio` calls asyncio libraries from trio tasks, and handlers made with :func:`handler` run.  They find the loop
    by a context variable: tasks that are started inside the block have it, tasks that were running before don't.

    When the block is left, asyncio tasks that are still there are cancelled and waited for; one that goes on is cancelled again after
    ``redeliver`` seconds, and named in the log, and so on.  Then async generators are closed, and threads of the default executor
    waited for.

    Cancellation: of the block, as of any trio code; entering it is a checkpoint, and leaving it waits for what is said above, also in a
    cancelled scope.  The loop runs until that is done.

    Args:
        redeliver: seconds; ``math.inf`` is never again.

    Raises:
        ImportError: trio-asyncio is not installed, or doesn't support this Python.  :func:`open_trio`, the other direction, needs neither.
        LocalProtocolError: trio is a guest of an asyncio event loop here, or this is asyncio code.
    """

    def __init__(self, *, redeliver: float = REDELIVER) -> None:
        if not redeliver > 0:
            raise ValueError(f"redeliver={redeliver!r}: must be a number of seconds above 0")
        _check_no_host()
        self._trio_asyncio = _import_trio_asyncio()
        self._redeliver = redeliver
        self._begun = trio.Event()  # or failed
        self._closing = trio.Event()
        self._portal: Portal | None = None
        self._outer: Any = None
        self._nursery: trio.Nursery
        self._loop_before: asyncio.AbstractEventLoop | None = None
        self._portal_before: Portal | None = None
        self._exit: BaseException | None = None

    @enable_ki_protection
    async def __aenter__(self) -> asyncio.AbstractEventLoop:
        _check_no_host()
        await checkpoint_if_cancelled()
        if self._outer is not None:
            raise LocalProtocolError("each open_loop() is for one `async with`; call it again")
        self._outer = trio.open_nursery()
        self._nursery = await self._outer.__aenter__()
        failure: BaseException | None = None
        try:
            self._nursery.start_soon(self._hold)
            with trio.CancelScope(shield=True):
                await self._begun.wait()
        except BaseException as error:  # Ctrl-C
            failure = error
        portal = self._portal
        if portal is None or failure is not None:
            self._closing.set()
            failure = await self._leave(failure)
            try:
                assert failure is not None
                raise failure from None
            finally:
                del failure
        self._loop_before = self._trio_asyncio.current_loop.get()
        self._portal_before = current_portal.get()
        self._trio_asyncio.current_loop.set(portal.loop)
        current_portal.set(portal)
        return portal.loop

    @enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Close the loop.

        What the body raised goes on as it is, unless asyncio code raised a SystemExit or KeyboardInterrupt, which wins.
        """
        # Not reset(): a fixture may be torn down in another context.
        self._trio_asyncio.current_loop.set(self._loop_before)
        current_portal.set(self._portal_before)
        self._closing.set()
        result = await self._leave(error)
        if result is None or result is error:
            return False
        raise result from None

    async def _leave(self, error: BaseException | None) -> BaseException | None:
        """Wait for the loop to close; return what is to be raised."""
        try:
            await self._outer.__aexit__(None, None, None)
        except BaseException as ours:
            return to_raise("the asyncio loop failed", error, ours)
        return error

    # -- the task that holds the loop --------------------------------------------------------------------------------------------

    @enable_ki_protection  # a Ctrl-C is for the main task: here it would leave half a loop
    async def _hold(self) -> None:
        try:
            await self._hold_loop()
        finally:
            self._begun.set()

    async def _hold_loop(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._trio_asyncio.open_loop() as loop:
                loop.__class__ = _bridging(type(loop))  # type: ignore[arg-type]
                loop.adopted(self._exited, self._redeliver)
                await loop.synchronize()  # its main task is still in a step of the old class
                strays = Strays(loop, self._redeliver)
                try:
                    await self._serve(loop, strays)
                finally:
                    try:
                        with trio.CancelScope(shield=True):
                            await strays.end(carried=True)
                            await strays.end_generators()
                            await loop.end_threads()
                            if loop.get_debug():
                                await _end_debugging(loop)
                    finally:
                        loop.may_stop = True
        if self._exit is not None:
            exit, self._exit = self._exit, None
            raise exit

    async def _serve(self, loop: Any, strays: Strays) -> None:
        """Until the block is left, and then until its stray tasks and what asyncio code has in trio have ended."""
        async with trio.open_nursery() as watch:
            async with trio.open_nursery() as nursery:
                loop.portal = self._portal = portal = Portal(loop, nursery)
                self._begun.set()
                try:
                    await self._closing.wait()
                except trio.Cancelled:
                    # A trio task that asyncio code had started has raised what ends everything.  The block comes first.
                    self._nursery.cancel_scope.cancel(reason="what asyncio code has started in trio has failed")
                    with trio.CancelScope(shield=True):
                        await self._closing.wait()
                    raise
                finally:
                    with trio.CancelScope(shield=True):
                        # Their cleanup may need trio.  What takes longer is waited for, with that, behind.
                        with trio.move_on_after(min(self._redeliver, REDELIVER)):
                            await strays.end(carried=False)
                    portal.close_now("the asyncio loop closes")
                    watch.start_soon(report_tasks, nursery)
            watch.cancel_scope.cancel(reason="what asyncio code had in trio has ended")

    def _exited(self, error: BaseException) -> None:
        """Asyncio code has raised a SystemExit or KeyboardInterrupt that nobody waits for: it is the whole program's."""
        if self._exit is None:
            self._exit = error
        self._nursery.cancel_scope.cancel(reason=f"asyncio code raised {type(error).__name__}")


class _Loop(Executors):
    """What the bridge's loop does in its own way; put before the class of trio-asyncio's."""

    portal: Portal
    redeliver: float
    may_stop = False
    _on_exit: Callable[[BaseException], None]

    def adopted(self, on_exit: Callable[[BaseException], None], redeliver: float) -> None:
        """In place of the constructor: the loop was made by trio-asyncio."""
        Executors.__init__(self)
        self._on_exit = on_exit
        self.redeliver = redeliver

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Log it, as asyncio does.  trio-asyncio's crashes the loop: for an error that a library didn't look at, or a warning."""
        asyncio.BaseEventLoop.default_exception_handler(self, context)  # type: ignore[arg-type]  # it is one

    def stop(self, waiter: trio.Event | None = None) -> trio.Event | None:
        """Called by asyncio code, it ends the block, as it ends asyncio.run(); the loop goes on until all has ended in there."""
        if self.may_stop:
            return super().stop(waiter)  # type: ignore[misc,no-any-return]  # of the loop's class
        self._on_exit(RuntimeError("loop.stop() was called in an open_loop() block"))
        return waiter

    @enable_ki_protection
    async def _main_loop_one(self, no_wait: bool = False) -> None:
        """A step of trio-asyncio's main task.

        An exit that asyncio code raises would end that task there, and leave everybody who waits hanging.  And each step is one of
        trio's scheduler, which costs more than most callbacks: here it is several callbacks, if they are ready.

        Protected, since a KeyboardInterrupt between two callbacks would lose one; what handlers and :func:`run_asyncio` run is
        not, and trio's main task gets it otherwise.
        """
        one = super()._main_loop_one  # type: ignore[misc]  # of the loop's class
        for turn in range(_CALLBACKS):
            try:
                await one(no_wait or turn > 0)
            except (KeyboardInterrupt, SystemExit) as error:
                if type(error).__module__.partition(".")[0] == "trio_asyncio":
                    raise  # how it stops
                self._on_exit(error)
            except trio.WouldBlock:
                if turn == 0:
                    raise
                return


async def _end_debugging(loop: asyncio.AbstractEventLoop) -> None:
    """Where coroutines were made is tracked for the whole thread, until the loop takes that back in one of its callbacks."""
    loop.set_debug(False)
    done = trio.Event()
    loop.call_soon_threadsafe(done.set)
    await done.wait()


@functools.cache
def _bridging(base: type[object]) -> type[object]:
    return type("TrioDcoreEventLoop", (_Loop, base), {"__module__": __name__, "__doc__": _Loop.__doc__})


def _import_trio_asyncio() -> Any:
    """trio-asyncio, or the one error that says why there is none."""
    if sys.version_info >= (3, 14) and not _supports_314():
        # Importing it fails half-way there, when it has patched asyncio already.
        raise ImportError(
            "aio.open_loop() needs trio-asyncio, whose versions up to 0.16 don't support Python 3.14; run asyncio outside and trio "
            "inside instead (aio.open_trio(), aio.rpc, aio.Server), or Python 3.13",
            name="trio_asyncio",
        )
    first = "trio_asyncio" not in sys.modules
    new_event_loop = asyncio.new_event_loop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of asyncio's child watchers, which it derives from
            import trio_asyncio
    except ModuleNotFoundError as error:
        if error.name != "trio_asyncio":
            raise
        raise ImportError(
            "aio.open_loop() needs trio-asyncio: pip install 'trio_dcore[asyncio]'; the other direction (aio.open_trio(), aio.rpc, "
            "aio.Server) works without",
            name="trio_asyncio",
        ) from None
    if first:
        # It has made every new loop of the process one on trio, also that of an asyncio.run() which has nothing to do with this.
        asyncio.new_event_loop = asyncio.events.new_event_loop = new_event_loop
    return trio_asyncio


def _supports_314() -> bool:
    import importlib.metadata  # only needed here

    try:
        version = importlib.metadata.version("trio_asyncio")
    except importlib.metadata.PackageNotFoundError:
        return True  # that is the error to report
    numbers = tuple(int(number) if number.isdecimal() else 0 for number in version.split(".")[:2])
    return numbers > (0, 16)


def _host() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs here; in a trio task: whose guest trio is, or one of trio-asyncio's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _check_no_host() -> None:
    """The one of asyncio's two event loops that its C code sees is that outside."""
    loop = hosting_loop() or _host()
    if loop is None:
        return
    if "trio_asyncio" not in sys.modules or not isinstance(loop, sys.modules["trio_asyncio"].BaseTrioEventLoop):
        raise LocalProtocolError(
            "an asyncio event loop runs here already, and trio, if at all, inside of it: run_asyncio() and handlers use that; "
            "open_loop() is for programs that begin with trio.run()"
        )
    if asyncio.current_task(loop) is not None:
        raise LocalProtocolError("called from asyncio code: open_loop() is for trio tasks")


def running_loop() -> asyncio.AbstractEventLoop:
    """The asyncio loop for the calling trio task.  Not a checkpoint.

    Raises:
        LocalProtocolError: there is none.
    """
    # That of a trio_asyncio.open_loop(), in ours or alone.
    trio_asyncio = sys.modules.get("trio_asyncio")
    loop: asyncio.AbstractEventLoop | None = None if trio_asyncio is None else trio_asyncio.current_loop.get()
    portal: Portal | None = current_portal.get() if loop is None else getattr(loop, "portal", None)
    if portal is not None:
        loop = portal.loop
        if portal.thread != threading.get_ident() and trio.lowlevel.in_trio_run():  # else an in_thread() handler's
            loop = hosting_loop()
        if loop is None:
            raise LocalProtocolError(
                "the asyncio event loop of this context belongs to another thread, which has started this one: put `async with "
                "trio_dcore.aio.open_loop():` round this"
            )
    if loop is None:
        loop = hosting_loop() or _host()
        if loop is None:
            raise LocalProtocolError(
                "no asyncio event loop here: put `async with trio_dcore.aio.open_loop():` round this, and round the server if this is "
                "one of its handlers"
            )
    if loop.is_closed():
        raise LocalProtocolError(
            "the open_loop() block that this task was started in has been left, and its event loop is closed"
        )
    return loop


def redeliver_of(loop: asyncio.AbstractEventLoop) -> float:
    """What ``redeliver`` the loop was opened with."""
    return getattr(loop, "redeliver", REDELIVER)
