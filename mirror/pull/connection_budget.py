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

from cachetools import TTLCache

MAX_CONNECTIONS: Final = 8
"""Connections to one endpoint at which a fetch opens no further one. First connections of fetches
are never held up, and count: a pull of eight layers needs no help."""
_REMEMBERED_S: Final = 600.0
"""Seconds for which an endpoint gets no more connections than it accepted: long enough for the
layers of an image, short enough for a limit that was a passing overload."""
_MAX_ENDPOINTS: Final = 1000
"""Endpoints whose refusals are remembered. A configuration has a few."""


class ConnectionBudget:
    """Counts connections by the URL of their endpoint."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Start without connections. ``clock``: returns seconds."""
        self._open: Counter[str] = Counter()
        self._accepted: TTLCache[str, int] = TTLCache(_MAX_ENDPOINTS, _REMEMBERED_S, clock)
        """URL of an endpoint that refused a connection -> the number that it accepts."""

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
        most = min(MAX_CONNECTIONS, self._accepted.get(endpoint, MAX_CONNECTIONS))
        return self._open[endpoint] < most

    def on_refused(self, endpoint: str) -> None:
        """Remember that the endpoint refused one of the connections that are counted now."""
        accepted = max(1, self._open[endpoint] - 1)
        self._accepted[endpoint] = min(accepted, self._accepted.get(endpoint, accepted))

    def on_no_ranges(self, endpoint: str) -> None:
        """Remember that the endpoint sends no ranges, so that a second connection is useless."""
        self._accepted[endpoint] = 0
