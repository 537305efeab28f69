"""Write the bytes of one request to the file of its upload, and hash them beside.

Lives here: batches, the memory for bytes that wait for the disk, the running hash. Must not know:
rows, what the upload is for.

Theory of operation: as for content that is fetched (``store/ingest_writer.py``). A thread hashes
and writes one batch, while the next one gathers. The hash covers what is in the file. If it is
behind, since another process has written the bytes before, it catches up from the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from mirror.oci.errors import StorageUnavailable, UploadUnknown
from mirror.oci.reference import Digest
from mirror.store.ingest_writer import MemoryBudget, ShortWrite, append_joined, write_all
from mirror.store.writeback import start_writeback

T = TypeVar("T")

_READ_BYTES: Final = 1024 * 1024
"""Bytes that are read and hashed at a time."""


class RunningHash:
    """The hash of the first bytes of a file. One thread at a time may use it."""

    def __init__(self, algorithm: str) -> None:
        """Start with no byte. ``algorithm``: one of :data:`mirror.oci.reference.ALGORITHMS`."""
        self.algorithm = algorithm
        self.position = 0
        """Bytes that were hashed so far."""
        self._hash: Any = hashlib.new(algorithm)

    def update(self, data: bytes | bytearray) -> None:
        """Hash the next bytes."""
        self._hash.update(data)
        self.position += len(data)

    def catch_up(self, fd: int, stop: int) -> None:
        """Hash the bytes of a file up to ``stop``. Blocks. Raises ``OSError``."""
        while self.position < stop:
            data = os.pread(fd, min(_READ_BYTES, stop - self.position), self.position)
            if not data:
                return
            self.update(data)

    def digest(self) -> Digest:
        """Return the digest of the bytes so far."""
        return Digest(self.algorithm, self._hash.hexdigest())


class UploadWriter:
    """Appends to the file of an upload whose lock it holds, until it is closed."""

    def __init__(
        self,
        fd: int,
        position: int,
        running_hash: RunningHash,
        threads: Executor,
        memory: MemoryBudget,
        before_unlock: Callable[[int], asyncio.Future[Any] | None],
        on_closed: Callable[[], object],
    ) -> None:
        """Start at the end of the file.

        Args:
            fd: The locked file. It is closed with the writer.
            position: Its length in bytes.
            running_hash: The hash of at most ``position`` bytes of it.
            threads: Write and hash.
            memory: Limits the bytes that wait, of all uploads of this process.
            before_unlock: Called with the bytes that are in the file, once there will be no more.
                The file is closed when the future that it returns is done. None: at once.
            on_closed: Called once the file is closed, and unlocked.
        """
        self.fd = fd
        self.position = position
        """Bytes that were accepted, also those that wait for the disk."""
        self.running_hash = running_hash
        self._threads = threads
        self._memory = memory
        self._before_unlock = before_unlock
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._written = position
        self._pending: list[bytes | bytearray] = []
        self._job: asyncio.Future[Any] | None = None
        self._error: Exception | None = None
        self._is_busy = False
        self._is_unlocking = False
        self.last_byte_at = self._loop.time()
        """Time of the event loop at which the last bytes were accepted: it is the client's turn."""
        self.is_closing = False
        """Whether no more bytes are accepted. A thread may still write some."""
        self.closed = asyncio.Event()
        """Set once the file is closed, and unlocked."""

    async def write(self, chunk: bytes) -> None:
        """Add the next bytes. Pauses while the upload may not hold more memory.

        Raises ``StorageUnavailable`` if the disk has refused this batch or an earlier one, and the
        error of :meth:`fail`.
        """
        if self._error is not None:
            raise self._error
        append_joined(self._pending, chunk)
        self.position += len(chunk)
        self._start_next_batch()
        self._memory.hold(self, self.position - self._written)
        while self._error is None and self._job and not self._memory.may_take(self):
            await asyncio.wait({self._job})
        if self._error is not None:
            raise self._error

    @property
    def has_disk_failed(self) -> bool:
        """Whether the disk has refused bytes."""
        return isinstance(self._error, StorageUnavailable)

    def silent_s(self) -> float:
        """Return the seconds since the last bytes.

        0.0 once all have come, while they are written, or in :meth:`working`.
        """
        is_busy = self._is_busy or self._job is not None
        return 0.0 if is_busy else self._loop.time() - self.last_byte_at

    @contextmanager
    def working(self) -> Iterator[None]:
        """In the block, the client waits for us: it is not silent."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
            self.last_byte_at = self._loop.time()

    def fail(self, error: Exception) -> None:
        """Accept no more bytes: raise ``error`` for the next ones, and close."""
        self._error = self._error or error
        self.close()

    async def flush(self) -> None:
        """Return once all bytes are in the file. Raises like :meth:`write`, and ``UploadUnknown``.

        The latter if another process has ended the upload.
        """
        while self._job is not None:
            await asyncio.wait({self._job})
        if self._error is not None:
            raise self._error
        if not os.fstat(self.fd).st_nlink:
            raise UploadUnknown("there is no such upload: it was cancelled")

    async def run_last(self, threads: Executor, work: Callable[[], T]) -> T:
        """Return ``work()``, called in a thread. No bytes may follow. Raises like ``work``.

        The file stays open for the thread, also if the caller is cancelled and closes it.
        """
        self._is_busy = True
        await self.flush()
        self._job = job = self._loop.run_in_executor(threads, work)
        job.add_done_callback(self._on_last_done)
        await asyncio.wait({job})
        return job.result()

    def _on_last_done(self, job: asyncio.Future[Any]) -> None:
        job.exception()  # Retrieved: a caller that was cancelled never asks.
        self._job = None
        self._close_if_idle()

    def close(self) -> None:
        """Close the file once all bytes that were accepted are in it, or the disk has refused them.

        So a client that was cut off goes on after the last byte that came.
        """
        self.is_closing = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.is_closing and self._job is None and not self._is_unlocking:
            self._is_unlocking = True
            self._pending = []
            self._memory.hold(self, 0)
            last_step = self._before_unlock(self._written)
            if last_step is None:
                self._unlock()
            else:
                last_step.add_done_callback(self._unlock)

    def _unlock(self, _: object = None) -> None:
        os.close(self.fd)
        self.closed.set()
        self._on_closed()

    def _start_next_batch(self) -> None:
        if self._job is None and self._pending and self._error is None:
            batch, self._pending = self._pending, []
            self._job = self._loop.run_in_executor(
                self._threads, _append, self.fd, self.running_hash, batch, self._written
            )
            self._job.add_done_callback(self._on_batch_written)

    def _on_batch_written(self, job: asyncio.Future[int]) -> None:
        self._job = None
        error = job.exception()
        if error is None:
            self._written = job.result()
        elif isinstance(error, ShortWrite):
            self._written = error.end
            reason = error.cause.strerror or str(error.cause)
            self._error = StorageUnavailable(f"the upload cannot be stored: {reason}")
        else:
            self._error = StorageUnavailable(f"the upload cannot be stored: {error}")
        self._memory.hold(self, self.position - self._written)
        self._start_next_batch()
        self._close_if_idle()


def _append(fd: int, running_hash: RunningHash, batch: list[bytes | bytearray], start: int) -> int:
    """Write a batch at ``start``, and hash it if the hash has come that far. Returns the end."""
    end = write_all(fd, batch, start)
    start_writeback(fd, start, end)
    if running_hash.position == start:
        for chunk in batch:
            running_hash.update(chunk)
    return end
