"""Endpoints in order of preference, with a circuit for each: pure, with time passed in.

A circuit opens when an endpoint fails several times in a row, lets one try through after a while
(half open), and closes when that goes well. Only failures to answer count: a 4xx is an answer.
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
_REST_LIMIT: Final = 300.0


@dataclass(slots=True)
class Circuit:
    """The state of one endpoint. Times in seconds of one clock."""

    failures: int = 0
    open_until: float = 0.0
    resting_until: float = 0.0
    """A 429 asked for this pause."""
    pause: float = FIRST_PAUSE

    @property
    def is_open(self) -> bool:
        """Whether it has failed too often, whatever the time is."""
        return self.failures >= THRESHOLD

    def permits(self, now: float) -> bool:
        """Whether a request may be tried."""
        return now >= self.resting_until and (not self.is_open or now >= self.open_until)

    def claim(self, now: float) -> None:
        """A request is tried; in a half-open circuit the next one has to wait for its outcome."""
        if self.is_open:
            self.open_until = now + self.pause

    def succeeded(self) -> None:
        """It answered."""
        self.failures, self.pause, self.open_until = 0, FIRST_PAUSE, 0.0

    def failed(self, now: float) -> None:
        """It did not answer."""
        self.failures += 1
        if self.is_open:
            self.open_until = now + self.pause
            self.pause = min(self.pause * 2, LONGEST_PAUSE)

    def rest(self, now: float, seconds: float | None) -> None:
        """It asked for a pause (429)."""
        if seconds is not None:
            self.resting_until = now + min(seconds, _REST_LIMIT)


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one upstream."""

    urls: tuple[URL, ...]
    circuits: dict[URL, Circuit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.circuits = {url: Circuit() for url in self.urls}

    def candidates(self, now: float, avoid: Collection[str] = ()) -> list[URL]:
        """Endpoints to try, best first, those in ``avoid`` last; none while no circuit permits."""
        permitted = [url for url in self.urls if self.circuits[url].permits(now)]
        return sorted(permitted, key=lambda url: str(url) in avoid)

    def rests(self, now: float) -> float | None:
        """Seconds until an endpoint that asked for a pause may be asked; None if none did."""
        waits = [c.resting_until - now for c in self.circuits.values() if c.resting_until > now]
        return min(waits, default=None)
