"""Values of metric labels that come from outside, so that they are few.

Lives here: pure functions. Must not know: metrics.
"""

from __future__ import annotations


def bounded_label(value: str, known: tuple[str, ...]) -> str:
    """Return ``value`` as a label; ``other`` if it is not one of ``known``."""
    return value if value in known else "other"


def status_label(status: int) -> str:
    """Return the label of an HTTP status: its class, but 429 as it is. ``none``: no response."""
    if status in (0, 429):
        return str(status) if status else "none"
    return f"{status // 100}xx" if 200 <= status < 600 else "other"
