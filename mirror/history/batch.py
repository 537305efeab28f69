"""One batch of the history: what a process has observed in about a second.

Lives here: the sums that are made on the event loop, and which requests get a row of their own.
Must not know: the database, threads.

Theory of operation. A popular image brings thousands of requests a second, all alike. Each is added
to a sum, and only few get a row: those that say why a pull was no hit, or slow, and the latest of
the others. So a batch is small, whatever the number of requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

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
"""Sums in a batch: about 10 MB of memory. More requests are not counted by their content."""

RequestKey: TypeAlias = tuple[str, str, str, Outcome, Kind, str, str]
"""Upstream, repository, client, outcome, kind, method, digest."""


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


def is_fetched_elsewhere(pull: RequestRecord) -> bool:
    """Return whether another process has fetched the bytes that were sent: no further fetch."""
    progress = pull.trace.progress if pull.trace is not None else None
    return progress is not None and progress.bytes == 0 and pull.bytes_sent > 0


class Batch:
    """All that was observed since the last batch, as sums and as rows."""

    def __init__(self, now: float) -> None:
        """Start empty. ``now``: Unix time in seconds."""
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
        self.uses: list[tuple[float, tuple[str, ...]]] = []
        """(Unix time in seconds, digests) of each use of content."""
        self.moves: list[TagMoved] = []
        self.dropped = 0
        """Rows and sums that found no room."""

    @property
    def weight(self) -> int:
        """Number of its entries: about the number of rows that are written."""
        sums = len(self.requests) + len(self.fetched)
        return sums + len(self.rows) + len(self.hits) + len(self.uses) + len(self.moves)

    def add_requests(self, ended: Iterable[RequestRecord]) -> None:
        """Add requests that have ended."""
        requests, hits, rows = self.requests, self.hits, self.rows
        for pull in ended:
            outcome, kind = pull.outcome, pull.kind
            if kind is Kind.PING:
                continue
            if outcome is Outcome.MISS and is_fetched_elsewhere(pull):
                outcome = Outcome.JOIN
            key = (
                *(pull.upstream, pull.repository, pull.client, outcome, kind),
                *(pull.method, pull.digest),
            )
            sums = requests.get(key)
            if sums is not None:
                sums[0] += 1
                sums[1] += pull.bytes_sent
            elif len(requests) < _MAX_SUMS:
                requests[key] = [1, pull.bytes_sent]
            else:
                self.dropped += 1
            if outcome is Outcome.HIT and not pull.error and pull.duration < SLOW_S:
                hits.append(pull)
            elif len(rows) < _MAX_ROWS:
                rows.append(pull)
            else:
                self.dropped += 1

    def add_own_request(self, pull: RequestRecord, now: float) -> None:
        """Add a request of a command or a job. It is not counted as a request of a client.

        A hit is not kept: nothing was fetched. ``now``: Unix time in seconds.
        """
        if pull.outcome is Outcome.HIT:
            return
        if pull.digest and pull.outcome in (Outcome.MISS, Outcome.JOIN):
            self.uses.append((now, (pull.digest,)))
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
