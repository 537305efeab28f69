"""Request ranges of content that are far ahead of its running fetch, aside from that fetch.

Theory of operation. Lazy snapshotters (stargz, SOCI) ask for the end of a layer first, and for
small ranges of it in any order. The growing file brings its last byte last. So a range that begins
more than a second ahead of the fetch is requested from the upstream by itself (an *aside request*).
The fetch continues meanwhile, and the content is stored as always.

The bytes of such a request are the one exception to the rule that every client is served from the
content file. They cannot be verified without the bytes before them, so they are not stored, and the
response says so. Clients that read ranges check them by digests of their own.

A client never depends on such a request. It waits for the request and for the fetch at the same
time, and takes the bytes that come first. If the request fails, the client waits for the fetch.

The same range is requested once for all clients of a repository that wait for it at the same time.
Other repositories are not served with it: unverified bytes are what one upstream has sent to one
repository.

While the disk does not take the content, a fetch ends with its last client, and its bytes are lost.
So no fetch is started then for a client that wants only ranges, and the ranges are requested alone.

Lives here: which ranges are requested, and how many at the same time. Must not know: HTTP, files,
which repository may read which content, how ranges are read (:mod:`mirror.pull.range_readers`).
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from cachetools import TTLCache

from mirror.observability.events import AsideEnded, AsideResult, Observer, Outcome
from mirror.oci.errors import (
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.headers import Span
from mirror.oci.reference import Digest, Repository
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.fetch import Fetch
from mirror.pull.range_readers import AsideReader, AsideRequest, RangesReader, SpanKey
from mirror.pull.requests import ContentSource
from mirror.single_flight import SingleFlight
from mirror.store.follower import Follower
from mirror.store.ingest_writer import MemoryBudget
from mirror.store.reader import Reader

MAX_ASIDE_BYTES: Final = 4 * 1024 * 1024
"""Bytes that are requested aside for one client request at most: a span of SOCI, and 80 chunks of
stargz. They are fetched a second time with the content."""
MAX_HELD_BYTES: Final = 16 * 1024 * 1024
"""Bytes of all ranges together: a client that reads slowly holds its ranges, and must not take the
memory from the fetches."""
MIN_LEAD_S: Final = 1.0
"""Seconds that the fetch must need to reach a range. An aside request takes about as long if the
registry is slow."""
MAX_GAP_BYTES: Final = 256 * 1024
"""Bytes between two wanted ranges that are requested with them: they cost less time than a second
request, which a registry may answer with a redirect first."""
MAX_REQUESTS: Final = 8
"""Requests for one client request at most. A client that wants more ranges waits for the fetch."""
MAX_AT_ONCE: Final = 2
"""Requests for one content at the same time, so that they take little from its fetch. If the
endpoint may have no further connection (all are in use, or it refused some), as many are allowed
nevertheless: they are short, and clients wait for them. None is sent while a 429 pauses them."""
_SAMPLE_S: Final = 0.1
"""Seconds for which the rate of a fetch is measured: about a third of the time in which a lazy
snapshotter expects its first bytes."""
_MAX_SAMPLE_AGE_S: Final = 2.0
"""Seconds after which the rate is measured anew."""
_REJECTED_TTL_S: Final = 600.0
"""Seconds without such requests for a repository whose upstream ignored ``Range`` or responded 429:
as long as a whole image pull takes."""
_FAILED_TTL_S: Final = 30.0
"""Seconds without such requests for a repository after a failure: longer than a restart takes."""
_UNSTORED_TTL_S: Final = 60.0
"""Seconds without a fetch for ranges of content that the disk did not take. The fetch after them
shows whether the disk has room again."""
_MAX_UNSTORED: Final = 1000
"""Contents that the disk did not take, and that are kept in memory: the layers of about a hundred
images. For a content that is forgotten, one more fetch is started."""
_MAX_PAUSES: Final = 1000
"""Repositories whose pauses are kept in memory. For a repository that is forgotten, one
request fails again."""

# --- decisions ------------------------------------------------------------------------------------


def choose_spans(spans: Sequence[Span], front: int, rate: float) -> tuple[Span, ...]:
    """Choose the spans to request aside from the fetch. Empty: wait for the fetch.

    Args:
        spans: The spans that the client wants, in order. Each has an end that the client states.
        front: Bytes at the start of the content that have arrived.
        rate: Bytes per second that the fetch brings.
    """
    return join_spans([span for span in spans if span.start - front > rate * MIN_LEAD_S])


def join_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Join spans that are near to each other. Empty if they are too many or too large to request.

    Args:
        spans: In order.
    """
    joined: list[Span] = []
    for span in spans:
        if joined and span.start - joined[-1].stop <= MAX_GAP_BYTES:
            joined[-1] = Span(joined[-1].start, span.stop)
        else:
            joined.append(span)
    is_small = sum(span.length for span in joined) <= MAX_ASIDE_BYTES
    return tuple(joined) if is_small and len(joined) <= MAX_REQUESTS else ()


def result_of(error: MirrorError) -> AsideResult:
    """Return the result of an aside request that has failed."""
    match error:
        case UpstreamProtocolError():
            return "no_range"
        case UpstreamRateLimited():
            return "rate_limited"
        case _:
            return "failed"


def pause_after(result: AsideResult) -> float:
    """Return the seconds for which a repository gets no aside requests after one that failed."""
    return _FAILED_TTL_S if result == "failed" else _REJECTED_TTL_S


@dataclass(slots=True)
class FrontRate:
    """The rate of one fetch, from two positions of its front. Times in seconds."""

    sampled_at: float = -math.inf
    sampled_front: int = 0
    rate: float | None = None

    def measure(self, now: float, front: int) -> float | None:
        """Return the current rate in bytes per second. None: ask again after ``_SAMPLE_S``.

        Timers may be early, so half of that time is enough.
        """
        age = now - self.sampled_at
        if age >= _SAMPLE_S / 2:
            is_recent = age <= _MAX_SAMPLE_AGE_S
            self.rate = (front - self.sampled_front) / age if is_recent else None
            self.sampled_at, self.sampled_front = now, front
        return self.rate


# --- requests -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Origin:
    """Where the ranges of one content are requested, and how many of them at the same time."""

    size: int
    """Bytes of the whole content."""
    endpoints: dict[str, str]
    """{URL of the endpoint: its upstream} of all that sent bytes, the latest one last."""
    slots: asyncio.Semaphore
    front_rate: FrontRate = field(default_factory=FrontRate)

    @property
    def endpoint(self) -> str:
        """URL of the endpoint that sent bytes last. Empty: another process fetches."""
        return next(reversed(self.endpoints), "")


class AsideRequests:
    """The aside requests of one process."""

    def __init__(
        self,
        single_flight: SingleFlight,
        memory: MemoryBudget,
        connections: ConnectionBudget,
        emit: Observer,
    ) -> None:
        """Start without requests.

        Args:
            single_flight: Runs the requests in the background.
            memory: Counts the bytes of running requests, and of those that clients still read.
            connections: Counts the connections to each endpoint.
            emit: Receives an event for each request that has ended.
        """
        self._single_flight = single_flight
        self._memory = memory
        self._connections = connections
        self._emit = emit
        self._reserved = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(MAX_AT_ONCE))
        """URL of an endpoint -> the requests that it gets beyond its connections."""
        self._origins: WeakKeyDictionary[Fetch, _Origin] = WeakKeyDictionary()
        self._unstored: TTLCache[Digest, _Origin] = TTLCache(_MAX_UNSTORED, _UNSTORED_TTL_S)
        """Contents that the disk did not take, and whose ranges were wanted."""
        self._requests: dict[SpanKey, AsideRequest] = {}
        self._paused_until: TTLCache[Repository, float] = TTLCache(_MAX_PAUSES, _REJECTED_TTL_S)
        """Repository -> time of the event loop until which it gets no such request."""
        self._held = 0
        """Bytes of all requests that have a reader."""

    async def open_unstored(self, running: Fetch | None, source: ContentSource) -> Reader | None:
        """Request the wanted ranges without a fetch.

        This is done in two cases: less than a minute ago the disk refused this content, or a
        running fetch holds it in memory only and has dropped the first byte that the client wants.

        Args:
            running: The running fetch of the content. None: there is none.
            source: The client's request, and the registry to ask.

        Returns:
            A reader of the ranges, which have arrived. None: join ``running``, or start a fetch.
        """
        request = source.request
        if running is not None and running.ingest.has_all_from(
            request.first_byte(running.ingest.size)
        ):
            return None
        if running is not None:
            self._remember_unstored(running, source)
        origin = self._unstored.get(request.digest)
        if origin is None or request.select_spans is None:
            return None
        chosen = join_spans(request.select_spans(origin.size))
        # All bytes of a content are never sent unverified.
        is_whole = sum(span.length for span in chosen) == origin.size
        if is_whole or not self._may_request(origin, source) or not self._has_memory(chosen):
            return None
        request.pull.outcome = Outcome.MISS
        reader = RangesReader(
            origin.size, self._join(origin, source, chosen), request.pull, self._release
        )
        try:
            with request.pull.stage("wait"):
                await reader.wait_for_all()
        except MirrorError:
            reader.close()
            return None
        except BaseException:
            reader.close()
            raise
        request.pull.is_unverified = True
        return reader

    def _remember_unstored(self, fetch: Fetch, source: ContentSource) -> None:
        """Remember the content if the disk does not take it."""
        size, digest = fetch.ingest.size, fetch.ingest.digest
        if fetch.ingest.window is None or size is None or digest in self._unstored:
            return
        # No fetch of the content needs a connection.
        slots = asyncio.Semaphore(source.registry.parallel.connections)
        self._unstored[digest] = _Origin(size, fetch.endpoints_used, slots)

    async def attach(self, fetch: Fetch, follower: Follower, source: ContentSource) -> Reader:
        """Request the wanted ranges that are far ahead of ``fetch``.

        Waits 0.1 s for the rate of the fetch, and at most a second for a range that seems near.
        Raises the error of the fetch.

        Args:
            fetch: The running fetch of the content.
            follower: A reader of it, which may read the content.
            source: The client's request, and the registry to ask.

        Returns:
            A reader that closes ``follower``, or ``follower`` itself if nothing is requested.
        """
        request = source.request
        if request.select_spans is None or follower.size is None:
            return follower
        spans = request.select_spans(follower.size)
        if not spans:
            return follower
        self._remember_unstored(fetch, source)
        origin = self._origins.get(fetch)
        if origin is None:
            slots = asyncio.Semaphore(MAX_AT_ONCE)
            origin = _Origin(follower.size, fetch.endpoints_used, slots)
            self._origins[fetch] = origin
        is_near = spans[-1].start < follower.arrived
        if is_near or not self._may_request(origin, source):
            return follower
        with request.pull.stage("wait"):
            chosen = await self._choose(origin.front_rate, follower, spans)
        if not self._has_memory(chosen) or self._single_flight.is_draining:
            return follower
        request.pull.is_unverified = True
        asides = self._join(origin, source, chosen)
        return AsideReader(follower, asides, request.pull, self._release)

    def _may_request(self, origin: _Origin, source: ContentSource) -> bool:
        """Return whether settings, earlier failures and pauses allow such requests now."""
        until = self._paused_until.get(source.request.repository, 0.0)
        is_failed = asyncio.get_running_loop().time() < until
        is_off = source.registry.parallel.connections == 1 or self._single_flight.is_draining
        return not (is_failed or is_off or self._connections.is_paused(origin.endpoint))

    def _has_memory(self, spans: Sequence[Span]) -> bool:
        """Return whether these spans fit into memory. False if there is no span."""
        count = sum(span.length for span in spans)
        has_memory = self._held + count <= MAX_HELD_BYTES and count <= self._memory.free_ahead()
        return bool(spans) and has_memory

    async def _choose(
        self, front_rate: FrontRate, follower: Follower, spans: Sequence[Span]
    ) -> tuple[Span, ...]:
        """Choose the spans to request, once the rate of the fetch is known.

        Some upstreams send a burst first. So a span that seems near is looked at again, until it
        has arrived or turns out to be far ahead.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MIN_LEAD_S
        while True:
            arrived = follower.arrived
            rate = front_rate.measure(loop.time(), arrived)
            chosen = choose_spans(spans, arrived, rate) if rate is not None else ()
            # While the rate is not known, a later span may still turn out to be far ahead.
            awaited = spans[0] if rate is not None else spans[-1]
            if chosen or arrived > awaited.start or loop.time() >= deadline:
                return chosen
            if arrived > spans[0].start:
                await asyncio.sleep(_SAMPLE_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SAMPLE_S):
                        await follower.wait(spans[0].start)

    def _join(
        self, origin: _Origin, source: ContentSource, spans: Sequence[Span]
    ) -> list[AsideRequest]:
        """Join the running requests for these spans, or start them."""
        return [self._join_one(origin, source, span) for span in spans]

    def _join_one(self, origin: _Origin, source: ContentSource, span: Span) -> AsideRequest:
        key = (source.request.digest, source.request.repository, span)
        aside = self._requests.get(key)
        if aside is None:
            # Requests are shared by `_requests`: a task with the same key may be ending.
            task = self._single_flight.run(
                ("aside", object()), lambda: self._request(origin, source, span)
            )
            aside = self._requests[key] = AsideRequest(key, task)
            self._held += span.length
            self._memory.hold_ahead(aside, span.length)
        aside.readers += 1
        return aside

    def _release(self, aside: AsideRequest) -> None:
        """End the use of a request by one reader. The last one ends the request."""
        aside.readers -= 1
        if not aside.readers:
            del self._requests[aside.key]
            self._held -= aside.span.length
            self._memory.hold_ahead(aside, 0)
            aside.task.cancel()

    @asynccontextmanager
    async def _connection(self, origin: _Origin, endpoint: str) -> AsyncIterator[None]:
        """Wait until a request may be sent, and count its connection while the block runs."""
        async with origin.slots:
            may_add = self._connections.may_add(endpoint)
            async with nullcontext() if may_add else self._reserved[endpoint]:
                with self._connections.connection(endpoint):
                    yield

    async def _request(self, origin: _Origin, source: ContentSource, span: Span) -> bytearray:
        """Request a span, once it may be sent. Raises ``MirrorError``."""
        repository, received = source.request.repository, bytearray()
        # The fetch of another process does not say which endpoint it uses.
        async with self._connection(origin, origin.endpoint or repository.upstream):
            if not self._may_request(origin, source):
                raise UpstreamUnavailable("requests for ranges pause after a failure")
            result: AsideResult = "dropped"
            reason = ""
            try:
                async with source.registry.open(
                    repository,
                    source.request.digest,
                    source.request.kind,
                    offset=span.start,
                    stop=span.stop,
                    # Without `If-Range`: nodes of a storage have different tags for one digest.
                    total=origin.size,
                    avoid=tuple(origin.endpoints)[:-1],
                ) as stream:
                    async for chunk in stream:
                        received += chunk
                result = "ok"
                return received
            except MirrorError as error:
                result, reason = result_of(error), error.message
                pause_s = pause_after(result)
                self._paused_until[repository] = asyncio.get_running_loop().time() + pause_s
                raise
            finally:
                self._emit(AsideEnded(repository.upstream, result, len(received), reason))
