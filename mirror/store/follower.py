"""The followers of one ingest: which bytes they can read, and how they wait for more.

Lives here: the readers' half of an ingest, the wait for bytes, and the choice of the followers that
are dropped when memory is full. Must not know: upstreams, hashes, how bytes reach the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from mirror.observability.events import Uncached
from mirror.observability.traces import FetchProgress
from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError
from mirror.oci.reference import Digest
from mirror.store.ingest_lock import IngestContext, IngestLock
from mirror.store.reader import Extent, FileExtent
from mirror.store.window import Window

FOLLOWER_TIMEOUT_S: Final = 5.0
"""Seconds without free memory after which the slowest followers are dropped.

Followers that have read everything wait for this long, so it is much shorter than the 60 s after
which a client that reads nothing is disconnected.
"""


class Waiters:
    """Followers that wait for bytes that have not arrived."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def wait(self, start: int) -> None:
        """Return once there is a byte at ``start``, or once it is certain that none will arrive."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((start, future))
        await future

    def wake(self, head: int, is_closed: bool) -> None:
        """Wake the waiters for bytes before ``head``; all of them if ``is_closed``."""
        waiting, self._waiting = self._waiting, []
        for start, future in waiting:
            if future.done():
                continue  # its client has disconnected
            if start < head or is_closed:
                future.set_result(None)
            else:
                self._waiting.append((start, future))


class ReadableIngest:
    """The followers' half of one ingest. :class:`mirror.store.ingest.Ingest` adds the fetch's half.

    The fetch's side (``ingest``, ``ingest_writer``, ``other_process``) writes the attributes,
    followers read them.
    """

    def __init__(self, context: IngestContext, digest: Digest, size: int | None) -> None:
        """Start with no bytes and no role.

        Args:
            context: What the ingest needs of its store.
            digest: The name of the content.
            size: Bytes of the whole content; None while unknown.
        """
        self.context = context
        self.digest = digest
        self.size = size
        self.position = 0
        """Offset of the next byte to be fetched."""
        self.on_disk = 0
        """Bytes at the start of the content that are read from the file."""
        self.window: Window | None = None
        """The bytes after ``on_disk``, once the disk takes no more of this content; else None."""
        self.is_confirmed = False
        """Whether bytes that an earlier fetch left are known to belong to this content.

        No follower gets them before: the upstream may turn out to send something else.
        """
        self.is_verified = False
        """Whether the content is complete and its hash is the digest."""
        self.failure: MirrorError | None = None
        """Why no further byte arrives; None while the fetch runs, and after success."""
        self.followers: set[Follower] = set()
        """The followers whose bytes stay in memory. A dropped one is not in the set."""
        self.last_progress = time.monotonic()
        """When bytes last arrived, on the monotonic clock."""
        self.progress = FetchProgress()
        """Bytes that this process has received for it."""
        self.released = asyncio.Event()
        """Set once the fetch uses this ingest no more."""
        self.lock = IngestLock(context, digest, self._close_if_unused)
        self.waiters = Waiters()
        self._give_up: Callable[[], None] = lambda: None
        self._may_finish_unfollowed = True

    # --- reading ------------------------------------------------------------------------------

    @property
    def head(self) -> int:
        """Bytes that followers may have: less than all of them until the content is verified."""
        if not self.is_confirmed:
            return 0
        return self.on_disk if self.window is None else self.window.stop

    @property
    def is_closed(self) -> bool:
        """Whether no further byte arrives."""
        return self.is_verified or self.failure is not None

    def follow(self, start: int = 0) -> Follower | None:
        """Return a new follower from ``start`` on; None if bytes after it have left memory."""
        return Follower(self, start) if self.has_all_from(start) else None

    def has_all_from(self, start: int) -> bool:
        """Return whether every byte from ``start`` on can be read, now or later."""
        return self.window is None or self.window.has_all_from(start)

    def extent(self, start: int, stop: int) -> Extent:
        """Return bytes from ``start`` (below ``head``) to ``stop`` at most.

        Raises ``ContentLost`` if they cannot be read any more.
        """
        if self.window is not None and start >= self.on_disk:
            return self.window.extent(start, stop)
        if self.lock.fd is None:
            raise ContentLost("the ingest file is closed")
        return FileExtent(self.lock.fd, start, min(stop, self.on_disk))

    def wake_followers(self) -> None:
        """Wake the followers that have bytes to read; all of them once the ingest is closed."""
        self.waiters.wake(self.head, self.is_closed)
        self.count_memory()

    # --- memory, and the last follower --------------------------------------------------------

    def count_memory(self) -> None:
        """Tell the budget how many bytes are in memory: those after the last one that is on disk.

        In memory mode they begin with the first one that a follower still needs.
        """
        end = self.position
        if self.is_closed:  # Bytes that have not been written are dropped then.
            end = self.on_disk if self.window is None else self.window.stop
        start = self.on_disk if self.window is None else self.window.start
        self.context.hold_memory(self, end - start)

    def continue_in_memory(self, reason: str) -> None:
        """Store no further byte on disk; serve the rest of the content from memory.

        Followers notice nothing. ``reason`` is one of few labels, for the log and the metrics.
        """
        if self.window is None:
            self.window = Window(self.on_disk)
            self.lock.remove_file()
            self.progress.uncached = reason
            self.context.emit(Uncached(str(self.digest), reason))

    async def wait_for_memory(self) -> None:
        """Wait until the window has freed memory; drop slow followers if it takes too long.

        A follower is slow if it still needs the oldest bytes while another one has read all that
        have arrived. If no follower has read all, none is dropped. A dropped follower that waits
        for bytes again is counted again if they are still in memory. Otherwise it gets
        ``ContentLost``.
        """
        assert self.window is not None
        if not await self.window.wait_until_freed(FOLLOWER_TIMEOUT_S):
            if any(follower.position >= self.head for follower in self.followers):
                needed = self.window.first_chunk_end
                self.followers -= {f for f in self.followers if f.position < needed}
            self.on_follower_moved()

    def when_abandoned(self, give_up: Callable[[], None], *, may_finish: bool) -> None:
        """Set what to do when the last follower closes before the content is complete.

        Args:
            give_up: Called then. It ends the fetch.
            may_finish: Do not call ``give_up``, and finish the fetch, so that the content is
                stored. An ingest that continues in memory is given up anyway: it is not stored.
        """
        self._give_up, self._may_finish_unfollowed = give_up, may_finish

    def on_follower_moved(self) -> None:
        """Free memory that no follower needs, after one has read further or has closed."""
        if self.window is not None:
            self.window.slide(follower.position for follower in self.followers)
            self.count_memory()
        may_give_up = self.window is not None or not self._may_finish_unfollowed
        if may_give_up and not self.followers and not self.is_closed:
            self._give_up()
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        """Unlock the file once the fetch has ended, and close it after the last follower."""
        if self.released.is_set() and not self.lock.is_busy:
            self.lock.release(is_kept_open=bool(self.followers))


class Follower:
    """One reader of an ingest (see :class:`mirror.store.reader.Reader`)."""

    def __init__(self, ingest: ReadableIngest, position: int) -> None:
        self._ingest = ingest
        self._is_open = True
        self.position = position
        """Offset of the next byte that this follower needs."""
        ingest.followers.add(self)

    @property
    def digest(self) -> Digest:
        """The name of the content."""
        return self._ingest.digest

    @property
    def size(self) -> int | None:
        """Bytes of the whole content; None until the upstream has stated them."""
        return self._ingest.size

    @property
    def arrived(self) -> int:
        """Bytes that can be read without waiting."""
        return self._ingest.head

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """Wait for the byte at ``start`` (see :meth:`mirror.store.reader.Reader.wait`)."""
        ingest = self._ingest
        if not self._is_open:
            raise ContentLost("this reader is closed")
        if stop is not None and start >= stop:
            return None
        self.position = start
        if ingest.has_all_from(start):
            ingest.followers.add(self)  # it may have been dropped as too slow
        ingest.on_follower_moved()
        while True:
            has_wrong_bytes = isinstance(ingest.failure, DigestMismatch)
            if start < ingest.head and not has_wrong_bytes:
                return ingest.extent(start, ingest.head if stop is None else stop)
            if ingest.failure is not None:
                raise ingest.failure
            if ingest.is_verified:
                return None
            await ingest.waiters.wait(start)

    async def wait_for_size(self) -> int | None:
        """Wait until the size is known (see :meth:`mirror.store.reader.Reader.wait_for_size`)."""
        ingest = self._ingest
        # A window would be full before the end of the content: it slides with its followers.
        while ingest.size is None and ingest.window is None and not ingest.is_closed:
            await ingest.waiters.wait(ingest.head)
        if ingest.failure is not None:
            raise ingest.failure
        return ingest.size

    def close(self) -> None:
        """Stop reading. The fetch continues. Safe to call twice."""
        if not self._is_open:
            return
        self._is_open = False
        self._ingest.followers.discard(self)
        self._ingest.on_follower_moved()
