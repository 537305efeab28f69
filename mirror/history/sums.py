"""What the cache saves: sums of the counters.

Lives here: pure functions. Must not know: where the counters are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from mirror.history.stored_pull import SAVED_OUTCOMES, SERVED_OUTCOMES, PeriodCount

Grouping: TypeAlias = Literal["upstream", "repository", "network"]
"""The field of the counters by which they are summed up."""

_SAVED: Final = frozenset(outcome.value for outcome in SAVED_OUTCOMES)
_SERVED: Final = frozenset(outcome.value for outcome in SERVED_OUTCOMES)


@dataclass(slots=True)
class Saving:
    """The sums of one group. Sizes are in bytes."""

    name: str
    """Name of the group, such as an upstream. Empty: it is not known, or not counted."""
    requests: int = 0
    served: int = 0
    """Requests that were served."""
    hits: int = 0
    """Requests that were served without a fetch of their own."""
    bytes_sent: int = 0
    bytes_fetched: int = 0
    billable: int = 0
    """Manifests that clients got by ``GET``: an upstream would have billed each of them."""
    billed: int = 0
    """Requests to the upstream that it may have billed."""

    @property
    def hit_ratio(self) -> float | None:
        """Part of the served requests that were hits. None: none was served."""
        return self.hits / self.served if self.served else None

    @property
    def bytes_saved(self) -> int:
        """Bytes that were not fetched. Negative: more was fetched than clients have got."""
        return self.bytes_sent - self.bytes_fetched

    @property
    def billable_saved(self) -> int:
        """Billable requests that were not sent."""
        return self.billable - self.billed

    def add(self, count: PeriodCount) -> None:
        """Add the counters of a period."""
        self.requests += count.requests
        self.served += count.requests if count.outcome in _SERVED else 0
        self.hits += count.requests if count.outcome in _SAVED else 0
        self.bytes_sent += count.bytes_sent
        self.bytes_fetched += count.bytes_fetched
        self.billable += count.billable
        self.billed += count.billed

    def to_json(self) -> dict[str, Any]:
        """Return a row of ``savings --json``."""
        ratio = self.hit_ratio
        return {
            "name": self.name,
            "requests": self.requests,
            "hit_ratio": None if ratio is None else round(ratio, 4),
            "bytes_sent": self.bytes_sent,
            "bytes_fetched": self.bytes_fetched,
            "bytes_saved": self.bytes_saved,
            "billable": self.billable,
            "billed": self.billed,
            "billable_saved": self.billable_saved,
        }


def build_savings(
    counts: Collection[PeriodCount], by: Grouping, most: int | None = None
) -> list[Saving]:
    """Sum up counters by a field, those with the most saved bytes first.

    Args:
        counts: The counters.
        by: The field. A repository is named with its upstream.
        most: Names at most. The rest is summed up under an empty name. None: all.
    """
    found = _build_groups(counts, by, None)
    if most is not None and len(found) > most:
        found = _build_groups(counts, by, {group.name for group in found[:most]})
    return found


def _build_groups(
    counts: Iterable[PeriodCount], by: Grouping, names: Collection[str] | None
) -> list[Saving]:
    """Sum up by name. ``names``: those that are not summed up under an empty one. None: all."""
    groups: dict[str, Saving] = {}
    for count in counts:
        name = _name_of(count, by)
        if names is not None and name not in names:
            name = ""
        groups.setdefault(name, Saving(name)).add(count)
    return sorted(groups.values(), key=lambda group: (-group.bytes_saved, group.name))


def _name_of(count: PeriodCount, by: Grouping) -> str:
    if by == "repository":
        return f"{count.upstream}/{count.repository}" if count.repository else ""
    return count.network if by == "network" else count.upstream


def build_total(counts: Iterable[PeriodCount]) -> Saving:
    """Sum up all counters."""
    total = Saving("total")
    for count in counts:
        total.add(count)
    return total
