"""Predict what another disk size would change, from the trace of accesses.

Lives here: a simulation of the cache with another quota. Must not know: where the trace is kept.

Theory of operation. Hit ratios of other cache sizes are often derived from reuse distances. But a
manifest that is served renews the recency of those parts only that are on the disk: what was
evicted is not brought back. So the distance alone does not decide. Instead, each size is simulated,
with the order of eviction and the water marks of the store ("miniature simulation", Waldspurger et
al., 2017). The trace has a sample of all contents, chosen by their digests (SHARDS, Waldspurger et
al., 2015), so the simulated cache has the same part of the size.

The first access of the trace to a content says nothing if it was a hit: it was fetched before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mirror.config.settings import Storage
from mirror.history.queries import Access, AccessTrace

FACTORS: Final = (0.5, 1.0, 2.0, 4.0)
"""Disk sizes to compare, as multiples of the present one: the usual next steps."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result of one size. Requests are those of the trace: of a sample of all contents."""

    factor: float
    """The size as a multiple of the present one."""
    max_size: int
    """Bytes of the quota."""
    requests: int
    """Requests that were judged."""
    misses: int
    """Requests among them for which content would have been fetched."""
    bytes_fetched: int
    """Bytes that would have been fetched, for all contents."""

    @property
    def hit_ratio(self) -> float | None:
        """Part of the requests that were hits. None: there were no requests."""
        return 1 - self.misses / self.requests if self.requests else None


class _SimulatedCache:
    """A cache with a quota. Its content goes in the order of ``eviction_order``."""

    def __init__(self, high: float, low: float) -> None:
        """Start empty. ``high``, ``low``: its water marks in bytes."""
        self._high = high
        self._low = low
        self._contents: dict[int, tuple[int, int]] = {}
        """Content -> (last use, size)."""
        self._total = 0
        self._at = 0
        self._second = 0
        """Number of the second: the clock may have been set back in the trace."""

    def begin(self, access: Access) -> None:
        """Note that an access begins. The last use of contents is kept in whole seconds."""
        self._second += access.at != self._at
        self._at = access.at

    def mark_used(self, access: Access) -> bool:
        """Renew the recency of a content. Returns whether the cache has it."""
        if access.content not in self._contents:
            return False
        self._contents[access.content] = self._second, self._contents[access.content][1]
        return True

    def add(self, access: Access) -> None:
        """Store a content, and evict others if the cache is above its high water mark."""
        if access.size > self._high:
            return  # It is served, and not stored.
        self._contents[access.content] = self._second, access.size
        self._total += access.size
        if self._total <= self._high:
            return
        order = sorted((*value, content) for content, value in self._contents.items())
        for _, size, content in order:
            if self._total <= self._low:
                return
            # The new content is being written, and read: it stays.
            if content != access.content:
                del self._contents[content]
                self._total -= size


def predict(
    trace: AccessTrace, storage: Storage, factors: Sequence[float] = FACTORS
) -> list[Prediction]:
    """Predict hits and misses for other sizes of the quota. The result is deterministic.

    Args:
        trace: The accesses. A trace of 100,000 rows takes about 0.2 s for each size.
        storage: The present quota, and its water marks.
        factors: The sizes, as multiples of the present one.
    """
    return [_simulate(trace, storage, factor) for factor in factors]


def _simulate(trace: AccessTrace, storage: Storage, factor: float) -> Prediction:
    size = storage.max_size * factor
    cache = _SimulatedCache(
        size * storage.high_water * trace.rate, size * storage.low_water * trace.rate
    )
    requests = misses = fetched = 0
    known: set[int] = set()
    for access in trace.accesses:
        is_first = access.content not in known
        known.add(access.content)
        cache.begin(access)
        if not access.requests:
            if not cache.mark_used(access) and is_first:
                cache.add(access)
            continue
        if is_first and not access.misses:
            cache.add(access)
            requests += access.requests - 1
            continue
        requests += access.requests
        if not cache.mark_used(access):
            misses += 1
            fetched += access.size
            cache.add(access)
    return Prediction(factor, int(size), requests, misses, int(fetched / trace.rate))


def measured_hit_ratio(accesses: Iterable[Access]) -> float | None:
    """Return the part of requests that were hits, as it was. None: there were no requests."""
    requests = misses = 0
    for access in accesses:
        requests += access.requests
        misses += access.misses
    return 1 - misses / requests if requests else None
