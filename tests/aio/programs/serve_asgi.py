"""An ASGI application under uvicorn, until a signal comes; then it says what is left behind, which is to be nothing."""

import asyncio
import importlib.util
import signal
import sys
import warnings

import uvicorn

from trio_dcore.testing import no_leaks


async def main(app, serving):
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 60
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    task = asyncio.create_task(serving.serve())
    while not serving.started:
        if task.done():
            await task
        await asyncio.sleep(0.01)
    print(serving.servers[0].sockets[0].getsockname()[1], flush=True)
    await task
    print("served", flush=True)


path, loop = sys.argv[1:]
spec = importlib.util.spec_from_file_location("application", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
# uvicorn hands the signal on when it has stopped.
signal.signal(signal.SIGTERM, lambda *_: print("terminated", flush=True))
unseen = []
factory = asyncio.SelectorEventLoop
if loop == "uvloop":
    import uvloop

    factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.sleep(0))  # it has a pipe for the whole process
warnings.simplefilter("error")
with no_leaks():
    config = uvicorn.Config(module.app, port=0, log_config=None, lifespan="on", loop="none")
    with asyncio.Runner(loop_factory=factory, debug=True) as runner:
        runner.run(main(module.app, uvicorn.Server(config)))
assert unseen == []
print("nothing is left", flush=True)
