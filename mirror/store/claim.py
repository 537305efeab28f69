"""Who brings the bytes of growing content: we, another process, or nobody any more.

Lives here: the lock on the growing file, what an earlier holder left, signs of life, letting go.
Must not know: followers, memory, hashes.

The lock (``flock``) dies with its holder, so a crash hands the content over by itself. A holder
that is stopped keeps it; its missing signs of life say so.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mirror.events import Observer
from mirror.oci.digest import Digest
from mirror.store import disk
from mirror.store.layout import Layout

HEARTBEAT: Final = 1.0
"""Seconds between signs of life."""
_ATTEMPTS: Final = 1000


class Role(Enum):
    """What is to be done about growing content."""

    LEAD = auto()
    """Fetch it: the lock is ours."""
    TAIL = auto()
    """Another process fetches it."""
    DONE = auto()
    """It is whole."""


@dataclass(frozen=True, slots=True)
class Surroundings:
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


class Claim:
    """One process's hold on the growing file of one digest."""

    def __init__(self, surroundings: Surroundings, digest: Digest) -> None:
        self.fd: int | None = None
        self.locked = False
        self._tailed = False
        self._s = surroundings
        self._digest = digest
        self._loop = asyncio.get_running_loop()
        self._beat: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

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

    def take(self, size: int | None, served: int) -> Role:
        """Blocking: try to get hold of the lock. ``served`` bytes of it were handed out already.

        Raises ``OSError`` where the disk refuses, or the file was taken away.
        """
        layout, digest = self._s.layout, self._digest
        for _ in range(_ATTEMPTS):
            if self.fd is None:
                self.fd = disk.open_ingest(layout, digest)
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise FileExistsError(errno.EEXIST, "growing content is not a regular file")
            if not disk.try_lock(self.fd):
                self._tailed = True
                return Role.TAIL
            if self.path_is_ours:
                break
            if self.is_published:
                fcntl.flock(self.fd, fcntl.LOCK_SH)
                return Role.DONE
            if self._tailed:
                raise FileNotFoundError(errno.ENOENT, "growing content was taken away")
            self.close()
        else:
            raise FileExistsError(errno.EEXIST, "growing content changes hands without end")
        whole = disk.open_whole(layout, digest) if not self._tailed else None
        if whole is not None:
            disk.drop_ingest(layout, digest, self.opened())
            self.close()
            self.fd = whole[0]
            return Role.DONE
        self.locked = True
        self._trim(size, served)
        return Role.LEAD

    def _trim(self, size: int | None, served: int) -> None:
        """Keep of an earlier fetch's bytes only what may be resumed."""
        fd = self.opened()
        found = os.fstat(fd).st_size
        left = disk.read_state(self._s.layout, self._digest)
        state = left[0] if left is not None and left[0].boot == self._s.boot else None
        # Where nobody saw the bytes being written, only what their writer vouched for is kept.
        vouched = min(found, state.written) if state is not None else 0
        keep = found if self._tailed else vouched
        known = size if size is not None else state.size if state is not None else None
        if known is not None and keep >= known:
            # Full length would say that it is verified, and it is not.
            keep = max(0, known - 1) if keep == known else 0
        keep = max(keep, served)
        if keep != found:
            os.ftruncate(fd, keep)

    # --- signs of life ------------------------------------------------------------------------

    async def write_state(self, state: disk.IngestState) -> None:
        """Tell other processes. Raises ``OSError`` where the disk refuses."""
        while self._writing is not None:
            await asyncio.wait({self._writing})
        job = self._start_writing(state)
        await asyncio.wait({job})
        job.result()

    def _start_writing(self, state: disk.IngestState) -> asyncio.Future[None]:
        arguments = (self._s.layout, self._digest, state)
        job = self._loop.run_in_executor(self._s.io, disk.write_state, *arguments)
        self._writing = job
        job.add_done_callback(self._written)
        return job

    def _written(self, job: asyncio.Future[None]) -> None:
        self._writing = None
        # A sign of life that could not be written is one that is missed, which others notice.
        if not job.cancelled():
            job.exception()

    def start_beating(self, state: Callable[[], disk.IngestState]) -> None:
        """Write ``state()`` every second until the claim ends."""

        def beat() -> None:
            if self._writing is None:
                self._start_writing(state())
            self._beat = self._loop.call_later(HEARTBEAT, beat)

        self.stop_beating()
        self._beat = self._loop.call_later(HEARTBEAT, beat)

    def stop_beating(self) -> None:
        """No sign of life will come after this one."""
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    # --- the end --------------------------------------------------------------------------------

    async def publish(self) -> None:
        """Make the verified file durable and visible. Raises ``OSError``; then it is gone."""
        self.stop_beating()
        if self._writing is not None:
            await asyncio.wait({self._writing})
        await self._loop.run_in_executor(
            self._s.publishing,
            disk.publish,
            self._s.layout,
            self._digest,
            self.opened(),
            self._s.now(),
        )

    def drop(self) -> None:
        """Remove the file and its state: nobody shall resume it. Open descriptors go on."""
        self.stop_beating()
        if self.locked and self.fd is not None:
            disk.drop_ingest(self._s.layout, self._digest, self.fd)
            disk.drop_state(self._s.layout, self._digest)

    def begin_anew(self) -> None:
        """What was followed came to nothing before its first byte: forget it."""
        self.close()
        self._tailed = False

    def let_go(self) -> None:
        """Unlock, so that another process may go on; this one keeps reading what is there."""
        self.stop_beating()
        if self.fd is not None and self.locked:
            # Shared, not none: what is published is being read here, and is not evicted.
            fcntl.flock(self.fd, fcntl.LOCK_SH if self.is_published else fcntl.LOCK_UN)
        self.locked = False

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
