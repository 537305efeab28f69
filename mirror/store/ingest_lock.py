"""The lock of one ingest: says which process fetches, and what it may keep of an earlier fetch.

Lives here: the lock on the ingest file, the decision about bytes that were left there, the
heartbeat, publishing and removing. Must not know: followers, memory, hashes in progress.

The lock is a ``flock``. The kernel releases it when its holder dies, so a crash hands the content
over to another process. A stopped holder keeps it. Other processes see then that its heartbeat is
missing.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import time
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeVar

from mirror.observability.events import Observer, Published, Uncached
from mirror.oci.errors import ContentLost, DigestMismatch
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.quarantine import quarantine

T = TypeVar("T")

HEARTBEAT_S: Final = 1.0
"""Seconds between two heartbeats: seldom enough to cost nothing, and ten fit into the 10 s after
which other processes do not wait any longer."""
_RECENT_DEATH_S: Final = 3 * HEARTBEAT_S
"""A holder whose last heartbeat is at most this many seconds old counts as one that has just died.

Three heartbeats, because two may be late.
"""
_MAX_LOCK_ATTEMPTS: Final = 1000
"""Files that may be unlinked between opening and locking, one after the other.

Each attempt means that another process ended an ingest just then, so a few suffice in practice.
"""
_SHARE_PAUSE_S: Final = 0.05
"""Seconds between two attempts to share the lock of content that another process publishes."""
_MAX_SHARE_ATTEMPTS: Final = 1200
"""Attempts to share the lock: a minute of them, because an ``fsync`` may take half a minute."""


class Role(Enum):
    """The role of this process for one ingest."""

    LEADER = auto()
    """It holds the lock, and has to fetch."""
    FOLLOWER = auto()
    """Another process holds the lock, and fetches."""
    DONE = auto()
    """The content is complete. No process fetches."""


@dataclass(frozen=True, slots=True)
class IngestContext:
    """The parts of a store that an ingest uses."""

    layout: Layout
    io: Executor
    """Threads that open, read, hash and write."""
    heartbeats: Executor
    """The one thread that changes state files. No write of content delays a heartbeat there."""
    publishing: Executor
    """Threads that publish. An ``fsync`` may take half a minute; writes must not wait for it."""
    emit: Observer
    hold_memory: Callable[[Hashable, int], None]
    """Records how many bytes of memory an ingest holds."""
    may_take_memory: Callable[[Hashable], bool]
    """Returns whether an ingest may take a further chunk into memory."""
    make_room: Callable[[int], Awaitable[bool]]
    """Evicts content until the given number of bytes fits. Returns False if it cannot fit."""
    on_verified: Callable[[Digest, int], Awaitable[None]]
    """Called with verified content and its bytes before it is published. Records both."""
    now: Callable[[], float]
    """Seconds since the epoch."""
    boot: str
    """The kernel's boot id (see :func:`mirror.store.disk.boot_id`)."""


class IngestLock:
    """One process's hold on the ingest file of one digest.

    It ends in one of three ways: ``publish`` (a success), ``remove_file`` (nothing to resume), or
    neither (the file stays for a resume). After each of them, ``release`` unlocks and closes.
    """

    def __init__(
        self, context: IngestContext, digest: Digest, when_idle: Callable[[], None] = lambda: None
    ) -> None:
        """Start without a file.

        Args:
            context: What the ingest needs of its store.
            digest: The name of the content.
            when_idle: Called in the event loop each time that the last thread is done with the
                file.
        """
        self.fd: int | None = None
        """The ingest file, or the published file after that; None if none is open."""
        self.is_locked = False
        """Whether this process holds the exclusive lock."""
        self.resumed_from = 0
        """Bytes of an earlier fetch that were kept when this process got the lock."""
        self.has_followed = False
        """Whether this process has read from the open file while another one was writing it. That
        needs a live state (:class:`mirror.store.other_process.LeaderState`): a lock alone proves
        nothing, because an eviction or a scan of the directories holds it for a moment, too."""
        self._is_to_be_replaced = False
        """Whether the open file has to be replaced by a new one before it is written."""
        self._context = context
        self._layout = context.layout
        self._digest = digest
        self._when_idle = when_idle
        self._loop = asyncio.get_running_loop()
        self._jobs: set[asyncio.Future[Any]] = set()
        self._heartbeat: asyncio.TimerHandle | None = None

    # --- threads --------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a thread uses the file. It has to stay open and locked until then."""
        return bool(self._jobs)

    def run_in_thread(
        self,
        executor: Executor,
        work: Callable[..., T],
        *arguments: Any,
        when_done: Callable[[asyncio.Future[T]], None] = lambda job: None,
    ) -> asyncio.Future[T]:
        """Run ``work(*arguments)`` in a thread, and keep the file open and locked until its end.

        Await the result with :func:`wait_for_thread`: a cancelled waiter does not stop a thread.

        Args:
            executor: Runs it.
            work: Blocks.
            arguments: Passed to ``work``.
            when_done: Called in the event loop with the finished future. It may start the next job:
                the file is not closed between the two.
        """
        job = self._loop.run_in_executor(executor, work, *arguments)
        self._jobs.add(job)
        job.add_done_callback(when_done)
        job.add_done_callback(self._on_job_done)
        return job

    def _on_job_done(self, job: asyncio.Future[Any]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            job.exception()  # marked as retrieved, so asyncio logs nothing if nobody waits
        if not self._jobs:
            self._when_idle()

    async def wait_for_threads(self) -> None:
        """Wait until no thread uses the file."""
        while self._jobs:
            await asyncio.wait(self._jobs)

    # --- the file -------------------------------------------------------------------------------

    @property
    def is_path_ours(self) -> bool:
        """Whether the ingest path still names the open file."""
        return self.fd is not None and disk.is_at(self.fd, self._layout.ingest(self._digest))

    @property
    def is_published(self) -> bool:
        """Whether the digest's path under ``blobs/`` names the open file."""
        return self.fd is not None and disk.is_at(self.fd, self._layout.blob(self._digest))

    @property
    def length(self) -> int:
        """Bytes in the file. Raises ``OSError`` if it is closed."""
        return os.fstat(self._require_open()).st_size

    def _require_open(self) -> int:
        if self.fd is None:
            raise OSError(errno.EBADF, "the ingest file is closed")
        return self.fd

    # --- the lock -------------------------------------------------------------------------------

    async def try_acquire(self, expected_size: int | None, served: int) -> Role:
        """Try to lock the ingest file, which is created if it does not exist.

        Args:
            expected_size: Bytes of the whole content; None if unknown.
            served: Bytes that clients already have. The file is never cut below this.

        Returns:
            ``LEADER`` if the lock is ours; ``resumed_from`` bytes are in the file then.
            ``FOLLOWER`` if another process holds it. ``DONE`` if the content is published; the open
            file is the published one then.

        Raises:
            OSError: The disk refuses, or the file that was followed has been removed.
            ContentLost: The file is shorter than ``served``.
        """
        job = self.run_in_thread(self._context.io, self._try_acquire, expected_size, served)
        return await wait_for_thread(job)

    def _try_acquire(self, expected_size: int | None, served: int) -> Role:
        if self._is_to_be_replaced:
            self._unlink()
            self._close_blocking()
        for _ in range(_MAX_LOCK_ATTEMPTS):
            if self.fd is None:
                self.fd = disk.open_ingest(self._layout, self._digest)
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise FileExistsError(errno.EEXIST, "the ingest file is not a regular file")
            if not disk.try_lock(self.fd):
                return Role.FOLLOWER
            if self.is_path_ours:
                break
            if self.is_published:
                fcntl.flock(self.fd, fcntl.LOCK_SH)
                return Role.DONE
            if self.has_followed:
                raise FileNotFoundError(errno.ENOENT, "the ingest file was removed")
            self._close_blocking()
        else:
            raise FileExistsError(errno.EEXIST, "the ingest file is replaced again and again")
        published = self._open_published() if not self.has_followed else None
        if published is not None:
            self._unlink()
            self._close_blocking()
            self.fd = published
            return Role.DONE
        self.is_locked = True
        self.resumed_from = self._cut_to_trusted(expected_size, served)
        return Role.LEADER

    def _open_published(self) -> int | None:
        """Open content that was published before this process got the lock; None if there is none.

        It is hashed here, because no reader in this process has verified it.
        """
        opened = disk.open_whole(self._layout, self._digest)
        if opened is None:
            return None
        fd, status = opened
        try:
            disk.verify(fd, status.st_size, self._digest)
        except DigestMismatch:
            quarantine(self._layout, self._digest, fd)
            os.close(fd)
            return None
        except OSError:  # It cannot be read. These bytes take its place.
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _cut_to_trusted(self, expected_size: int | None, served: int) -> int:
        """Cut the file to the bytes of an earlier fetch that may be resumed; returns how many."""
        fd = self._require_open()
        length = os.fstat(fd).st_size
        if length < served:
            raise ContentLost("the ingest file was cut")
        record = disk.read_state(self._layout, self._digest)
        # Unsynced bytes of another boot may be anything.
        state = record[0] if record is not None and record[0].boot == self._context.boot else None
        # Trust only the `written` bytes that the last holder recorded in the state file.
        trusted = min(length, state.written) if state is not None else 0
        if state is not None and state.error is None and state.is_recent(_RECENT_DEATH_S):
            # The holder has just died. Another process may already have served bytes after
            # `written`. Keep them.
            trusted = length
        # This process has seen the bytes being written.
        keep = length if self.has_followed else trusted
        size = expected_size
        if size is None and state is not None:
            size = state.size
        if size is not None and keep >= size:
            # Full length would mean that the content is verified, and it is not.
            keep = max(0, size - 1) if keep == size else 0
        keep = max(keep, served)
        if keep != length:
            os.ftruncate(fd, keep)
        return keep

    def discard_previous(self) -> None:
        """Give up the bytes of an earlier fetch: the next ``try_acquire`` opens a new file.

        The old file is not cut, so that other processes that read it never get a mixture.
        """
        self.stop_heartbeat()
        self.is_locked, self._is_to_be_replaced = False, True

    # --- the state file ---------------------------------------------------------------------------
    # One thread writes and removes all state files, so each one changes in the order of the calls.

    async def write_state(self, state: disk.IngestState) -> None:
        """Write the state file, for other processes. Raises ``OSError`` if the disk refuses."""
        arguments = (self._layout, self._digest, state)
        await wait_for_thread(
            self.run_in_thread(self._context.heartbeats, disk.write_state, *arguments)
        )

    def start_heartbeat(self, state: Callable[[], disk.IngestState]) -> None:
        """Write ``state()`` every second until :meth:`stop_heartbeat`.

        A heartbeat that the disk refuses is a missing one, which other processes notice.
        """
        arguments = (self._context.heartbeats, disk.write_state, self._layout, self._digest)
        job: asyncio.Future[None] | None = None

        def beat() -> None:
            nonlocal job
            if job is None or job.done():
                job = self.run_in_thread(*arguments, state())
            self._heartbeat = self._loop.call_later(HEARTBEAT_S, beat)

        self.stop_heartbeat()
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, beat)

    def stop_heartbeat(self) -> None:
        """Start no further heartbeat. A thread that is writing one finishes it."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    # --- the end --------------------------------------------------------------------------------

    async def publish(self, started_at: float) -> None:
        """Make the verified file durable and visible under ``blobs/``.

        If the disk refuses, the file is removed and its descriptor stays readable.

        Args:
            started_at: When the ingest started, on the monotonic clock; for its duration.
        """
        self.stop_heartbeat()
        await self.wait_for_threads()
        digest, now = self._digest, self._context.now()
        try:
            fd, size = self._require_open(), self.length
            # Before it can be opened: a process without this record would hash all of it again.
            await self._context.on_verified(digest, size)
            arguments = (self._layout, digest, fd, now)
            job = self.run_in_thread(self._context.publishing, disk.publish, *arguments)
            await wait_for_thread(job)
        except OSError as error:
            self._context.emit(Uncached(str(digest), disk.reason_of(error)))
            return
        self._context.emit(Published(str(digest), size, time.monotonic() - started_at))

    def remove_file(self, *, is_state_kept: bool = False) -> None:
        """Unlink the file if the lock is ours, so that no process resumes it. Runs in a thread.

        Open descriptors stay readable, here and in other processes.

        Args:
            is_state_kept: Leave the state file, from which other processes learn the failure.
        """
        self.stop_heartbeat()
        if self.is_locked and self.fd is not None:
            self.run_in_thread(self._context.heartbeats, self._unlink, is_state_kept)

    def _unlink(self, is_state_kept: bool = False) -> None:
        # The state file goes first. Once the ingest file is gone, another process may create both
        # anew, and its state file must not be removed.
        if self.is_path_ours and not is_state_kept:
            disk.drop_state(self._layout, self._digest)
        disk.drop_ingest(self._layout, self._digest, self._require_open())

    async def acquire_when_complete(self, size: int) -> bool:
        """Wait until another process has published its complete file, and take a shared lock.

        A shared lock protects the content from eviction. Gives up after a minute, or at once if the
        file was unlinked. Readers keep their descriptor.

        Args:
            size: Bytes of the whole content.

        Returns:
            True if the other process has ended before it could publish: the exclusive lock is ours,
            and :meth:`publish` is next.
        """
        for _ in range(_MAX_SHARE_ATTEMPTS):
            if self.fd is None or os.fstat(self.fd).st_nlink == 0:
                return False
            is_published = self.is_published
            kind = fcntl.LOCK_SH if is_published else fcntl.LOCK_EX
            with suppress(BlockingIOError):
                fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
                if is_published:
                    return False
                # It may have been published before we got the lock: then that is shared next.
                if self.is_path_ours and self.length == size:
                    self.is_locked = True
                    return True
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            await asyncio.sleep(_SHARE_PAUSE_S)
        return False

    def release(self, *, is_kept_open: bool = False) -> None:
        """Unlock the file, so that another process may fetch, and close it. Safe to call twice.

        Args:
            is_kept_open: Leave the file open for followers in this process. A published file keeps
                a shared lock then, which protects it from eviction.
        """
        self.stop_heartbeat()
        if self.fd is not None and (self.is_locked or self._is_to_be_replaced):
            kind = fcntl.LOCK_SH | fcntl.LOCK_NB if self.is_published else fcntl.LOCK_UN
            with suppress(BlockingIOError):
                fcntl.flock(self.fd, kind)
        self.is_locked = False
        if not is_kept_open and self.fd is not None:
            fd, self.fd, self.has_followed = self.fd, None, False
            disk.close(fd, self._context.io)

    def _close_blocking(self) -> None:
        fd, self.fd = self._require_open(), None
        self._is_to_be_replaced = self.has_followed = False
        os.close(fd)


async def wait_for_thread(job: asyncio.Future[T]) -> T:
    """Wait for a thread's result.

    Cancelling the waiter does not stop the thread, and its exception is not lost.
    """
    await asyncio.wait({job})
    return job.result()
