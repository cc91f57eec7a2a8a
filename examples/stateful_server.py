"""A Server subclass that keeps state: a small key-value store whose keys can be watched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import trio

from trio_dcore import Server, rpc


class Store(Server):
    """Remembers values.  All handlers run in one thread, so between two awaits no other one interferes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"put": self.put, "get": self.get, "watch": self.watch}, **kwargs)
        self.values: dict[str, Any] = {}
        self.changed = trio.Event()

    def put(self, key: str, value: Any) -> None:
        """Store a value and wake everybody who watches."""
        self.values[key] = value
        self.changed.set()
        self.changed = trio.Event()

    def get(self, key: str) -> Any:
        """Return a value; a KeyError here is a KeyError at the caller."""
        return self.values[key]

    async def watch(self, key: str) -> AsyncIterator[Any]:
        """Yield the value of a key each time it changes."""
        last = object()
        while True:
            changed = self.changed
            value = self.values.get(key)
            if value != last:
                last = value
                yield value
            await changed.wait()


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """Start a store and use it from two clients."""
    async with Store() as store:
        contact = await store.listen(address)

        async def watch(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with rpc(contact) as remote, remote.watch.stream(key="colour") as colours:
                async for colour in colours:
                    print(f"watched: {colour}")
                    if colour is None:
                        task_status.started()
                    if colour == "blue":
                        break

        async with rpc(contact) as remote, trio.open_nursery() as nursery:
            await nursery.start(watch)
            await remote.put(key="colour", value="red")
            print(f"got: {await remote.get(key='colour')}")
            await remote.put(key="colour", value="blue")
            try:
                await remote.get(key="taste")
            except KeyError as exc:
                print(f"KeyError: {exc.args[0]}")


if __name__ == "__main__":
    trio.run(main)
