"""The events of webhooks: what was sent, what was dropped, what waits.

Lives here: what the metrics get to know of notifications. A notification is an event as one target
gets it. Must not know: who observes, how one is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

SendResult: TypeAlias = Literal["delivered", "failed"]
NotificationDropReason: TypeAlias = Literal[
    "full", "rate", "refused", "expired", "gone", "removed", "disk"
]
"""- ``full``: newer ones take its place (``max_queued``, ``max_queued_size``).
- ``rate``: a process had too many pulls in a second, or they came faster than the disk takes them.
- ``refused``: the target has responded with a final status several times.
- ``expired``: the target was not reached for three days.
- ``gone``: the target has responded with 410.
- ``removed``: the configuration does not name the target any more.
- ``disk``: the disk has refused it, or its file was damaged."""


@dataclass(frozen=True, slots=True)
class NotificationSent:
    """A request to a target has ended."""

    target: str
    result: SendResult


@dataclass(frozen=True, slots=True)
class NotificationsDropped:
    """``count`` notifications will never be sent."""

    target: str
    reason: NotificationDropReason
    count: int


@dataclass(frozen=True, slots=True)
class NotificationQueueMeasured:
    """The current number of notifications that wait for a target, in all processes."""

    target: str
    count: int
    oldest_age: float
    """Seconds since the event of the oldest one. 0: none waits."""
