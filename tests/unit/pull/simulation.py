"""Transfers in virtual time: an event loop whose clock jumps, and upstreams of different kinds."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mirror.config.settings import Parallel
from mirror.observability.events import Event
from mirror.oci.errors import (
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.parallel import ParallelReader
from mirror.pull.requests import ContentSource
from mirror.store.ingest_writer import MemoryBudget
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import MemoryRegistry, a_request

MIB = 2**20
CHUNK_BYTES = 256 * 1024
T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Moves the clock in place of waiting."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is not None and timeout > 0:
            self._advance(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: its time is that of the next timer."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_JumpingSelector(self._pass_time))

    def _pass_time(self, seconds: float) -> None:
        self._now += seconds

    def time(self) -> float:
        return self._now


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time. Returns its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


@dataclass
class Upstream:
    """A storage with limits. Rates in bytes per second."""

    data: bytes = field(repr=False)
    endpoint: str = "https://storage.example"
    rate: float = 10.0 * MIB
    """Of each connection."""
    total_rate: float | None = None
    """Of all connections together."""
    max_connections: int | None = None
    """One more gets a 429."""
    burst: float | None = None
    """Further requests that may be sent at once. One more gets a 429."""
    refill: float = 0.0
    """Requests per second that may be sent after that."""
    retry_after: float | None = None
    has_ranges: bool = True
    latency: float = 0.02
    """Seconds until response headers."""
    slow: Callable[[int], float] = lambda number: 1.0
    """Returns the factor of the rate of the n-th connection."""
    breaks: Callable[[int], int | None] = lambda number: None
    """Returns the bytes after which the n-th connection breaks."""
    stalls: Callable[[int], int | None] = lambda number: None
    """Returns the bytes after which the n-th connection brings nothing for ``idle`` seconds."""
    begins_late: Callable[[int], float] = lambda number: 0.0
    """Returns the seconds for which the n-th connection brings nothing after its headers."""
    keeps_newest: bool = False
    """Whether a new connection breaks all others."""
    error: MirrorError | None = None
    fails: Callable[[int], MirrorError | None] = lambda number: None
    """Returns the error that the n-th further request gets in place of a response."""
    is_silent: Callable[[int], bool] = lambda number: False
    """Returns whether the n-th connection brings nothing more, or its request gets no response."""
    idle: float = 30.0
    """Seconds without a byte after which a silent connection ends, and the same for a request."""
    broken: int = 0
    """Connections that broke."""
    failed: int = 0
    """Requests that failed by ``fails``."""
    starves_at: float = math.inf
    """Time of the loop from which nothing arrives any more."""
    trickle: float = 0.0
    """Rate of each connection from then on. With 0, no request is answered, either."""
    unread: int = 0
    """Bytes that always wait in the socket of a connection."""
    buffer: int = 0
    """Bytes in the buffers of a socket: they are lost when a connection is closed early."""
    asked: list[float] = field(default_factory=list)
    """Times of further requests."""
    refused: list[float] = field(default_factory=list)
    """Times of refusals."""
    connections: int = 0
    most: int = 0
    opened: int = 0
    sent: int = 0
    requested: list[tuple[int, int]] = field(default_factory=list)
    _free_at: float = 0.0
    _tokens: float = field(init=False)
    _asked_at: float = 0.0

    def __post_init__(self) -> None:
        self._tokens = self.burst or 0.0

    def may_request(self) -> bool:
        """Count a request. Returns whether it is accepted."""
        now = asyncio.get_running_loop().time()
        is_free = self.max_connections is None or self.connections < self.max_connections
        if self.burst is not None:
            self._tokens = min(self.burst, self._tokens + self.refill * (now - self._asked_at))
            self._asked_at = now
            is_free = is_free and self._tokens >= 1
            self._tokens -= is_free
        if not is_free:
            self.refused.append(now)
        return is_free

    async def starve(self) -> None:
        """Wait for ever if nothing arrives."""
        if not self.trickle:
            await asyncio.Event().wait()

    async def wait_if_silent(self, number: int) -> None:
        """Raise ``UpstreamTimeout`` in time if the n-th connection brings nothing more."""
        if self.is_silent(number):
            await asyncio.sleep(self.idle)
            raise UpstreamTimeout("silent")

    def stream(self, start: int = 0) -> Stream:
        """Return the response to a request without an end."""
        return Stream(self, start, len(self.data))


class Stream:
    """A response of an :class:`Upstream` (see :class:`mirror.upstream.api.ContentStream`)."""

    endpoint = Upstream.endpoint
    media_type = "application/octet-stream"
    validator = None

    def __init__(self, upstream: Upstream, start: int, stop: int) -> None:
        self.endpoint = upstream.endpoint
        self.start = start
        self.total: int | None = len(upstream.data)
        self._upstream = upstream
        self._position = start
        self._stop = stop
        self._is_closed = False
        self.unread = upstream.unread
        self._number = upstream.opened
        upstream.opened += 1
        upstream.connections += 1
        upstream.most = max(upstream.most, upstream.connections)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        upstream, position, loop = self._upstream, self.start, asyncio.get_running_loop()
        broken_at = upstream.breaks(self._number)
        stop = self._stop if broken_at is None else min(self._stop, self.start + broken_at)
        stalled_at = upstream.stalls(self._number)
        await asyncio.sleep(upstream.begins_late(self._number))
        while position < stop:
            chunk = upstream.data[position : min(position + CHUNK_BYTES, stop)]
            rate = upstream.rate * upstream.slow(self._number)
            if loop.time() >= upstream.starves_at:
                await upstream.starve()
                rate, chunk = upstream.trickle, chunk[:1]
            ready_at = loop.time() + len(chunk) / rate
            if upstream.total_rate is not None:
                upstream._free_at = max(upstream._free_at, loop.time())
                upstream._free_at += len(chunk) / upstream.total_rate
                ready_at = max(ready_at, upstream._free_at)
            await asyncio.sleep(ready_at - loop.time())
            await upstream.wait_if_silent(self._number)
            if stalled_at is not None and position + len(chunk) > self.start + stalled_at:
                await asyncio.sleep(upstream.idle)
                raise UpstreamTimeout("silent")
            if upstream.keeps_newest and self._number < upstream.opened - 1:
                raise UpstreamUnavailable("a newer connection is kept")
            if self._is_closed:
                return
            position += len(chunk)
            self._position = position
            upstream.sent += len(chunk)
            yield chunk
        if stop < self._stop:
            assert upstream.error is not None
            upstream.broken += 1
            raise upstream.error

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._upstream.connections -= 1
            self._upstream.sent += min(self._upstream.buffer, self._stop - self._position)

    @asynccontextmanager
    async def open_range(self, start: int, stop: int) -> AsyncIterator[ContentStream]:
        upstream = self._upstream
        upstream.requested.append((start, stop))
        upstream.asked.append(asyncio.get_running_loop().time())
        number = len(upstream.asked)
        await asyncio.sleep(upstream.latency)
        if asyncio.get_running_loop().time() >= upstream.starves_at:
            await upstream.starve()
        await upstream.wait_if_silent(upstream.opened)
        if (error := upstream.fails(number)) is not None:
            upstream.failed += 1
            raise error
        if not upstream.may_request():
            raise UpstreamRateLimited("too many", retry_after=upstream.retry_after)
        if not upstream.has_ranges:
            raise UpstreamProtocolError("no ranges")
        stream = Stream(upstream, start, stop)
        try:
            yield stream
        finally:
            stream.close()


@dataclass
class Result:
    """A transfer that has ended."""

    seconds: float
    is_right: bool
    events: list[Event]
    reader: ParallelReader
    memory: int
    """Most bytes ahead."""
    longest_wait: float
    """Most seconds that the reader has waited for bytes, or for an error."""

    def happened(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]


async def transfer(
    upstream: Upstream,
    parallel: Parallel | None = None,
    *,
    connections: ConnectionBudget | None = None,
    memory: MemoryBudget | None = None,
    sources: int = 1,
    second: Upstream | None = None,
    pause: Callable[[int], float] = lambda position: 0.0,
    may_fail: bool = False,
    events: list[Event] | None = None,
) -> Result:
    """Read the data of ``upstream``. Raises the error of the last transfer.

    Args:
        upstream: Where the bytes come from.
        parallel: The settings. None: the defaults.
        connections: Shared with other transfers. None: one of its own.
        memory: Shared with other transfers. None: one of its own.
        sources: Transfers that may be begun, each one after an error, and after a pause that a 429
            asks for (2 s without ``Retry-After``). This is what the fetch loop does.
        second: Where the bytes come from after the first error. None: from ``upstream``.
        pause: Returns the seconds that the reader pauses at a position.
        may_fail: Return a result that is not right, in place of raising the error.
        events: Gets the events. None: only the result has them.
    """
    loop, events = asyncio.get_running_loop(), [] if events is None else events
    registry = MemoryRegistry(parallel=parallel or Parallel(), idle=upstream.idle)
    memory = memory or MemoryBudget(48 * MIB)
    request = a_request(Digest.of(b"any"))
    connections = connections or ConnectionBudget(lambda endpoint: 1, loop.time)
    reader = ParallelReader(connections, memory, events.append, request.pull)
    begun, position, is_right, peak, longest_wait = loop.time(), 0, True, 0, 0.0
    try:
        while True:
            try:
                stream = upstream.stream(position)
                try:
                    async with reader.read(
                        stream, ContentSource(registry, request), position
                    ) as chunks:
                        waits_since = loop.time()
                        async for chunk in chunks:
                            longest_wait = max(longest_wait, loop.time() - waits_since)
                            is_right &= chunk == upstream.data[position : position + len(chunk)]
                            position += len(chunk)
                            peak = max(peak, memory.total)
                            await asyncio.sleep(pause(position))
                            waits_since = loop.time()
                finally:
                    stream.close()
                break
            except MirrorError as error:
                longest_wait = max(longest_wait, loop.time() - waits_since)
                upstream, sources = second or upstream, sources - 1
                if not sources and may_fail:
                    break
                if not sources:
                    raise
                if isinstance(error, UpstreamRateLimited):
                    await asyncio.sleep(2.0 if error.retry_after is None else error.retry_after)
    finally:
        reader.close()
    is_right &= position == len(upstream.data)
    return Result(loop.time() - begun, is_right, events, reader, peak, longest_wait)
