"""One batch of the history: what a process has observed in about a second.

Lives here: the sums that are made on the event loop, and which requests get a row of their own.
Must not know: the database, threads.

Theory of operation. A popular image brings thousands of requests a second, all alike. Each is added
to a sum, and only few get a row: those that say why a pull was no hit, or slow, and the latest of
the others. So a batch is small, whatever the number of requests.

The order of accesses decides what a cache evicts. It is kept in steps: within a step, accesses of
one content are one entry. A step ends when its requests have sent a small part of the quota, or
when content is fetched that was requested in it before: it was evicted in between.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, TypeAlias

from mirror.history.stored_pull import SERVED_OUTCOMES
from mirror.observability.events import Kind, Outcome, RequestRecord, TagMoved

SLOW_S: Final = 1.0
"""Seconds from which a hit gets a row of its own: one is answered in milliseconds, or streams a
large blob."""
_MAX_HITS: Final = 20
"""Rows of other hits in a batch, the latest ones: examples are enough."""
_MAX_ROWS: Final = 500
"""Rows of other requests in a batch: a few images, pulled by many nodes at the same time. More are
counted only."""
_MAX_SUMS: Final = 20_000
"""Sums, and entries of the trace, in a batch: about 10 MB of memory. More are not recorded."""
_CONTENT_KINDS: Final = (Kind.MANIFEST, Kind.BLOB)
_TRACED_OUTCOMES: Final = SERVED_OUTCOMES - {Outcome.ASIDE}
"""Outcomes of requests that read content of the cache."""

RequestKey: TypeAlias = tuple[str, str, str, Outcome, Kind, str]
"""Upstream, repository, client, outcome, kind, method."""

# Sums are made by `Counter` and these getters, because they run in C: a server that answers 40,000
# requests a second has 25 us for each of them.
_REQUEST_FIELDS: Final = attrgetter(
    *("upstream", "repository", "client", "outcome", "kind", "method"),
    *("digest", "bytes_sent"),
)
_BYTES_SENT: Final = attrgetter("bytes_sent")


@dataclass(slots=True)
class Fetched:
    """Work of an upstream for one request."""

    record: RequestRecord | None
    """The request that has caused it. None: there is none."""
    upstream: str
    bytes: int = 0
    """Bytes of bodies that were received."""
    billed: int = 0
    """Requests that the upstream may have billed."""


@dataclass(slots=True)
class ContentAccess:
    """Accesses of one content within a step."""

    at: float
    """Time of ``time.monotonic`` of the first one."""
    requests: int = 0
    """Requests of clients."""
    misses: int = 0
    """Fetches for them, or for a command."""
    is_use_recorded: bool = False
    """Whether the store has recorded it as used, for the order of eviction."""
    size: int = 0
    """Bytes of the content. 0: not known."""


def is_fetched_elsewhere(pull: RequestRecord) -> bool:
    """Return whether another process has fetched the bytes that were sent: no further fetch."""
    progress = pull.trace.progress if pull.trace is not None else None
    return progress is not None and progress.bytes == 0 and pull.bytes_sent > 0


class Batch:
    """All that was observed since the last batch, as sums and as rows."""

    def __init__(self, now: float, step_bytes: float) -> None:
        """Start empty.

        Args:
            now: Unix time in seconds.
            step_bytes: Bytes that the requests of a step send at most.
        """
        self.at = now
        """Unix time in seconds of the newest entry, set when the batch ends."""
        self.ended_at = time.monotonic()
        """Time of ``time.monotonic`` at :attr:`at`."""
        self.requests: dict[RequestKey, list[int]] = {}
        """Request -> [number, bytes sent]."""
        self.fetched: dict[tuple[int, str], Fetched] = {}
        """(``id()`` of the record, upstream) -> work of the upstream. It keeps the record alive."""
        self.rows: list[RequestRecord] = []
        """Requests that get a row of their own."""
        self.hits: deque[RequestRecord] = deque(maxlen=_MAX_HITS)
        """The latest other hits."""
        self.steps: list[dict[str, ContentAccess]] = [{}]
        """The trace: digest -> accesses, for each step."""
        self.moves: list[TagMoved] = []
        self.dropped = 0
        """Rows, sums and entries of the trace that found no room."""
        self._accesses = 0
        """Entries of the trace, in all steps."""
        self._step_bytes = step_bytes
        self._sent_in_step = 0

    @property
    def weight(self) -> int:
        """Number of its entries: about the number of rows that are written."""
        sums = len(self.requests) + len(self.fetched) + self._accesses
        return sums + len(self.rows) + len(self.hits) + len(self.moves)

    def wall_time(self, at: float) -> float:
        """Return the Unix time of a time of ``time.monotonic``, both in seconds."""
        return self.at - (self.ended_at - at)

    def add_requests(self, ended: Sequence[RequestRecord]) -> None:
        """Add requests that have ended."""
        for part, sent in _split(ended, self._step_bytes):
            if self._sent_in_step + sent > self._step_bytes:
                self._begin_step()
            self._sent_in_step += sent
            self._add_part(part)

    def _add_part(self, part: Sequence[RequestRecord]) -> None:
        """Add requests of one step."""
        begin, hit = 0, Outcome.HIT  # A member of an enum is looked up by a call.
        others = [
            index
            for index, pull in enumerate(part)
            if pull.outcome is not hit or pull.error or pull.duration >= SLOW_S
        ]
        for index in others:
            self._add_fast_hits(part[begin:index])
            self._add_other(part[index])
            begin = index + 1
        self._add_fast_hits(part[begin:])

    def _add_fast_hits(self, hits: Sequence[RequestRecord]) -> None:
        for key, number in Counter(map(_REQUEST_FIELDS, hits)).items():
            self._add_sum(key, number, hits[0])
        self.hits.extend(_latest_but_pings(hits))

    def _add_other(self, pull: RequestRecord) -> None:
        if pull.kind is Kind.PING:
            return
        fields = _REQUEST_FIELDS(pull)
        if pull.outcome is Outcome.MISS and is_fetched_elsewhere(pull):
            fields = (*fields[:3], Outcome.JOIN, *fields[4:])
        self._add_sum(fields, 1, pull)
        if len(self.rows) < _MAX_ROWS:
            self.rows.append(pull)
        else:
            self.dropped += 1

    def _add_sum(
        self,
        fields: tuple[str, str, str, Outcome, Kind, str, str, int],
        number: int,
        pull: RequestRecord,
    ) -> None:
        """Add equal requests. ``pull``: one that ended at about the same time."""
        *_, outcome, kind, method, digest, size = fields
        if kind is Kind.PING:
            return
        sums = self.requests.get(fields[:6])
        if sums is not None:
            sums[0] += number
            sums[1] += number * size
        elif len(self.requests) < _MAX_SUMS:
            self.requests[fields[:6]] = [number, number * size]
        else:
            self.dropped += 1
        is_content = kind in _CONTENT_KINDS and method == "GET" and digest
        if is_content and outcome in _TRACED_OUTCOMES:
            is_miss = outcome is Outcome.MISS
            access = self._access(digest, pull.started + pull.duration, is_miss=is_miss)
            if access is None:
                return
            access.requests += number
            access.misses += is_miss
            if pull.digest == digest:
                access.size = access.size or _size_of(pull)

    def _access(self, digest: str, at: float, *, is_miss: bool) -> ContentAccess | None:
        """Return the entry of a content in the current step. None: there is no room for it."""
        access = self.steps[-1].get(digest)
        if access is not None and not (is_miss and access.requests):
            return access
        if self._accesses >= _MAX_SUMS:
            self.dropped += 1
            return None
        if access is not None:
            self._begin_step()
        self._accesses += 1
        access = self.steps[-1][digest] = ContentAccess(at)
        return access

    def _begin_step(self) -> None:
        self._sent_in_step = 0
        if self.steps[-1]:
            self.steps.append({})

    def add_use(self, digests: Iterable[str], at: float) -> None:
        """Add contents whose use was recorded. ``at``: time of ``time.monotonic``."""
        for digest in digests:
            access = self._access(digest, at, is_miss=False)
            if access is not None:
                access.is_use_recorded = True

    def add_own_request(self, pull: RequestRecord) -> None:
        """Add a request of a command or a job. It is not counted as a request of a client.

        A hit is not kept: nothing was fetched.
        """
        if pull.outcome is Outcome.HIT:
            return
        if pull.digest and pull.outcome in (Outcome.MISS, Outcome.JOIN):
            access = self._access(pull.digest, pull.started + pull.duration, is_miss=False)
            if access is not None:
                access.misses += 1
        if len(self.rows) < _MAX_ROWS:
            self.rows.append(pull)
        else:
            self.dropped += 1

    def add_fetched(
        self, record: RequestRecord | None, upstream: str, size: int, billed: int
    ) -> None:
        """Add work of an upstream.

        Args:
            record: The request that has caused it. None: there is none.
            upstream: The upstream.
            size: Bytes of a body that were received.
            billed: Requests that the upstream may have billed.
        """
        fetched = self.fetched.get((id(record), upstream))
        if fetched is None:
            fetched = self.fetched[id(record), upstream] = Fetched(record, upstream)
        fetched.bytes += size
        fetched.billed += billed

    def end(self, now: float) -> None:
        """Note the time at which the batch ends. ``now``: Unix time in seconds."""
        self.at, self.ended_at = now, time.monotonic()


def _size_of(pull: RequestRecord) -> int:
    """Return the bytes of the content of a request. 0: it does not say."""
    if pull.trace is not None and pull.trace.size:
        return pull.trace.size
    return pull.bytes_sent if pull.is_complete and pull.status == 200 else 0


def _split(
    ended: Sequence[RequestRecord], step_bytes: float
) -> Iterator[tuple[Sequence[RequestRecord], int]]:
    """Split requests, and yield each part with the bytes that it has sent.

    That is less than a step, but for a part of a single request.
    """
    sent = sum(map(_BYTES_SENT, ended))
    if len(ended) > 1 and sent > step_bytes:
        middle = len(ended) // 2
        yield from _split(ended[:middle], step_bytes)
        yield from _split(ended[middle:], step_bytes)
    elif ended:
        yield ended, sent


def _latest_but_pings(pulls: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Return the latest requests for content, in their order, as many as a batch keeps."""
    found: list[RequestRecord] = []
    for pull in reversed(pulls):
        if len(found) >= _MAX_HITS:
            break
        if pull.kind is not Kind.PING:
            found.append(pull)
    return found[::-1]
