"""``savings``: show what the cache saves, and what another disk size would change.

Lives here: the arguments and the columns. Must not know: how the numbers come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    pass

_PERIODS: Final = {
    "hour": 3600.0,
    "day": 86400.0,
    "week": 7 * 86400.0,
    "1h": 3600.0,
    "1d": 86400.0,
    "7d": 7 * 86400.0,
    "30d": 30 * 86400.0,
}
"""``--last`` -> seconds. The counters are kept for 30 days."""
_DISK_ONLY: Final = ("max_size", "recorded_hit_ratio", "is_reliable")
"""Fields of the rows of predictions."""
