"""Read one blob by several connections, in order.

Lives here: the tasks that fetch pieces, and the requests. The policy is elsewhere: which bytes
(:mod:`mirror.pull.pieces`), whether ranges are good (:mod:`mirror.pull.trial`), how many
connections (:mod:`mirror.pull.ramp`), how many in all (:mod:`mirror.pull.connection_budget`), what
failures mean (:mod:`mirror.pull.connection_failures`). Must not know: the ingest, HTTP.

Theory of operation. The fetch loop gets one iterator of chunks in order, as from one connection, so
the ingest file grows only at its front. As long as one connection is enough, its chunks are passed
on as they come. Otherwise each connection has a task that puts its chunks into a piece, and the
front of the pieces is passed on. The tasks belong to a group that ends with the transfer.
The plain response is closed only after ranges have been measured to be better.

The invariant. The *front* is the next byte to hand out. While bytes are missing, one of these holds
after each event:

- The front has arrived, and waits for the reader.
- A connection fetches it. Its request and its body have time limits of their own.
- Nobody fetches it. The next request has a known time, or waits for a connection ahead to end.
- The transfer has ended with an error, and the fetch loop decides what is next.

The front moves by ``limits.min_rate`` within ``limits.idle``, or the transfer ends: the limits of a
body hold for all connections together. :meth:`_Transfer._restore` restores the invariant after each
event. Nothing else sends requests or sets the error. A failure ahead of the front never ends the
transfer: that piece may wait for the front.

A connection that fails gives its piece back. A refusal of a further one says nothing about the
content, so the error is never a refusal. What has arrived ahead is kept for the next transfer if
that one's endpoint has sent ranges. Otherwise its plain response is not given up without a trial.
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
from mirror.oci.errors import FailureScope, MirrorError, UpstreamTimeout
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.connection_failures import ConnectionFailures, Failure
from mirror.pull.pieces import Piece, Pieces, RequestSize, piece_size
from mirror.pull.ramp import Ramp, Step
from mirror.pull.requests import ContentSource
from mirror.pull.trial import Trial, TrialResult
from mirror.store.ingest_writer import MemoryBudget
from mirror.upstream.api import ContentStream

_TICK_S: Final = 0.1
"""Seconds between two evaluations of the rates. A measurement takes four."""
_BUFFER_BYTES: Final = 512 * 1024
"""Bytes of the front piece that wait to be handed out before its connection pauses: two reads of a
socket. With one, it would pause after each read."""
_MEMORY_SHARE: Final = 11 / 12
"""Part of the memory ahead that pieces may fill: 44 of 48 MiB. Lazy clients need not wait for a
large fetch, since the rest is for them (:mod:`mirror.pull.aside`)."""


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
        self.endpoints: set[str] = set()
        """URLs of the endpoints that have sent whole ranges."""
        self._pieces: Pieces | None = None

    @asynccontextmanager
    async def read(
        self, stream: ContentStream, source: ContentSource, position: int
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield an iterator of the bytes of ``stream``. Further connections may help to bring them.

        Args:
            stream: The response to a request without an end.
            source: Its source. If wrong bytes of this content were found, one connection reads it.
            position: Offset of the first byte that is missing.

        Raises:
            MirrorError: While the iterator is read: the latest error of a connection, or
                ``UpstreamTimeout`` if all together sent too little.
        """
        parallel = source.registry.parallel
        is_alone = parallel.connections == 1 or source.request.kind is Kind.MANIFEST
        if is_alone or stream.total is None or stream.start != position or source.avoid:
            self.close()
            yield aiter(stream)
            return
        pieces = self._pieces_for(stream, stream.total, parallel.part)
        error: Exception | None = None
        async with asyncio.TaskGroup() as group:
            transfer = _Transfer(self, stream, source, pieces, group)
            try:
                yield transfer.chunks()
            except Exception as raised:
                error = raised  # A group would wrap it.
            finally:
                transfer.end()
        if error is not None:
            raise error

    def _pieces_for(self, stream: ContentStream, total: int, part: int) -> Pieces:
        """Return what the transfer before has left if it may be kept. Otherwise no pieces."""
        pieces, place = self._pieces, (stream.start, total)
        is_known = stream.endpoint in self.endpoints
        if pieces is None or not is_known or (pieces.position, pieces.total) != place:
            self.close()
            pieces = self._pieces = Pieces(*place, piece_size(total, part))
        return pieces

    @property
    def free_memory(self) -> int:
        """Bytes that may be requested ahead now, beside what was requested."""
        return self.memory.free_ahead(_MEMORY_SHARE)

    def distrust_ranges(self) -> None:
        """Let the endpoints that sent ranges get no further connection: some bytes are wrong."""
        for endpoint in self.endpoints:
            self.connections.on_no_ranges(endpoint)

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
        source: ContentSource,
        pieces: Pieces,
        group: asyncio.TaskGroup,
    ) -> None:
        """Start with the response ``stream`` of ``source`` alone. ``group`` gets the tasks."""
        self._reader = reader
        self._stream = stream
        self._upstream = source.request.repository.upstream
        self._pieces = pieces
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._registry = source.registry
        self._ramp = Ramp(self._registry.parallel.connections)
        self._failures: ConnectionFailures
        self._received_at = 0.0
        """Time of the latest chunk of any connection."""
        self._plain: Piece
        """The piece of the response that the transfer began with."""
        self._tasks: dict[Piece, asyncio.Task[None]] = {}
        self._further = 0
        """Further connections, as last reported to the budget and the metrics."""
        self._ticker: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """Set when the front may have bytes, or when the transfer has ended."""
        self._drained = asyncio.Event()
        """Set when bytes were handed out."""
        self._error: MirrorError | None = None
        """Why the transfer has ended. None: it has not."""
        self._trial: Trial | None = None
        """The trial of the first further connection. None: there was none, or it has ended."""
        self._is_closed = False

    def end(self) -> None:
        """Cancel all tasks. Their group waits for them."""
        self._is_closed = True
        if self._trial is not None:
            self._trial = None  # That it is cancelled says nothing about ranges.
            self._pieces.drop_ranges()
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
                now = self._loop.time()
                self._ramp.pause(now - yielded_at)
                self._ramp.receive(now, len(chunk), self._stream.unread)
                step = self._ramp.evaluate(now, pieces.missing, pieces.size)
                if step is Step.ADD and self._may_add():
                    break
            else:
                return
        self._begin(plain)
        while pieces.position < pieces.total:
            count, front, data = len(pieces), pieces.front, pieces.pop()
            if front is not None and data is not None:
                yielded_at = self._loop.time()
                asked_at = None if front is self._plain else front.asked_at
                self._failures.on_progress(yielded_at, len(data), asked_at)
                if len(pieces) < count:
                    self._restore()  # There may be memory now.
                self._hold_memory()
                self._drained.set()
                yield data
                paused_s = self._loop.time() - yielded_at
                self._ramp.pause(paused_s)
                self._failures.pause(paused_s)
            elif self._error is None:
                self._changed.clear()
                self._restore()  # There may be a gap at the front.
                await self._changed.wait()
            else:
                raise self._error

    def _may_add(self) -> bool:
        has_memory = self._reader.free_memory >= self._pieces.size
        return has_memory and self._reader.connections.may_add(self._stream.endpoint)

    def _begin(self, plain: AsyncIterator[bytes]) -> None:
        """Go on with one task for each connection."""
        if not len(self._pieces):
            self._ramp.add()
            self._trial = Trial(self._ramp.rate, self._pieces.missing, self._pieces.size)
        now, registry = self._loop.time(), self._registry
        self._failures = ConnectionFailures(now, registry.idle, registry.min_rate)
        self._plain = self._pieces.begin_plain(now)
        self._start(self._plain, self._read_plain(plain))
        self._ticker = self._group.create_task(self._tick())
        self._restore()

    def _restore(self) -> None:
        """Restore the invariant after an event: send the requests that are due, or end."""
        if self._is_closed or self._error is not None:
            return
        now, front = self._loop.time(), self._pieces.front
        has_bytes = front is not None and bool(front.chunks)
        if self._failures.is_over(now, is_fetched=front is not None, has_bytes=has_bytes):
            self._error = self._failures.latest or UpstreamTimeout(
                f"{self._stream.endpoint} sent less than {self._registry.min_rate} bytes/s for"
                f" {self._registry.idle:g} s (limits.idle, limits.min_rate)",
                scope=FailureScope.SAME_KIND,
            )
            self._changed.set()
        while self._error is None and now >= self._failures.not_before:
            if not self._send_request(now):
                break

    def _send_request(self, now: float) -> bool:
        """Send a request for one piece. Returns False if none may be sent.

        A request needs no budget if no other connection brings bytes. The front is requested also
        if there are as many connections as wanted, for these bring what is behind it.
        """
        pieces, reader = self._pieces, self._reader
        active = sum(1 for one in self._tasks if one.has_connection and not pieces.is_stuck(one))
        is_asking = not all(piece.has_response for piece in self._tasks)
        has_to_wait = is_asking and self._failures.is_retrying
        is_wanted = active < self._ramp.wanted or pieces.front is None
        may_add = reader.connections.may_add(self._stream.endpoint)
        if has_to_wait or not is_wanted or (active and not may_add):
            return False
        if (piece := self._next_piece(now, active, may_add=may_add)) is None:
            return False
        if not pieces.may_pause(piece) and piece.stop - piece.start > reader.free_memory:
            pieces.give_back(piece)
            return False
        self._start(piece, self._fetch(piece))
        self._hold_memory()
        return True

    def _next_piece(self, now: float, active: int, *, may_add: bool) -> Piece | None:
        """Add the piece of the next request. None: there is no gap."""
        pieces, memory, connections = self._pieces, self._reader.free_memory, self._ramp.wanted
        if self._trial is not None:
            return pieces.add_piece_ahead(now, self._trial.lead, self._trial.request_bytes)
        size = RequestSize.USUAL
        if connections == 1:
            size = RequestSize.SIXTEEN if self._ramp.may_grow else RequestSize.REST
        elif not active and not (may_add and memory >= pieces.size):
            size = RequestSize.SIXTEEN
        # Further connections share the memory, so that a large request does not stop the others.
        memory_each = (memory + pieces.ahead) // max(1, connections - 1)
        return pieces.add_piece(now, self._ramp.rate_of_one, connections, memory_each, size)

    def _start(self, piece: Piece, work: Coroutine[None, None, None]) -> None:
        """Start the task of a piece."""
        task = self._tasks[piece] = self._group.create_task(work)
        self._report_connections()
        # A task that is cancelled before its first step runs no line of its coroutine.
        task.add_done_callback(partial(self._on_task_done, piece))

    def _report_connections(self) -> None:
        """Tell the budget and the metrics how many connections there are beside the first one."""
        count = max(0, len(self._tasks) - 1)
        if count != self._further:
            self._reader.connections.hold(self._reader, self._stream.endpoint, count)
            self._reader.emit(ConnectionsChanged(self._upstream, count - self._further))
            self._further = count

    def _on_task_done(self, piece: Piece, task: asyncio.Task[None]) -> None:
        """Note that a connection has ended. Another one may fetch the rest of its piece."""
        del self._tasks[piece]
        self._report_connections()
        if piece.is_plain:
            self._stream.close()
        elif self._trial is not None:
            self._trial.on_end(self._loop.time())
            self._judge()
        self._pieces.give_back(piece)
        self._restore()
        is_waiting = self._failures.is_retrying or len(self._tasks) > 1
        if self._trial is not None and not is_waiting:
            self._judge(is_due=True)  # No request follows: no memory, no connection, no gap.
        self._hold_memory()
        self._changed.set()

    async def _fetch(self, piece: Piece) -> None:
        """Fetch a piece by a further connection."""
        try:
            async with self._stream.open_range(piece.start, piece.stop) as stream:
                now = self._loop.time()
                if not self._pieces.accept_response(piece, now):
                    return  # The plain piece has been faster.
                count = sum(1 for other in self._tasks if other.has_response)
                if self._trial is not None:
                    self._trial.on_response(now, now - piece.asked_at)
                else:
                    self._ramp.on_connections(now, count)
                self._reader.pull.connections = max(self._reader.pull.connections, count)
                await self._read(piece, stream, aiter(stream))
        except MirrorError as error:
            self._on_failure(piece, error)

    async def _read_plain(self, chunks: AsyncIterator[bytes]) -> None:
        """Read the response that this transfer began with."""
        try:
            await self._read(self._plain, self._stream, chunks)
        except MirrorError as error:
            self._on_failure(self._plain, error)

    async def _read(
        self, piece: Piece, stream: ContentStream, chunks: AsyncIterator[bytes]
    ) -> None:
        """Put the chunks of a response into its piece. A plain one ends where another begins."""
        pieces = self._pieces
        async for chunk in chunks:
            now = self._received_at = self._loop.time()
            self._ramp.receive(now, len(chunk), stream.unread)
            if self._trial is not None and piece.is_plain:
                self._judge(is_due=pieces.is_meeting_next(piece, len(chunk)))
            if self._trial is not None:
                self._trial.receive(now, len(chunk), is_plain=piece.is_plain)
            is_complete = pieces.receive(piece, chunk, now)
            if piece.handed_out_until == pieces.position:
                self._changed.set()
            if is_complete and piece.is_plain:
                return
            if is_complete:
                self._failures.on_complete()
                self._reader.endpoints.add(self._stream.endpoint)
            if not is_complete and pieces.may_pause(piece) and piece.waiting > _BUFFER_BYTES:
                piece.pause(self._loop.time())
                while piece.waiting > _BUFFER_BYTES // 2:
                    self._drained.clear()
                    await self._drained.wait()
                piece.resume(self._loop.time())

    def _on_failure(self, piece: Piece, error: MirrorError) -> None:
        """Do what the failure of a connection demands."""
        now, connections, ramp = self._loop.time(), self._reader.connections, self._ramp
        if piece.is_plain:
            self._judge(is_due=True, is_plain_broken=True)
        is_trial = self._trial is not None
        has_range = any(one.has_response and not one.is_plain for one in self._tasks)
        failure = Failure(
            error=error,
            asked_at=piece.asked_at,
            received=piece.received_until - piece.start,
            has_response=piece.has_response,
            is_plain=piece.is_plain,
            is_bad_trial=is_trial and (has_range if piece.is_plain else piece.has_response),
            is_only_request=piece.is_paced and len(self._tasks) == 1,
            received_at=self._received_at,
        )
        ramp.on_cut(now)
        wanted = 1 if is_trial and piece.is_plain else ramp.wanted
        then = self._failures.on_failure(now, failure, wanted, is_adding=ramp.is_adding)
        if then.refused_s is not None:
            connections.on_refused(self._stream.endpoint, then.refused_s)
        elif then.is_useless:
            connections.on_no_ranges(self._stream.endpoint)
        if then.connections < ramp.wanted:  # So it is if this failure ends a trial.
            self._back_off(then.reason, then.connections)
        elif then.reason != "failed":
            ramp.back_off(ramp.wanted)  # No addition follows.
        if then.has_pause and self._plain.has_connection and self._pieces.front is self._plain:
            self._drop_ranges()

    def _judge(self, *, is_due: bool = False, is_plain_broken: bool = False) -> None:
        """End the trial if there is a verdict. ``is_due``: there has to be one.

        If the plain response is broken, only a good verdict counts: a failure ends the trial.
        """
        if (trial := self._trial) is None:
            return
        missing = self._pieces.total - self._plain.received_until
        verdict = trial.judge(self._loop.time(), missing, is_due=is_due)
        if verdict is TrialResult.GOOD:
            self._trial = None
            step = self._ramp.accept_trial(trial.rate, missing, self._pieces.size)
            if step is Step.ADD and self._may_add():
                self._ramp.add()
        elif verdict is TrialResult.SLOW and not is_plain_broken:
            self._reader.connections.on_no_ranges(self._stream.endpoint)
            self._back_off("slow_ranges", 1)
        elif verdict is TrialResult.NO_GAIN and not is_plain_broken:
            self._back_off("no_gain", 1)

    def _back_off(self, reason: BackOffReason, wanted: int) -> None:
        """Have fewer connections. Without any further one, a trial is over."""
        if self._trial is not None:
            self._drop_ranges()
        self._ramp.back_off(wanted)
        self._reader.emit(BackedOff(self._upstream, self._stream.endpoint, reason, wanted))

    def _drop_ranges(self) -> None:
        """Let the plain response bring the rest. Drop what others fetch, and have brought."""
        self._trial = None
        for task in (task for piece, task in self._tasks.items() if not piece.is_plain):
            task.cancel()
        self._pieces.drop_ranges()
        self._hold_memory()

    async def _tick(self) -> None:
        """Judge the rates, and cut late pieces, until the transfer ends."""
        while True:
            await asyncio.sleep(_TICK_S)
            now, pieces = self._loop.time(), self._pieces
            self._give_back_connections()
            for piece, task in self._tasks.items():
                if pieces.is_overtaken(piece):
                    task.cancel()
            match self._ramp.evaluate(now, pieces.missing, pieces.size, pieces.latency or 0.0):
                case Step.ADD if self._may_add():
                    self._ramp.add()
                case Step.NO_GAIN:
                    self._back_off("no_gain", self._ramp.wanted - 1)
            self._judge()
            may_cut = self._trial is None and self._ramp.wanted > 1  # Others bring bytes.
            late = pieces.find_late(now) if may_cut else None
            if late is not None and late in self._tasks:
                cut = PieceCut(self._upstream, self._stream.endpoint, late.received_until)
                self._reader.emit(cut)
                self._reader.pull.late_parts += 1
                self._ramp.on_cut(now)
                # Otherwise, an upstream that sends nothing would be asked again and again.
                if not late.has_response or pieces.has_stood_still(late, now):
                    self._on_failure(late, UpstreamTimeout("a range was not sent in time"))
                self._tasks[late].cancel()
            self._restore()
            self._changed.set()

    def _give_back_connections(self) -> None:
        """End all connections but that of the front if the request for another blob needs them."""
        is_reclaimed = self._reader.connections.is_reclaimed(self._stream.endpoint)
        if not is_reclaimed or self._ramp.wanted == 1:
            return
        self._back_off("reclaimed", 1)
        for piece, task in self._tasks.items():
            if piece is not self._pieces.front:
                task.cancel()

    def _hold_memory(self) -> None:
        self._reader.memory.hold_ahead(self._pieces, self._pieces.ahead)
