"""Record what a real ``distributed`` writes: ``python tests/golden/record.py`` rewrites every file of this directory.

``messages/`` holds single messages, each written by a stock comm to a socket; ``conversations/`` holds what a stock rpc and a
stock Server said to each other through a proxy, each side's bytes in a file of its own.  ``index.json`` describes them all, and
names the versions that wrote them.

Tracebacks travel in error replies, so all code is compiled under names that say nothing about the machine it was recorded on.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import importlib.util
import json
import shutil
import socket
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOTS = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib"), str(HERE)]


def neutral(path: str) -> str:
    """A file's name without the directory that the package, or the recorder, happens to stand in."""
    for root in ROOTS:
        if path.startswith(root):
            return path[len(root) :].lstrip("/\\").replace("\\", "/")
    return path


class NeutralLoader(importlib.machinery.SourceFileLoader):
    """Compiles modules under their neutral names."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        code: CodeType = compile(data, neutral(str(path)), "exec", dont_inherit=True, optimize=_optimize)
        return code


@contextlib.contextmanager
def neutral_imports() -> Any:
    """Import from source, past all caches, by :class:`NeutralLoader`."""
    suffixes = importlib.machinery.SOURCE_SUFFIXES
    hook = importlib.machinery.FileFinder.path_hook(
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES), (NeutralLoader, suffixes)
    )
    sys.dont_write_bytecode = True
    sys.pycache_prefix = str(HERE / "no-caches-here")
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    yield
    sys.path_hooks.remove(hook)
    sys.path_importer_cache.clear()


def load_cases() -> ModuleType:
    loader = NeutralLoader("golden_cases", str(HERE / "cases.py"))
    spec = importlib.util.spec_from_loader("golden_cases", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_cases"] = module
    loader.exec_module(module)
    return module


# -- single messages -------------------------------------------------------------------------------------------------------------


async def written(message: Any, context: dict[str, Any]) -> bytes:
    """What a stock comm writes for a message to a peer with which ``context`` was negotiated."""
    from distributed.comm.tcp import TCP
    from tornado.iostream import IOStream

    context = {"compression": None, "pickle-protocol": 5, **context}
    shard = context.pop("shard", None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = IOStream(socket.create_connection(listener.getsockname()))
        receiver, _ = listener.accept()
    receiver.setblocking(False)
    comm = TCP(stream, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    comm.local_info = comm.remote_info = {}
    comm.handshake_options = context
    if shard is not None:
        comm.max_shard_size = shard  # type: ignore[misc]
    size = await comm.write(message, on_error="raise")
    data = b""
    with receiver:
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(receiver, 2**16)
    comm.abort()
    return data


async def record_messages(folder: Path, cases: ModuleType) -> list[dict[str, Any]]:
    from distributed.core import Status
    from distributed.protocol import to_serialize
    from distributed.protocol.serialize import ToPickle

    api = SimpleNamespace(Serialize=to_serialize, ToPickle=ToPickle, Status=Status)
    entries = []
    for case in cases.CASES:
        data = await written(case.message(api), dict(case.context))
        (folder / f"{case.name}.bin").write_bytes(data)
        entries.append({"name": case.name, "description": case.description, "bytes": len(data)})
    return entries


# -- conversations ---------------------------------------------------------------------------------------------------------------


class Proxy:
    """Passes one TCP connection on and keeps what was said, in order."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.said: list[tuple[str, bytes]] = []
        self.connections = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        async with server:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(self.copy("client", reader, far_writer), self.copy("server", far_reader, writer))

    async def copy(self, side: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                self.said.append((side, data))
                writer.write(data)
                await writer.drain()
        writer.close()

    def turns(self) -> list[tuple[str, bytes]]:
        merged: list[tuple[str, bytes]] = []
        for side, data in self.said:
            if merged and merged[-1][0] == side:
                merged[-1] = (side, merged[-1][1] + data)
            else:
                merged.append((side, data))
        return merged


async def swap(a: Any, b: Any) -> dict[str, Any]:
    from distributed.protocol import to_serialize

    return {"a": to_serialize(b), "b": to_serialize(a)}


def lock() -> Any:
    from distributed.protocol import to_serialize

    return to_serialize(threading.Lock())


async def call_add(remote: Any) -> None:
    assert await remote.add(x=1, y=2) == 3
    assert await remote.add(x=-1, y=0.5) == -0.5


async def call_unknown(remote: Any) -> None:
    assert await remote.no_such_op(x=1) is None


async def call_fail(remote: Any) -> None:
    with contextlib.suppress(ValueError):
        await remote.fail(x=1)
        raise AssertionError("the handler's ValueError didn't arrive")


async def call_wrong_arguments(remote: Any) -> None:
    with contextlib.suppress(TypeError):
        await remote.add(x=1, z=2)


async def call_swap(remote: Any) -> None:
    import numpy as np
    from distributed.protocol import to_serialize

    first, second = np.arange(5_000), np.arange(6_000.0)
    swapped = await remote.swap(a=to_serialize(first), b=to_serialize(second))
    assert (swapped["a"] == second).all()
    assert (swapped["b"] == first).all()


async def call_lock(remote: Any) -> None:
    with contextlib.suppress(TypeError):
        await remote.lock()
        raise AssertionError("a lock was sent")


async def stream(remote: Any) -> None:
    comm = await remote.live_comm()
    await comm.write({"op": "connection_stream", "reply": False})
    await comm.write([{"op": "inc", "x": 1}, {"op": "inc", "x": 2}])
    await comm.write([{"op": "inc", "x": 3}])
    await comm.write([{"op": "close-stream"}])
    await asyncio.sleep(0.1)
    await comm.close()


CONVERSATIONS: list[tuple[str, str, Callable[[Any], Awaitable[None]]]] = [
    ("add", "handshake, two calls on one connection, close", call_add),
    ("unknown-op", "an op the server doesn't have: it answers None", call_unknown),
    ("error", "a handler that raises, with a cause", call_fail),
    ("wrong-arguments", "a call that doesn't fit the handler's signature", call_wrong_arguments),
    ("unserializable", "a handler whose result can't be serialized: the error family", call_lock),
    ("two-arrays", "two arrays each way: outer counts the first of them only", call_swap),
    ("stream", "a stream is opened, two batches are sent, it is closed", stream),
]


async def record_conversation(talk: Callable[[Any], Awaitable[None]], cases: ModuleType) -> list[tuple[str, bytes]]:
    from distributed.core import Server, rpc

    received = []
    server = Server(
        {"add": cases.add, "fail": cases.fail, "swap": swap, "lock": lock}, stream_handlers={"inc": lambda x: received.append(x)}
    )
    await server.listen("tcp://127.0.0.1:0")
    proxy = Proxy(server.port)
    async with proxy.running() as address:
        remote = rpc(address)
        try:
            await talk(remote)
        finally:
            await remote.close_rpc()
            # What is said while closing is part of it.
            await asyncio.sleep(0.1)
    await server.close()
    assert proxy.connections == 1, proxy.connections
    return proxy.turns()


async def record_conversations(folder: Path, cases: ModuleType) -> list[dict[str, Any]]:
    entries = []
    for name, description, talk in CONVERSATIONS:
        turns = await record_conversation(talk, cases)
        for side in ("client", "server"):
            (folder / f"{name}.{side}.bin").write_bytes(b"".join(data for who, data in turns if who == side))
        entries.append({"name": name, "description": description, "turns": [[side, len(data)] for side, data in turns]})
    return entries


# -- all of it -------------------------------------------------------------------------------------------------------------------


def hide_module_paths() -> None:
    """A pickled traceback holds ``__file__`` of the modules that it went through."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str):
            module.__file__ = neutral(path)


async def main() -> None:
    versions = {}
    for package in ("distributed", "msgpack", "numpy", "lz4", "zstandard", "tblib"):
        module = importlib.import_module(package)
        version: Any = getattr(module, "__version__", None) or module.version
        versions[package] = version if isinstance(version, str) else ".".join(map(str, version))
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    folders = {name: HERE / name for name in ("messages", "conversations")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    index: dict[str, Any] = {"versions": versions}
    cases = load_cases()
    index["messages"] = await record_messages(folders["messages"], cases)
    hide_module_paths()
    index["conversations"] = await record_conversations(folders["conversations"], cases)
    lists = {name: ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in index[name]) for name in folders}
    parts = [f'"versions": {json.dumps(versions)}', *(f'"{name}": [\n {text}\n]' for name, text in lists.items())]
    (HERE / "index.json").write_text("{" + ",\n".join(parts) + "}\n")
    secrets = [
        path.encode() for path in (sys.prefix, sys.base_prefix, str(HERE), str(Path.home()), str(Path.cwd())) if len(path) > 1
    ]
    for file in HERE.rglob("*.bin"):
        told = [path for path in secrets if path in file.read_bytes()]
        assert not told, f"{file.name} tells of {told}"


if __name__ == "__main__":
    with neutral_imports():
        import distributed  # noqa: F401

        asyncio.run(main())
