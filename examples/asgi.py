"""An ASGI application that runs a server and calls one: what a web program does that has machines behind it.

Its lifespan runs an ``aio.Server`` and holds an ``aio.rpc``; its requests call through that.  Here uvicorn serves it, for three requests;
any ASGI server will do::

    uvicorn --app-dir examples asgi:app
    curl 'http://127.0.0.1:8000/add?x=1&y=2'

With ``CALL=tcp://host:port`` in the environment the requests call the server there instead of the one that is inside.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import uvicorn

from trio_dcore import aio

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def add(x: int, y: int, seconds: float = 0) -> int:
    await asyncio.sleep(seconds)
    return x + y


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


class App:
    """The application; one object for all requests."""

    remote: aio.rpc
    address: str

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["type"] == "http":
            await self.answer(scope, send)

    async def live(self, receive: Receive, send: Send) -> None:
        await receive()  # "startup"
        async with aio.Server({"add": add, "count": count}) as server:
            self.address = await server.listen("tcp://127.0.0.1:0")
            async with aio.rpc(os.environ.get("CALL") or self.address) as self.remote:
                await send({"type": "lifespan.startup.complete"})
                await receive()  # "shutdown": no request is left
        await send({"type": "lifespan.shutdown.complete"})

    async def answer(self, scope: dict[str, Any], send: Send) -> None:
        status, lines = 200, []
        arguments = {key: json.loads(value) for key, value in parse_qsl(scope["query_string"].decode())}
        try:
            async with asyncio.timeout(arguments.pop("timeout", 10)):
                match scope["path"]:
                    case "/add":
                        lines.append(await self.remote.add(**arguments))
                    case "/count":
                        lines += [item async for item in self.remote.count.stream(**arguments)]
                    case "/address":
                        lines.append(self.address)
                    case _:
                        status = 404
        except TimeoutError:
            status, lines = 504, ["too slow"]  # and the handler was cancelled
        except (aio.RemoteError, TypeError) as error:
            status, lines = 500, [str(error)]
        body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


app = App()


def get(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        return str(response.read().decode().replace("\n", " ").strip())


async def main() -> None:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    print("added:", await asyncio.to_thread(get, f"{url}/add?x=1&y=2"))
    print("counted:", await asyncio.to_thread(get, f"{url}/count?n=3"))
    server.should_exit = True
    await serving
    print("stopped")


if __name__ == "__main__":
    asyncio.run(main())
