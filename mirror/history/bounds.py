"""How much of the disk the history may take: a share of the quota.

Lives here: its bounds, in bytes and in numbers of rows. Must not know: the tables, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_QUOTA_SHARE: Final = 0.02
"""Part of the quota that the history may take beside the content. From a quota of 4 GiB on, it has
its full size."""
_FLOOR_BYTES: Final = 4 * 1024 * 1024
"""Bytes of the smallest history: a few hundred requests, the counters of some days, and a trace."""
_FULL_BYTES: Final = 84 * 1024 * 1024
"""Bytes of a history in which all tables have reached their largest number of rows."""
_MIN_ACCESSES: Final = 20_000
"""Rows of the smallest trace: a smaller sample of the contents would not represent all."""
_ACCESS_BYTES: Final = 80
"""Bytes of a row of the trace, with its index."""
_STEPS: Final = 64
"""Steps of the trace until content of the size of the quota was requested. The order of accesses is
kept from step to step, so predictions are about so exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of the history. Create them with :meth:`of_quota`."""

    max_bytes: int
    """Bytes of the file. Its log takes up to an eighth more."""
    pulls: int = 20_000
    """Rows of requests that are no fast hits: 15 MB."""
    hit_pulls: int = 5_000
    """Rows of fast hits: 3 MB."""
    counts: int = 200_000
    """Rows of counters by repository and network: 30 MB, such as 250 pairs in each hour of 30
    days."""
    minutes: int = 50_000
    """Rows of counters by the minute: 5 MB, such as 33 pairs of upstream and outcome."""
    tags: int = 100_000
    """Digests of all tags: 25 MB."""
    accesses: int = 100_000
    """Rows of the trace of accesses: 8 MB, and a second to evaluate. With more, it has a smaller
    sample of the contents."""
    step_bytes: float
    """Bytes of different contents whose accesses may be in one step of the trace."""

    @classmethod
    def of_quota(cls, max_size: int) -> Bounds:
        """Return the bounds for a quota. ``max_size``: its bytes (``storage.max_size``)."""
        size = int(min(_FULL_BYTES, max(_FLOOR_BYTES, max_size * _QUOTA_SHARE)))
        full = cls(max_bytes=_FULL_BYTES, step_bytes=0)
        accesses = max(_MIN_ACCESSES, int(full.accesses * size / _FULL_BYTES))
        share = (size - accesses * _ACCESS_BYTES) / (_FULL_BYTES - full.accesses * _ACCESS_BYTES)
        return cls(
            max_bytes=size,
            pulls=int(full.pulls * share),
            hit_pulls=int(full.hit_pulls * share),
            counts=int(full.counts * share),
            minutes=int(full.minutes * share),
            tags=int(full.tags * share),
            accesses=accesses,
            step_bytes=max_size / _STEPS,
        )
