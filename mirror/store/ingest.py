"""One ingest: content that is fetched once, and read by any number of clients meanwhile.

Theory of operation
===================
The fetch appends the content to one file, ``ingest/<algorithm>/<hex>``. No client reads from the
upstream: each one, the first one too, is a follower that reads this file as it grows. A finished
ingest is the same file, renamed to ``blobs/<algorithm>/<hex>``.

Who may write. Several processes may want the same content. Each one has an :class:`Ingest` for it,
in one of three roles (:class:`mirror.store.ingest_lock.Role`):

- LEADER: this process holds the exclusive ``flock`` of the ingest file. It alone fetches, writes
  the file, and writes the state file beside it (size, bytes written, a heartbeat every second).
- FOLLOWER: another process holds the lock. Once its state shows that it is alive, this process
  reads the file as it grows, and hands the bytes to its own followers
  (:mod:`mirror.store.other_process`).
- DONE: the content is complete and verified. No process writes any more.

::

    from        event                                              to
    (new)       the lock is free                                   LEADER
    (new)       another process holds the lock                     FOLLOWER
    (new)       the content is published, and its hash is right    DONE
    LEADER      all bytes are written, and the digest holds        DONE (then published)
    LEADER      the upstream fails                                 closed, with a failure
    FOLLOWER    the file has its full length, or is published      DONE (published here, if the
                                                                   other process has died)
    FOLLOWER    the lock is free again: the other process ended    LEADER (it resumes the fetch)
    FOLLOWER    the other process is stopped, or has a new file    LEADER, in memory
    FOLLOWER    the other process's fetch fails                    LEADER (once; then closed)
    FOLLOWER    the file lost bytes that followers already have    closed, with a failure

Why full length means verified. The last batch is hashed before it is written. If the hash is not
the digest, the batch is never written. A file that is resumed is cut below its full length first.
So a file of full length is verified, any process may hand out every byte that it finds in the file,
and no client ever gets wrong content completely: its last bytes are the proof of the others.

Where the bytes are. On disk, as long as the disk takes them. If it refuses (full, read-only, an
I/O error), or if the file was taken over by another process, the ingest continues in memory from
that offset: ``on_disk`` bytes stay in the file, the rest is in a window
(:mod:`mirror.store.window`) that slides with its followers. Followers notice nothing. The content
is not cached then, and a new follower can join only while the window still holds what it needs. An
ingest in memory needs no lock: its process fetches for itself.

How much memory. What has arrived and is not on disk, or is in the window, counts in the budget of
the process (:class:`mirror.store.ingest_writer.MemoryBudget`). An ingest that may take no more
reads nothing from its upstream until its own bytes are written, or its own followers have read.

How a crash hands over. The kernel releases the lock of a dead process. The processes that follow
try the lock several times a second. One of them gets it, keeps the bytes that it may trust
(:class:`mirror.store.ingest_lock.IngestLock`), and resumes the fetch behind them. A process that is
stopped keeps its lock; if its heartbeat is missing for 10 s, the others continue in memory.

How it ends. ``finish`` publishes the content, ``fail`` gives a failure to every follower in every
process, and ``release`` always comes last: it ends this process's hold on the file, as soon as no
thread and no follower uses it.

Lives here: the fetch's half. Followers are in :mod:`mirror.store.follower`, batches in
:mod:`mirror.store.ingest_writer`. Must not know: upstreams, HTTP, who decides to fetch.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from typing import Final

from mirror.observability.events import Uncached
from mirror.oci.errors import (
    ContentLost,
    DigestMismatch,
    MirrorError,
    UpstreamProtocolError,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.follower import ReadableIngest
from mirror.store.ingest_lock import IngestContext, Role
from mirror.store.ingest_writer import IngestWriter

RESERVE_STEP_BYTES: Final = 8 * 1024 * 1024
"""Bytes of disk space that content of unknown size asks for at a time. Each step looks once whether
there is room."""
_STATE_BYTES: Final = 64 * 1024
"""Bytes to free for the state file on a full disk: one block of any file system."""
_MAX_FAILURE_DELAY_S: Final = 0.05
"""Seconds that followers wait for a failure at most, if the disk does not respond."""


class Ingest(ReadableIngest):
    """Content while it is fetched. One fetch drives it; any number of followers read it."""

    def __init__(self, ingest_context: IngestContext, digest: Digest, size: int | None) -> None:
        """Start without a role. Call :meth:`try_lead` next.

        Args:
            ingest_context: What the ingest needs of its store.
            digest: The name of the content.
            size: Bytes of the whole content; None while unknown.
        """
        super().__init__(ingest_context, digest, size)
        self._started_at = self.last_progress
        self._holder = secrets.token_hex(8)
        self.reserved = 0
        """Offset up to which space on disk was asked for. Zero while another process fetches."""
        self.granted = 0
        """Offset up to which space on disk may be used: the last ``reserved`` that got room."""
        self._writer = IngestWriter(self)

    @property
    def is_led(self) -> bool:
        """Whether this process fetches, and not another one."""
        return self.lock.is_locked or self.window is not None

    async def try_lead(self) -> Role:
        """Try to become the process that fetches.

        Returns:
            ``LEADER`` if this process has the lock, or continues in memory; fetch from
            ``position`` on. ``FOLLOWER`` if another process has the lock. ``DONE`` if the content
            is complete.

        Raises:
            ContentLost: The file is shorter than what followers already have.
        """
        if self.is_verified:
            return Role.DONE
        if self.is_led:
            return Role.LEADER
        try:
            role = await self.lock.try_acquire(self.size, self.on_disk)
            if role is not Role.FOLLOWER:
                self.on_disk = self.position = self.lock.length
            if role is Role.LEADER:
                await self._write_state()
                self.lock.start_heartbeat(self._state)
        except OSError as error:
            self.continue_in_memory(disk.reason_of(error))
            return Role.LEADER
        if role is Role.DONE:
            self.size = self.on_disk
            self.is_verified = self.is_confirmed = True
        self.wake_followers()
        return role

    async def _write_state(self) -> None:
        """Write the state file. A full disk is evicted for first. Raises ``OSError``."""
        try:
            await self.lock.write_state(self._state())
        except OSError as error:
            is_full = disk.reason_of(error) == "full"
            if not is_full or not await self.context.make_room(_STATE_BYTES):
                raise
            await self.lock.write_state(self._state())

    def _state(self) -> disk.IngestState:
        return disk.IngestState(
            size=self.size,
            boot=self.context.boot,
            written=self.on_disk,
            holder=self._holder,
            beat=time.monotonic(),
            resumed_from=self.lock.resumed_from,
            reserved=self.reserved,
        )

    async def declare(self, size: int | None) -> None:
        """Confirm that the upstream sends this content, before its first byte is fed.

        From here on followers get the bytes that an earlier fetch left.

        Args:
            size: Bytes of the whole content; None if the upstream does not state them.

        Raises:
            UpstreamProtocolError: ``size`` contradicts the bytes that have arrived.
        """
        if not self.position:
            self.size = None
        if size is not None and self.size is not None and size != self.size:
            raise UpstreamProtocolError(f"upstream states {size} bytes, expected {self.size}")
        if size is not None and size < self.position:
            raise UpstreamProtocolError(
                f"upstream states {size} bytes, {self.position} have arrived"
            )
        self.size = size if size is not None else self.size
        self.progress.began = self.progress.began or time.monotonic()
        self.is_confirmed = True
        self.wake_followers()
        if self.window is None:
            await self._reserve_space()

    async def _reserve_space(self) -> None:
        """Ask for space for the whole content, or for the next bytes if its size is unknown.

        The need is published in the state file first, so that an eviction in another process counts
        it.
        """
        self.reserved = self.size if self.size is not None else self.position + RESERVE_STEP_BYTES
        try:
            await self._write_state()
        except OSError as error:
            self.continue_in_memory(disk.reason_of(error))
            return
        if await self.context.make_room(self.reserved - self.on_disk):
            self.granted = self.reserved
        else:
            self.continue_in_memory("full")

    def start_over(self) -> bool:
        """Discard the bytes of an earlier fetch, which the upstream's response does not continue.

        Returns:
            True if they are discarded: call :meth:`try_lead` again. False if there are none, or if
            followers may already have them.
        """
        if self.is_confirmed or not self.on_disk:
            return False
        self.lock.discard_previous()
        self.on_disk = self.position = 0
        return True

    async def feed(self, chunk: bytes) -> None:
        """Add the next bytes. Waits for the disk; for followers only if the disk takes no more.

        Raises:
            UpstreamProtocolError: The content would be longer than its declared size.
            DigestMismatch: The content is complete and wrong.
            ContentLost: The ingest file cannot be read.
        """
        end = self.position + len(chunk)
        if self.size is not None and end > self.size:
            raise UpstreamProtocolError("upstream sent more bytes than it stated")
        if self.window is None and end > self.reserved:
            await self._writer.wait_until_written()
            await self._reserve_space()
        self.progress.bytes += len(chunk)
        self.progress.latest = time.monotonic()
        await self._writer.write(chunk)

    # --- the ends -----------------------------------------------------------------------------

    async def finish(self) -> None:
        """End successfully: verify the content and publish it.

        Returns once it is published, or once the disk has refused it (the followers get it anyway).

        Raises:
            UpstreamUnavailable: Bytes are missing.
            DigestMismatch: The content is wrong.
            ContentLost: The ingest file cannot be read.
        """
        if self.size is not None and self.position < self.size:
            raise UpstreamUnavailable(f"ended at {self.position} of {self.size} bytes")
        is_new_size = self.size is None
        await self._writer.write_last()
        if self.window is None:
            if is_new_size:
                # Other processes need the size to see that the content is complete. Publishing it
                # may take half a minute.
                with suppress(OSError):  # They see it once it is published, then.
                    await self.lock.write_state(self._state())
            await self.lock.publish(self._started_at)
        await self.lock.wait_for_threads()

    async def end_following(self) -> None:
        """End successfully: another process has fetched all, and this one has seen it.

        That process publishes the content. If it has died before it could, this one does.
        """
        if await self.lock.acquire_when_complete(self.on_disk):
            await self.lock.publish(self._started_at)
            await self.lock.wait_for_threads()

    async def fail(self, error: MirrorError) -> None:
        """End with a failure for all followers, in all processes.

        Bytes on disk are kept for a resume, except after a digest mismatch or lost content. Does
        nothing after another end.
        """
        if self.is_closed:
            return
        self.failure = error
        self._writer.discard_pending()
        # Followers learn of the failure when all is done here, so that a client that tries again
        # finds the lock free. A disk that hangs delays them by 50 ms at most.
        wake = asyncio.get_running_loop().call_later(_MAX_FAILURE_DELAY_S, self.wake_followers)
        try:
            await self._writer.wait_until_written()
            if self.lock.is_locked and self.window is None:
                await self._leave_file(error)
            await self.lock.wait_for_threads()
        finally:
            wake.cancel()
            self.wake_followers()

    async def _leave_file(self, error: MirrorError) -> None:
        """Leave the file for a resume and the error for other processes, as far as they make sense.

        A file without a byte is removed: there is nothing to resume, and no other process has
        handed out any byte.
        """
        if not self.on_disk:
            self.lock.remove_file()
            return
        self.lock.stop_heartbeat()
        try:
            state = replace(self._state(), error=(error.code, error.message))
            await self.lock.write_state(state)
        except OSError as refusal:
            self.context.emit(Uncached(str(self.digest), disk.reason_of(refusal)))
        if isinstance(error, DigestMismatch | ContentLost):
            # Other processes learn the failure from the state file, so that one stays.
            self.lock.remove_file(is_state_kept=True)

    def release(self) -> None:
        """End the fetch's use of this ingest. Always the last call; never waits.

        The file is unlocked once no thread uses it, and closed after the last follower. Without
        ``finish`` or ``fail`` before, followers get ``UpstreamUnavailable``, and the bytes on disk
        are kept.
        """
        self.released.set()
        if not self.is_closed:
            self.failure = UpstreamUnavailable("the fetch was given up")
            self._writer.discard_pending()
        self.wake_followers()
        self.on_follower_moved()
