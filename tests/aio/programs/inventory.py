"""A server as it is written for ``distributed.core``; the tests change the import and nothing else (tests/aio/test_moving.py)."""

import asyncio
import sys

from distributed.core import ConnectionPool, Server, Status, rpc


class Inventory(Server):
    def __init__(self, **kwargs):
        self.stock = {"bolts": 12}
        self.changed = asyncio.Event()
        handlers = {
            "get": self.get,
            "put": self.put,
            "take": self.take,
            "watch": self.watch,
            "relay": self.relay,
            "wait_for": self.wait_for,
            "stop": self.stop_soon,
        }
        super().__init__(handlers, stream_handlers={"add": self.add_from_stream}, **kwargs)
        self.stopping = asyncio.Event()

    async def start_unsafe(self):
        await super().start_unsafe()
        await self.listen("tcp://127.0.0.1:0")
        return self

    def get(self, name):
        return self.stock.get(name)

    async def put(self, name, count=1):
        await asyncio.sleep(0)
        self.stock[name] = self.stock.get(name, 0) + count
        self.changed.set()
        self.changed.clear()
        return self.stock[name]

    async def take(self, name, count):
        if self.stock.get(name, 0) < count:
            raise ValueError(f"only {self.stock.get(name, 0)} {name}")
        return await self.put(name, -count)

    async def watch(self, comm, names):
        for name in names:
            await comm.write({"name": name, "count": self.stock.get(name)})
        await comm.close()
        return Status.dont_reply

    async def wait_for(self, name, count):
        async with asyncio.timeout(10):
            while self.stock.get(name, 0) < count:
                await self.changed.wait()
        return self.stock[name]

    async def relay(self, address, name):
        return await self.rpc(address).get(name=name)

    def add_from_stream(self, name, count):
        self.stock[name] = self.stock.get(name, 0) + count
        self.changed.set()
        self.changed.clear()

    def stop_soon(self):
        self.stopping.set()


async def main():
    async with Inventory() as server, Inventory() as other:
        assert server.status == Status.running
        async with rpc(server.address) as remote:
            assert await remote.identity() == {"type": "Inventory", "id": server.id}
        pool = await ConnectionPool(limit=2)
        assert await pool(server.address).relay(address=other.address, name="bolts") == 12
        await pool.close()
        print(server.address, flush=True)
        await server.stopping.wait()
    print("stopped", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit()
