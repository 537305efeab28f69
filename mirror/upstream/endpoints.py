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

THRESHOLD: Final = 3
"""Failures in a row that open a circuit."""
FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 60.0
BARE_REST: Final = 2.0
"""Seconds of rest after a 429 that names none: clients repeat theirs at once, several times."""
REST_LIMIT: Final = 300.0


@dataclass(slots=True)
class Circuit:
    """The state of one endpoint. Times in seconds of one clock."""

    failures: int = 0
    path: str | None = None
    """The path of the last failure, if it was of one."""
    open_until: float = 0.0
    resting_until: float = 0.0
    """A 429 asked for a pause until then."""
    rest_named: bool = False
    """It said how long; otherwise the pause is ours, and is told to nobody."""
    pause: float = FIRST_PAUSE
    probing: bool = False
    """The one try of a half-open circuit is under way."""

    @property
    def is_open(self) -> bool:
        """Whether it has failed too often, whatever the time is."""
        return self.failures >= THRESHOLD

    def permits(self, now: float) -> bool:
        """Whether a request may be tried."""
        if now < self.resting_until:
            return False
        return not self.is_open or (not self.probing and now >= self.open_until)

    def claim(self) -> bool:
        """A request that is permitted is tried. True: all others wait for its outcome.

        Its outcome is one of ``succeeded``, ``failed``, ``rest`` and ``abandoned``.
        """
        self.probing = self.is_open
        return self.probing

    def succeeded(self) -> None:
        """It answered."""
        self.failures, self.path, self.open_until = 0, None, 0.0
        self.pause, self.probing = FIRST_PAUSE, False

    def failed(self, now: float, *, probe: bool, path: str | None = None) -> None:
        """It did not answer ``path``; or nothing at all (None).

        Those that were under way when the circuit opened change nothing.
        """
        was_open = self.is_open
        if path is None or path != self.path:
            self.failures, self.path = self.failures + 1, path
        if probe or self.is_open != was_open:
            self.open_until = now + self.pause
            self.pause = min(self.pause * 2, LONGEST_PAUSE)
        if probe:
            self.probing = False

    def abandoned(self, *, probe: bool) -> None:
        """Whoever asked left before there was an outcome."""
        if probe:
            self.probing = False

    def rest(self, now: float, seconds: float | None) -> None:
        """It answered, and asked for a pause (429)."""
        self.succeeded()
        until = now + (BARE_REST if seconds is None else min(seconds, REST_LIMIT))
        if until > self.resting_until:
            self.resting_until, self.rest_named = until, seconds is not None


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one upstream."""

    urls: tuple[URL, ...]
    circuits: dict[URL, Circuit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.circuits = {url: Circuit() for url in self.urls}

    def candidates(self, now: float, avoid: Collection[str] = ()) -> list[URL]:
        """Endpoints to try, best first, then those in ``avoid``, in its order.

        None while no circuit permits.
        """
        permitted = [url for url in self.urls if self.circuits[url].permits(now)]
        late = {name: place for place, name in enumerate(avoid)}
        return sorted(permitted, key=lambda url: late.get(str(url), -1))

    def resting(self, now: float) -> list[float | None]:
        """The seconds for which endpoints rest, None where they did not say; empty: none rests."""
        return [
            circuit.resting_until - now if circuit.rest_named else None
            for circuit in self.circuits.values()
            if circuit.resting_until > now
        ]
