"""Retry state of one source of a fetch: what its transfers have brought, and when it is given up.

Lives here: the rules after a transfer that broke, as functions of the time. Must not know: I/O,
followers, other sources.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from mirror.observability.events import Resumed
from mirror.oci.errors import (
    AllCircuitsOpen,
    FailureScope,
    MirrorError,
    OutboundRefused,
    StorageRefused,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.requests import REFUSALS, ContentSource
from mirror.upstream.api import ContentStream, ReclaimConnections

STALL_GRACE_S: Final = 15.0
"""Seconds without progress, beside ``limits.idle``, after which a source is given up. They are for
another attempt after a body that stalled. More would delay the fallback of the clients."""
_MAX_FAILED_IN_A_ROW: Final = 5
"""Transfers from one source that may break in a row without progress."""
_RANGED_ATTEMPTS: Final = 2
"""Transfers in a row that may break without progress before ``Range`` is left out: a server may
answer a ``Range`` with an error that does not mention it."""
_PAUSE_UNIT_S: Final = 0.05
"""Seconds. After n broken transfers in a row the pause is this times 2^n at most (n=1: 0.1 s)."""
_MAX_PAUSE_S: Final = 2.0
"""Seconds at most between two transfers, so that a fetch resumes soon after a short outage. The
seconds of ``wait_s`` are added."""
_MAX_LATE_PAUSE_S: Final = 5.0
"""The same after so many failures that only a client with bytes is a reason to go on."""
_MAX_LIMITED_S: Final = 120.0
"""Seconds without progress after which a source is given up whose upstream has limited our ranges
with a 429. Longer than for others: one connection would have needed no further request, so clients
are not cut off. Limits of requests are often for one minute. A longer pause is not waited for."""
REPEAT_AFTER_S: Final = 1.0, 2.0
"""Bounds, in seconds, of the random wait before a request is sent again that failed while we had
further connections to the endpoint. These are closed at once, but an upstream may count them for a
moment."""
_MAX_REPEATS: Final = 3
"""Times that a request of one source is sent again because of our own further connections."""
_RANGE_REFUSALS: Final = (UpstreamProtocolError, StorageRefused, *REFUSALS)
"""Errors that a server may respond with because of ``Range``."""


@dataclass(slots=True)
class SourceAttempts:
    """Retry state of one source, kept across its transfer attempts.

    All times are in seconds of the event loop's clock.
    """

    source: ContentSource
    stall_limit_s: float
    """Seconds without progress after which the source is given up."""
    last_progress_at: float = 0.0
    """Time of the latest progress. Before any: of the first response, else of the first request. It
    is moved by the time that skipped bytes take (see ``may_use_range``), and by that of other
    sources (see ``is_preempted``)."""
    failed_in_a_row: int = 0
    """Transfers that broke since the latest progress."""
    ranged_failures: int = 0
    """Failures in a row after which ``Range`` may be left out: all but those by a 429 alone."""
    wait_s: float | None = None
    """Seconds to wait for endpoints that pause after a 429, or whose circuits are open (0.0). None:
    nothing is waited for."""
    resume_at: float = 0.0
    """Time until which the source has to wait."""
    error: MirrorError | None = None
    """The latest error."""
    highest_position: int = 0
    """Offset in the content, in bytes, at the latest progress."""
    resumed_from: int = 0
    """Offset in the content, in bytes, at which the latest transfer began."""
    has_progressed: bool = False
    """Whether the latest transfer has brought at least ``MIN_PROGRESS_BYTES`` new bytes."""
    may_use_range: bool = True
    """False once a response to a ``Range`` was wrong, or was a 401, 403 or 404: a storage may
    refuse ranges, and an upstream may pass this on. Further requests then have no ``Range``, and
    the bytes before the offset are skipped."""
    has_just_dropped_range: bool = False
    """Whether the latest failure is the one after which ``Range`` is left out."""
    is_range_suspected: bool = False
    """Whether ``Range`` is left out only because some endpoints refused it while others had to be
    waited for. It is used again if the former refuse the whole content, too."""
    refused_whole: set[str] = field(default_factory=set)
    """URLs of endpoints that have refused a request without ``Range``: when they refuse one with
    it, ``Range`` is not the cause."""
    is_refused: bool = False
    """Whether the upstream has refused a request without ``Range``. Then the refusal is final."""
    validator: str | None = None
    """Validator of the latest response, for ``If-Range``. None: it had none, or was wrong."""
    endpoint: str = ""
    """URL of the endpoint that sent the latest response."""
    avoid: list[str] = field(default_factory=list)
    """Endpoints whose transfers broke without progress, the latest one last."""
    has_responded: bool = False
    """Whether the source has sent response headers at least once."""
    ranged_endpoints: set[str] = field(default_factory=set)
    """URLs of endpoints whose ranges of this content have brought bytes: when they fail, ``Range``
    is not the cause."""
    has_split: bool = False
    """Whether further connections have brought bytes. The plain response was given up for them, and
    would have needed no further request. So as long as a client would be cut off, nothing is final
    but the stall limit."""
    paused: dict[str, float] = field(default_factory=dict)
    """URL of an endpoint that has limited our ranges with a 429 -> time until which it gets no
    request for this content. The others are asked meanwhile."""
    has_reclaimed: bool = False
    """Whether the latest request has failed beside further connections of other fetches, which are
    closed now."""
    repeats: int = 0
    """How often a request was sent again for that."""
    has_transfer_response: bool = False
    """Whether the latest transfer has got its response. A 429 after that is one of a range."""
    is_preempted: bool = False
    """Whether another source has taken its place. It is tried again after all new sources."""
    preempted_at: tuple[float, int] = 0.0, 0
    """When it lost its place: the time, and the offset in the content in bytes."""

    def begin(self, position: int, now: float) -> None:
        """Note that a transfer begins, with the byte at ``position``."""
        self.resumed_from, self.has_progressed = position, False
        self.has_transfer_response = self.has_reclaimed = False
        self.last_progress_at = self.last_progress_at or now

    def on_response(self, stream: ContentStream) -> None:
        """Note that the transfer has got a response."""
        self.has_transfer_response = True
        self.validator, self.endpoint = stream.validator, stream.endpoint

    def note_progress(
        self, now: float, position: int, ranged: Collection[str], *, has_split: bool = False
    ) -> None:
        """Note that all bytes before ``position`` are there.

        Args:
            now: The time.
            position: Offset in the content, in bytes.
            ranged: URLs of the endpoints that have sent some of them in response to a ``Range``.
            has_split: Whether further connections have.
        """
        self.has_split |= has_split
        self.has_progressed = True
        self.failed_in_a_row = self.ranged_failures = 0
        self.refused_whole.clear()
        self.highest_position, self.last_progress_at = position, now
        self.ranged_endpoints.update(ranged)

    @asynccontextmanager
    async def limit_stall(self, has_reader: bool) -> AsyncIterator[asyncio.Timeout]:
        """Limit the block to the time that the source may still take without progress.

        There is no limit before the first response, unless a client may have received a byte.
        Yields the limit, which the block may move. Raises ``UpstreamTimeout`` when it is reached.
        """
        is_limited = self.has_responded or has_reader
        try:
            deadline = self.ends_at if is_limited else None
            async with asyncio.timeout_at(deadline) as limit:
                yield limit
        except TimeoutError:
            raise UpstreamTimeout(
                f"the upstream sent no data for {self.ends_at - self.last_progress_at:g} s, in"
                " several attempts"
            ) from None

    def reclaim(self, from_others: ReclaimConnections, endpoint: str) -> bool:
        """Call ``from_others``, and note its result. Not after :data:`_MAX_REPEATS` repeats."""
        if self.repeats >= _MAX_REPEATS or not from_others(endpoint):
            return False
        self.has_reclaimed = True
        return True

    def begin_repeat(self) -> bool:
        """Use up one repeat. Returns True if the latest request is sent again.

        It may have failed because of connections of ours, which are closed by then. The caller
        waits for a time within :data:`REPEAT_AFTER_S`.
        """
        is_repeated, self.has_reclaimed = self.has_reclaimed, False
        self.repeats += is_repeated
        return is_repeated

    def preempt(self, now: float, position: int) -> None:
        """Note that another source takes the place of this one."""
        self.is_preempted, self.preempted_at = True, (now, position)

    def try_again(self, now: float, position: int) -> None:
        """Note that this source has its place again.

        The time of the others does not count. But it counts if this one had to wait, and the others
        brought nothing: clients must not stand still for the time limits of several sources.
        """
        at, reached = self.preempted_at
        if self.wait_s is None or position > reached:
            self.last_progress_at += now - at

    def count_failure(self, error: MirrorError, now: float, *, has_reader: bool = False) -> None:
        """Count a transfer that broke, and choose how the next one is requested.

        It is not counted if endpoints have to be waited for, and no other one has failed. A pause
        that ends after the stall limit is not waited for, and counts like any failure.

        Args:
            error: Why it broke.
            now: The time.
            has_reader: Whether a client may have received a byte. It would be cut off, so pauses
                after a 429 are waited for. Any other client may use its next mirror.
        """
        self.error = error
        is_of_range = self.has_transfer_response and not error.is_wait
        if isinstance(error, UpstreamRateLimited) and is_of_range and has_reader:
            # Nothing but the number of requests of this transfer is the cause.
            paused_s = _MAX_PAUSE_S if error.retry_after is None else error.retry_after
            if now + paused_s < self.last_progress_at + _MAX_LIMITED_S:
                self.paused[self.endpoint] = now + paused_s
        is_ranged = self.may_use_range and self.resumed_from > 0
        is_known = error.endpoint in self.ranged_endpoints
        self.is_refused = isinstance(error, REFUSALS) and (is_known or not is_ranged)
        pause_s = error.next_request_in or 0.0
        may_wait = has_reader and now + pause_s < self.ends_at
        is_wait = isinstance(error, AllCircuitsOpen) and self.has_responded
        is_wait = is_wait or (error.is_wait and may_wait)
        if not is_wait:
            self.failed_in_a_row += 1
            if not self.has_progressed:
                endpoint = error.endpoint or self.endpoint
                self.avoid = [*(e for e in self.avoid if e != endpoint), endpoint]
        failures_before = self.ranged_failures
        self._judge_range(error, is_ranged=is_ranged)
        # Then `Range` may be the cause, so there is a try before the wait.
        is_range_doubted = self.ranged_failures > failures_before
        self.has_just_dropped_range = is_ranged and not self.may_use_range
        self.wait_s = None
        if is_wait and not is_range_doubted:
            self.wait_s = pause_s
        elif may_wait and self.failed_in_a_row > _MAX_FAILED_IN_A_ROW:
            self.wait_s = pause_s or None  # Others have failed too often.
        if self.wait_s:
            self.refused_whole.clear()  # An endpoint may work again after a pause.

    def _judge_range(self, error: MirrorError, *, is_ranged: bool) -> None:
        """Decide whether the next request has ``Range``.

        A 429 tells nothing about ``Range``, but the responses of other endpoints do.
        """
        is_ranged_endpoint = error.endpoint in self.ranged_endpoints
        if isinstance(error, (StorageRefused, *REFUSALS)) and is_ranged_endpoint:
            return  # ``Range`` was not the cause.
        if isinstance(error, _RANGE_REFUSALS):
            self.is_range_suspected, self.may_use_range, self.validator = False, False, None
            return
        has_to_wait = isinstance(error, UpstreamRateLimited | AllCircuitsOpen)
        causes = [one for one in error.others if not isinstance(one, UpstreamRateLimited)]
        if has_to_wait and not causes and self.ranged_endpoints:
            return  # Ranges of this content were accepted before.
        refusals = [one for one in causes if isinstance(one, _RANGE_REFUSALS)]
        failures = [one for one in causes if one not in refusals] if has_to_wait else [error]
        has_failure = any(map(self._may_depend_on_range, failures))
        if not is_ranged:
            whole = {one.endpoint for one in refusals if isinstance(one, REFUSALS)}
            self.refused_whole |= whole
            if self.is_range_suspected and whole and len(refusals) == len(whole):
                self.is_range_suspected, self.may_use_range, self.ranged_failures = False, True, 0
            self.ranged_failures += has_failure
            return
        if failures and not (has_failure or refusals):
            return  # ``Range`` was not the cause.
        is_known = all(one.endpoint in self.refused_whole for one in refusals)
        if not has_failure and is_known and self.failed_in_a_row < _MAX_FAILED_IN_A_ROW:
            return
        self.ranged_failures += 1
        is_first_failed = not self.has_responded and any(map(_is_response, (error, *causes)))
        is_last_try = self.failed_in_a_row >= _MAX_FAILED_IN_A_ROW
        if self.ranged_failures > _RANGED_ATTEMPTS or is_first_failed or is_last_try:
            self.is_range_suspected, self.may_use_range = not has_failure, False

    def _may_depend_on_range(self, error: MirrorError) -> bool:
        """Return whether ``Range`` may be the cause of a failure.

        Not if no request with a token reached the endpoint, and not if that has sent right ranges.
        """
        if not isinstance(error, UpstreamUnavailable):
            return True
        is_reached = error.scope is not FailureScope.ENDPOINT and not error.is_without_token
        return is_reached and error.endpoint not in self.ranged_endpoints

    def is_over(self, now: float, *, may_repeat: bool = False) -> bool:
        """Return whether the source is given up.

        The registry has repeated a request that had no response. It is sent once more without
        ``Range`` if it had one.

        Args:
            now: The time.
            may_repeat: Whether it is repeated nevertheless: a client would be cut off, and there is
                no other source.
        """
        is_patient = self.has_split and may_repeat
        if now >= self.ends_at or (self.is_refused and not is_patient):
            return True
        may_begin = self.has_responded or self.has_just_dropped_range or may_repeat
        has_failed_often = self.failed_in_a_row > _MAX_FAILED_IN_A_ROW and not is_patient
        return self.wait_s is None and (has_failed_often or not may_begin)

    @property
    def ends_at(self) -> float:
        """Time at which the source is given up without progress."""
        least = _MAX_LIMITED_S if self.is_limited else 0.0
        return self.last_progress_at + max(self.stall_limit_s, least)

    @property
    def is_limited(self) -> bool:
        """Whether our ranges have got a 429 since the latest progress."""
        return any(until >= self.last_progress_at for until in self.paused.values())

    def ruled_out(self, now: float) -> dict[str, MirrorError]:
        """Return ``ruled_out`` of the next request: the endpoints that pause for our ranges."""
        errors: dict[str, MirrorError] = {}
        for endpoint, until in self.paused.items():
            if until > now:
                message = "the upstream accepts no further connection"
                errors[endpoint] = error = UpstreamRateLimited(message, retry_after=until - now)
                error.next_request_in = until - now
        return errors

    def resumed_event(self, position: int, error: MirrorError) -> Resumed:
        """Return the event of a transfer that ended with ``error`` and is resumed."""
        upstream = self.source.request.repository.upstream
        return Resumed(upstream, position, isinstance(error, UpstreamProtocolError), error.message)

    def pause(self) -> float:
        """Return the seconds before the next transfer.

        They are random, so that fetches which broke together do not resume together.
        """
        is_long_outage = self.failed_in_a_row > _MAX_FAILED_IN_A_ROW
        most = _MAX_LATE_PAUSE_S if is_long_outage else _MAX_PAUSE_S
        most = min(most, _PAUSE_UNIT_S * 2 ** min(self.failed_in_a_row, 10))
        if self.wait_s is not None:
            most = _MAX_PAUSE_S
        return (self.wait_s or 0.0) + random.uniform(0, most)  # noqa: S311 - jitter, not a secret


class Preempted(UpstreamTimeout):
    """Another source is tried, because this one is slow, or has to wait after a 429."""


def _is_response(error: MirrorError) -> bool:
    """Return whether a server has failed this request, which it may do because of ``Range``.

    Not a server that cannot be reached, is slow, or wants a pause: that has another cause.
    """
    if isinstance(error, UpstreamTimeout | UpstreamRateLimited | OutboundRefused):
        return False
    return not isinstance(error, UpstreamUnavailable) or error.may_depend_on_request
