"""Put events into the queue: the observer on the event loop, and the thread that writes.

Lives here: which events count, and for which targets. Must not know: how they are sent.

A request costs a look at its record here, and a pull of an image an append to a list. A batch is
given to the thread once a second, and at once after a change of a hosted repository.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

from mirror.config.settings import EventTarget
from mirror.notifications import queue
from mirror.notifications.cloud_event import CloudEvent, is_wanted
from mirror.notifications.queue import QUEUE_FORM, NewNotification
from mirror.observability.events import (
    Event,
    HostedChange,
    Kind,
    LogMessage,
    NotificationsDropped,
    Observer,
    RequestEnded,
    RequestRecord,
)
from mirror.observability.notification_events import NotificationDropReason
from mirror.store.batch_writer import BatchWriter
from mirror.store.layout import Layout
from mirror.store.shared_database import SharedDatabase
from mirror.threads import CallLater, on_running_loop

_BATCH_S: Final = 1.0
"""Seconds of a batch of pulls: so much of them is lost in a crash."""
_MAX_BATCHED_PULLS: Final = 500
"""Pulls of a batch, which are 10 ms of the thread for each target. Further ones are dropped."""
_CACHED_NAMES: Final = 4096
"""Repositories whose targets are remembered: those that are pulled again and again."""


@dataclass(slots=True)
class _EventBatch:
    """Events, each with the names of its targets."""

    entries: list[tuple[CloudEvent, tuple[str, ...]]]

    @property
    def weight(self) -> int:
        """Number of notifications."""
        return sum(len(targets) for _, targets in self.entries)

    def counts(self) -> Counter[str]:
        """Return the number of notifications of each target."""
        return Counter(target for _, targets in self.entries for target in targets)


class NotificationRecorder:
    """The observer that queues notifications. All public methods run on the event loop."""

    def __init__(
        self,
        layout: Layout,
        emit: Observer,
        call_later: CallLater,
        now: Callable[[], float],
        on_queued: Callable[[], None],
    ) -> None:
        """Start without targets.

        Args:
            layout: The data directory.
            emit: Receives warnings, and the number of lost notifications, on the event loop.
            call_later: Schedules the next batch of pulls.
            now: Returns the Unix time in seconds.
            on_queued: Called on the event loop once notifications are in the queue.
        """
        self._emit = emit
        self._emit_from_thread = on_running_loop(emit)
        self._call_later = call_later
        self._now = now
        self._on_queued = on_running_loop(lambda _: on_queued())
        self._host = socket.gethostname()
        self._database = SharedDatabase(layout.notifications, QUEUE_FORM)
        self._writer: BatchWriter[_EventBatch] | None = None
        """None until there is something to write."""
        self._targets: dict[str, EventTarget] = {}
        self._find_targets: Callable[[str, str, str], tuple[str, ...]] = lambda *_: ()
        self._entries: list[tuple[CloudEvent, tuple[str, ...]]] = []
        self._pulls = 0
        """Pulls since the last call of :meth:`_on_time`."""
        self._is_scheduled = False

    def configure(self, targets: Sequence[EventTarget]) -> None:
        """Queue events for these targets from now on."""
        self._targets = {target.name: target for target in targets}
        self._find_targets = lru_cache(_CACHED_NAMES)(partial(_find_targets, tuple(targets)))

    def observe(self, event: Event) -> None:
        """Queue ``event`` for each target that wants it."""
        if not self._targets:
            return
        if type(event) is RequestEnded:
            pull = event.pull
            if pull.kind is Kind.MANIFEST and pull.method == "GET" and pull.status == 200:
                self._on_pull(pull)
        elif type(event) is HostedChange and event.action != "mount":
            repository = event.repository
            targets = self._find_targets(event.action, repository.upstream, repository.path)
            if targets:
                self._entries.append((CloudEvent.of_change(event), targets))
                self._hand_over()

    def _on_pull(self, pull: RequestRecord) -> None:
        targets = self._find_targets("pull", pull.upstream, pull.repository)
        if not targets or not pull.is_complete:
            return
        self._pulls += 1
        if self._pulls > _MAX_BATCHED_PULLS:
            for target in targets:
                self._emit(NotificationsDropped(target, "rate", 1))
            return
        self._entries.append((CloudEvent.of_pull(pull, self._now()), targets))
        if not self._is_scheduled:
            self._is_scheduled = True
            self._call_later(_BATCH_S, self._on_time)

    def _on_time(self) -> None:
        self._is_scheduled = False
        self._pulls = 0
        self._hand_over()

    def _hand_over(self) -> None:
        """Give what was observed until now to the thread."""
        if not self._entries:
            return
        batch, self._entries = _EventBatch(self._entries), []
        if self._writer is None:
            self._writer = BatchWriter(
                "queue of notifications",
                self._database,
                self._write,
                self._on_refused,
                self._emit_from_thread,
            )
        if not self._writer.put(batch):
            for target, count in batch.counts().items():
                report_dropped(self._emit, target, "rate", count)

    def close(self, timeout: float) -> None:
        """Hand over the rest, and wait at most ``timeout`` seconds until it is written."""
        self._hand_over()
        if self._writer is not None:
            self._writer.close(timeout)

    # --- in the thread --------------------------------------------------------------------------

    def _write(self, batches: Sequence[_EventBatch]) -> None:
        rows = [
            row
            for batch in batches
            for event, names in batch.entries
            for row in self._rows(event, names)
        ]
        targets = self._targets
        names = {row.target for row in rows}
        with self._database.transaction() as connection:
            dropped = queue.add(connection, rows, [targets[n] for n in names if n in targets])
        for name, count in dropped.items():
            report_dropped(self._emit_from_thread, name, "full", count)
        self._on_queued(None)

    def _rows(self, event: CloudEvent, names: tuple[str, ...]) -> list[NewNotification]:
        body = event.to_json(self._host)
        is_pull = event.kind == "pull"
        return [NewNotification(name, event.id, is_pull, event.at, body) for name in names]

    def _on_refused(self, batches: Sequence[_EventBatch]) -> None:
        for target, count in sum((batch.counts() for batch in batches), Counter()).items():
            report_dropped(self._emit_from_thread, target, "disk", count)


def _find_targets(
    targets: tuple[EventTarget, ...], kind: str, registry: str, path: str
) -> tuple[str, ...]:
    """Return the names of the targets that get events of a kind of a repository."""
    name = f"{registry}/{path}"
    return tuple(target.name for target in targets if is_wanted(target, kind, name))


def report_dropped(emit: Observer, target: str, reason: NotificationDropReason, count: int) -> None:
    """Count notifications that will never be sent, and log them."""
    if count:
        emit(NotificationsDropped(target, reason, count))
        fields = (("target", target), ("reason", reason), ("count", count))
        emit(LogMessage("warning", "notifications were dropped", fields))
