"""A thread that writes batches into a database that may be replaced.

Lives here: the bounded queue of batches, and what happens if the disk refuses or the file is
damaged. Must not know: what is in a batch, tables.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, Protocol, TypeVar

from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import error_text
from mirror.store.shared_database import SharedDatabase, is_file_damaged

_MAX_QUEUED: Final = 50_000
"""Entries that wait for the thread: some seconds of a busy server. Further ones are dropped."""
_RETRY_S: Final = 30.0
"""Seconds after which a disk that has refused a batch is tried again. Until then, all is dropped,
so that a full disk gets no further load."""


class WeightedBatch(Protocol):
    """Entries that are written together."""

    @property
    def weight(self) -> int:
        """Number of its entries: about the number of rows that are written."""


B = TypeVar("B", bound=WeightedBatch)


class BatchWriter(Generic[B]):
    """Writes batches in a daemon thread: a disk that hangs delays nothing, not even the end."""

    def __init__(
        self,
        name: str,
        database: SharedDatabase,
        write: Callable[[Sequence[B]], None],
        on_dropped: Callable[[Sequence[B]], None],
        emit_from_thread: Observer,
    ) -> None:
        """Start the thread.

        Args:
            name: What the batches are, for the log: ``history``.
            database: Where ``write`` writes. It is closed at the end.
            write: Writes batches in one transaction. Called in the thread, and again after an error
                that means damage, with a new file.
            on_dropped: Called in the thread with batches that were not written.
            emit_from_thread: Receives warnings.
        """
        self._name = name
        self._database = database
        self._write_once = write
        self._on_dropped = on_dropped
        self._emit = emit_from_thread
        self._lock = threading.Lock()
        self._queue: list[B] = []
        self._queued = 0
        self._has_work = threading.Event()
        self._is_closing = False
        self._is_refused = False
        self._resume_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether all batches are written, or dropped."""
        return self._queued == 0

    def put(self, batch: B) -> bool:
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
                self._database.close()
                return

    def _write(self, batches: Sequence[B]) -> None:
        if not batches:
            return
        if time.monotonic() < self._resume_at:
            self._on_dropped(batches)
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

    def _set_aside(self, error: Exception) -> None:
        self._database.move_aside()
        message = f"the {self._name} is damaged: its file was moved aside, and a new one is made"
        self._emit(LogMessage("warning", message, (("why", str(error)),)))

    def _on_refusal(self, batches: Sequence[B], why: str) -> None:
        """Stop writing for a while. The first refusal is logged."""
        self._resume_at = time.monotonic() + _RETRY_S
        with suppress(Exception):
            self._database.close()
        if not self._is_refused:
            self._is_refused = True
            message = f"the {self._name} is not recorded: its file cannot be written"
            self._emit(LogMessage("warning", message, (("why", why),)))
        self._on_dropped(batches)
