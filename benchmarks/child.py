"""The two ends of a measurement, each a process: ``python -m benchmarks.child server|client SYSTEM``.

A server says its address and serves until its stdin ends.  A client does one piece of work for each line of JSON on its stdin, in
an event loop of its own each time, and answers with what it measured.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import traceback
from typing import Any

from .processes import raise_file_limit
from .systems import System, load
from .work import WORK

__all__ = ["main"]


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)  # the server is measured, not shut down; the kernel closes what it has open


def _serve(system: System) -> None:
    # Blocked in a read for as long as anything is measured.
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    system.run(system.serve, lambda address: _say(address=address))


def _work(system: System) -> None:
    for line in sys.stdin:
        question = json.loads(line)
        work = WORK[question["work"]]

        async def measure(work: Any = work, question: Any = question) -> Any:
            return await work(system, question["address"], question["server"], **question["params"])

        gc.collect()  # so that no measurement pays for the one before
        try:
            answer = system.run(measure)
        except Exception as error:
            traceback.print_exc()
            _say(error=f"{question['work']} {question['params']}: {error!r}")
        else:
            _say(**answer)


def main(role: str, name: str) -> None:
    """Be a server or a client of one system."""
    raise_file_limit()
    system = load(name)
    if role == "server":
        _serve(system)
    else:
        _work(system)


if __name__ == "__main__":
    main(*sys.argv[1:])
