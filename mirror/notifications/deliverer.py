"""Deliver the notifications of the queue: in one process, one at a time for each target.

Lives here: which process delivers, pauses after failures, and when a notification is given up. Must
not know: what is in a notification, the form of a request.

A target that fails, hangs or is slow has a task of its own, so it holds up no other one. Its
notifications stay in their order: nothing is sent to it before the oldest one is accepted, or given
up.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from sqlite3 import Connection
from typing import Final, TypeVar

from mirror.notifications import queue
from mirror.notifications.notification_recorder import report_dropped
from mirror.notifications.queue import QUEUE_FORM, Notification, TargetState
from mirror.notifications.sender import DeliveryResult, SendOutcome, WebhookSender
from mirror.observability.events import (
    LogMessage,
    NotificationQueueMeasured,
    NotificationSent,
    Observer,
)
from mirror.oci.errors import MAX_RETRY_AFTER_S, ConfigError, StorageUnavailable
from mirror.single_flight import SharedTask, SingleFlight
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.shared_database import SharedDatabase, is_file_damaged
from mirror.threads import HangingCalls

T = TypeVar("T")

_MAX_TARGET_PAUSE_S: Final = 300.0
"""Seconds between two requests to a target that fails, at most."""
_MAX_REFUSALS: Final = 10
"""Refusals of one notification after which it is given up. The pauses between them are a quarter of
an hour together: time to mend a receiver."""
_MAX_NOTIFICATION_AGE_S: Final = 3 * 86400.0
"""Seconds after which a notification is given up whose target fails: it outlasts a weekend."""
_FORGET_TARGET_S: Final = 60.0
"""Seconds for which the queue of an unknown target is kept: other processes may have read a new
configuration a moment earlier."""
_CLOSE_TIMEOUT_S: Final = 1.0
"""Seconds that the last use of the disk may take at a stop."""
_MAX_CALLS: Final = 64
"""Calls of the disk at the same time: one for each target, and as many as may hang."""


class Deliverer:
    """Sends notifications while this process has the lock. Its public methods run on the loop."""

    def __init__(
        self,
        layout: Layout,
        emit: Observer,
        now: Callable[[], float],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Start without targets.

        Args:
            layout: The data directory.
            emit: Receives the outcome of each request, the length of the queues, and messages.
            now: Returns the Unix time in seconds.
            jitter: Returns a random number in [0, 1).
        """
        self._directory = layout.notifications
        self._emit = emit
        self._now = now
        self._jitter = jitter
        self._database = SharedDatabase(layout.notifications, QUEUE_FORM)
        self._database_lock = threading.Lock()
        self._calls = HangingCalls("notifications", _MAX_CALLS)
        self._call_number = 0
        self._lock_fd: int | None = None
        self._single_flight: SingleFlight | None = None
        self._senders: Mapping[str, WebhookSender] = {}
        self._tasks: dict[str, SharedTask[None]] = {}
        self._gone: set[str] = set()
        """Targets that have responded with 410 since the configuration was read."""
        self._resume_at: dict[str, float] = {}
        """Name of a target -> seconds since the epoch of its next request. A full disk may refuse
        to keep this time."""
        self._unknown_since: dict[str, float] = {}
        self._accepted: dict[str, list[Notification]] = {}
        """Notifications that were accepted, but could not be removed from the queue."""
        self._is_closed = False
        self._has_failed = False
        """Whether the last use of the queue has failed."""

    def configure(self, senders: Mapping[str, WebhookSender]) -> None:
        """Send to these targets from now on, also to those that were gone."""
        self._senders = senders
        self._gone.clear()

    def start(self, single_flight: SingleFlight) -> None:
        """Deliver from now on, in tasks of ``single_flight``."""
        self._single_flight = single_flight

    def wake(self) -> None:
        """Look soon whether there is something to send."""
        if self._single_flight is not None and not self._single_flight.is_draining:
            self._single_flight.run(("notifications-wake",), self.poll)

    async def close(self) -> None:
        """End all requests, and close the files. What was not accepted stays in the queue."""
        self._single_flight = None
        for task in self._tasks.values():
            task.cancel()
        with suppress(StorageUnavailable, TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._in_thread(self._close_files)

    # --- what is to be sent ---------------------------------------------------------------------

    async def poll(self) -> None:
        """Send what is due, if this process delivers. Starts tasks, and does not wait for them.

        Called once a second, and after notifications were queued.
        """
        if self._single_flight is None or not self._senders:
            return
        try:
            states = await self._in_thread(self._read_states)
        except StorageUnavailable as error:
            self._on_storage_failure(error)
            return
        self._has_failed = False
        if states is None:
            return
        self._measure(states)
        await self._forget_unknown(states)
        for state in states:
            sender = self._senders.get(state.target)
            if sender is not None and state.count and self._is_due(state):
                self._start(sender)

    def _start(self, sender: WebhookSender) -> None:
        name = sender.target.name
        if self._single_flight is None or self._single_flight.is_draining:
            return
        work = partial(self._deliver, sender)
        self._tasks[name] = self._single_flight.run(("deliver", name), work)

    def _is_due(self, state: TargetState) -> bool:
        resume_at = max(state.resume_at, self._resume_at.get(state.target, 0.0))
        # A time that is farther away than any pause was set by a clock that was wrong.
        return not 0 < resume_at - self._now() <= MAX_RETRY_AFTER_S

    def _measure(self, states: Iterable[TargetState]) -> None:
        by_name = {state.target: state for state in states}
        for name in self._senders:
            state = by_name.get(name)
            count, oldest_at = (state.count, state.oldest_at) if state is not None else (0, None)
            age = 0.0 if oldest_at is None else max(0.0, self._now() - oldest_at)
            self._emit(NotificationQueueMeasured(name, count, age))

    async def _forget_unknown(self, states: Iterable[TargetState]) -> None:
        """Remove the queues of targets that the configuration does not name any more."""
        unknown = {state.target for state in states} - set(self._senders)
        now = self._now()
        self._unknown_since = {name: self._unknown_since.get(name, now) for name in unknown}
        for name, since in self._unknown_since.items():
            if not 0 <= now - since < _FORGET_TARGET_S:
                count = await self._change(partial(queue.remove_target, target=name))
                report_dropped(self._emit, name, "removed", count or 0)

    def _on_storage_failure(self, error: StorageUnavailable) -> None:
        if not self._has_failed:
            self._has_failed = True
            message = "notifications are not sent: their queue cannot be used"
            self._emit(LogMessage("warning", message, (("why", error.message),)))

    # --- one target -----------------------------------------------------------------------------

    async def _deliver(self, sender: WebhookSender) -> None:
        """Send the notifications of one target, until none is left or one is not accepted."""
        name = sender.target.name
        try:
            while self._senders.get(name) is sender:
                await self._remove_accepted(name)
                await self._refresh_secrets(sender)
                failures, notifications = await self._in_transaction(
                    partial(queue.read_next, target=name)
                )
                if not notifications:
                    return
                for notification in notifications:
                    if name in self._gone:
                        outcome = SendOutcome(DeliveryResult.GONE, why="")
                    else:
                        outcome = await sender.send(notification, self._now())
                    await self._record_outcome(name, notification, outcome, failures)
                    if outcome.result is DeliveryResult.GONE or self._now() < self._resume_at.get(
                        name, 0.0
                    ):
                        return
                    if outcome.result is DeliveryResult.ACCEPTED:
                        failures = 0
        except StorageUnavailable as error:
            self._on_storage_failure(error)

    async def _record_outcome(
        self, name: str, notification: Notification, outcome: SendOutcome, failures: int
    ) -> None:
        """Record the outcome of a request. After a failure, the target is left alone for a while.

        ``failures``: those of the target in a row before it.
        """
        match outcome.result:
            case DeliveryResult.ACCEPTED:
                self._emit(NotificationSent(name, "delivered"))
                self._accepted.setdefault(name, []).append(notification)
                if failures:
                    message = "notifications are delivered again"
                    self._emit(LogMessage("info", message, (("target", name),)))
                self._resume_at.pop(name, None)
                await self._remove_accepted(name)
                return
            case DeliveryResult.GONE:
                await self._stop(name, outcome)
                return
            case DeliveryResult.REFUSED if notification.refusals + 1 >= _MAX_REFUSALS:
                self._emit(NotificationSent(name, "failed"))
                await self._in_transaction(
                    partial(queue.remove_notifications, notifications=[notification])
                )
                report_dropped(self._emit, name, "refused", 1)
                return
        self._emit(NotificationSent(name, "failed"))
        if not failures:
            fields = (("target", name), ("why", outcome.why))
            self._emit(LogMessage("warning", "notifications are not delivered", fields))
        pause = max(outcome.retry_after, backoff(failures, self._jitter()))
        self._resume_at[name] = self._now() + pause
        expired = await self._in_transaction(
            partial(self._note_failure, name, notification, outcome.result)
        )
        report_dropped(self._emit, name, "expired", expired)

    async def _remove_accepted(self, name: str) -> None:
        """Remove what a target has accepted. After a failure, nothing is sent until it succeeds."""
        accepted = self._accepted.get(name)
        if accepted:
            await self._in_transaction(
                partial(queue.remove_accepted, target=name, notifications=tuple(accepted))
            )
            accepted.clear()

    async def _refresh_secrets(self, sender: WebhookSender) -> None:
        try:
            await self._in_thread(sender.secrets.refresh)
        except ConfigError as error:
            why = (("why", str(error)),)
            message = "secrets were not read again: the previous ones stay in use"
            self._emit(LogMessage("warning", message, why))

    async def _stop(self, name: str, outcome: SendOutcome) -> None:
        """Send nothing more to a target until the configuration is read again."""
        if name not in self._gone:
            self._gone.add(name)
            self._emit(NotificationSent(name, "failed"))
            message = "the target of events is gone: nothing is sent until the next SIGHUP or start"
            fields = (("target", name), ("why", outcome.why))
            self._emit(LogMessage("error", message, fields))
        count = await self._in_transaction(partial(queue.remove_target, target=name))
        report_dropped(self._emit, name, "gone", count)

    # --- the queue ------------------------------------------------------------------------------

    async def _change(self, change: Callable[[Connection], T]) -> T | None:
        """Change the queue. A failure is logged, and returned as None."""
        try:
            return await self._in_transaction(change)
        except StorageUnavailable as error:
            self._on_storage_failure(error)
            return None

    async def _in_transaction(self, work: Callable[[Connection], T]) -> T:
        """Return ``work(connection)``, called in a thread. Raises ``StorageUnavailable``."""
        return await self._in_thread(self._transact, work)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Return the result of ``work``, called in a thread. Raises ``StorageUnavailable``."""
        self._call_number += 1  # A key of its own: no call may join another one.
        try:
            return await self._calls.run(self._call_number, partial(work, *arguments))
        except (sqlite3.Error, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise StorageUnavailable(f"{self._directory}: {why}") from error

    # --- in threads -----------------------------------------------------------------------------

    def _close_files(self) -> None:
        with self._database_lock:
            self._is_closed = True
            self._database.close()
            if self._lock_fd is not None:
                os.close(self._lock_fd)

    def _transact(self, work: Callable[[Connection], T]) -> T:
        with self._database_lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the deliveries have ended")
            try:
                with self._database.transaction() as connection:
                    return work(connection)
            except sqlite3.Error as error:
                if is_file_damaged(error):
                    self._database.move_aside()
                raise

    def _read_states(self) -> list[TargetState] | None:
        """Return the states of all targets. None: another process delivers."""
        with self._database_lock:
            if self._lock_fd is None and not self._is_closed:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._lock_fd = disk.lock_file(self._directory / "deliver.lock")
        return self._transact(queue.read_states) if self._lock_fd is not None else None

    def _note_failure(
        self,
        name: str,
        notification: Notification,
        result: DeliveryResult,
        connection: Connection,
    ) -> int:
        """Note a failed request. Returns the number of notifications that are given up."""
        if result is DeliveryResult.REFUSED:
            queue.note_refusal(connection, notification.number)
        queue.note_failure(connection, name, self._resume_at[name])
        return queue.remove_older(connection, name, self._now() - _MAX_NOTIFICATION_AGE_S)


def backoff(failures: int, jitter: float) -> float:
    """Return the seconds until the next request to a target that fails.

    Args:
        failures: Failed requests in a row before the last one.
        jitter: A random number in [0, 1). Several mirrors may send to one target.
    """
    return float(min(_MAX_TARGET_PAUSE_S, 2.0 ** min(failures, 16)) * (0.5 + jitter / 2))
