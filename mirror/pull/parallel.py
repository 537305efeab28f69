"""Read one blob by several connections, in order.

Lives here: the tasks that fetch pieces, and what is done when one fails. The policy is elsewhere:
which bytes (:mod:`mirror.pull.pieces`), how many connections (:mod:`mirror.pull.ramp`), how many in
all (:mod:`mirror.pull.connection_budget`). Must not know: the ingest, other sources, HTTP.

Theory of operation. The fetch loop gets one iterator of chunks in order, as from one connection, so
the ingest file grows only at its front. As long as one connection is enough, its chunks are passed
on as they come. Otherwise each connection has a task that puts its chunks into a piece, and the
front of the pieces is passed on. The tasks belong to a group that ends with the transfer.

What fails. A connection that fails gives its piece back. The transfer fails only when no connection
is left, with the error of the last one. What has arrived ahead is kept for the next transfer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from mirror.config.settings import Parallel
from mirror.observability.events import (
    BackedOff,
    BackOffReason,
    ConnectionsChanged,
    Observer,
    PieceCut,
    RequestRecord,
)
from mirror.oci.errors import MirrorError, UpstreamProtocolError, UpstreamRateLimited
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.pieces import Piece, Pieces, piece_size
from mirror.pull.ramp import Ramp, Step
from mirror.pull.requests import ContentSource
from mirror.store.ingest_writer import MemoryBudget
from mirror.upstream.api import MIN_PROGRESS_BYTES, ContentStream

_TICK_S: Final = 0.1
"""Seconds between two looks at the rates: a fourth of a measurement."""
_BUFFER_BYTES: Final = 512 * 1024
"""Bytes of the front piece that wait to be handed out before its connection pauses: two reads of a
socket, so that it does not wait for the loop."""
_FIRST_LATENCY_S: Final = 0.1
"""Seconds that a response is expected to take before one was measured."""
_RETRY_AFTER_S: Final = 1.0
"""Seconds to wait after a 429 without ``Retry-After``. The number of connections was accepted
before, so the server may count one that has just ended."""
_MAX_WAIT_S: Final = 2.0
"""Seconds at most that a transfer waits without any connection, as between two transfers."""


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
        if stream.total is None or stream.start != position or source.avoid:
            self.close()
            yield aiter(stream)
            return
        pieces = self._pieces_for(position, stream.total, parallel.part)
        upstream = source.request.repository.upstream
        error: Exception | None = None
        async with asyncio.TaskGroup() as group:
            transfer = _Transfer(self, stream, upstream, pieces, parallel, group)
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
        parallel: Parallel,
        group: asyncio.TaskGroup,
    ) -> None:
        """Start with the response ``stream`` alone. ``group`` gets the tasks."""
        self._reader = reader
        self._stream = stream
        self._upstream = upstream
        self._pieces = pieces
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._ramp = Ramp(parallel.connections)
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
        """The piece of that connection."""
        self._refusals = 0
        """Refusals of further connections since the last response."""
        self._not_before = 0.0
        """Time before which no further request is sent, after a 429."""
        self._latency = _FIRST_LATENCY_S
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
                yield chunk
                if self._wants_another(len(chunk)):
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
                yield front
            elif self._tasks or self._may_wait():
                self._changed.clear()
                await self._changed.wait()
            else:
                assert self._failure is not None, "a connection ends by a failure"
                raise self._failure

    def _wants_another(self, count: int) -> bool:
        """Count bytes of the only connection. Returns whether to open a second one."""
        now = self._loop.time()
        self._ramp.receive(now, count)
        step = self._ramp.evaluate(now, self._pieces.missing, self._pieces.size)
        return step is Step.ADD and self._may_add()

    def _may_add(self) -> bool:
        reader = self._reader
        return reader.connections.may_add(self._stream.endpoint) and reader.memory.may_take_ahead(
            self._pieces.size
        )

    def _begin(self, plain: AsyncIterator[bytes]) -> None:
        """Go on with one task for each connection."""
        if not len(self._pieces):
            self._ramp.add()
        piece = self._pieces.begin_plain(self._loop.time())
        self._start(piece, self._read(piece, plain))
        self._ticker = self._group.create_task(self._tick())
        self._fill()

    # --- connections ----------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start connections, as long as more are wanted, a piece is free, and the budgets allow."""
        while not self._is_over and len(self._tasks) < self._ramp.wanted:
            now, reader = self._loop.time(), self._reader
            is_first = not self._tasks
            if now < self._not_before:
                return
            if not (is_first or reader.connections.may_add(self._stream.endpoint)):
                return
            lead = max(self._pieces.size // 2, int(self._ramp.rate * self._latency))
            piece = self._pieces.claim(now, lead, self._ramp.wanted)
            if piece is None:
                return
            needed = 0 if piece.is_front else piece.stop - piece.start
            if needed and not reader.memory.may_take_ahead(needed):
                self._pieces.give_back(piece)
                return
            self._start(piece, self._fetch(piece))
            self._hold_memory()

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
        if piece is self._broken and not self._tasks and not self._may_wait():
            self._is_over = True  # The fetch loop decides about another request.
        self._fill()
        self._hold_memory()
        self._changed.set()

    async def _fetch(self, piece: Piece) -> None:
        """Fetch a piece by a further connection."""
        try:
            async with self._stream.open_range(piece.start, piece.stop) as stream:
                now = self._loop.time()
                self._latency, self._refusals = now - piece.asked_at, 0
                if not self._pieces.respond(piece):
                    return  # The plain piece has been faster.
                count = sum(1 for other in self._tasks if other.has_response)
                self._ramp.on_connections(now, count)
                self._reader.pull.connections = max(self._reader.pull.connections, count)
                await self._read(piece, aiter(stream))
        except MirrorError as error:
            self._on_failure(piece, error)

    async def _read(self, piece: Piece, chunks: AsyncIterator[bytes]) -> None:
        """Put the chunks of a response into its piece. The plain one ends where another begins."""
        pieces = self._pieces
        try:
            async for chunk in chunks:
                now = self._loop.time()
                self._ramp.receive(now, len(chunk))
                is_complete = pieces.receive(piece, chunk, now)
                if piece.taken == pieces.position:
                    self._changed.set()
                if is_complete and piece.is_plain:
                    return
                if piece.is_front and piece.waiting > _BUFFER_BYTES:
                    await self._wait_until_drained(piece)
        except MirrorError as error:
            if not piece.is_plain:
                raise
            self._failure, self._broken = error, piece

    async def _wait_until_drained(self, piece: Piece) -> None:
        piece.pause(self._loop.time())
        while piece.waiting > _BUFFER_BYTES // 2:
            self._drained.clear()
            await self._drained.wait()
        piece.resume(self._loop.time())

    def _on_failure(self, piece: Piece, error: MirrorError) -> None:
        """Decide what the failure of a further connection means for their number."""
        self._failure, self._broken = error, piece
        reason: BackOffReason = "failed"
        wanted = self._ramp.wanted - 1
        match error:
            case UpstreamRateLimited():
                reason = "refused"
                delay = _RETRY_AFTER_S if error.retry_after is None else error.retry_after
                self._reader.connections.on_refused(self._stream.endpoint, delay)
                if not self._ramp.is_adding:
                    self._not_before = self._loop.time() + delay
                    self._refusals += 1
                    wanted += self._refusals == 1  # This number was accepted before.
            case UpstreamProtocolError():
                reason = "no_ranges"
                self._reader.connections.on_no_ranges(self._stream.endpoint)
                wanted = min(1, wanted)
            case _ if piece.end - piece.start >= MIN_PROGRESS_BYTES:
                return  # It is replaced.
        self._back_off(reason, wanted)

    def _back_off(self, reason: BackOffReason, wanted: int) -> None:
        self._ramp.back_off(wanted)
        self._reader.emit(BackedOff(self._upstream, self._stream.endpoint, reason, wanted))

    def _may_wait(self) -> bool:
        """Return whether a connection may be opened soon, although there is none now."""
        delay = self._not_before - self._loop.time()
        return self._ramp.wanted > 0 and 0 < delay <= _MAX_WAIT_S

    # --- the clock ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Judge the rates, and cut late pieces, until the transfer ends."""
        while True:
            await asyncio.sleep(_TICK_S)
            now, pieces = self._loop.time(), self._pieces
            match self._ramp.evaluate(now, pieces.missing, pieces.size):
                case Step.ADD if self._may_add():
                    self._ramp.add()
                case Step.NO_GAIN:
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
