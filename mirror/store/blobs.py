"""Whole content by digest: opening, verifying again when a verification is old, recency.

Lives here: one open file for each content that is being read (its lease, which eviction respects),
the age of verifications, quarantine, marking content as used. Must not know: repositories, tags,
which repository may read which content.

Theory of operation: content is trusted while its verification is younger than ``storage.reverify``
and no other program has written to the file (``disk.has_our_mtime``). Otherwise it is verified
again. A small file is hashed before its first byte is served, so damage is a cache miss. A large
file is served like content that is being fetched: its bytes are sent at once, a thread hashes the
file at the same time, and the last byte is held back until the hash is right. So a range that ends
earlier does not wait. If another program has written to the file, the last byte of every range is
held back as well.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Final

from mirror.observability.events import (
    ContentUsed,
    DigestMismatched,
    Evicted,
    LogMessage,
    Observer,
    Reverified,
)
from mirror.oci.errors import ContentLost, ContentUnreadable, DigestMismatch, StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.hosted_contents import HostedContents
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.quarantine import quarantine
from mirror.store.reader import FileExtent

SMALL_BYTES: Final = 4 * 1024 * 1024
"""Bytes up to which content is verified before its first byte is served: hashed within 10 ms."""
_DAMAGE_TTL_S: Final = 60.0
"""Seconds for which damage is remembered: the request that has found it fetches the content."""
_MAX_DAMAGED: Final = 1000
"""Damaged contents that are remembered."""
_MAX_REMEMBERED: Final = 100_000
"""Digests whose times are kept in memory (24 MB). An older verification time is read from the index
again, and forgotten recency costs one more system call."""
_FLUSH_STEP: Final = 1000
"""Verification times that are handed to the index at once."""
_MAX_TOUCHES: Final = 1000
"""Records of a use that may wait for the disk: more than a burst of requests makes. On a disk that
hangs, further ones would fill the memory, and the threads for hours after it."""
_RECENCY_STEP_S: Final = 60.0
"""Seconds between two updates of one file's last use: LRU eviction needs no finer order."""


@dataclass(slots=True, eq=False)
class _LeasedFile:
    """One open file, shared by all its readers. It is closed after the last one."""

    fd: int
    size: int
    """Bytes of the file when it was opened."""
    readers: int = 0
    verification: asyncio.Future[None] | None = None
    """A running verification, or one that has found damage."""
    is_suspect: bool = False
    """Whether that verification has another reason than age."""


class BlobStore:
    """The whole content of one data directory. All methods run on the event loop."""

    def __init__(
        self,
        layout: Layout,
        index: Index,
        *,
        reverify: float,
        opening: Executor,
        hashing: Executor,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        """Start without an open file.

        Args:
            layout: The data directory.
            index: Keeps the times of verifications.
            reverify: Seconds for which a verification is trusted. Zero: it never is.
            opening: Threads that open files, set their times, and verify small content.
            hashing: Threads that verify large content.
            emit: Receives events, on the event loop only.
            now: Seconds since the epoch.
        """
        self._layout = layout
        self._index = index
        self._hosted = HostedContents(layout)
        self._reverify = reverify
        self._opening = opening
        self._hashing = hashing
        self._emit = emit
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._leases: dict[Digest, _LeasedFile] = {}
        self._verified: dict[Digest, float] = {}
        self._unsaved: set[Digest] = set()
        self._lengths: dict[Digest, int] = {}
        self._damaged: dict[Digest, float] = {}
        """Content -> when damage was found in it, in seconds since the epoch."""
        """Bytes of content that was verified in this process."""
        self._stopping = threading.Event()
        self._used_at: dict[Digest, float] = {}
        self._touches = threading.Semaphore(_MAX_TOUCHES)

    async def find(self, digest: Digest, size: int | None = None) -> WholeReader | None:
        """Open content for reading. The caller closes the reader.

        Args:
            digest: The content.
            size: Its length in bytes as a manifest states it, or None. A manifest may be wrong, so
                content of another length is verified once, and is served.

        Returns:
            A reader; None if the content is missing, damaged or cannot be read: it is fetched then.

        Raises:
            StorageUnavailable: There are too few descriptors.
        """
        with suppress(ContentUnreadable):
            return await self.find_hosted(digest, size)
        return None

    async def find_hosted(self, digest: Digest, size: int | None = None) -> WholeReader | None:
        """Open content for reading that no upstream may have (see :meth:`find`).

        Returns:
            A reader; None if the content is missing or damaged.

        Raises:
            ContentUnreadable: The disk reports an error.
            StorageUnavailable: There are too few descriptors.
        """
        lease = await self._lease(digest)
        if lease is None:
            return None
        reader = WholeReader(self, digest, lease)
        try:
            status = os.fstat(lease.fd)
            is_cut = status.st_size != lease.size
            is_doubted = size not in (None, lease.size) and self._lengths.get(digest) != lease.size
            is_trusted = await self._is_trusted(digest, status)
            if lease.verification is None and (is_cut or is_doubted or not is_trusted):
                lease.is_suspect = is_cut or is_doubted or not disk.has_our_mtime(status)
                self._start_verification(digest, lease)
            must_wait = is_cut or (is_doubted and not is_trusted) or lease.size <= SMALL_BYTES
            if lease.verification is not None and must_wait:
                await asyncio.wait({lease.verification})
            reader.raise_if_damaged()
        except DigestMismatch:
            reader.close()
            return None
        except BaseException:
            reader.close()
            raise
        return reader

    async def _lease(self, digest: Digest) -> _LeasedFile | None:
        lease = self._leases.get(digest)
        if lease is not None and os.fstat(lease.fd).st_nlink > 0:
            return lease
        job = self._loop.run_in_executor(self._opening, disk.open_whole, self._layout, digest)
        try:
            await asyncio.wait({job})
            opened = job.result()
        except asyncio.CancelledError:
            job.add_done_callback(_close_opened)
            raise
        except OSError as error:
            raise self.unreadable(digest, error) from error
        if opened is None:
            return None
        present = self._leases.get(digest)
        if present is not None and os.path.samestat(os.fstat(present.fd), opened[1]):
            os.close(opened[0])
            return present
        self._leases[digest] = _LeasedFile(opened[0], opened[1].st_size)
        return self._leases[digest]

    async def read(self, digest: Digest, limit: int) -> bytes | None:
        """Read small content. It is hashed again at every read.

        Args:
            digest: The content.
            limit: Bytes. Content of more is not read.

        Returns:
            The bytes; None if the content is missing, damaged, cannot be read, or is larger than
            ``limit``.

        Raises:
            StorageUnavailable: There are too few descriptors.
        """
        with suppress(ContentUnreadable):
            return await self.read_hosted(digest, limit)
        return None

    async def read_hosted(self, digest: Digest, limit: int) -> bytes | None:
        """Read small content that no upstream may have (see :meth:`read`).

        Raises:
            ContentUnreadable: The disk reports an error.
            StorageUnavailable: There are too few descriptors.
        """
        try:
            body = await self._loop.run_in_executor(self._opening, self._read, digest, limit)
        except OSError as error:
            raise self.unreadable(digest, error) from error
        if body is not None:
            self._set_verified(digest, self._now())
        return body

    def unreadable(self, digest: Digest, error: OSError) -> StorageUnavailable:
        """Log an error of the disk, and return its exception.

        For too few descriptors, it is no ``ContentUnreadable``: a fetch would need even more.
        """
        if disk.reason_of(error) == "descriptors":
            return StorageUnavailable(f"content cannot be opened: {error.strerror}")
        why = error.strerror or str(error)
        fields = (("digest", str(digest)), ("why", why))
        self._emit(LogMessage("warning", "content cannot be read", fields))
        return ContentUnreadable(f"content cannot be read: {why}")

    def _read(self, digest: Digest, limit: int) -> bytes | None:
        opened = disk.open_whole(self._layout, digest)
        if opened is None:
            return None
        fd, status = opened
        try:
            if status.st_size > limit:
                return None
            body = self._read_open(digest, fd, limit)
            if body is not None and Digest.of(body, digest.algorithm) == digest:
                return body
            self._quarantine(digest, fd, status.st_size, may_be_intact=body is None)
            self._loop.call_soon_threadsafe(self._report_damage, digest)
            return None
        finally:
            os.close(fd)

    def _read_open(self, digest: Digest, fd: int, limit: int) -> bytes | None:
        try:
            return os.pread(fd, limit + 1, 0)
        except OSError:
            if self._hosted.may_have(digest):
                raise
            return None  # An unreadable sector counts as damage.

    async def _is_trusted(self, digest: Digest, status: os.stat_result) -> bool:
        if self._reverify <= 0 or not disk.has_our_mtime(status):
            return False
        if self._is_recent(self._verified.get(digest)):
            return True
        # Another process may have verified it since.
        at = await self._index.verified_at(digest)
        if at is not None and self._is_recent(at):
            self._set_verified(digest, at, is_saved=True)
            return True
        return False

    def _is_recent(self, at: float | None) -> bool:
        return at is not None and 0 <= self._now() - at < self._reverify

    def _set_verified(self, digest: Digest, at: float, *, is_saved: bool = False) -> None:
        self._verified.pop(digest, None)
        self._verified[digest] = at
        if not is_saved:
            self._unsaved.add(digest)
        while len(self._verified) > _MAX_REMEMBERED:
            oldest = next(iter(self._verified))
            del self._verified[oldest]
            self._unsaved.discard(oldest)

    def _set_length(self, digest: Digest, size: int) -> None:
        if len(self._lengths) > _MAX_REMEMBERED:
            self._lengths.clear()
        self._lengths[digest] = size

    def _start_verification(self, digest: Digest, lease: _LeasedFile) -> None:
        lease.readers += 1  # The verification reads the file as well.
        # Clients wait for small content. It must not wait for large content, which takes seconds.
        threads = self._opening if lease.size <= SMALL_BYTES else self._hashing
        lease.verification = self._loop.run_in_executor(
            threads, self._verify, digest, lease.fd, lease.size
        )
        lease.verification.add_done_callback(
            lambda job: self._verification_done(job, digest, lease)
        )

    def _verify(self, digest: Digest, fd: int, size: int) -> None:
        try:
            disk.verify(fd, size, digest, self._stopping.is_set)
        except DigestMismatch:
            self._quarantine(digest, fd, size)
            raise
        except OSError as error:
            # An unreadable sector counts as damage, unless no upstream has the content.
            if self._hosted.may_have(digest):
                raise
            self._quarantine(digest, fd, size, may_be_intact=True)
            raise DigestMismatch(f"content of {digest} cannot be read: {error.strerror}") from error
        disk.touch_open(fd, self._now())

    def _quarantine(
        self, digest: Digest, fd: int, size: int, *, may_be_intact: bool = False
    ) -> None:
        """Move damaged content away, in a thread. It is counted once, by the process that did."""
        if quarantine(self._layout, digest, fd, may_be_intact=may_be_intact):
            self._loop.call_soon_threadsafe(self._emit, Evicted(1, size, "corrupt"))

    def _verification_done(
        self, job: asyncio.Future[None], digest: Digest, lease: _LeasedFile
    ) -> None:
        error = job.exception()
        if isinstance(error, StorageUnavailable | OSError):
            self._forget(digest, lease)  # The store is closed, or the disk fails: nothing is known.
        elif error is not None:
            self._report_damage(digest)
            self._forget(digest, lease)
        else:
            lease.verification = None
            self._set_verified(digest, self._now())
            self._set_length(digest, lease.size)
            self._emit(Reverified(str(digest), is_ok=True))
        self.release(digest, lease)

    def is_damaged(self, digest: Digest) -> bool:
        """Return whether a request found damage in this content within the last minute."""
        return self._now() - self._damaged.get(digest, -math.inf) < _DAMAGE_TTL_S

    def _report_damage(self, digest: Digest) -> None:
        if len(self._damaged) >= _MAX_DAMAGED:
            self._damaged.clear()
        self._damaged[digest] = self._now()
        self._verified.pop(digest, None)
        self._unsaved.discard(digest)
        self._emit(DigestMismatched(upstream="", digest=str(digest), where="disk"))
        self._emit(Reverified(str(digest), is_ok=False))

    def _forget(self, digest: Digest, lease: _LeasedFile) -> None:
        if self._leases.get(digest) is lease:
            del self._leases[digest]

    def release(self, digest: Digest, lease: _LeasedFile) -> None:
        """Count one reader less, and close the file after the last one."""
        lease.readers -= 1
        if lease.readers == 0:
            self._forget(digest, lease)
            disk.close(lease.fd, self._opening)

    def mark_verified(self, digest: Digest, size: int) -> None:
        """Record that content of ``size`` bytes was verified now. :meth:`flush` saves that."""
        self._set_verified(digest, self._now())
        self._set_length(digest, size)

    async def on_verified(self, digest: Digest, size: int) -> None:
        """Record that content of ``size`` bytes was verified now, while it was fetched."""
        now = self._now()
        self._set_verified(digest, now)
        self._set_length(digest, size)
        if await self._index.set_verified([(digest, now)]):
            self._unsaved.discard(digest)

    def mark_used(self, digests: Collection[Digest]) -> bool:
        """Record the use of content for LRU eviction, at most once a minute each.

        Returns at once: a thread of the store sets the times of the files, and closing the store
        waits for it. Missing content is passed over. Never raises.

        Args:
            digests: A manifest with its parts, or one blob. If the last record of any of them is
                older than a minute, all are recorded. So a manifest never looks more recently used
                than its parts by more than a minute.

        Returns:
            True if the use is recorded. False if every last record is younger than a minute, or if
            the disk has not taken the last :data:`_MAX_TOUCHES` records.
        """
        now = self._now()
        if all(0 <= now - self._used_at.get(d, -inf) < _RECENCY_STEP_S for d in digests):
            return False
        if not self._touches.acquire(blocking=False):
            return False
        if len(self._used_at) > _MAX_REMEMBERED:
            self._used_at.clear()
        self._used_at.update(dict.fromkeys(digests, now))
        self._emit(ContentUsed(tuple(map(str, digests))))
        with suppress(RuntimeError):  # The store is closed.
            job = self._opening.submit(disk.touch, self._layout, tuple(digests), now)
            job.add_done_callback(lambda job: self._touches.release())
        return True

    def stop_verifying(self) -> None:
        """End all verifications: a running one after its current read, a queued one at once."""
        self._stopping.set()

    async def flush(self) -> None:
        """Write the verification times of this process to the index, in steps.

        The server calls this every few seconds, so that no other process verifies the same content
        again, nor this one after a crash. Times that cannot be written wait for the next call.
        """
        while self._unsaved:
            times = [(d, self._verified[d]) for d in islice(self._unsaved, _FLUSH_STEP)]
            if not await self._index.set_verified(times):
                return
            # Content may have been verified once more in the meantime.
            self._unsaved -= {digest for digest, at in times if self._verified.get(digest) == at}


def _close_opened(job: asyncio.Future[tuple[int, os.stat_result] | None]) -> None:
    """Close a file that was opened for a request which has been cancelled."""
    if not job.cancelled() and job.exception() is None:
        opened = job.result()
        if opened is not None:
            os.close(opened[0])


class WholeReader:
    """One reader of whole content (see :class:`mirror.store.reader.Reader`)."""

    def __init__(self, blobs: BlobStore, digest: Digest, lease: _LeasedFile) -> None:
        self.digest = digest
        self._blobs = blobs
        self._lease = lease
        self._is_open = True
        lease.readers += 1

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self._lease.size

    async def wait_for_size(self) -> int:
        """Return the size."""
        return self._lease.size

    async def wait(self, start: int, stop: int | None = None) -> FileExtent | None:
        """Wait for the byte at ``start`` (see :meth:`mirror.store.reader.Reader.wait`).

        While a verification runs, the last byte of the content waits for its result. If there is
        another reason for it than age, so does the last byte of every range.
        """
        if not self._is_open:
            raise ContentLost("this reader is closed")
        limit = self.size if stop is None else min(stop, self.size)
        if start >= limit:
            return None
        verification = self._lease.verification
        if verification is not None:
            held_back = limit - 1 if self._lease.is_suspect else self.size - 1
            if not verification.done() and start < held_back:
                return FileExtent(self._lease.fd, start, min(limit, held_back))
            await asyncio.wait({verification})
            self.raise_if_damaged()
        return FileExtent(self._lease.fd, start, limit)

    def raise_if_damaged(self) -> None:
        """Raise :class:`DigestMismatch` if a verification has found damage.

        Raises ``ContentUnreadable`` if it could not read hosted content.
        """
        verification = self._lease.verification
        if verification is not None and verification.done():
            try:
                verification.result()
            except OSError as error:
                raise self._blobs.unreadable(self.digest, error) from error

    def close(self) -> None:
        """Release the lease. Further calls do nothing."""
        if self._is_open:
            self._is_open = False
            self._blobs.release(self.digest, self._lease)
