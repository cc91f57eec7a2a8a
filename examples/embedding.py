"""A server inside an application's own nursery: it is one task among others, and ends with them.

``server.serve`` runs until the server is stopped or its scope is cancelled; ``nursery.start`` returns when it listens.
"""

from __future__ import annotations

import trio

from trio_dcore import Server, rpc


class Thermometer:
    """The application, which happens to be asked for its state from outside."""

    def __init__(self) -> None:
        self.celsius = 20.0

    async def warm_up(self) -> None:
        """The application's own work, which knows nothing of the server."""
        while True:
            await trio.sleep(0.001)
            self.celsius += 0.1


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """Run the application with its server, ask it, and stop the server from outside."""
    thermometer = Thermometer()
    server = Server({"read": lambda: thermometer.celsius, "stop": lambda: server.stop()})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thermometer.warm_up)
        (contact,) = await nursery.start(server.serve, address)

        async with rpc(contact) as remote:
            print(f"plausible: {20 <= await remote.read() < 100}")
            # A handler may stop its own server, and its reply still arrives.
            await remote.stop()
        await server.finished()
        print(f"server: {server.status.name}")
        # Cancelling would have stopped the server as well, at once: it is a task like any other.
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
