"""Pauses between short pieces of work, for threads that run beside the event loop.

Lives here: how long such a thread works and rests. Must not know: what the work is.
"""

from __future__ import annotations

import time
from typing import Final

_WORK_S: Final = 0.00025
"""Seconds of work between two pauses. A request waits for the interpreter lock for as long, each
time that the event loop, or a thread that opens a file for it, wakes up."""
_PAUSE_S: Final = 0.0002
"""Seconds of a pause. Enough for a thread that waits for the interpreter lock to take it."""


class Pace:
    """Pauses work that consists of many short system calls.

    Such a thread takes the interpreter lock again before another one has woken up, for 5 ms at a
    time. Each request that is served meanwhile would wait for that.
    """

    def __init__(self) -> None:
        """Start with the time until the first pause."""
        self._pause_at = time.monotonic() + _WORK_S

    def keep(self) -> None:
        """Pause if that is due. Call it after each short piece of work."""
        if time.monotonic() >= self._pause_at:
            time.sleep(_PAUSE_S)
            self._pause_at = time.monotonic() + _WORK_S
