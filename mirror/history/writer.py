"""Writes batches of the history, and keeps the file within its bounds.

Lives here: when old rows are removed. Must not know: the tables (``tables.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from mirror.history import tables
from mirror.history.batch import Batch
from mirror.history.bounds import Bounds
from mirror.history.content_sizes import ContentSizes
from mirror.history.history_file import HISTORY_FORM
from mirror.observability.events import HistoryRowsDropped, Observer
from mirror.store.batch_writer import BatchWriter
from mirror.store.layout import Layout
from mirror.store.shared_database import SharedDatabase

_UPKEEP_S: Final = 600.0
"""Seconds between two removals of old rows."""
_TRIM_SHARE: Final = 0.25
"""Part of the requests that the history may have. After so many further entries, rows of requests
are removed earlier: each entry is a row at most."""
_LOG_SHARE: Final = 8
"""The log has an eighth of the bytes of the file at most. Then its content goes into the file."""
_STEADY_S: Final = 3600.0
"""Seconds for which the clock must have run steadily before rows are removed by their age. So a
clock that is set ahead for a while removes nothing."""
_MAX_JUMP_S: Final = 60.0
"""Seconds by which the clock may differ from the monotonic one in that time: it is adjusted."""


class HistoryWriter:
    """Writes batches in a thread of its own."""

    def __init__(
        self,
        layout: Layout,
        bounds: Bounds,
        emit_from_thread: Observer,
        now: Callable[[], float],
    ) -> None:
        """Start the thread.

        Args:
            layout: The data directory. It has the sizes of contents, too.
            bounds: The bounds of the history.
            emit_from_thread: Receives warnings, and the number of lost rows.
            now: Returns the Unix time in seconds.
        """
        self._database = SharedDatabase(
            layout.history, HISTORY_FORM, bounds.max_bytes // _LOG_SHARE
        )
        self._sizes = ContentSizes(layout)
        self._bounds = bounds
        self._emit = emit_from_thread
        self._now = now
        self._upkeep_at = time.monotonic() + _UPKEEP_S
        self._written = 0
        """Entries that were written since rows of requests were removed last."""
        self._steady_since = time.monotonic(), now()
        self._writer = BatchWriter(
            "history", self._database, self._write, self._on_dropped, emit_from_thread
        )
        self.put = self._writer.put
        self.close = self._writer.close

    @property
    def is_idle(self) -> bool:
        """Whether all batches are written, or dropped."""
        return self._writer.is_idle

    # --- in the thread --------------------------------------------------------------------------

    def _write(self, batches: Sequence[Batch]) -> None:
        with self._database.transaction() as connection:
            for batch in batches:
                tables.insert(connection, batch, self._sizes, self._bounds)
                self._written += batch.weight
        if time.monotonic() >= self._upkeep_at:
            self._written, self._upkeep_at = 0, time.monotonic() + _UPKEEP_S
            is_steady = self._has_steady_clock()
            with self._database.transaction() as connection:
                tables.trim(connection, self._now(), self._bounds, has_steady_clock=is_steady)
        elif self._written > self._bounds.pulls * _TRIM_SHARE:
            self._written = 0
            with self._database.transaction() as connection:
                tables.trim_requests(connection, self._bounds)

    def _has_steady_clock(self) -> bool:
        begun, then = self._steady_since
        elapsed = time.monotonic() - begun
        if abs(self._now() - then - elapsed) > _MAX_JUMP_S:
            self._steady_since = time.monotonic(), self._now()
            return False
        return elapsed >= _STEADY_S

    def _on_dropped(self, batches: Sequence[Batch]) -> None:
        self._emit(HistoryRowsDropped(sum(batch.weight for batch in batches)))
