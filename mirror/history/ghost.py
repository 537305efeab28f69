"""Predict what another disk size would change, from the trace of accesses.

Lives here: a simulation of the cache with another quota. Must not know: where the trace is kept.

Theory of operation. Hit ratios of other cache sizes are often derived from reuse distances. But a
manifest that is served renews the recency of those parts only that are on the disk: what was
evicted is not brought back. So the distance alone does not decide. Instead, each size is simulated,
with the order of eviction, the water marks, and the marks of the store ("miniature simulation",
Waldspurger et al., 2017). The trace has a sample of all contents, chosen by their digests (SHARDS,
Waldspurger et al., 2015), so the simulated cache has the same part of the size.

The first access of the trace to a content says nothing if it was a hit: it was fetched before.

The same simulation of the present size is compared with what has happened. So it is known how far
a prediction may be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mirror.config.settings import Storage
from mirror.history.content_sizes import content_number
from mirror.history.queries import Access, AccessTrace

FACTORS: Final = (0.5, 1.0, 2.0, 4.0)
"""Disk sizes to compare, as multiples of the present one: the usual next steps."""
_MAX_ERROR: Final = 0.03
"""Difference of hit ratios. If the simulation of the present size is further from what has
happened, that of other sizes is not reliable either."""
_MIN_IDLE_S: Final = 3.0
"""Seconds. If content is evicted earlier than that after its last use, the prediction is not
reliable: small content is served from memory for a second, and the trace has whole seconds."""


@dataclass(frozen=True, slots=True)
class Protected:
    """The content that marks keep from eviction (pins, freezes, leases)."""

    contents: frozenset[int] = frozenset()
    """Their numbers (:func:`mirror.history.content_sizes.content_number`)."""
    size: int = 0
    """Bytes of those on the disk."""

    @classmethod
    def of_sizes(cls, sizes: Iterable[tuple[str, int]]) -> Protected:
        """Return the protected content of (digest, bytes on the disk)."""
        found = list(sizes)
        numbers = frozenset(content_number(digest) for digest, _ in found)
        return cls(numbers, sum(size for _, size in found))


@dataclass(frozen=True, slots=True)
class Prediction:
    """The result of one size. Requests are those of the trace: of a sample of all contents."""

    factor: float
    """The size as a multiple of the present one."""
    max_size: int
    """Bytes of the quota."""
    requests: int
    """Requests that were judged: `GET` of content."""
    misses: int
    """Requests among them for which content would have been fetched."""
    recorded_misses: int
    """Requests among them for which content was fetched, with the disk that there was."""
    bytes_fetched: int
    """Bytes that would have been fetched, for all contents."""
    evictions: int
    """Contents of the sample that would have been evicted."""
    idle: float | None
    """Mean time in seconds from the last use of content to its eviction. None: nothing was."""
    is_crowded: bool
    """Whether marks protect as much as an eviction leaves. Then evictions do not free enough, and
    are held off, so what is stored depends on their duration."""

    @property
    def hit_ratio(self) -> float | None:
        """Part of the requests that were hits. None: there were no requests."""
        return 1 - self.misses / self.requests if self.requests else None

    @property
    def recorded_hit_ratio(self) -> float | None:
        """Part of the requests that were hits, as it was. None: there were no requests."""
        return 1 - self.recorded_misses / self.requests if self.requests else None


class _SimulatedCache:
    """A cache with a quota. Its content goes in the order of ``eviction_order``.

    Sizes are those of the sample.
    """

    def __init__(self, storage: Storage, factor: float, rate: float, protected: Protected) -> None:
        """Start empty.

        Args:
            storage: The present quota, and its water marks.
            factor: The size as a multiple of the quota.
            rate: Part of all contents that is in the sample.
            protected: What the marks keep. It is not in this cache, but takes its space.
        """
        size = storage.max_size * factor
        # A single content may take what the high water mark allows. All together have less.
        self._largest = size * storage.high_water
        self._limit = max(0.0, size - protected.size) * rate
        self._high = max(0.0, size * storage.high_water - protected.size) * rate
        self._low = max(0.0, size * storage.low_water - protected.size) * rate
        self._contents: dict[int, tuple[int, int, int]] = {}
        """Content -> (number of the second of its last use, size, time of its last use)."""
        self._total = 0
        self._at = 0
        self._second = 0
        """Number of the second: the clock may have been set back in the trace."""
        self.evictions = 0
        self.idle = 0
        """Sum over all evictions: seconds since the last use."""

    def begin(self, access: Access) -> None:
        """Note that an access begins. The last use of contents is kept in whole seconds."""
        self._second += access.at != self._at
        self._at = access.at

    def has_content(self, content: int) -> bool:
        """Return whether the cache has a content."""
        return content in self._contents

    def mark_used(self, access: Access) -> None:
        """Renew the recency of a content that the cache has."""
        _, size, _ = self._contents[access.content]
        self._contents[access.content] = self._second, size, self._at

    def add(self, access: Access) -> None:
        """Store a content, and evict others if the cache is above its high water mark."""
        if access.size > self._largest:
            return  # It is served, and not stored.
        if self._total + access.size > self._high:
            self._evict(access.size)
        if self._total + access.size <= self._limit:
            self._contents[access.content] = self._second, access.size, self._at
            self._total += access.size

    def _evict(self, need: int) -> None:
        order = sorted((*value, content) for content, value in self._contents.items())
        for _, size, at, content in order:
            if self._total + need <= self._low:
                return
            del self._contents[content]
            self._total -= size
            self.evictions += 1
            self.idle += max(0, self._at - at)


def predict(
    trace: AccessTrace,
    storage: Storage,
    factors: Sequence[float] = FACTORS,
    protected: Protected | None = None,
) -> list[Prediction]:
    """Predict hits and misses for other sizes of the quota. The result is deterministic.

    Args:
        trace: The accesses. A trace of 100,000 rows takes about 0.2 s for each size.
        storage: The present quota, and its water marks.
        factors: The sizes, as multiples of the present one.
        protected: What the marks keep. They are taken to have been there all the time.
    """
    return [_simulate(trace, storage, factor, protected or Protected()) for factor in factors]


def _simulate(
    trace: AccessTrace, storage: Storage, factor: float, protected: Protected
) -> Prediction:
    cache = _SimulatedCache(storage, factor, trace.rate, protected)
    requests = misses = recorded = fetched = 0
    old = _find_old(trace.accesses)
    requested: set[int] = set()
    for access in trace.accesses:
        content = access.content
        cache.begin(access)
        is_hit = cache.has_content(access.content) or (
            content in protected.contents and content in requested
        )
        if access.requests:
            is_judged = content in requested or content not in old
            requested.add(content)
            # If the first request says nothing, further ones of its row are hits.
            requests += access.requests - (not is_judged)
            recorded += access.misses
            if is_judged and not is_hit:
                misses += 1
                fetched += access.size
        if cache.has_content(access.content):
            if access.is_used:
                cache.mark_used(access)
        elif content not in protected.contents and (
            access.requests or access.misses or content in old
        ):
            cache.add(access)
            old.discard(content)
    return Prediction(
        factor=factor,
        max_size=int(storage.max_size * factor),
        requests=requests,
        misses=misses,
        recorded_misses=recorded,
        bytes_fetched=int(fetched / trace.rate),
        evictions=cache.evictions,
        idle=cache.idle / cache.evictions if cache.evictions else None,
        is_crowded=protected.size >= storage.max_size * factor * storage.low_water,
    )


def _find_old(accesses: Iterable[Access]) -> set[int]:
    """Return the contents that were in the cache before the trace: they were no miss at first.

    A use does not decide it: all parts of a manifest are used, also those that are fetched later.
    """
    is_old: dict[int, bool] = {}
    used: set[int] = set()
    for access in accesses:
        if access.requests or access.misses:
            is_old.setdefault(access.content, not access.misses)
        else:
            used.add(access.content)
    return {content for content in {*is_old, *used} if is_old.get(content, True)}


def is_present_matched(predictions: Iterable[Prediction]) -> bool:
    """Return whether the simulation of the present size has found what has happened."""
    return all(
        abs(one.misses - one.recorded_misses) <= _MAX_ERROR * one.requests
        for one in predictions
        if one.factor == 1.0
    )


def is_slow_enough(prediction: Prediction) -> bool:
    """Return whether content stays in the simulated cache for seconds."""
    return prediction.idle is None or prediction.idle >= _MIN_IDLE_S
