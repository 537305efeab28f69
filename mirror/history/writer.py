"""The thread that writes batches of the history.

Lives here: the bounded queue, what happens if the disk refuses or the file is damaged, and the
upkeep. Must not know: the tables (``tables.py``).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from mirror.history import tables
from mirror.history.batch import Batch
from mirror.history.bounds import Bounds
from mirror.history.content_sizes import ContentSizes
from mirror.history.history_file import HistoryFile, is_file_damaged
from mirror.observability.events import HistoryRowsDropped, LogMessage, Observer
from mirror.oci.errors import error_text
from mirror.store.layout import Layout

_MAX_QUEUED: Final = 50_000
"""Entries that wait for the thread: some seconds of a busy server. Further ones are dropped."""
_RETRY_S: Final = 30.0
"""Seconds after which a disk that has refused a batch is tried again. Until then, all is dropped,
so that a full disk gets no further load."""
_UPKEEP_S: Final = 600.0
"""Seconds between two removals of old rows."""
_TRIM_SHARE: Final = 0.25
"""Part of the requests that the history may have. After so many further entries, rows of requests
are removed earlier: each entry is a row at most."""
_STEADY_S: Final = 3600.0
"""Seconds for which the clock must have run steadily before rows are removed by their age. So a
clock that is set ahead for a while removes nothing."""
_MAX_JUMP_S: Final = 60.0
"""Seconds by which the clock may differ from the monotonic one in that time: it is adjusted."""


class HistoryWriter:
    """Writes batches in a daemon thread: a disk that hangs delays nothing, not even the end."""

    def __init__(
        self,
        file: HistoryFile,
        layout: Layout,
        bounds: Bounds,
        emit_from_thread: Observer,
        now: Callable[[], float],
    ) -> None:
        """Start the thread.

        Args:
            file: Where batches are written.
            layout: The data directory, which has the sizes of contents.
            bounds: The bounds of the history.
            emit_from_thread: Receives warnings, and the number of lost rows.
            now: Returns the Unix time in seconds.
        """
        self._file = file
        self._sizes = ContentSizes(layout)
        self._bounds = bounds
        self._emit = emit_from_thread
        self._now = now
        self._lock = threading.Lock()
        self._queue: list[Batch] = []
        self._queued = 0
        self._has_work = threading.Event()
        self._is_closing = False
        self._is_refused = False
        self._resume_at = 0.0
        self._upkeep_at = time.monotonic() + _UPKEEP_S
        self._written = 0
        """Entries that were written since rows of requests were removed last."""
        self._steady_since = time.monotonic(), now()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> bool:
        """Queue a batch. Returns False if it was dropped: the queue is full."""
        weight = batch.weight
        with self._lock:
            if self._queued + weight > _MAX_QUEUED:
                return False
            self._queue.append(batch)
            self._queued += weight
        self._has_work.set()
        return True

    def close(self, timeout: float) -> None:
        """Wait until the queued batches are written, but at most ``timeout`` seconds."""
        self._is_closing = True
        self._has_work.set()
        self._thread.join(timeout)

    # --- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._has_work.wait()
            with self._lock:
                self._has_work.clear()
                batches, self._queue = self._queue, []
            try:
                self._write(batches)
            except Exception as error:  # Of any kind: the next batches need the thread.
                self._on_refusal(batches, error_text(error))
            with self._lock:
                self._queued -= sum(batch.weight for batch in batches)
                has_ended = self._is_closing and not self._queue
            if has_ended:
                self._file.close()
                return

    def _write(self, batches: list[Batch]) -> None:
        if not batches:
            return
        if time.monotonic() < self._resume_at:
            self._drop(batches)
            return
        try:
            self._write_once(batches)
        except (sqlite3.Error, OSError) as error:
            if not is_file_damaged(error):
                self._on_refusal(batches, str(error))
                return
            self._set_aside(error)
            self._write_once(batches)
        self._is_refused = False

    def _write_once(self, batches: list[Batch]) -> None:
        with self._file.transaction() as connection:
            for batch in batches:
                tables.insert(connection, batch, self._sizes, self._bounds)
                self._written += batch.weight
        if time.monotonic() >= self._upkeep_at:
            self._written, self._upkeep_at = 0, time.monotonic() + _UPKEEP_S
            is_steady = self._has_steady_clock()
            with self._file.transaction() as connection:
                tables.trim(connection, self._now(), self._bounds, has_steady_clock=is_steady)
        elif self._written > self._bounds.pulls * _TRIM_SHARE:
            self._written = 0
            with self._file.transaction() as connection:
                tables.trim_requests(connection, self._bounds)

    def _has_steady_clock(self) -> bool:
        begun, then = self._steady_since
        elapsed = time.monotonic() - begun
        if abs(self._now() - then - elapsed) > _MAX_JUMP_S:
            self._steady_since = time.monotonic(), self._now()
            return False
        return elapsed >= _STEADY_S

    def _set_aside(self, error: Exception) -> None:
        self._file.move_aside()
        message = "the history is damaged: its file was moved aside, and a new one is made"
        self._emit(LogMessage("warning", message, (("why", str(error)),)))

    def _on_refusal(self, batches: list[Batch], why: str) -> None:
        """Stop recording for a while. The first refusal is logged."""
        self._resume_at = time.monotonic() + _RETRY_S
        with suppress(Exception):
            self._file.close()
        if not self._is_refused:
            self._is_refused = True
            message = "the history is not recorded: its file cannot be written"
            self._emit(LogMessage("warning", message, (("why", why),)))
        self._drop(batches)

    def _drop(self, batches: list[Batch]) -> None:
        self._emit(HistoryRowsDropped(sum(batch.weight for batch in batches)))
