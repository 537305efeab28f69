"""The writer of one ingest: hashes its bytes and writes them to disk, one batch at a time.

Lives here: the queue of chunks, the memory that all ingests may hold, the batches, and the blocking
calls that a thread runs for each. Must not know: upstreams, followers' positions, who holds the
lock.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import deque
from collections.abc import Hashable, Iterable
from functools import partial
from itertools import islice
from typing import Final

from mirror.oci.errors import ContentLost, MirrorError
from mirror.oci.reference import Verifier
from mirror.store import disk
from mirror.store.follower import ReadableIngest

MIN_SHARE_BYTES: Final = 256 * 1024
"""Bytes of memory that each ingest may hold, whatever the others hold: a few reads of a socket, so
that a fetch continues, although more slowly."""
MAX_SHARE_BYTES: Final = 8 * 1024 * 1024
"""Bytes of memory that one ingest may hold at most: enough for batches that a disk writes well."""
_JOINED_BYTES: Final = 64 * 1024
"""Bytes from which chunks are not joined: an upstream may send chunks of a few bytes, and each one
would cost as much memory and time again as a whole block."""
_CATCH_UP_BYTES: Final = 64 * 1024 * 1024
"""Bytes of an earlier fetch that are hashed with each batch.

More would delay the batch, and so the followers, for longer than about 0.1 s.
"""
_MAX_BUFFERS: Final = 512
"""Buffers in one ``pwritev``, which takes at most 1024 (``IOV_MAX``) on Linux."""


class MemoryBudget:
    """The memory for bytes that wait, of all fetches of a process.

    They wait for the disk or for followers, and an ingest holds them. Or they have arrived *ahead*
    of earlier bytes, by another connection, and a fetch holds them. Each use may take the
    limit. Both together may take 4/3 of it: if one uses all, the other one still has a third.

    An ingest never waits for memory that another one holds. It waits for its own disk thread or for
    its own followers, and may always hold :data:`MIN_SHARE_BYTES`. So no client that reads nothing
    can stop the fetch of another content. A fetch asks for memory ahead before it requests the
    bytes, and does without if there is none.
    """

    def __init__(self, limit: int) -> None:
        """Start with no ingest. ``limit``: bytes for each of the two uses."""
        self._limit = limit
        self._limit_of_both = limit * 4 // 3
        self._held: dict[Hashable, int] = {}
        self._ahead: dict[Hashable, int] = {}
        self._total = 0
        self._total_ahead = 0

    @property
    def total(self) -> int:
        """Bytes that all ingests and fetches hold."""
        return self._total + self._total_ahead

    def hold(self, ingest: Hashable, count: int) -> None:
        """Record that ``ingest`` holds ``count`` bytes."""
        self._total += count - self._held.pop(ingest, 0)
        if count:
            self._held[ingest] = count

    def may_take(self, ingest: Hashable) -> bool:
        """Return whether ``ingest`` may take a further chunk from its upstream.

        Above the minimum an ingest needs an equal share of the limit, and free memory: others may
        hold more than their share, from a time when they were fewer.
        """
        held = self._held.get(ingest, 0)
        if held < MIN_SHARE_BYTES:
            return True
        share = min(MAX_SHARE_BYTES, self._limit // len(self._held))
        has_share = held < share and self._total < self._limit
        return has_share and self._total + self._total_ahead < self._limit_of_both

    def hold_ahead(self, owner: Hashable, count: int) -> None:
        """Record that ``owner`` holds, or has requested, ``count`` bytes ahead in all."""
        self._total_ahead += count - self._ahead.pop(owner, 0)
        if count:
            self._ahead[owner] = count

    def free_ahead(self, share: float = 1.0) -> int:
        """Return the bytes that may be requested ahead now. Negative if too many are held.

        ``share``: the part of the limit up to which the caller may fill the memory ahead.
        """
        most = int(self._limit * share)
        return min(most - self._total_ahead, self._limit_of_both - self.total)


class IngestWriter:
    """Hashes and writes the chunks of one ingest. At most one batch is in a thread at a time."""

    def __init__(self, ingest: ReadableIngest) -> None:
        self.error: MirrorError | None = None
        """The failure after which no further byte is taken; None if there was none."""
        self._ingest = ingest
        self._verifier = Verifier(ingest.digest)
        self._pending: list[bytes | bytearray] = []
        self._newest = b""
        """The last chunk. Without a known size it may be the end of the content. It is held back
        until that is known, because the last batch has to be hashed before it is written."""
        self._has_ended = False
        self._job: asyncio.Future[int] | None = None

    async def write(self, chunk: bytes) -> None:
        """Add the next bytes. Pauses while the ingest may not take more memory.

        Raises ``DigestMismatch`` or ``ContentLost`` of this batch or of an earlier one.
        """
        ingest = self._ingest
        append_joined(self._pending, self._newest)
        self._newest = chunk
        ingest.position += len(chunk)
        self._start_next_batch()
        ingest.count_memory()
        while self.error is None and not ingest.context.may_take_memory(ingest):
            if self._job is not None:
                await asyncio.wait({self._job})
            elif ingest.window and ingest.followers:
                await ingest.wait_for_memory()
            else:
                ingest.on_follower_moved()
                break
        if self.error is not None:
            raise self.error

    async def write_last(self) -> None:
        """Write what is pending as the end of the content, and return once it is verified.

        Raises ``DigestMismatch`` or ``ContentLost``.
        """
        self._has_ended = True
        self._start_next_batch()
        await self.wait_until_written()
        if self.error is not None:
            raise self.error

    async def wait_until_written(self) -> None:
        """Return once no batch is in a thread."""
        while self._job is not None:
            await asyncio.wait({self._job})

    def discard_pending(self) -> None:
        """Drop the chunks that no thread has begun to write."""
        self._pending, self._newest = [], b""

    def _start_next_batch(self) -> None:
        """Give the pending chunks to a thread, unless it is still busy with the last batch."""
        ingest = self._ingest
        if self._job is not None or ingest.is_closed or self.error is not None:
            return
        is_last = self._has_ended or ingest.position == ingest.size
        if is_last or ingest.size is not None:
            append_joined(self._pending, self._newest)
            self._newest = b""
        if not self._pending and not is_last:
            return
        batch, self._pending = self._pending, []
        start = ingest.on_disk if ingest.window is None else ingest.window.stop
        append = partial(append_batch, is_last=is_last, is_stored=ingest.window is None)
        self._job = ingest.lock.run_in_thread(
            ingest.context.io,
            append,
            ingest.lock.fd,
            self._verifier,
            batch,
            start,
            when_done=lambda job: self._on_batch_written(job, batch, start, is_last),
        )

    def _on_batch_written(
        self, job: asyncio.Future[int], batch: list[bytes | bytearray], start: int, is_last: bool
    ) -> None:
        ingest = self._ingest
        self._job = None
        ingest.last_progress = time.monotonic()
        try:
            self._hand_out(batch, job.result(), is_last)
        except ShortWrite as short:
            if ingest.window is None:
                ingest.on_disk = short.end
            ingest.continue_in_memory(disk.reason_of(short.cause))
            remaining = bytes_after(batch, ingest.on_disk - start)
            if is_last:
                # The last batch is hashed before it is written. So these bytes are verified, and
                # can be served from memory.
                self._hand_out(remaining, start, is_last)
            else:
                self._pending[:0] = remaining
        except MirrorError as error:
            self.error = error
        except OSError as error:
            self.error = ContentLost(f"the ingest file cannot be read: {error.strerror}")
        ingest.wake_followers()
        self._start_next_batch()

    def _hand_out(self, batch: list[bytes | bytearray], end: int, is_last: bool) -> None:
        """Let followers have ``batch``, which is in the file up to ``end`` unless in memory."""
        ingest = self._ingest
        if ingest.window is None:
            ingest.on_disk = end
        else:
            ingest.window.append(batch)
            ingest.on_follower_moved()
        if is_last:
            ingest.size = ingest.position
            ingest.is_verified = True


# --- blocking calls -------------------------------------------------------------------------------


class ShortWrite(Exception):
    """The disk refused in the middle of a batch: ``end`` bytes of the content are in the file."""

    def __init__(self, cause: OSError, end: int) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.end = end


def append_batch(
    fd: int | None,
    verifier: Verifier,
    batch: list[bytes | bytearray],
    start: int,
    *,
    is_last: bool,
    is_stored: bool,
) -> int:
    """Hash ``batch`` and write it. Blocks.

    Args:
        fd: The ingest file; None if it is closed.
        verifier: The hash of the content before ``start``, or of a part of it.
        batch: The next bytes of the content.
        start: Offset of the first of them.
        is_last: The content ends with them. All of it is hashed before any of them is written.
        is_stored: Write them to ``fd``. False for content that stays in memory.

    Returns:
        The offset after ``batch``.

    Raises:
        DigestMismatch: The content is complete and its hash is another one.
        ShortWrite: The disk took only a part of ``batch``.
        OSError: The bytes of an earlier fetch cannot be read.
    """
    if is_last or not is_stored:
        if verifier.position < start:
            disk.hash_file(_require_open(fd), verifier, start)
        verifier.update_all(batch)
        if is_last:
            verifier.finish()
        if not is_stored:
            return start + sum(map(len, batch))
    end = write_all(_require_open(fd), batch, start)
    if not is_last and verifier.position == start:
        verifier.update_all(batch)
    elif not is_last:
        # The hash is still behind, at bytes of an earlier fetch. Each batch hashes a part of them.
        disk.hash_file(_require_open(fd), verifier, min(end, verifier.position + _CATCH_UP_BYTES))
    return end


def _require_open(fd: int | None) -> int:
    if fd is None:
        raise OSError(errno.EBADF, "the ingest file is closed")
    return fd


def write_all(fd: int, chunks: Iterable[bytes | bytearray], offset: int) -> int:
    """Write at ``offset`` until all is written; returns the new end. Short writes are continued.

    Raises ``ShortWrite`` with the end that was reached, so that the file's valid length is known.
    """
    views = deque(memoryview(chunk) for chunk in chunks if chunk)
    while views:
        try:
            count = os.pwritev(fd, list(islice(views, _MAX_BUFFERS)), offset)
        except OSError as error:
            raise ShortWrite(error, offset) from error
        if count == 0:
            raise ShortWrite(OSError(errno.ENOSPC, "nothing could be written"), offset)
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.popleft())
        if count:
            views[0] = views[0][count:]
    return offset


def append_joined(blocks: list[bytes | bytearray], chunk: bytes) -> None:
    """Append ``chunk`` to ``blocks``. Small chunks are joined to blocks of 64 to 128 KiB."""
    if not blocks or max(len(blocks[-1]), len(chunk)) >= _JOINED_BYTES:
        if chunk:
            blocks.append(chunk)
    else:
        last = blocks[-1]
        if isinstance(last, bytes):
            last = blocks[-1] = bytearray(last)
        last += chunk


def bytes_after(batch: Iterable[bytes | bytearray], count: int) -> list[bytes | bytearray]:
    """Return the chunks of ``batch`` without its first ``count`` bytes."""
    remaining: list[bytes | bytearray] = []
    for chunk in batch:
        if count < len(chunk):
            remaining.append(chunk[max(0, count) :])
        count -= len(chunk)
    return remaining
