"""The events of scheduled jobs.

Lives here: what the log and the metrics get to know of a run. Must not know: who observes, how a
job works.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefetchEnded:
    """A run of an entry of prefetch has ended. ``bytes``: how many were fetched."""

    complete: int
    """Images that are complete on disk."""
    failed: int
    bytes: int
    is_ok: bool
    """Whether all images of the entry were found, and are complete."""


@dataclass(frozen=True, slots=True)
class RetentionEnded:
    """A run of the retention rules has removed ``images``, and freed ``bytes``."""

    images: int
    bytes: int
    is_ok: bool
    """Whether it came to its end."""
