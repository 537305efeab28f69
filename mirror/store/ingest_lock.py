"""Who brings the bytes of growing content: we, another process, or nobody any more.

Lives here: the lock on the growing file, what an earlier holder left, signs of life, letting go.
Must not know: followers, memory, hashes in progress.

The lock (``flock``) dies with its holder, so a crash hands the content over by itself. A holder
that is stopped keeps it; its missing signs of life say so.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeVar

from mirror.observability.events import Observer, Published, Uncached
from mirror.oci.errors import ContentLost, DigestMismatch
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout

T = TypeVar("T")

HEARTBEAT_S: Final = 1.0
"""Seconds between signs of life."""
_JUST_NOW: Final = 3 * HEARTBEAT_S
_ATTEMPTS: Final = 1000
_SHARE_ATTEMPTS, _SHARE_PAUSE = 1200, 0.05
"""A minute: an ``fsync`` may take half of that."""


class Role(Enum):
    """What is to be done about growing content."""

    LEADER = auto()
    """Fetch it: the lock is ours."""
    FOLLOWER = auto()
    """Another process fetches it."""
    DONE = auto()
    """It is whole."""


@dataclass(frozen=True, slots=True)
class IngestContext:
    """What growing content needs of its store."""

    layout: Layout
    io: Executor
    publishing: Executor
    """Apart from ``io``: an ``fsync`` may take half a minute, and writes must not wait for it."""
    emit: Observer
    make_room: Callable[[int], Awaitable[bool]]
    published: Callable[[Digest], Awaitable[None]]
    now: Callable[[], float]
    """Seconds since the epoch."""
    boot: str


class IngestLock:
    """One process's hold on the growing file of one digest."""

    def __init__(
        self,
        ingest_context: IngestContext,
        digest: Digest,
        when_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.fd: int | None = None
        self.locked = False
        self.kept = 0
        """Bytes of an earlier fetch that were there when the lock became ours."""
        self._has_followed = False
        self._must_replace = False
        self._s = ingest_context
        self._digest = digest
        self._when_idle = when_idle
        self._loop = asyncio.get_running_loop()
        self._jobs: set[asyncio.Future[Any]] = set()
        self._heartbeat: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

    # --- threads --------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a thread is using the file: it must stay open, and locked, until it is done."""
        return bool(self._jobs)

    def run(self, executor: Executor, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """``work`` in a thread. Wait for it with ``outcome``: a thread is not ended by a cancel."""
        job = self._loop.run_in_executor(executor, work, *arguments)
        self._jobs.add(job)
        job.add_done_callback(self._done)
        return job

    def _done(self, job: asyncio.Future[Any]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            job.exception()  # for whoever waits; nobody may
        if not self._jobs:
            self._when_idle()

    async def settled(self) -> None:
        """Wait until no thread uses the file."""
        while self._jobs:
            await asyncio.wait(self._jobs)

    # --- the file -------------------------------------------------------------------------------

    @property
    def path_is_ours(self) -> bool:
        """Whether the ingest path still names the file that is open here."""
        return self.fd is not None and disk.is_at(self.fd, self._s.layout.ingest(self._digest))

    @property
    def is_published(self) -> bool:
        """Whether the open file is what the digest's path under ``blobs/`` names."""
        return self.fd is not None and disk.is_at(self.fd, self._s.layout.blob(self._digest))

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.opened()).st_size

    def opened(self) -> int:
        """The descriptor of the growing file."""
        if self.fd is None:
            raise OSError(errno.EBADF, "growing content is closed")
        return self.fd

    # --- the lock -------------------------------------------------------------------------------

    async def try_acquire(self, size: int | None, served: int) -> Role:
        """Try to get hold of the lock. ``served`` bytes of it were handed out already.

        Raises ``OSError`` where the disk refuses, or the file was taken away, and ``ContentLost``
        if it is shorter than what was handed out.
        """
        return await wait_for_thread(self.run(self._s.io, self._try_acquire, size, served))

    def _try_acquire(self, size: int | None, served: int) -> Role:
        layout, digest = self._s.layout, self._digest
        if self._must_replace:
            self._remove()
            self._close()
        for _ in range(_ATTEMPTS):
            if self.fd is None:
                self.fd = disk.open_ingest(layout, digest)
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise FileExistsError(errno.EEXIST, "growing content is not a regular file")
            if not disk.try_lock(self.fd):
                self._has_followed = True
                return Role.FOLLOWER
            if self.path_is_ours:
                break
            if self.is_published:
                fcntl.flock(self.fd, fcntl.LOCK_SH)
                return Role.DONE
            if self._has_followed:
                raise FileNotFoundError(errno.ENOENT, "growing content was taken away")
            self._close()
        else:
            raise FileExistsError(errno.EEXIST, "growing content changes hands without end")
        whole = self._find_whole() if not self._has_followed else None
        if whole is not None:
            self._remove()
            self._close()
            self.fd = whole
            return Role.DONE
        self.locked = True
        self.kept = self._trim(size, served)
        return Role.LEADER

    def _find_whole(self) -> int | None:
        """Content that was published before the lock was ours: hashed, since nobody else did."""
        opened = disk.open_whole(self._s.layout, self._digest)
        if opened is None:
            return None
        fd, status = opened
        try:
            disk.verify(fd, status.st_size, self._digest)
        except DigestMismatch:
            disk.quarantine(self._s.layout, self._digest, fd)
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _trim(self, size: int | None, served: int) -> int:
        """Keep of an earlier fetch's bytes only what may be resumed; returns how many."""
        fd = self.opened()
        found = os.fstat(fd).st_size
        if found < served:
            raise ContentLost("growing content was cut")
        left = disk.read_state(self._s.layout, self._digest)
        state = left[0] if left is not None and left[0].boot == self._s.boot else None
        # Where nobody saw the bytes being written, only what their writer vouched for is kept.
        vouched = min(found, state.written) if state is not None else 0
        if left is not None and state is not None and state.error is None:
            # One that died a moment ago vouched for the rest by dying: others may have it.
            vouched = found if 0 <= self._s.now() - left[1] <= _JUST_NOW else vouched
        keep = found if self._has_followed else vouched
        known = size if size is not None else state.size if state is not None else None
        if known is not None and keep >= known:
            # Full length would say that it is verified, and it is not.
            keep = max(0, known - 1) if keep == known else 0
        keep = max(keep, served)
        if keep != found:
            os.ftruncate(fd, keep)
        return keep

    def discard_previous(self) -> None:
        """What is there does not belong: begin anew when the lock is taken next.

        In another file, so that whoever is reading this one does not get a mixture.
        """
        self.stop_heartbeat()
        self.locked, self._must_replace = False, True

    # --- signs of life ------------------------------------------------------------------------

    async def write_state(self, state: disk.IngestState) -> None:
        """Tell other processes. Raises ``OSError`` where the disk refuses."""
        while self._writing is not None:
            await asyncio.wait({self._writing})
        await wait_for_thread(self._start_writing(state))

    def _start_writing(self, state: disk.IngestState) -> asyncio.Future[None]:
        arguments = (self._s.layout, self._digest, state)
        # A sign of life that could not be written is one that is missed, which others notice.
        job = self.run(self._s.io, disk.write_state, *arguments)
        self._writing = job
        job.add_done_callback(self._written)
        return job

    def _written(self, job: asyncio.Future[None]) -> None:
        self._writing = None

    def start_heartbeat(self, state: Callable[[], disk.IngestState]) -> None:
        """Write ``state()`` every second until the claim ends."""

        def beat() -> None:
            if self._writing is None:
                self._start_writing(state())
            self._heartbeat = self._loop.call_later(HEARTBEAT_S, beat)

        self.stop_heartbeat()
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, beat)

    def stop_heartbeat(self) -> None:
        """No sign of life will come after this one."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    # --- the end --------------------------------------------------------------------------------

    async def publish(self, began: float) -> None:
        """Make the verified file durable and visible; where the disk refuses, it is gone.

        ``began``: when its fetch did, on the monotonic clock.
        """
        self.stop_heartbeat()
        await self.settled()
        layout, digest, now = self._s.layout, self._digest, self._s.now()
        try:
            fd, size = self.opened(), self.length
            await wait_for_thread(
                self.run(self._s.publishing, disk.publish, layout, digest, fd, now)
            )
        except OSError as error:
            self._s.emit(Uncached(str(digest), disk.reason_of(error)))
            return
        await self._s.published(digest)
        self._s.emit(Published(str(digest), size, time.monotonic() - began))

    def drop(self, *, keep_state: bool = False) -> None:
        """Remove the file and its state: nobody shall resume it. Open descriptors go on."""
        self.stop_heartbeat()
        if self.locked and self.fd is not None:
            self.run(self._s.io, self._remove, keep_state)

    def _remove(self, keep_state: bool = False) -> None:
        # The state first: without the file, it would be somebody else's.
        if self.path_is_ours and not keep_state:
            disk.drop_state(self._s.layout, self._digest)
        disk.drop_ingest(self._s.layout, self._digest, self.opened())

    async def downgrade_to_shared(self) -> None:
        """Hold what another process verified against eviction, once that one has published it."""
        for _ in range(_SHARE_ATTEMPTS):
            if self.fd is None or os.fstat(self.fd).st_nlink == 0:
                return
            try:
                fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_SHARE_PAUSE)
            else:
                return

    def reset(self) -> None:
        """What was followed came to nothing before its first byte: forget it."""
        self.close()
        self._has_followed = False

    def release(self) -> None:
        """Unlock, so that another process may go on; this one keeps reading what is there."""
        self.stop_heartbeat()
        if self.fd is not None and (self.locked or self._must_replace):
            # Shared, not none: what is published is being read here, and is not evicted.
            kind = fcntl.LOCK_SH | fcntl.LOCK_NB if self.is_published else fcntl.LOCK_UN
            with suppress(BlockingIOError):
                fcntl.flock(self.fd, kind)
        self.locked = False

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, self.fd = self.fd, None
        if fd is not None:
            disk.close(fd, self._s.io)

    def _close(self) -> None:
        """In the thread."""
        fd, self.fd, self._must_replace = self.opened(), None, False
        os.close(fd)


async def wait_for_thread(job: asyncio.Future[T]) -> T:
    """What a thread brings. Whoever waits may be cancelled: the thread goes on, and ends well."""
    await asyncio.wait({job})
    return job.result()
