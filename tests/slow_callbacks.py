"""Detect callbacks that block an event loop, like asyncio's debug mode, but by processor time.

asyncio logs callbacks that took more than 100 ms by the wall clock. On a busy machine that can be
any callback. Here the processor time of the loop's thread counts, without that of the garbage
collector. Coroutines of the tests and of the fakes are not measured.
"""

from __future__ import annotations

import asyncio
import gc
import time
from asyncio import events
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeGuard

LIMIT: Final = 0.1
"""Seconds of processor time: asyncio's own ``slow_callback_duration``."""
_TESTS: Final = str(Path(__file__).parent)


class Watch:
    """Measures every callback of every event loop of this process while it is installed."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self.slow: list[str] = []
        self.longest = 0.0
        self.count = 0
        """Number of callbacks so far. A task that waits without being woken runs none."""
        self._collecting = 0.0
        self._collected = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Measure until the context ends."""
        plain = events.Handle._run

        def measured(handle: asyncio.Handle) -> None:
            begun, collected = time.thread_time(), self._collected
            plain(handle)
            self.count += 1
            took = time.thread_time() - begun
            if took > self.longest or took > self.limit:
                took -= self._collected - collected
                self._note(handle, took)

        events.Handle._run = measured  # type: ignore[assignment,method-assign] # the loop runs it by name
        gc.callbacks.append(self._collector)
        try:
            yield
        finally:
            gc.callbacks.remove(self._collector)
            events.Handle._run = plain  # type: ignore[method-assign] # as it was

    def _collector(self, phase: str, info: dict[str, Any]) -> None:
        # A collection in another thread makes the loop wait, and uses none of its processor time.
        if phase == "start":
            self._collecting = time.thread_time()
        else:
            self._collected += max(0.0, time.thread_time() - self._collecting)

    def _note(self, handle: asyncio.Handle, took: float) -> None:
        owner = getattr(getattr(handle, "_callback", None), "__self__", handle)
        code = getattr(owner.get_coro(), "cr_code", None) if _is_task(owner) else None
        if code is not None and code.co_filename.startswith(_TESTS):
            return
        self.longest = max(self.longest, took)
        if took > self.limit:
            self.slow.append(f"{took:.3f} s of processor time: {owner!r}")


def _is_task(owner: object) -> TypeGuard[asyncio.Task[Any]]:
    return isinstance(owner, asyncio.Task)
