"""Read one blob by several connections, in order.

Lives here: the tasks that fetch pieces, and what is done when one fails. The policy is elsewhere:
which bytes (:mod:`mirror.pull.pieces`), how many connections (:mod:`mirror.pull.ramp`), how many in
all (:mod:`mirror.pull.connection_budget`). Must not know: the ingest, other sources, HTTP.

Theory of operation. The fetch loop gets one iterator of chunks in order, as from one connection, so
the ingest file grows only at its front. As long as one connection is enough, its chunks are passed
on as they come. Otherwise each connection has a task that puts its chunks into a piece, and the
front of the pieces is passed on. The tasks belong to a group that ends with the transfer.

What fails. A connection that fails gives its piece back. The transfer ends only when no connection
is left, with the error of the last one:

- If that one broke, the fetch loop sends the next request. So it decides about a pause, and about
  another endpoint. A connection that waits behind the front does not count.
- If it was refused, the transfer asks for the rest by one request, or waits, at most for
  ``limits.idle``. A refusal that is repeated ends it.

The limits of a body, ``limits.idle`` and ``limits.min_rate``, hold for all connections together,
too: a connection that is cut as late never reaches its own.

A refusal of a further connection says nothing about the content, so the error is never a refusal.
What has arrived ahead is kept for the next transfer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from mirror.observability.events import (
    BackedOff,
    BackOffReason,
    ConnectionsChanged,
    Kind,
    Observer,
    PieceCut,
    RequestRecord,
)
from mirror.oci.errors import (
    FailureScope,
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.pieces import Piece, Pieces, piece_size
from mirror.pull.ramp import Ramp, Step
from mirror.pull.requests import ContentSource
from mirror.store.ingest_writer import MemoryBudget
from mirror.upstream.api import MIN_PROGRESS_BYTES, ContentStream, Registry

_TICK_S: Final = 0.1
"""Seconds between two looks at the rates: a fourth of a measurement."""
_BUFFER_BYTES: Final = 512 * 1024
"""Bytes of the front piece that wait to be handed out before its connection pauses: two reads of a
socket, so that it does not wait for the loop."""
_MEMORY_SHARE: Final = 11 / 12
"""Part of the memory ahead that pieces may fill: 44 of 48 MiB. The rest is for requests of single
parts (:mod:`mirror.pull.aside`), so that lazy clients need not wait for a large fetch."""
_RETRY_AFTER_S: Final = 1.0
"""Seconds to wait after a 429 at least, and twice as many after each further one. ``Retry-After``
may ask for more. The number of connections was accepted before, so the server may count one that
has just ended."""
_SHORT_WAIT_S: Final = 2.0
"""Seconds for which a transfer rather has no connection than one request too many."""


class ParallelReader:
    """Reads the transfers of one fetch, and keeps what has arrived ahead between them."""

    def __init__(
        self,
        connections: ConnectionBudget,
        memory: MemoryBudget,
        emit: Observer,
        pull: RequestRecord,
    ) -> None:
        """Start without a transfer.

        Args:
            connections: The connections of this process.
            memory: The memory of this process.
            emit: Receives the events of connections.
            pull: Record of the request that has brought the source.
        """
        self.connections = connections
        self.memory = memory
        self.pull = pull
        self.emit = emit
        self._pieces: Pieces | None = None

    @asynccontextmanager
    async def read(
        self, stream: ContentStream, source: ContentSource, position: int
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield an iterator of the bytes of ``stream``. Further connections may help to bring them.

        Args:
            stream: The response to a request without an end.
            source: Its source. One that has sent wrong bytes gets no further connection.
            position: Offset of the first byte that is missing.

        Raises:
            MirrorError: While the iterator is read: see :meth:`ContentStream.__aiter__`. It is the
                error of the last connection.
        """
        parallel = source.registry.parallel
        is_alone = parallel.connections == 1 or source.request.kind is Kind.MANIFEST
        if is_alone or stream.total is None or stream.start != position or source.avoid:
            self.close()
            yield aiter(stream)
            return
        pieces = self._pieces_for(position, stream.total, parallel.part)
        upstream = source.request.repository.upstream
        error: Exception | None = None
        async with asyncio.TaskGroup() as group:
            transfer = _Transfer(self, stream, upstream, pieces, source.registry, group)
            try:
                yield transfer.chunks()
            except Exception as raised:
                error = raised  # A group would wrap it.
            finally:
                transfer.end()
        if error is not None:
            raise error

    def _pieces_for(self, position: int, total: int, part: int) -> Pieces:
        """Return what the transfer before has left. Otherwise no pieces."""
        pieces = self._pieces
        if pieces is None or (pieces.position, pieces.total) != (position, total):
            self.close()
            pieces = self._pieces = Pieces(position, total, piece_size(total, part))
        return pieces

    @property
    def room(self) -> int:
        """Bytes that may be requested ahead now, beside what was requested."""
        return self.memory.free_ahead(_MEMORY_SHARE)

    def close(self) -> None:
        """Drop what has arrived ahead."""
        if self._pieces is not None:
            self.memory.hold_ahead(self._pieces, 0)
            self._pieces = None


class _Transfer:
    """One response, and the further connections beside it."""

    def __init__(
        self,
        reader: ParallelReader,
        stream: ContentStream,
        upstream: str,
        pieces: Pieces,
        registry: Registry,
        group: asyncio.TaskGroup,
    ) -> None:
        """Start with the response ``stream`` of ``registry`` alone. ``group`` gets the tasks."""
        self._reader = reader
        self._stream = stream
        self._upstream = upstream
        self._pieces = pieces
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._ramp = Ramp(registry.parallel.connections)
        self._idle = registry.idle
        self._min_rate = registry.min_rate
        self._silent_since = self._loop.time()
        """Time since which all connections together have brought less than ``min_rate``."""
        self._received = 0
        """Bytes since then."""
        self._tasks: dict[Piece, asyncio.Task[None]] = {}
        self._further = 0
        """Connections beside the first one, as they are counted."""
        self._ticker: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """Set when the front has bytes, or when a task has ended."""
        self._drained = asyncio.Event()
        """Set when bytes were handed out."""
        self._failure: MirrorError | None = None
        """The error of the connection that failed last."""
        self._broken: Piece | None = None
        """The piece of the connection that broke last. One that was refused has not."""
        self._refusals = 0
        """Refusals of further connections since the last response."""
        self._failures = 0
        """Failures of further connections in a row that have brought nothing."""
        self._not_before = 0.0
        """Time before which no request is sent although no connection is left, after a 429."""
        self._may_overlap = False
        """Whether the last connection may be opened while the one before it has not ended."""
        self._is_over = False

    def end(self) -> None:
        """End all tasks. Their group waits for them."""
        self._is_over = True
        for task in (*self._tasks.values(), *([self._ticker] if self._ticker else ())):
            task.cancel()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes in order."""
        pieces, plain = self._pieces, aiter(self._stream)
        if not len(pieces):
            async for chunk in plain:
                pieces.skip(len(chunk))
                yielded_at = self._loop.time()
                yield chunk
                self._ramp.pause(self._loop.time() - yielded_at)
                if self._receive_alone(len(chunk)):
                    break
            else:
                return
        self._begin(plain)
        while pieces.position < pieces.total:
            count, front = len(pieces), pieces.pop()
            if front is None or len(pieces) < count:
                self._fill()  # There may be memory now, or a gap at the front, which needs none.
            if front is not None:
                self._hold_memory()
                self._drained.set()
                yielded_at = self._loop.time()
                yield front
                self._pause(self._loop.time() - yielded_at)
            elif self._active or self._may_wait():
                self._changed.clear()
                await self._changed.wait()
                self._check_progress()
            else:
                assert self._failure is not None, "a connection ends by a failure"
                raise self._failure

    def _pause(self, seconds: float) -> None:
        """Count seconds in which the reader took no bytes."""
        self._ramp.pause(seconds)
        self._silent_since = min(self._silent_since + seconds, self._loop.time())

    def _check_progress(self) -> None:
        """Raise ``UpstreamTimeout`` if all connections together have stopped, or are too slow."""
        if self._loop.time() - self._silent_since >= self._idle:
            what = f"sends less than {self._min_rate} bytes/s by {len(self._tasks)} connections"
            raise UpstreamTimeout(
                f"{self._stream.endpoint} {what} (limits.idle, limits.min_rate)",
                scope=FailureScope.SUBJECT,
            )

    def _receive_alone(self, count: int) -> bool:
        """Count bytes of the only connection. Returns whether to open a second one."""
        now = self._loop.time()
        self._ramp.receive(now, count)
        step = self._ramp.evaluate(now, self._pieces.missing, self._pieces.size)
        return step is Step.ADD and self._may_add()

    def _may_add(self) -> bool:
        reader = self._reader
        may_add = reader.connections.may_add(self._stream.endpoint)
        return may_add and reader.room >= self._pieces.size

    def _begin(self, plain: AsyncIterator[bytes]) -> None:
        """Go on with one task for each connection."""
        if not len(self._pieces):
            self._ramp.add()
        self._silent_since = self._loop.time()
        piece = self._pieces.begin_plain(self._silent_since)
        self._start(piece, self._read_first(piece, plain))
        self._ticker = self._group.create_task(self._tick())
        self._fill()

    # --- connections ----------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start connections, as long as more are wanted, a piece is free, and the budgets allow.

        After a refusal, one request has to be answered before the next one.
        """
        while not self._is_over and self._active < self._most:
            now, pieces, reader = self._loop.time(), self._pieces, self._reader
            is_asking = self._refusals > 0 and not all(one.has_response for one in self._tasks)
            may_add = reader.connections.may_add(self._stream.endpoint)
            may_request = may_add if self._active else now >= self._not_before
            if is_asking or not may_request:
                return
            room, connections = reader.room, self._ramp.wanted
            if not self._active and not (may_add and room >= pieces.size):
                connections = 1
            rooms = (room + pieces.ahead) // max(1, connections - 1)
            piece = pieces.claim(now, self._ramp.rate_of_one, connections, rooms)
            if piece is None:
                return
            if not pieces.may_pause(piece) and piece.stop - piece.start > room:
                pieces.give_back(piece)
                return
            self._start(piece, self._fetch(piece))
            self._hold_memory()

    @property
    def _most(self) -> int:
        """Connections to have now."""
        is_last = self._may_overlap and self._ramp.wanted == 1
        may_overlap = is_last and not any(piece.is_plain for piece in self._tasks)
        return self._ramp.wanted + may_overlap

    @property
    def _active(self) -> int:
        """Connections that bring bytes, or will soon."""
        return sum(1 for piece in self._tasks if not self._pieces.is_stuck(piece))

    def _start(self, piece: Piece, work: Coroutine[None, None, None]) -> None:
        """Start the task of a piece."""
        task = self._tasks[piece] = self._group.create_task(work)
        self._count_connections()
        # A task that is cancelled before its first step runs no line of its coroutine.
        task.add_done_callback(partial(self._on_task_done, piece))

    def _count_connections(self) -> None:
        """Tell the budget and the metrics how many connections there are beside the first one."""
        count = max(0, len(self._tasks) - 1)
        if count != self._further:
            self._reader.connections.hold(self, self._stream.endpoint, count)
            self._reader.emit(ConnectionsChanged(self._upstream, count - self._further))
            self._further = count

    def _on_task_done(self, piece: Piece, task: asyncio.Task[None]) -> None:
        del self._tasks[piece]
        self._count_connections()
        if piece.is_plain:
            self._stream.close()
        self._pieces.give_back(piece)
        if piece is self._broken and not self._active and not self._may_wait():
            self._is_over = True  # The fetch loop decides about another request.
        self._fill()
        self._hold_memory()
        self._changed.set()

    async def _fetch(self, piece: Piece) -> None:
        """Fetch a piece by a further connection."""
        try:
            async with self._stream.open_range(piece.start, piece.stop) as stream:
                now = self._loop.time()
                self._refusals = 0
                if not self._pieces.accept_response(piece, now):
                    return  # The plain piece has been faster.
                count = sum(1 for other in self._tasks if other.has_response)
                self._ramp.on_connections(now, count)
                self._reader.pull.connections = max(self._reader.pull.connections, count)
                await self._read(piece, aiter(stream))
                self._failures = 0
        except MirrorError as error:
            self._on_failure(piece, error)

    async def _read_first(self, piece: Piece, chunks: AsyncIterator[bytes]) -> None:
        """Read the response that this transfer began with."""
        try:
            await self._read(piece, chunks)
        except MirrorError as error:
            self._failure, self._broken = error, piece

    async def _read(self, piece: Piece, chunks: AsyncIterator[bytes]) -> None:
        """Put the chunks of a response into its piece. A plain one ends where another begins."""
        pieces = self._pieces
        async for chunk in chunks:
            now = self._loop.time()
            self._ramp.receive(now, len(chunk))
            self._received += len(chunk)
            if self._received >= self._min_rate * (now - self._silent_since):
                self._silent_since, self._received = now, 0
            is_complete = pieces.receive(piece, chunk, now)
            if piece.taken == pieces.position:
                self._changed.set()
            if is_complete and piece.is_plain:
                return
            if not is_complete and pieces.may_pause(piece) and piece.waiting > _BUFFER_BYTES:
                await self._wait_until_drained(piece)

    async def _wait_until_drained(self, piece: Piece) -> None:
        piece.pause(self._loop.time())
        while piece.waiting > _BUFFER_BYTES // 2:
            self._drained.clear()
            await self._drained.wait()
        piece.resume(self._loop.time())

    def _on_failure(self, piece: Piece, error: MirrorError) -> None:
        """Decide what the failure of a further connection means for their number."""
        self._failure = error
        if not isinstance(error, UpstreamTimeout | UpstreamRateLimited):
            self._failure = UpstreamUnavailable(f"a further connection failed: {error.message}")
        reason: BackOffReason = "failed"
        wanted = self._ramp.wanted - 1
        match error:
            case UpstreamRateLimited():
                reason = "refused"
                delay, self._may_overlap = error.retry_after, False
                if not self._ramp.is_adding:
                    delay = max(delay or 0.0, _RETRY_AFTER_S * 2**self._refusals)
                    self._refusals += 1
                    # This number was accepted before. If it is refused again, the upstream limits
                    # requests: the rest needs one.
                    wanted = self._ramp.wanted if self._refusals == 1 else 1
                self._reader.connections.on_refused(self._stream.endpoint, delay or 0.0)
                if delay is not None and (self._refusals > 1 or delay <= _SHORT_WAIT_S):
                    self._not_before = self._loop.time() + delay
            case UpstreamProtocolError():
                reason = "no_ranges"
                self._reader.connections.on_no_ranges(self._stream.endpoint)
                wanted = min(1, wanted)
            case _:
                self._broken = piece
                has_progressed = piece.end - piece.start >= MIN_PROGRESS_BYTES
                self._failures = 0 if has_progressed else self._failures + 1
                if self._failures <= 1:
                    return  # It is replaced.
        self._back_off(reason, wanted)

    def _back_off(self, reason: BackOffReason, wanted: int) -> None:
        self._ramp.back_off(wanted)
        self._reader.emit(BackedOff(self._upstream, self._stream.endpoint, reason, wanted))

    def _may_wait(self) -> bool:
        """Return whether a connection may be opened in time, although there is none now."""
        is_in_time = self._not_before <= self._silent_since + self._idle
        return self._ramp.wanted > 0 and self._loop.time() < self._not_before and is_in_time

    # --- the clock ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Judge the rates, and cut late pieces, until the transfer ends."""
        while True:
            await asyncio.sleep(_TICK_S)
            now, pieces = self._loop.time(), self._pieces
            match self._ramp.evaluate(now, pieces.missing, pieces.size, pieces.latency or 0.0):
                case Step.ADD if self._may_add():
                    self._ramp.add()
                case Step.NO_GAIN:
                    self._may_overlap = self._ramp.wanted == 1
                    self._back_off("no_gain", self._ramp.wanted)
            late = pieces.find_late(now)
            if late is not None and late in self._tasks:
                self._reader.emit(PieceCut(self._upstream, self._stream.endpoint, late.end))
                self._reader.pull.late_pieces += 1
                self._ramp.on_cut(now)
                self._tasks[late].cancel()
            self._fill()
            self._changed.set()

    def _hold_memory(self) -> None:
        self._reader.memory.hold_ahead(self._pieces, self._pieces.ahead)
