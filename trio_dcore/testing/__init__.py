"""What tests of shutdown and cancellation need; for this project's own and for yours.

- :func:`memory_network`: the whole stack over in-memory streams, so that virtual time works.
- :class:`FaultStream`: a stream with the faults that networks have.
- :class:`ManualPeer`: speaks the protocol by hand, rightly or wrongly.
- :class:`no_leaks`: what was there before is what is there after.
- :func:`cancel_sweep`: a scenario, cancelled at every step.
- :func:`wire_sweep`: a scenario, cut after every byte.
"""

from __future__ import annotations

from ._faults import FaultStream
from ._leaks import LeakError, no_leaks
from ._manual_peer import ManualPeer
from ._memory import MemoryStream, memory_stream_pair
from ._network import MemoryNetwork, MemoryStreamListener, memory_network
from ._sweeps import SweepError, WireCut, cancel_sweep, wire_sweep

__all__ = [
    "FaultStream",
    "LeakError",
    "ManualPeer",
    "MemoryNetwork",
    "MemoryStream",
    "MemoryStreamListener",
    "SweepError",
    "WireCut",
    "cancel_sweep",
    "memory_network",
    "memory_stream_pair",
    "no_leaks",
    "wire_sweep",
]
