"""trio_dcore in an asyncio program: a server and its client, with asyncio's tasks, timeouts and task groups.

Change the import to ``from distributed.core import ...`` and, but for the stream, it is a program for Dask's own core.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from trio_dcore.aio import CommClosedError, Server, connect, rpc, send_recv


class Kitchen(Server):
    """A server as one writes it for asyncio: plain methods, coroutines, and async generators."""

    def __init__(self) -> None:
        super().__init__({"menu": self.menu, "cook": self.cook, "courses": self.courses})
        self.log: list[str] = []

    def menu(self) -> tuple[str, ...]:
        """What there is."""
        return ("soup", "stew")

    async def cook(self, dish: str, seconds: float = 0.0) -> str:
        """Takes its time, and is cancelled if nobody waits any more."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.log.append(f"{dish}: sent back")
            raise
        return f"hot {dish}"

    async def courses(self) -> AsyncIterator[str]:
        """One after the other, for as long as somebody eats."""
        try:
            for number in range(1, 1000):
                yield f"course {number}"
        finally:
            self.log.append("courses: cleared away")


async def main() -> None:
    """Serve, and be a guest."""
    async with Kitchen() as kitchen:
        address = await kitchen.listen("tcp://127.0.0.1:0")

        async with rpc(address) as remote:
            print("menu:", await remote.menu())

            async with asyncio.TaskGroup() as group:
                dishes = [group.create_task(remote.cook(dish=dish)) for dish in ("soup", "stew")]
            print("served:", [dish.result() for dish in dishes])

            try:
                async with asyncio.timeout(0.05):
                    await remote.cook(dish="roast", seconds=3600)
            except TimeoutError:
                print("too slow")

            async with remote.courses.stream() as stream:
                async for course in stream:
                    print(course)
                    if course == "course 2":
                        break  # leaving the block ends the generator over there

        comm = await connect(address)
        print("by hand:", await send_recv(comm, op="cook", dish="egg"))
        await kitchen.close()
        try:
            await comm.read()
        except CommClosedError:
            print("the kitchen has closed")
        await comm.close()
    print(*sorted(kitchen.log), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
