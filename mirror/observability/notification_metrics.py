"""The metrics of notifications.

Lives here: their series. The label ``target`` has the names of the configuration. Must not know:
who reports the events.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from mirror.observability.events import (
    NotificationQueueMeasured,
    NotificationsDropped,
    NotificationSent,
)


class NotificationMetrics:
    """Counts what became of notifications."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Create the metrics. They have no series until there is an event of a target."""
        self._sent = Counter(
            "oci_mirror_notifications_sent",
            "Requests to targets of events, by their result.",
            ("target", "result"),
            registry=registry,
        )
        self._dropped = Counter(
            "oci_mirror_notifications_dropped",
            "Notifications that were not delivered, and never will be.",
            ("target", "reason"),
            registry=registry,
        )
        self._queued = Gauge(
            "oci_mirror_notifications_queued",
            "Notifications that wait for their delivery, in all processes.",
            ("target",),
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._oldest = Gauge(
            "oci_mirror_notifications_oldest_seconds",
            "Age, in seconds, of the oldest notification that waits.",
            ("target",),
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def count(self, event: NotificationSent | NotificationsDropped) -> None:
        """Count notifications that were sent or dropped."""
        match event:
            case NotificationSent(target, result):
                self._sent.labels(target, result).inc()
            case NotificationsDropped(target, reason, count):
                self._dropped.labels(target, reason).inc(count)

    def measure(self, event: NotificationQueueMeasured) -> None:
        """Keep the length of a queue. The first time, create the counters of its target with 0."""
        self._queued.labels(event.target).set(event.count)
        self._oldest.labels(event.target).set(event.oldest_age)
        for result in ("delivered", "failed"):
            self._sent.labels(event.target, result)
