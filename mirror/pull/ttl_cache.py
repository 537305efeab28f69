"""What was decided a moment ago: a bounded memory before the index and the disk.

Lives here: least-recently-used memory with a bound in bytes and a lifetime in seconds, which is
how long one worker process may be behind another. Must not know: what it holds.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class TtlLruCache(Generic[V]):
    """Values by key, for ``lifetime`` seconds, of at most ``limit`` bytes together."""

    def __init__(
        self,
        limit: int,
        lifetime: float,
        weigh: Callable[[V], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._weigh = weigh
        self._clock = clock
        self._bytes = 0
        self._entries: OrderedDict[Hashable, tuple[float, int, V]] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """The value, unless it is older than the lifetime, or from a clock that was set back."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not 0 <= self._clock() - entry[0] <= self._lifetime:
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[2]

    def put(self, key: Hashable, value: V) -> None:
        """Remember; the least recently used goes where the bound is reached."""
        self.drop(key)
        weight = self._weigh(value)
        if weight > self._limit:
            return
        self._entries[key] = (self._clock(), weight, value)
        self._bytes += weight
        while self._bytes > self._limit:
            self.drop(next(iter(self._entries)))

    def drop(self, key: Hashable) -> None:
        """Forget, if it is known."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1]
