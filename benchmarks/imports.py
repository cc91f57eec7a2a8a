"""T12: what importing costs, each import in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

__all__ = ["STATEMENTS", "BadImport", "check_what_is_loaded", "seconds"]

_ROOT = Path(__file__).resolve().parent.parent

#: What is timed, by the name it has in the table.
STATEMENTS = {
    "interpreter": "pass",
    "trio, msgpack": "import trio, msgpack",
    "ours": "import trio_dcore",
    # The root is lazy, so that the bare import says little: this one is what a program with a server and a client pays.
    "ours, used": "from trio_dcore import Server, rpc",
    "stock": "import distributed",
}

_LOADED = """
import gc, sys
from trio_dcore import Server, rpc
bad = sorted({"asyncio", "numpy", "cloudpickle", "distributed"} & set(sys.modules))
if "ssl" in sys.modules:
    import ssl
    bad += ["SSLContext" for thing in gc.get_objects() if isinstance(thing, ssl.SSLContext)]
print(" ".join(bad))
"""


class BadImport(RuntimeError):
    """A statement could not be imported at all."""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadImport(f"{code!r} failed:\n{done.stderr}")
    return done.stdout


def seconds(name: str) -> float:
    """Wall time of an interpreter that runs one statement and ends."""
    start = time.perf_counter()
    _python(STATEMENTS[name])
    return time.perf_counter() - start


def check_what_is_loaded() -> list[str]:
    """What the package's import brought in that it should not have; empty if all is well."""
    return _python(_LOADED).split()
