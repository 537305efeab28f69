"""The notifications of one process: the observer, and the deliveries.

Lives here: how the two are put together, and what a changed configuration does. Must not know: how
they work.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from mirror.config.settings import Settings
from mirror.notifications.deliverer import Deliverer
from mirror.notifications.notification_recorder import NotificationRecorder
from mirror.notifications.sender import WebhookSender
from mirror.observability.events import Event, Observer
from mirror.single_flight import SingleFlight
from mirror.store.layout import Layout
from mirror.threads import CallLater
from mirror.upstream.registries import listener_addresses

POLL_INTERVAL_S: Final = 1.0
"""Seconds between two looks at the queue: events of other processes are sent so late."""


class NotificationService:
    """Tells targets of events. All methods run on the event loop."""

    def __init__(
        self,
        layout: Layout,
        emit: Observer,
        call_later: CallLater,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Start without targets.

        Args:
            layout: The data directory.
            emit: Receives the events of deliveries, and messages.
            call_later: Calls a function after some seconds.
            now: Returns the Unix time in seconds.
        """
        self._senders: dict[str, WebhookSender] = {}
        self._opened: list[WebhookSender] = []
        """All senders, to close them. A request may still use one that was replaced."""
        self._deliverer = Deliverer(layout, emit, now)
        self._recorder = NotificationRecorder(layout, emit, call_later, now, self._deliverer.wake)
        self.observe: Callable[[Event], None] = self._recorder.observe
        """Queues an event, if a target wants it."""
        self.poll = self._deliverer.poll

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return a function that uses the targets of ``settings``, and cannot fail.

        Raises ``ConfigError`` or ``OSError`` if a file that a target names cannot be used.
        """
        own = listener_addresses(settings)
        senders = {}
        for target in settings.events:
            sender = self._senders.get(target.name)
            if sender is None or sender.target != target:
                sender = WebhookSender(target, own)
                self._opened.append(sender)
            senders[target.name] = sender

        def use_targets() -> None:
            self._senders = senders
            self._deliverer.configure(senders)
            self._recorder.configure(settings.events)

        return use_targets

    @asynccontextmanager
    async def delivering(self, single_flight: SingleFlight) -> AsyncIterator[None]:
        """Deliver while the context is open, in tasks of ``single_flight``."""
        self._deliverer.start(single_flight)
        try:
            yield
        finally:
            await self._deliverer.close()
            for sender in self._opened:
                await sender.close()

    def close(self, timeout: float) -> None:
        """Queue the rest, and wait at most ``timeout`` seconds until it is written."""
        self._recorder.close(timeout)
