"""How many connections one fetch has: a pure policy. The caller passes the time.

Lives here: the measurement of the rate, and the decision about one more or one fewer connection.
Must not know: asyncio, pieces, other fetches.

The first addition is judged by :mod:`mirror.pull.trial`. One more is added while the last addition
raised the whole rate by a quarter or more. An addition that does not is taken back, and none
follows. So a rate that is shared, or limited in all, is fetched by as few connections as reach it.
No connection is added while this process is the limit: the reader is paused for half of the time,
or received bytes wait in the sockets.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

MEASURE_S: Final = 0.4
"""Seconds over which a rate is measured: several bursts of a server that limits it."""
GAIN: Final = 1.25
"""Factor by which one more connection must raise the whole rate. The fourth one can raise it by a
third at most."""
_MAX_FALL: Final = 0.9
"""Part of the rate before an addition below which the addition has made it fall: a disk that seeks,
or a server that slows down an address with many connections."""
_MIN_REMAINING_S: Final = 1.0
"""Seconds that the rest must take, at the current rate, to be worth a further connection."""
_MAX_PAUSED: Final = 0.5
"""Part of a measurement in which the reader may take nothing. With more, the reader is the limit,
and what further connections bring would only fill the memory."""
_UNREAD_BYTES: Final = 512 * 1024
"""Bytes that wait in a socket when we are slower than its connection: more than arrive between two
reads, 5 ms at 100 MB/s. They would be lost if it was closed."""
_MAX_BEHIND: Final = 0.5
"""Part of the bytes of a measurement that may be received while :data:`_UNREAD_BYTES` or more wait
in the same socket. Measured on 2 cores: up to 0.2 with connections of 100 MB/s, up to 0.5 when
three of them reach the limit of the machine, and 0.9 in one run without a limit beside 20 busy
processes."""
_MIN_LATENCIES: Final = 5
"""Times of a response over which an addition is measured at least: a connection brings bytes for
three of them, and then waits for one."""
MIN_REMAINING_PIECES: Final = 4
"""Pieces that must be missing to be worth a further connection."""


class Step(Enum):
    """The decision after a measurement."""

    KEEP = auto()
    ADD = auto()
    """Open one more connection if the budgets allow it, and call :meth:`Ramp.add`."""
    NO_GAIN = auto()
    """The last addition was useless. Call :meth:`Ramp.back_off` with one connection fewer."""


class Ramp:
    """The number of connections of one fetch. Times in seconds of one clock."""

    def __init__(self, limit: int) -> None:
        """Start with one connection. ``limit``: ``parallel.connections``."""
        self.wanted = 1
        """The number of connections to have."""
        self.rate = 0.0
        """Bytes per second of all connections, as it was last measured."""
        self._plain_rate = 0.0
        """Bytes per second of the plain response before it was closed. While all connections
        together bring less than a quarter more, none is closed unless it made the rate fall: they
        may have reached slow nodes, and with fewer the fetch would be slower than at the start."""
        self.is_adding = False
        """Whether the last addition has not been judged."""
        self._limit = limit
        self._since: float | None = None
        self._bytes = 0
        self._paused_s = 0.0
        self._bytes_behind = 0
        """Bytes behind which :data:`_UNREAD_BYTES` or more waited."""

    @property
    def rate_of_one(self) -> float:
        """Bytes per second of one of the connections that were measured."""
        return self.rate / max(1, self.wanted - self.is_adding)

    @property
    def may_grow(self) -> bool:
        """Whether there may be more connections than now."""
        return self.wanted < self._limit

    def _begin(self, now: float | None) -> None:
        """Begin a measurement. None: it begins later."""
        self._since, self._bytes, self._paused_s, self._bytes_behind = now, 0, 0.0, 0

    def receive(self, now: float, count: int, unread: int = 0) -> None:
        """Count bytes of any connection. ``unread``: bytes that wait in its socket behind them."""
        if self._since is None:
            if not self.is_adding:  # Otherwise it begins when the new connection sends, too.
                self._begin(now)
            return  # The time in which these bytes arrived is not known.
        self._bytes += count
        if unread >= _UNREAD_BYTES:
            self._bytes_behind += count

    def pause(self, seconds: float) -> None:
        """Count seconds in which the reader took no bytes."""
        self._paused_s += seconds

    def on_connections(self, now: float, count: int) -> None:
        """Note that ``count`` connections have a response. The new one may be among them."""
        if self.is_adding and self._since is None and count >= self.wanted:
            self._begin(now)

    def on_cut(self, now: float) -> None:
        """Begin the measurement again: a connection has starved during it."""
        if self._since is not None:
            self._begin(now)

    def evaluate(self, now: float, missing: int, size: int, latency: float = 0.0) -> Step:
        """End a measurement if it is long enough, and decide.

        Args:
            now: The time.
            missing: Bytes that have not arrived.
            size: Bytes of a piece.
            latency: Seconds in which a connection that was replaced brings nothing.
        """
        if self._since is None or now - self._since < MEASURE_S:
            return Step.KEEP
        seconds = now - self._since
        rate = self._bytes / seconds
        is_slow_anyway = _MAX_FALL * self.rate <= rate < GAIN * self._plain_rate
        has_gain = rate >= GAIN * self.rate or is_slow_anyway
        if self.is_adding and not has_gain:
            if seconds < max(2 * MEASURE_S, _MIN_LATENCIES * latency):
                return Step.KEEP  # A connection that was replaced meanwhile may have cost some.
            return Step.NO_GAIN
        self.rate, self.is_adding = rate, False
        is_reader_slow = self._paused_s > _MAX_PAUSED * seconds
        is_reader_slow |= self._bytes_behind > _MAX_BEHIND * self._bytes
        self._begin(now)
        may_add = self._is_worth(missing, size) and not is_reader_slow
        return Step.ADD if may_add else Step.KEEP

    def _is_worth(self, missing: int, size: int) -> bool:
        """Return whether one more connection may bring the rest sooner."""
        is_long = missing > self.rate * _MIN_REMAINING_S
        return self.may_grow and is_long and missing > MIN_REMAINING_PIECES * size

    def add(self) -> None:
        """Note that one more connection is opened."""
        self.wanted += 1
        self.is_adding = True
        self._begin(None)

    def accept_trial(self, rate: float, missing: int, size: int) -> Step:
        """Begin to count from a good trial (:mod:`mirror.pull.trial`).

        Args:
            rate: Bytes per second of both connections.
            missing: Bytes that have not arrived.
            size: Bytes of a piece.

        Returns:
            ADD if a third connection is worth it, else KEEP.
        """
        self._plain_rate, self.rate, self.is_adding = self.rate, rate, False
        return Step.ADD if self._is_worth(missing, size) else Step.KEEP

    def back_off(self, wanted: int) -> None:
        """Have ``wanted`` connections, and no more until the end of this transfer."""
        self.wanted = self._limit = wanted
        self.is_adding = False
        self._begin(None)
