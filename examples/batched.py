"""A stream of many small messages that nobody answers: ``BatchedSend`` at one end, ``stream_handlers`` at the other.

It sends few lists instead of many messages; the other side may as well be a stock Dask server.
"""

from __future__ import annotations

import threading

import trio

from trio_dcore import BatchedSend, SerializationError, Server, connect


class Totals:
    """The server's side: handlers for single messages, whose results go nowhere."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.complete = trio.Event()

    def measured(self, value: float) -> None:
        """Add one up."""
        self.count += 1
        self.total += value

    def last(self) -> None:
        """All has come: messages stay in order."""
        self.complete.set()


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """Stream measurements to a server."""
    totals = Totals()
    async with Server(stream_handlers={"measured": totals.measured, "last": totals.last}) as server:
        contact = await server.listen(address)
        async with await connect(contact) as comm:
            await comm.write({"op": "connection_stream", "reply": False})  # from here on the comm is a message stream
            async with BatchedSend(comm, interval="2ms") as stream:
                for i in range(10_000):
                    await stream.send_wait({"op": "measured", "value": i / 2})  # waits only while the server is too slow
                try:
                    stream.send({"op": "measured", "value": threading.Lock()})
                except SerializationError as error:
                    print(f"not sent: {error.path}")  # and the others are
                stream.send({"op": "last"})
            # Leaving the block has sent what waited.
            print(f"fewer lists than messages: {stream.batch_count < stream.message_count / 10}")
            await totals.complete.wait()
    print(f"{totals.count} measurements, mean {totals.total / totals.count}")


if __name__ == "__main__":
    trio.run(main)
