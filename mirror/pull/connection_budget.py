"""The connections of one process to each endpoint, while they transfer blobs.

Lives here: how many there may be, and what an endpoint has refused. Must not know: what is
transferred, how a connection is made. The memory for what arrives is in
:class:`mirror.store.ingest_writer.MemoryBudget`.

Each worker process has budgets of its own, as it has for memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

MAX_CONNECTIONS: Final = 8
"""Connections to one endpoint at which a fetch opens no further one. First connections of fetches
are never held up, and count: a pull of eight layers needs no help."""
_REMEMBERED_S: Final = 600.0
"""Seconds for which an endpoint gets no more connections than it accepted: long enough for the
layers of an image, short enough for a limit that was a passing overload."""


class ConnectionBudget:
    """Counts connections by the URL of their endpoint."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start without connections. ``clock``: returns seconds."""
        self._clock = clock
        self._open: Counter[str] = Counter()
        self._accepted: dict[str, tuple[int, float]] = {}
        """URL of an endpoint -> (number of connections that it accepted, until when that counts).
        The configuration has a few endpoints."""

    @contextmanager
    def connection(self, endpoint: str) -> Iterator[None]:
        """Count a connection to ``endpoint`` while the block runs."""
        self._open[endpoint] += 1
        try:
            yield
        finally:
            self._open[endpoint] -= 1
            if not self._open[endpoint]:
                del self._open[endpoint]

    def may_add(self, endpoint: str) -> bool:
        """Return whether a further connection may be opened, beside another one of its fetch."""
        return self._open[endpoint] < self._limit(endpoint)

    def _limit(self, endpoint: str) -> int:
        accepted, until = self._accepted.get(endpoint, (MAX_CONNECTIONS, 0.0))
        return accepted if self._clock() < until else MAX_CONNECTIONS

    def on_refused(self, endpoint: str, retry_after: float) -> None:
        """Remember that the endpoint refused one of the connections that are counted now.

        ``retry_after``: seconds for which it is remembered at least.
        """
        accepted = min(max(1, self._open[endpoint] - 1), self._limit(endpoint))
        until = self._clock() + max(retry_after, _REMEMBERED_S)
        self._accepted[endpoint] = accepted, until

    def on_no_ranges(self, endpoint: str) -> None:
        """Remember that the endpoint sends no ranges, so that a second connection is useless."""
        self._accepted[endpoint] = 0, self._clock() + _REMEMBERED_S
