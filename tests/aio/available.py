"""Whether there is a trio-asyncio for this Python."""

from __future__ import annotations

import pytest

from trio_dcore.aio import open_loop

try:
    open_loop()
except ImportError as error:
    missing = str(error)
else:
    missing = ""

#: For tests of asyncio inside trio.
needs_trio_asyncio = pytest.mark.skipif(bool(missing), reason=missing or "it is there")
