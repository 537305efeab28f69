"""Record the history of one process: the observer on the event loop.

Lives here: which events count, and when a batch is handed to the writer. Must not know: the
database.

A request costs an append to a list here. The list is summed up when it is long, and once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from mirror.history.batch import Batch
from mirror.history.bounds import Bounds
from mirror.history.writer import HistoryWriter
from mirror.observability.events import (
    CURRENT_RECORD,
    BytesFetched,
    ContentUsed,
    Event,
    ExchangeEnded,
    HistoryRowsDropped,
    Observer,
    OwnRequestEnded,
    RequestEnded,
    RequestRecord,
    TagMoved,
)
from mirror.store.layout import Layout
from mirror.threads import CallLater, on_running_loop

_BATCH_S: Final = 1.0
"""Seconds of a batch: so much is lost in a crash, and a reader sees a request so late."""
_MAX_ENDED: Final = 100
"""Requests that are summed up at once, while they are in the cache of the processor. It takes 30 us
of the event loop."""


class HistoryRecorder:
    """The observer that records. All methods run on the event loop."""

    def __init__(
        self,
        layout: Layout,
        bounds: Bounds,
        emit: Observer,
        call_later: CallLater,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread of the writer. It writes nothing until there is something to write.

        Args:
            layout: The data directory.
            bounds: The bounds of the history.
            emit: Receives warnings, and the number of lost rows, on the event loop.
            call_later: Schedules the next batch.
            now: Returns the Unix time in seconds.
        """
        self._step_bytes = bounds.step_bytes
        self._emit = emit
        self._call_later = call_later
        self._now = now
        self._ended: list[RequestRecord] = []
        self._batch = Batch(now(), bounds.step_bytes)
        self._is_scheduled = False
        self._writer = HistoryWriter(layout, bounds, on_running_loop(emit), now)

    def observe(self, event: Event) -> None:
        """Record ``event``, if it is one that counts."""
        # By the exact type, most frequent first: each request sends several events.
        kind = type(event)
        if kind is RequestEnded:
            ended = self._ended
            ended.append(event.pull)  # type: ignore[union-attr] # its type is known
            if len(ended) >= _MAX_ENDED:
                self._sum_up()
        elif kind is BytesFetched:
            self._batch.add_fetched(CURRENT_RECORD.get(), event.upstream, event.count, 0)  # type: ignore[union-attr] # its type is known
        elif kind in _OTHERS:
            self._observe_other(event)
        else:
            return
        if not self._is_scheduled:
            self._is_scheduled = True
            self._call_later(_BATCH_S, self._on_time)

    def _observe_other(self, event: Event) -> None:
        match event:
            case ExchangeEnded(upstream=upstream, is_billed=True):
                self._batch.add_fetched(CURRENT_RECORD.get(), upstream, 0, 1)
            case OwnRequestEnded(pull):
                self._batch.add_own_request(pull)
            case ContentUsed(digests):
                self._sum_up()  # For the order of the accesses.
                self._batch.add_use(digests, time.monotonic())
            case TagMoved(variant=""):
                self._batch.moves.append(event)

    def _sum_up(self) -> None:
        ended, self._ended = self._ended, []
        self._batch.add_requests(ended)

    def _on_time(self) -> None:
        self._is_scheduled = False
        self.hand_over()

    def hand_over(self) -> None:
        """Give what was observed until now to the writer."""
        self._sum_up()
        batch, self._batch = self._batch, Batch(self._now(), self._step_bytes)
        batch.end(self._now())
        if not batch.weight:
            return
        dropped = batch.dropped + (0 if self._writer.put(batch) else batch.weight)
        if dropped:
            self._emit(HistoryRowsDropped(dropped))

    def close(self, timeout: float) -> None:
        """Hand over the rest, and wait at most ``timeout`` seconds until it is written."""
        self.hand_over()
        self._writer.close(timeout)


_OTHERS: Final = frozenset({ExchangeEnded, OwnRequestEnded, ContentUsed, TagMoved})
