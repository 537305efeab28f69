"""The metrics of hosted repositories.

Lives here: their names and help texts, and the counting of their events. Must not know: the library
(``metrics.py`` has it), who reports the events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_args

from mirror.observability.hosted_events import ChangeAction, HostedChange, HostedMeasured

_GAUGES: Final = {
    "repositories": ("hosted_repositories", "Hosted repositories."),
    "contents": ("hosted_contents", "Contents of hosted repositories."),
    "bytes": ("hosted_bytes", "Bytes of the contents of hosted repositories."),
    "metadata": (
        "hosted_metadata_bytes",
        "Bytes of hosted.max_size that metadata takes: tags, and the rows of content.",
    ),
    "quota": (
        "hosted_quota_bytes",
        "The quota of hosted repositories in bytes: hosted.max_size.",
    ),
    "uploads": ("uploads", "Uploads in progress to hosted repositories."),
    "reserved": ("upload_reserved_bytes", "Bytes of hosted.max_size that uploads have reserved."),
}
"""Field of :class:`HostedMeasured` -> the name of its metric, and the help text."""


class HostedMetrics:
    """Counts the events of hosted repositories."""

    def __init__(
        self, counter: Callable[[str, str, str], Any], gauge: Callable[[str, str], Any]
    ) -> None:
        """Create the metrics. ``counter`` and ``gauge`` make one of a name and a help text."""
        self._gauges = {field: gauge(name, text) for field, (name, text) in _GAUGES.items()}
        self._changes = counter(
            "hosted_changes",
            "Changes of hosted repositories: manifests and tags that were pushed, blobs that were "
            "mounted, and deletions.",
            "action",
        )
        for action in get_args(ChangeAction):
            self._changes.labels(action)

    def observe(self, event: HostedChange | HostedMeasured) -> None:
        """Count ``event``."""
        if isinstance(event, HostedChange):
            self._changes.labels(event.action).inc()
            return
        for field, gauge in self._gauges.items():
            gauge.set(getattr(event, field))
