"""trio_dcore over a unix socket."""

from __future__ import annotations

import os

from .ours import OurSystem

SYSTEM = OurSystem(f"unix://@trio-dcore-benchmark-{os.getpid()}")
