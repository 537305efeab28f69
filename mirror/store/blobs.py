"""Whole content: opening it, trusting it, verifying it again when its verification has aged.

Lives here: one shared descriptor for each content that is being read (the lease that eviction
respects), the age of verifications, quarantine. Must not know: repositories, tags, who may read.

Content is trusted while its verification is younger than ``storage.reverify`` and nobody but us
has written to the file (``disk.set_by_us``). Otherwise it is served through the same door as
growing content: bytes flow at once, the hash is computed beside, the last byte waits for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Final, Protocol

from mirror.observability.events import DigestMismatched, Evicted, LogMessage, Observer, Reverified
from mirror.oci.errors import ContentLost, DigestMismatch, StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout
from mirror.store.reader import FileExtent

SMALL: Final = 4 * 1024 * 1024
"""Bytes up to which aged content is verified before its first byte, so that damage is a miss."""
_MAX_REMEMBERED: Final = 100_000
"""Digests whose times are kept in memory (24 MB). An older verification time is read from the index
again, and forgotten recency costs one more system call."""
_RECENCY_STEP_S: Final = 60.0
"""Seconds between two updates of one file's last use: LRU eviction needs no finer order."""


class Verifications(Protocol):
    """Where the times of verifications are kept (the index)."""

    async def verified_at(self, digest: Digest) -> float | None:
        """Seconds since the epoch; None: not known."""

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> None:
        """Remember."""


@dataclass(slots=True, eq=False)
class _Lease:
    """One open file, shared by all that read it."""

    fd: int
    size: int
    readers: int = 0
    verification: asyncio.Future[None] | None = None


class BlobStore:
    """Whole content by digest."""

    def __init__(
        self,
        layout: Layout,
        verifications: Verifications,
        *,
        reverify: float,
        opening: Executor,
        hashing: Executor,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        self._layout = layout
        self._verifications = verifications
        self._reverify = reverify
        self._opening = opening
        self._hashing = hashing
        self._emit = emit
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._leases: dict[Digest, _Lease] = {}
        self._verified: dict[Digest, float] = {}
        self._unsaved: set[Digest] = set()
        self._used_at: dict[Digest, float] = {}

    async def find(self, digest: Digest, size: int | None = None) -> WholeReader | None:
        """Open content for reading; None is a miss: absent or damaged.

        ``size``: what a manifest says of it; content of another length is verified first.

        Raises :class:`StorageUnavailable` out of descriptors.
        """
        lease = await self._lease(digest)
        if lease is None:
            return None
        reader = WholeReader(self, digest, lease)
        try:
            status = os.fstat(lease.fd)
            # A manifest may lie about a size, so another length is a suspicion, not a verdict.
            suspect = status.st_size != lease.size or size not in (None, lease.size)
            if lease.verification is None and (
                suspect or not await self._is_trusted(digest, status)
            ):
                self._start_verification(digest, lease)
            if lease.verification is not None and (suspect or lease.size <= SMALL):
                await asyncio.wait({lease.verification})
            reader.raise_if_damaged()
        except DigestMismatch:
            reader.close()
            return None
        except BaseException:
            reader.close()
            raise
        return reader

    async def _lease(self, digest: Digest) -> _Lease | None:
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
            self._miss(digest, error)
            return None
        if opened is None:
            return None
        present = self._leases.get(digest)
        if present is not None and os.path.samestat(os.fstat(present.fd), opened[1]):
            os.close(opened[0])
            return present
        self._leases[digest] = _Lease(opened[0], opened[1].st_size)
        return self._leases[digest]

    async def read(self, digest: Digest, limit: int) -> bytes | None:
        """Small content as bytes, hashed again as it is read; None is a miss.

        Raises :class:`StorageUnavailable`.
        """
        try:
            body = await self._loop.run_in_executor(self._opening, self._read, digest, limit)
        except OSError as error:
            self._miss(digest, error)
            return None
        if body is not None:
            self._remember(digest, self._now())
        return body

    def _miss(self, digest: Digest, error: OSError) -> None:
        """Content that cannot be opened is fetched anew, and the disk is asked again next time.

        Raises :class:`StorageUnavailable` out of descriptors: a fetch would want more of them.
        """
        if disk.reason_of(error) == "descriptors":
            raise StorageUnavailable(f"content cannot be opened: {error.strerror}") from error
        why = (("digest", str(digest)), ("why", error.strerror or str(error)))
        self._emit(LogMessage("warning", "content cannot be opened", why))

    def _read(self, digest: Digest, limit: int) -> bytes | None:
        opened = disk.open_whole(self._layout, digest)
        if opened is None:
            return None
        fd, status = opened
        try:
            body = _read_open(fd, limit) if status.st_size <= limit else b""
            if Digest.of(body, digest.algorithm) == digest:
                return body
            if status.st_size <= limit:
                disk.quarantine(self._layout, digest, fd)
                self._loop.call_soon_threadsafe(self._report_damage, digest, status.st_size)
            return None
        finally:
            os.close(fd)

    async def _is_trusted(self, digest: Digest, status: os.stat_result) -> bool:
        if self._reverify <= 0 or not disk.set_by_us(status):
            return False
        at = self._verified.get(digest)
        if at is None:
            at = await self._verifications.verified_at(digest)
            if at is not None:
                self._remember(digest, at, saved=True)
        return at is not None and 0 <= self._now() - at < self._reverify

    def _remember(self, digest: Digest, at: float, *, saved: bool = False) -> None:
        self._verified.pop(digest, None)
        self._verified[digest] = at
        if not saved:
            self._unsaved.add(digest)
        while len(self._verified) > _MAX_REMEMBERED:
            oldest = next(iter(self._verified))
            del self._verified[oldest]
            self._unsaved.discard(oldest)

    def _start_verification(self, digest: Digest, lease: _Lease) -> None:
        lease.readers += 1  # the verification reads as well
        lease.verification = self._loop.run_in_executor(
            self._hashing, self._verify, digest, lease.fd, lease.size
        )
        lease.verification.add_done_callback(
            lambda job: self._verification_done(job, digest, lease)
        )

    def _verify(self, digest: Digest, fd: int, size: int) -> None:
        try:
            disk.verify(fd, size, digest)
        except DigestMismatch:
            disk.quarantine(self._layout, digest, fd)
            raise
        except OSError as error:
            # Sectors that cannot be read are damage like any other.
            disk.quarantine(self._layout, digest, fd)
            raise DigestMismatch(f"content of {digest} cannot be read: {error.strerror}") from error
        disk.touch_open(fd, self._now())

    def _verification_done(self, job: asyncio.Future[None], digest: Digest, lease: _Lease) -> None:
        if job.cancelled() or job.exception() is not None:
            self._report_damage(digest, lease.size)
            self._forget(digest, lease)
        else:
            lease.verification = None
            self._remember(digest, self._now())
            self._emit(Reverified(str(digest), ok=True))
        self.release(digest, lease)

    def _report_damage(self, digest: Digest, size: int) -> None:
        self._verified.pop(digest, None)
        self._unsaved.discard(digest)
        self._emit(DigestMismatched("", str(digest), "disk"))
        self._emit(Reverified(str(digest), ok=False))
        self._emit(Evicted(1, size, "corrupt"))

    def _forget(self, digest: Digest, lease: _Lease) -> None:
        if self._leases.get(digest) is lease:
            del self._leases[digest]

    def release(self, digest: Digest, lease: _Lease) -> None:
        """One reader less."""
        lease.readers -= 1
        if lease.readers == 0:
            self._forget(digest, lease)
            disk.close(lease.fd, self._opening)

    async def published(self, digest: Digest) -> None:
        """Content was verified just now."""
        now = self._now()
        self._remember(digest, now, saved=True)
        await self._verifications.set_verified([(digest, now)])

    def mark_used(self, digests: Collection[Digest]) -> None:
        """Record the use of content for LRU eviction, at most once a minute each.

        Returns at once: a thread of the store sets the times of the files, and closing the store
        waits for it. Missing content is passed over. Never raises.

        Args:
            digests: A manifest together with its parts, or one blob. If the use of any is due, the
                use of all is recorded: a manifest is never more than a minute ahead of its parts.
        """
        now = self._now()
        if all(0 <= now - self._used_at.get(d, -inf) < _RECENCY_STEP_S for d in digests):
            return
        if len(self._used_at) > _MAX_REMEMBERED:
            self._used_at.clear()
        self._used_at.update(dict.fromkeys(digests, now))
        with suppress(RuntimeError):  # The store is closed.
            self._opening.submit(disk.touch, self._layout, tuple(digests), now)

    async def flush(self) -> None:
        """Remember the verifications that this process did, for the next one."""
        times = [(digest, self._verified[digest]) for digest in self._unsaved]
        self._unsaved.clear()
        await self._verifications.set_verified(times)


def _read_open(fd: int, limit: int) -> bytes:
    try:
        return os.pread(fd, limit + 1, 0)
    except OSError:
        return b""  # sectors that cannot be read are damage like any other


def _close_opened(job: asyncio.Future[tuple[int, os.stat_result] | None]) -> None:
    """Whoever wanted it has left in the meantime."""
    if not job.cancelled() and job.exception() is None:
        opened = job.result()
        if opened is not None:
            os.close(opened[0])


class WholeReader:
    """One reader of whole content (see :class:`mirror.store.reader.Reader`)."""

    def __init__(self, contents: BlobStore, digest: Digest, lease: _Lease) -> None:
        self.digest = digest
        self._blobs = contents
        self._lease = lease
        self._open = True
        lease.readers += 1

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self._lease.size

    @property
    def arrived(self) -> int:
        """All of it."""
        return self._lease.size

    async def wait(self, start: int, stop: int | None = None) -> FileExtent | None:
        """See :meth:`mirror.store.reader.Reader.wait`.

        While a verification runs the last byte of every answer waits for it, of a range as well.
        """
        if not self._open:
            raise ContentLost("this reader is closed")
        limit = self.size if stop is None else min(stop, self.size)
        if start >= limit:
            return None
        verification = self._lease.verification
        if verification is not None:
            if not verification.done() and start < limit - 1:
                return FileExtent(self._lease.fd, start, limit - 1)
            await asyncio.wait({verification})
            self.raise_if_damaged()
        return FileExtent(self._lease.fd, start, limit)

    def raise_if_damaged(self) -> None:
        """Raises :class:`DigestMismatch` if a verification has found damage."""
        verification = self._lease.verification
        if verification is not None and verification.done():
            verification.result()

    def close(self) -> None:
        """End the lease."""
        if self._open:
            self._open = False
            self._blobs.release(self.digest, self._lease)
