"""Endpoints in order of preference, with a circuit breaker for each.

Theory of operation. A circuit breaker is closed, open, or half open:

- closed: requests are sent. ``FAILURE_THRESHOLD`` failures in a row open it.
- open: no request is sent for ``open_seconds``.
- half open: after that time, exactly one request is sent: the probe. If it succeeds, the circuit
  closes. If it fails, the circuit stays open for twice as long.

Only failures of the endpoint itself count. A 4xx is a response, so it counts as a success. Failures
of one path count once, however often they repeat, since other paths may work.

No I/O, no clock: the caller passes the time. Must not know: requests, responses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from yarl import URL

FAILURE_THRESHOLD: Final = 3
"""Failures in a row that open a circuit. A single one is often a connection that was closed."""
FIRST_OPEN_S: Final = 2.0
"""Seconds for which a circuit opens first: short, since most outages are restarts."""
MAX_OPEN_S: Final = 60.0
"""Seconds between two probes at most, so that a recovered endpoint is used within a minute."""
DEFAULT_BACK_OFF_S: Final = 2.0
"""Seconds to pause after a 429 without ``Retry-After``: clients repeat theirs at once."""
MAX_BACK_OFF_S: Final = 300.0
"""Seconds to pause after a 429 at most: an endpoint must not switch itself off for hours."""


@dataclass(slots=True)
class CircuitBreaker:
    """The state of one endpoint. All times are in seconds of one clock."""

    failures: int = 0
    failed_path: str | None = None
    """Path of the last failure. None if the endpoint failed as a whole."""
    open_until: float = 0.0
    back_off_until: float = 0.0
    """End of the pause that a 429 requested."""
    has_retry_after: bool = False
    """Whether the 429 had a ``Retry-After``. Otherwise clients get no ``Retry-After``."""
    open_seconds: float = FIRST_OPEN_S
    is_probing: bool = False
    """Whether the probe of the half-open circuit is under way."""

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open or half open."""
        return self.failures >= FAILURE_THRESHOLD

    def may_request(self, now: float) -> bool:
        """Return whether a request may be sent."""
        if now < self.back_off_until:
            return False
        return not self.is_open or (not self.is_probing and now >= self.open_until)

    def begin_request(self) -> bool:
        """Record that a permitted request is sent. Returns True if it is the probe.

        The caller reports its outcome with exactly one of ``record_success``, ``record_failure``,
        ``record_cancellation`` and ``back_off``.
        """
        self.is_probing = self.is_open
        return self.is_probing

    def record_success(self) -> None:
        """Close the circuit: the endpoint responded."""
        self.failures, self.failed_path, self.open_until = 0, None, 0.0
        self.open_seconds, self.is_probing = FIRST_OPEN_S, False

    def record_failure(self, now: float, *, is_probe: bool, path: str | None = None) -> None:
        """Count a failure, and open the circuit if there are enough.

        Requests that were under way when the circuit opened do not prolong it.

        Args:
            now: The time.
            is_probe: The result of ``begin_request``.
            path: The path that failed. None if the endpoint failed as a whole.
        """
        was_open = self.is_open
        if path is None or path != self.failed_path:
            self.failures, self.failed_path = self.failures + 1, path
        if is_probe or self.is_open != was_open:
            self.open_until = now + self.open_seconds
            self.open_seconds = min(self.open_seconds * 2, MAX_OPEN_S)
        if is_probe:
            self.is_probing = False

    def record_cancellation(self, *, is_probe: bool) -> None:
        """Let another request be the probe: this one was cancelled without an outcome."""
        if is_probe:
            self.is_probing = False

    def back_off(self, now: float, seconds: float | None) -> None:
        """Pause after a 429. ``seconds``: its ``Retry-After``, or None.

        A second 429 never shortens the pause. The endpoint responded, so the circuit closes.
        """
        self.record_success()
        end = now + (DEFAULT_BACK_OFF_S if seconds is None else min(seconds, MAX_BACK_OFF_S))
        if end > self.back_off_until:
            self.back_off_until, self.has_retry_after = end, seconds is not None


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one upstream, in the order of the configuration."""

    urls: tuple[URL, ...]
    circuits: dict[URL, CircuitBreaker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.circuits = {url: CircuitBreaker() for url in self.urls}

    def candidates(self, now: float, avoid: Collection[str] = ()) -> list[URL]:
        """Return the endpoints to try, the best one first.

        Endpoints whose circuit permits no request are left out. Those in ``avoid`` come last, in
        the order of ``avoid``.
        """
        permitted = [url for url in self.urls if self.circuits[url].may_request(now)]
        ranks = {name: rank for rank, name in enumerate(avoid)}
        return sorted(permitted, key=lambda url: ranks.get(str(url), -1))

    def remaining_pauses(self, now: float) -> list[float | None]:
        """Return the remaining seconds of each pause after a 429. Empty if there is none.

        None stands for a pause whose length we chose: clients get no ``Retry-After`` for it.
        """
        return [
            circuit.back_off_until - now if circuit.has_retry_after else None
            for circuit in self.circuits.values()
            if circuit.back_off_until > now
        ]
