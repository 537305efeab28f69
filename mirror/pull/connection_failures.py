"""What failures mean for a transfer by several connections: a pure policy.

Lives here: the count of failures in a row, the pauses after them, how many connections are left,
what is remembered for the endpoint, when the transfer ends. The caller passes the time. Must not
know: asyncio, pieces, which requests are sent (:mod:`mirror.pull.parallel`).

Failures in a row are counted together, whatever their kind. The count is reset by bytes from
requests that were sent after the latest failure. Bytes of the plain response do not reset it. After
each failure there is a pause, twice as long as the one before, and then one request has to be
answered before the next. After two, the transfer goes on with one connection, or with those before
the last addition, and a refusal is remembered for the endpoint. If nobody fetches the front then,
the transfer ends. So it does at once if a 429 asks for a pause of more than two seconds: the fetch
loop can ask other endpoints meanwhile.

Ranges that fail again and again, although they bring bytes, are of no use. After three failures
within 16 whole ranges, one request asks for all that is missing, and the endpoint gets no further
connection for a while. While ranges are on trial, one that breaks is enough.

The front may stand still for ``limits.idle`` at most: the limits of a body hold for all connections
of a transfer together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from mirror.observability.events import BackOffReason
from mirror.oci.errors import (
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.upstream.api import MIN_PROGRESS_BYTES

_MAX_FAILURES: Final = 2
"""Failures in a row after which the transfer goes on with the connections that it has: one may have
met a node that restarts."""
_FAILURE_WINDOW_RANGES: Final = 16
"""If the latest three failures fall within so many complete ranges, ranges are given up: the
transfer goes on with one request for all that is missing, which it would have needed anyway."""
_MAX_WRONG_RANGES: Final = 4
"""Wrong ranges in a row after which the transfer ends. More than for other failures: one of several
nodes may be wrong, and after the end the fetch loop may drop ``Range`` and receive all bytes
again."""
_FIRST_PAUSE_S: Final = 0.1
"""Seconds for which no request is sent after a failure, and twice as many after each further one:
about the time of a request, so that a refusal costs little."""
_RECENT_BYTES_S: Final = 1.0
"""Seconds since the latest bytes of an endpoint in which a failure is a refusal of one connection
more. Later, the endpoint itself may stand still."""
_RETRY_AFTER_S: Final = 1.0
"""Seconds to wait after a 429 at least, even if it permits a request at once, and twice as many
after each further one. The number of connections was accepted before, so the server may count one
that has just ended. Not after the 429 of an added connection: the number before it works."""
_SHORT_WAIT_S: Final = 2.0
"""Seconds of a pause in which a transfer keeps its connections. If a 429 asks for more, it goes on
with fewer at once, and ends if nobody fetches the front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A connection that failed. Times in seconds of the clock of the policy."""

    error: MirrorError
    asked_at: float
    """Time of its request."""
    received: int
    """Bytes that it has brought."""
    has_response: bool
    is_plain: bool
    """Whether it was the response that the transfer began with."""
    is_bad_trial: bool
    """Whether ranges were on trial (:mod:`mirror.pull.trial`), and one had a response. It has
    failed, or the plain response has: some upstreams close the older one of two connections."""
    is_only_request: bool
    """Whether it was the only connection, and its request was a large one: the plain response, all
    that is missing, or 16 pieces. Then the transfer ends."""
    received_at: float
    """Time of the latest bytes of any connection."""


@dataclass(frozen=True, slots=True)
class Consequence:
    """The changes after a failure."""

    reason: BackOffReason
    connections: int
    """The number of connections from now on."""
    is_useless: bool = False
    """Whether it is remembered that the endpoint has no useful ranges."""
    refused_s: float | None = None
    """Seconds for which the endpoint gets no further connection. It is remembered that it has
    refused one. None: it has not."""
    has_pause: bool = False
    """Whether a 429 asks for a pause. If the plain response still runs, it needs no request, so it
    brings the rest meanwhile."""


class ConnectionFailures:
    """The failures in a row of one transfer, and how long its front has stood still."""

    def __init__(self, now: float, idle: float, min_rate: int) -> None:
        """Start without failures.

        Args:
            now: The time.
            idle: Seconds for which the front may stand still (``limits.idle``).
            min_rate: Bytes per second below which it does (``limits.min_rate``).
        """
        self._idle, self._min_rate = idle, min_rate
        self._front_at = now
        """Time since which the front has moved by less than ``min_rate``, as for a body."""
        self._moved = 0
        """Bytes by which it has moved since then."""
        self._count = 0
        """Failures in a row of further connections: requests that were sent after the one before,
        and have brought less than :data:`MIN_PROGRESS_BYTES`. See :meth:`on_progress`."""
        self._max_count = _MAX_FAILURES
        """The count at which the transfer ends if nobody fetches the front."""
        self.latest: MirrorError | None = None
        """The latest of these failures. It is never a refusal of the content."""
        self._failed_at = 0.0
        """Time of the latest one that was counted. Requests before it had the same cause."""
        self._completed = 0
        """Ranges that have arrived whole."""
        self._failed_after: deque[int] = deque(maxlen=_MAX_FAILURES + 1)
        """Value of ``_completed`` at each of the latest three failures of ranges."""
        self._brought = 0
        """Bytes handed out since the latest failure, from requests that were sent after it."""
        self.not_before = 0.0
        """Time before which no request is sent."""

    @property
    def is_retrying(self) -> bool:
        """Whether a request has to be answered before the next one is sent."""
        return self._count > 0

    def is_over(self, now: float, *, is_fetched: bool, has_bytes: bool) -> bool:
        """Return whether the transfer ends.

        Args:
            now: The time.
            is_fetched: Whether the next byte to hand out has arrived, or a connection fetches it.
            has_bytes: Whether it has arrived.
        """
        has_long_pause = self.not_before > now + _SHORT_WAIT_S
        is_given_up = has_long_pause or self._count >= self._max_count
        has_stood_still = now >= self._front_at + self._idle
        return (is_given_up and not is_fetched) or (has_stood_still and not has_bytes)

    def pause(self, seconds: float) -> None:
        """Note that the reader took no bytes for so long. That is no silence of the upstream."""
        self._front_at += seconds

    def on_progress(self, now: float, count: int, asked_at: float | None) -> None:
        """Note that ``count`` bytes are handed out.

        ``asked_at``: time of their request. None: they are of the plain response.
        """
        self._moved += count
        if self._moved >= self._min_rate * (now - self._front_at):
            self._front_at, self._moved = now, 0
        if self._count and asked_at is not None and asked_at >= self._failed_at:
            self._brought += count
            if self._brought >= MIN_PROGRESS_BYTES:
                self._count, self.latest = 0, None

    def on_complete(self) -> None:
        """Note that a range has arrived whole."""
        self._completed += 1

    @property
    def _is_often(self) -> bool:
        """Whether ranges fail too often, although they bring bytes."""
        is_full = len(self._failed_after) > _MAX_FAILURES
        return is_full and self._completed - self._failed_after[0] <= _FAILURE_WINDOW_RANGES

    def on_failure(
        self, now: float, failure: Failure, connections: int, *, is_adding: bool
    ) -> Consequence:
        """Count a failure, and decide about the next request and the number of connections.

        Args:
            now: The time.
            failure: What has failed.
            connections: The number of connections to have.
            is_adding: Whether the last one of these was added a moment ago.
        """
        error = self.latest = failure.error
        is_limited = isinstance(error, UpstreamRateLimited)
        if not failure.is_plain and not isinstance(error, UpstreamTimeout | UpstreamRateLimited):
            self.latest = UpstreamUnavailable(f"a further connection failed: {error.message}")
        if failure.asked_at >= self._failed_at:  # Otherwise the failure before had the same cause.
            if not failure.is_plain and not is_limited:
                self._failed_after.append(self._completed)
            has_progressed = failure.received >= MIN_PROGRESS_BYTES
            self._count = max(1, self._count + (not has_progressed))
            self._failed_at, self._brought = now, 0
        pause = _FIRST_PAUSE_S * 2 ** (self._count - 1)
        is_repeated = self._count >= _MAX_FAILURES
        is_useless = self._is_often or failure.is_bad_trial
        # The number before an addition was accepted. If it fails, too, the rest needs one request.
        accepted = max(1, connections - 1) if is_adding else 1
        consequence = Consequence("failed", connections)
        self._max_count = _MAX_FAILURES
        match error:
            case UpstreamRateLimited():
                least = 0.0 if is_adding else _RETRY_AFTER_S * 2 ** (self._count - 1)
                wait = max(least, error.retry_after or 0.0)
                is_long = wait > _SHORT_WAIT_S
                left = accepted if is_adding or is_repeated or is_long else connections
                pause = max(pause, wait)
                consequence = Consequence("rate_limited", left, refused_s=pause, has_pause=is_long)
            case UpstreamProtocolError() if not failure.has_response:
                self._max_count = _MAX_WRONG_RANGES
                consequence = Consequence("no_ranges", 1, is_useless=True)
            case _ if failure.is_only_request:
                self._count = max(self._count, _MAX_FAILURES)  # The fetch loop decides.
            case _ if is_useless:
                consequence = Consequence("failed", 1, is_useless=True)
            case _ if is_repeated:
                is_sending = now - failure.received_at <= _RECENT_BYTES_S
                refused_s = pause if is_sending and not failure.has_response else None
                consequence = Consequence("failed", accepted, refused_s=refused_s)
        self.not_before = max(self.not_before, now + pause)
        return consequence
