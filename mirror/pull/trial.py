"""Whether the first further connection is worth the plain response: a pure policy.

Lives here: what the trial may cost, how far ahead it begins, the verdict. The caller passes the
time. Must not know: asyncio, pieces, how many connections follow (:mod:`mirror.pull.ramp`).

The plain response needs no other request, and clients would have it without us. It is given up only
for ranges that have been seen to work better. So the first further connection fetches far ahead of
it, where it is not met for a while:

- One small request comes first. Its bytes are the price of the trial: they are fetched twice if
  ranges are useless, so they are a hundredth of the blob.
- If the whole rate was good meanwhile, requests of the usual size follow until bytes have arrived
  for :data:`mirror.pull.ramp.MEASURE_S`.
- Until the verdict, the plain response does not end. After a bad one it runs to the end of the
  blob, over all that the trial has brought.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from mirror.pull import ramp
from mirror.pull.ramp import GAIN

_COST: Final = 100
"""The first request of the trial asks for one part of so many of the blob."""
_MIN_BYTES: Final = 256 * 1024
"""Bytes that it asks for at least: with fewer, they arrive at once."""
_LEAD_S: Final = 1.5
"""Seconds after which the plain response meets the first bytes of the trial: a response may take
one, and then some bytes have to come."""
_CLEAR_AFTER_S: Final = 0.2
"""Seconds of bytes after which a clear rise is enough, so that good upstreams lose little time."""
_CLEAR_GAIN: Final = 1.4
"""Factor of a clear rise of the rate."""
_SLOW: Final = 0.8
"""Part of the rate of the plain response below which a range is slow: the endpoint sends ranges by
another way. It sends them so for other blobs, too."""
_STARVED: Final = 4
"""The plain response is given up, too, if a range is so many times as fast."""
_MIN_LATENCIES_LEFT: Final = 5
"""Times of a response that the rest must take at least: each connection waits for one when it
begins, and for another one at the end of the blob."""
_MIN_LEFT_S: Final = 0.5
"""Seconds that it must take at least beside these."""
_MAX_SHARE_OF_LATENCY: Final = 1 / 3
"""A request asks for more bytes if responses take long, so that a connection waits for this part of
the time in which it receives."""


class TrialResult(Enum):
    """The knowledge about ranges."""

    OPEN = auto()
    GOOD = auto()
    """The plain response may be given up."""
    NO_GAIN = auto()
    """The whole rate does not rise: a limit is shared, or responses take too long."""
    SLOW = auto()
    """A range is slower than the plain response."""


class Trial:
    """The first further connection of a transfer. Times in seconds of one clock."""

    def __init__(self, rate: float, missing: int, size: int) -> None:
        """Start before the first request.

        Args:
            rate: Bytes per second of the plain response alone.
            missing: Bytes that have not arrived.
            size: Bytes of a usual request.
        """
        self._size = size
        self._first_bytes = max(_MIN_BYTES, min(size, missing // _COST))
        """Bytes of the first request."""
        self.latency = 0.0
        """Seconds that its response took."""
        self.rate = rate
        """Bytes per second of the plain response and of ranges together, at the latest verdict."""
        self._rate = rate
        self._lead_s = min(_LEAD_S, missing / 2 / rate)
        self._body_s = 0.0
        """Seconds in which bodies arrived, without the current one."""
        self._body_since: float | None = None
        """Time since which a body arrives. None: none does."""
        self._received = 0
        self._received_meanwhile = 0
        """Bytes of the plain response in the same time."""
        self._half: tuple[float, int] | None = None
        """Time at which half of the first request had arrived, and the bytes until then."""
        self._is_passed = False
        """Whether the first request was good."""

    @property
    def lead(self) -> int:
        """Bytes from the end of what the plain response has brought to the next request."""
        return int(self._rate * self._lead_s)

    @property
    def request_bytes(self) -> int:
        """Bytes of the next request."""
        return self._size if self._is_passed else self._first_bytes

    def on_response(self, now: float, latency: float) -> None:
        """Note that a response has arrived, after ``latency`` seconds."""
        self._body_since = now
        self.latency = max(self.latency, latency)

    def on_end(self, now: float) -> None:
        """Note that a body has ended."""
        if self._body_since is not None:
            self._body_s += now - self._body_since
            self._body_since = None

    def receive(self, now: float, count: int, *, is_plain: bool) -> None:
        """Count bytes of the plain response, or of the trial."""
        if self._body_since is None:
            return
        if is_plain:
            self._received_meanwhile += count
            return
        self._received += count
        if self._half is None and self._received >= self._first_bytes // 2:
            self._half = now, self._received

    def judge(self, now: float, missing: int, *, is_due: bool = False) -> TrialResult:
        """Return the verdict.

        Args:
            now: The time.
            missing: Bytes that have not arrived, or those of the trial alone.
            is_due: Whether the plain response meets the trial now, or no other request can be
                sent. The verdict is not open then.
        """
        seconds = self._body_s + (now - self._body_since if self._body_since is not None else 0.0)
        is_long = is_due or seconds >= ramp.MEASURE_S
        is_first = not self._is_passed and self._received >= self._first_bytes
        if not (is_long or is_first or seconds >= _CLEAR_AFTER_S):
            return TrialResult.OPEN
        seconds = max(seconds, 1e-3)
        rate, plain = self._received / seconds, self._received_meanwhile / seconds
        if is_first and not is_long and self._half is not None and now > self._half[0]:
            # A connection begins slowly.
            rate = max(rate, (self._received - self._half[1]) / (now - self._half[0]))
        is_clear = seconds >= _CLEAR_AFTER_S and not is_long
        verdict = self._compare(rate, plain, missing, GAIN if is_long else _CLEAR_GAIN)
        if is_long or (is_clear and verdict is TrialResult.GOOD):
            return verdict
        if is_first and verdict is not TrialResult.GOOD:
            return verdict
        if is_first:
            self._is_passed = True
            self._lead_s = min(self._lead_s, self.latency + ramp.MEASURE_S)
        return TrialResult.OPEN

    def _compare(self, rate: float, plain: float, missing: int, gain: float) -> TrialResult:
        """Compare the rate of a range with that of the plain response in the same time."""
        # What one connection brings if it waits for responses, too.
        effective = rate / (1 + min(_MAX_SHARE_OF_LATENCY, self.latency * rate / self._size))
        self.rate = min(plain, effective) + effective
        has_risen = plain + effective >= gain * self._rate or effective >= _STARVED * plain
        is_enough = 2 * effective >= max(plain, GAIN * self._rate)
        remaining_s = missing / self._rate
        is_worth = remaining_s >= _MIN_LEFT_S + _MIN_LATENCIES_LEFT * self.latency
        if has_risen and is_enough and is_worth:
            return TrialResult.GOOD
        is_slow = rate < _SLOW * plain or not self._received
        return TrialResult.SLOW if is_slow else TrialResult.NO_GAIN
