"""The soak: twenty clients call, while a nemesis kills, pauses, cuts, holds up and slows down what they call.

``python -m benchmarks.soak --minutes 10 --transport tcp unix tls`` prints a summary in Markdown; the exit code is 1 if anything was
not as it should be.  The code is that of the reference tests, tests/reference/soak.py, which run it for some seconds.  Linux.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

import trio

from tests.reference.soak import Soak, Summary
from trio_dcore.testing import no_leaks


async def soak(transports: list[str], seconds: float, seed: int, clients: int, folder: Path) -> Summary:
    """Run it, and see that it leaves nothing behind here."""
    async with no_leaks():
        return await Soak(transports, folder, seed=seed, clients=clients).run(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="the soak: random faults against clients and servers")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--transport", nargs="+", choices=("tcp", "unix", "tls"), default=["tcp", "unix", "tls"])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--logs", type=Path, help="keep what the servers have logged in this folder")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        summary = trio.run(soak, options.transport, 60 * options.minutes, seed, options.clients, folder)
        if options.logs is not None:
            options.logs.mkdir(parents=True, exist_ok=True)
            for each in folder.glob("*.log"):
                shutil.copy(each, options.logs)
    finally:
        shutil.rmtree(folder)
    print(summary.markdown())
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
