"""``python -m trio_dcore.cli`` is ``trio-dcore``."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
