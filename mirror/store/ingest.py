"""Growing content: the meeting place of one fetch and all who want what it brings.

Lives here: one writer and many followers, in this process and (through the file) in others;
hashing beside the growth; the last bytes withheld until the digest holds. Must not know:
upstreams, HTTP, who decides to fetch.

The final batch is hashed before it is written, so the file never reaches its full length before its
digest is verified: what is in it may be handed out, and the last byte is the proof of the rest.
Where the disk refuses, the same content goes on growing in memory, in a window that slides with its
followers: they notice nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from mirror.observability.events import Uncached
from mirror.oci.errors import (
    ContentLost,
    DigestMismatch,
    MirrorError,
    UpstreamProtocolError,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Verifier
from mirror.store import disk
from mirror.store.follower import PATIENCE, Follower, Waiters, too_slow
from mirror.store.ingest_lock import IngestContext, IngestLock, Role
from mirror.store.reader import Extent, FileExtent
from mirror.store.watch import Watch
from mirror.store.window import Window

PENDING_LIMIT: Final = 8 * 1024 * 1024
"""Bytes that may wait for the disk before the read from the upstream waits for it too."""
STALLED: Final = 10.0
"""Seconds without a sign of life after which another process's fetch is not waited for."""
_AT_ONCE: Final = 0.05
_FIRST_POLL: Final = 0.002
_POLL: Final = 0.01
_POLLS_PER_LOCK: Final = 5


class Ingest:
    """Content on its way in. One fetch loop drives it; any number of followers read it."""

    def __init__(self, ingest_context: IngestContext, digest: Digest, size: int | None) -> None:
        self.digest = digest
        self.size = size
        self.failure: MirrorError | None = None
        self.verified = False
        self.followers: set[Follower] = set()
        self.last_progress = time.monotonic()
        self.position = 0
        """Offset of the next byte to be fed."""
        self._began = self.last_progress
        self._s = ingest_context
        self._lock = IngestLock(ingest_context, digest, self._close_if_unused)
        self._holder = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self._on_disk = 0
        self._confirmed = False
        """Whether what an earlier fetch left is known to belong: nobody is given it before."""
        self._room = 0
        """Offset up to which room was made on the disk."""
        self._window: Window | None = None
        self._verifier = Verifier(digest)
        self._pending: list[bytes] = []
        self._ended = False
        self._broken: MirrorError | None = None
        self._job: asyncio.Future[int] | None = None
        self._waiters = Waiters()
        self.released = asyncio.Event()
        """Set once the fetch loop has let go."""
        self._give_up: Callable[[], None] = lambda: None
        self._keep_going = True

    # --- for followers ----------------------------------------------------------------------

    @property
    def head(self) -> int:
        """Bytes that may be handed out."""
        if not self._confirmed:
            return 0
        return self._on_disk if self._window is None else self._window.stop

    @property
    def closed(self) -> bool:
        """Whether nothing more will arrive."""
        return self.verified or self.failure is not None

    def follow(self, start: int = 0) -> Follower | None:
        """Read along from ``start``; None if memory no longer holds what that would need."""
        return Follower(self, start) if self.holds_all_from(start) else None

    def holds_all_from(self, start: int) -> bool:
        """Whether every byte from ``start`` on is here, or is still to come."""
        return self._window is None or self._window.holds_all_from(start)

    def extent(self, start: int, stop: int) -> Extent:
        """Bytes that are there: ``start`` is below ``head``. Raises ``ContentLost``."""
        if self._window is not None and start >= self._on_disk:
            return self._window.extent(start, stop)
        if self._lock.fd is None:
            raise ContentLost("growing content is closed")
        return FileExtent(self._lock.fd, start, min(stop, self._on_disk))

    async def progress(self, start: int) -> None:
        """Return once there are bytes at ``start``, or there will be none."""
        await self._waiters.wait(start)

    def _wake(self) -> None:
        self._waiters.wake(self.head, self.closed)

    def moved(self) -> None:
        """A follower has moved on, or left: memory behind the last one can go."""
        if self._window is not None:
            self._window.slide(follower.position for follower in self.followers)
        unkept = self._window is not None or not self._keep_going
        if unkept and not self.followers and not self.closed:
            self._give_up()
        self._close_if_unused()

    # --- for the fetch loop -----------------------------------------------------------------

    def when_abandoned(self, give_up: Callable[[], None], *, keep: bool) -> None:
        """What to do when the last follower has left. ``keep``: go on, except in memory."""
        self._give_up, self._keep_going = give_up, keep

    async def try_lead(self) -> Role:
        """Find out who brings the bytes; become the one if nobody does."""
        if self.verified:
            return Role.DONE
        if self._lock.locked or self._window is not None:
            return Role.LEADER
        try:
            role = await self._lock.try_acquire(self.size, self._on_disk)
            if role is not Role.FOLLOWER:
                self._on_disk = self.position = self._lock.length
            if role is Role.LEADER:
                await self._lock.write_state(self._state())
                self._lock.start_heartbeat(self._state)
        except OSError as error:
            self._detach(disk.reason_of(error))
            return Role.LEADER
        if role is Role.DONE:
            self.size = self._on_disk
            self.verified = self._confirmed = True
        self._wake()
        return role

    def _state(self) -> disk.IngestState:
        state = disk.IngestState(self.size, self._s.boot, self._on_disk)
        return replace(state, holder=self._holder, kept=self._lock.kept, room=self._room)

    async def follow_other_process(self) -> None:
        """Follow another process's fetch until it is whole, or it is for us to go on.

        Raises the failure that the other process met.
        """
        watch, pause, polls = Watch(self._s.layout, self.digest), _FIRST_POLL, 0
        while not self.verified:
            grown = self._look_at_file(watch)
            self._wake()
            if self.verified:
                return await self._lock.downgrade_to_shared()
            if not self._lock.path_is_ours and not self._lock.is_published:
                if not self._on_disk:
                    return self._lock.reset()
                self._detach("handover")
            elif watch.silence > STALLED:
                self._detach("stalled")
            polls += 1
            if self._window is not None or (
                polls % _POLLS_PER_LOCK == 0 and await self.try_lead() is not Role.FOLLOWER
            ):
                return None
            pause = _POLL if grown else min(pause * 1.2, _POLL * 4)
            await asyncio.sleep(pause)
        return None

    def _look_at_file(self, watch: Watch) -> bool:
        # In this order: what is published is whole, so its length is its size.
        published = self._lock.is_published
        end = self._lock.length
        grown = end > self._on_disk
        watch.look(self._on_disk, grown=grown)
        if watch.state is not None and (self.size is None or not self._on_disk):
            self.size = watch.state.size
        if published:
            self.size = end
        self._confirmed = self._confirmed or published or watch.state is not None
        if self._confirmed:
            self._on_disk = self.position = max(self._on_disk, end)
        if grown:
            self.last_progress = time.monotonic()
        # An empty file says nothing yet, unless empty is what was asked for.
        if end == self.size and (end > 0 or self._verifier.matches()):
            self.verified = True
        return grown

    async def declare(self, size: int | None) -> None:
        """An upstream answers; ``size`` is its word on the bytes of the whole content.

        Raises :class:`UpstreamProtocolError` if it is another than that of bytes that have come.
        """
        if not self.position:
            self.size = None
        if size is not None and self.size is not None and size != self.size:
            raise UpstreamProtocolError(f"upstream offers {size} bytes, not {self.size}")
        if size is not None and size < self.position:
            raise UpstreamProtocolError(f"upstream offers {size} bytes, {self.position} are here")
        self.size = size if size is not None else self.size
        self._confirmed = True
        self._wake()
        if self._window is None:
            await self._reserve()

    async def _reserve(self) -> None:
        """Have room for what was announced, or for the next bytes where nothing was.

        It is declared before it is made, so that whoever else makes room counts it.
        """
        self._room = self.size if self.size is not None else self.position + PENDING_LIMIT
        try:
            await self._lock.write_state(self._state())
        except OSError as error:
            self._detach(disk.reason_of(error))
            return
        if not await self._s.make_room(self._room - self._on_disk):
            self._detach("full")

    def start_over(self) -> bool:
        """Forget what an earlier fetch left, where the answer does not fit to it; then ``lead``."""
        if self._confirmed or not self._on_disk:
            return False
        self._lock.discard_previous()
        self._on_disk = self.position = 0
        return True

    async def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Waits only for the disk, or for memory where there is no disk.

        Raises what the writer met: ``DigestMismatch``, ``ContentLost``, ``UpstreamProtocolError``.
        """
        end = self.position + len(chunk)
        if self.size is not None and end > self.size:
            raise UpstreamProtocolError("more bytes than were announced")
        if self._window is None and end > self._room:
            await self._written_so_far()
            await self._reserve()
        self._pending.append(chunk)
        self.position = end
        self._pump()
        while self._broken is None and self._backlog() > PENDING_LIMIT:
            if self._job is not None:
                await asyncio.wait({self._job})
            elif self._window is not None and self.followers:
                if not await self._window.room(PATIENCE):
                    self.followers -= too_slow(self.followers, self.head, self._window.next_drop)
                    self.moved()
            else:
                self.moved()
                break
        if self._broken is not None:
            raise self._broken

    async def _written_so_far(self) -> None:
        while self._job is not None:
            await asyncio.wait({self._job})

    def _backlog(self) -> int:
        return sum(map(len, self._pending)) + (len(self._window) if self._window else 0)

    async def finish(self) -> None:
        """The upstream has ended cleanly. Returns when the content is published, or given up.

        Raises ``DigestMismatch``, or ``UpstreamUnavailable`` if it ended short.
        """
        if self.size is not None and self.position < self.size:
            raise UpstreamUnavailable(f"ended at {self.position} of {self.size} bytes")
        self._ended = True
        self._pump()
        await self._written_so_far()
        if self._broken is not None:
            raise self._broken
        if self._window is None:
            await self._lock.publish(self._began)
        await self._lock.settled()

    async def fail(self, error: MirrorError) -> None:
        """End for everybody, in every process. Right bytes are kept for a resume."""
        if self.closed:
            return
        self.failure = error
        self._pending.clear()
        # Who waits learns it when nothing is left to do, or else at once.
        at_once = self._loop.call_later(_AT_ONCE, self._wake)
        try:
            await self._written_so_far()
            if self._lock.locked and self._window is None:
                await self._leave(error)
            await self._lock.settled()
        finally:
            at_once.cancel()
            self._wake()

    async def _leave(self, error: MirrorError) -> None:
        if not self._on_disk:
            self._lock.drop()  # nothing to resume, and nobody else has seen a byte
            return
        self._lock.stop_heartbeat()
        try:
            state = replace(self._state(), error=(error.code, error.message))
            await self._lock.write_state(state)
        except OSError as refused:
            self._s.emit(Uncached(str(self.digest), disk.reason_of(refused)))
        if isinstance(error, DigestMismatch | ContentLost):
            self._lock.drop(keep_state=True)  # it is what others learn the failure from

    def release(self) -> None:
        """The fetch loop lets go; followers may still read what is there."""
        self.released.set()
        if not self.closed:
            self.failure = UpstreamUnavailable("the fetch was given up")
        self._wake()
        self._close_if_unused()

    # --- the writer ---------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start the next batch if none is being written."""
        if self._job is not None or self.closed or self._broken is not None:
            return
        last = self._ended or self.position == self.size
        # Without a known size the newest chunk may be the last: it waits until that is known.
        hold = 1 if self.size is None and not last else 0
        batch = self._pending[: len(self._pending) - hold]
        if not batch and not last:
            return
        start = self.position - sum(map(len, self._pending))
        del self._pending[: len(batch)]
        append = partial(disk.append, last=last, keep=self._window is None)
        fd, verifier = self._lock.fd, self._verifier
        self._job = self._lock.run(self._s.io, append, fd, verifier, batch, start)
        self._job.add_done_callback(lambda job: self._written(job, batch, start, last))

    def _written(
        self, job: asyncio.Future[int], batch: list[bytes], start: int, last: bool
    ) -> None:
        self._job = None
        self.last_progress = time.monotonic()
        try:
            end = job.result()
            self._arrive(batch, end, last)
        except disk.ShortWrite as short:
            self._on_disk = short.end
            self._detach(disk.reason_of(short.cause))
            rest = disk.after(batch, short.end - start)
            if last:
                # The hash came first: these bytes are proven, only homeless.
                self._arrive(rest, start, last)
            else:
                self._pending[:0] = rest
        except MirrorError as error:
            self._broken = error
        except OSError as error:
            self._broken = ContentLost(f"growing content cannot be read: {error.strerror}")
        self._wake()
        self._pump()
        self._close_if_unused()

    def _arrive(self, batch: list[bytes], end: int, last: bool) -> None:
        if self._window is None:
            self._on_disk = end
        else:
            self._window.append(batch)
            self.moved()
        if last:
            self.size = self.position
            self.verified = True

    def _detach(self, reason: str) -> None:
        """Go on in memory from here: the disk keeps what it has, and gets no more."""
        if self._window is None:
            self._window = Window(self._on_disk)
            self._lock.drop()
            self._s.emit(Uncached(str(self.digest), reason))

    def _close_if_unused(self) -> None:
        if not self.released.is_set() or self._job is not None or self._lock.busy:
            return
        self._lock.release()
        if not self.followers:
            self._lock.close()
