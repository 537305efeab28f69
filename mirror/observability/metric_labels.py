"""Values of metric labels that come from outside, so that they are few.

Lives here: pure functions and tables. Must not know: metrics.
"""

from __future__ import annotations

from typing import Final

STATUS_LABELS: Final = {
    0: "none",
    **{status: f"{status // 100}xx" for status in range(200, 600)},
    429: "429",
}
"""HTTP status -> its label: its class, but 429 as it is. 0: no response. Others are ``other``."""


def bounded_label(value: str, known: tuple[str, ...]) -> str:
    """Return ``value`` as a label; ``other`` if it is not one of ``known``."""
    return value if value in known else "other"
