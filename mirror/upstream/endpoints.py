"""Endpoints in order of preference, with a circuit for each: pure, with time passed in.

A circuit opens when an endpoint fails several times in a row, lets one try through after a while
(half open), and closes when that goes well. Only the endpoint's own failures count: a 4xx is an
answer, and a path that fails again and again counts once, since it says nothing of the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from yarl import URL

FAILURE_THRESHOLD: Final = 3
"""Failures in a row that open a circuit."""
FIRST_OPEN_S: Final = 2.0
MAX_OPEN_S: Final = 60.0
DEFAULT_BACK_OFF_S: Final = 2.0
"""Seconds of rest after a 429 that names none: clients repeat theirs at once, several times."""
MAX_BACK_OFF_S: Final = 300.0


@dataclass(slots=True)
class CircuitBreaker:
    """The state of one endpoint. Times in seconds of one clock."""

    failures: int = 0
    path: str | None = None
    """The path of the last failure, if it was of one."""
    open_until: float = 0.0
    back_off_until: float = 0.0
    """A 429 asked for a pause until then."""
    has_named_delay: bool = False
    """It said how long; otherwise the pause is ours, and is told to nobody."""
    open_seconds: float = FIRST_OPEN_S
    is_probing: bool = False
    """The one try of a half-open circuit is under way."""

    @property
    def is_open(self) -> bool:
        """Whether it has failed too often, whatever the time is."""
        return self.failures >= FAILURE_THRESHOLD

    def may_request(self, now: float) -> bool:
        """Whether a request may be tried."""
        if now < self.back_off_until:
            return False
        return not self.is_open or (not self.is_probing and now >= self.open_until)

    def begin_request(self) -> bool:
        """A request that is permitted is tried. True: all others wait for its outcome.

        Its outcome is one of ``succeeded``, ``failed``, ``rest`` and ``abandoned``.
        """
        self.is_probing = self.is_open
        return self.is_probing

    def succeeded(self) -> None:
        """It answered."""
        self.failures, self.path, self.open_until = 0, None, 0.0
        self.open_seconds, self.is_probing = FIRST_OPEN_S, False

    def failed(self, now: float, *, probe: bool, path: str | None = None) -> None:
        """It did not answer ``path``; or nothing at all (None).

        Those that were under way when the circuit opened change nothing.
        """
        was_open = self.is_open
        if path is None or path != self.path:
            self.failures, self.path = self.failures + 1, path
        if probe or self.is_open != was_open:
            self.open_until = now + self.open_seconds
            self.open_seconds = min(self.open_seconds * 2, MAX_OPEN_S)
        if probe:
            self.is_probing = False

    def cancelled(self, *, probe: bool) -> None:
        """Whoever asked left before there was an outcome."""
        if probe:
            self.is_probing = False

    def back_off(self, now: float, seconds: float | None) -> None:
        """It answered, and asked for a pause (429)."""
        self.succeeded()
        until = now + (DEFAULT_BACK_OFF_S if seconds is None else min(seconds, MAX_BACK_OFF_S))
        if until > self.back_off_until:
            self.back_off_until, self.has_named_delay = until, seconds is not None


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one upstream."""

    urls: tuple[URL, ...]
    circuits: dict[URL, CircuitBreaker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.circuits = {url: CircuitBreaker() for url in self.urls}

    def candidates(self, now: float, avoid: Collection[str] = ()) -> list[URL]:
        """Endpoints to try, best first, then those in ``avoid``, in its order.

        None while no circuit permits.
        """
        permitted = [url for url in self.urls if self.circuits[url].may_request(now)]
        late = {name: place for place, name in enumerate(avoid)}
        return sorted(permitted, key=lambda url: late.get(str(url), -1))

    def backing_off(self, now: float) -> list[float | None]:
        """The seconds for which endpoints rest, None where they did not say; empty: none rests."""
        return [
            circuit.back_off_until - now if circuit.has_named_delay else None
            for circuit in self.circuits.values()
            if circuit.back_off_until > now
        ]
