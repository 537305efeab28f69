"""The connections of one process to each endpoint, while they transfer blobs.

Lives here: how many there may be, and what an endpoint has refused. Must not know: what is
transferred, how a connection is made. The memory for what arrives is in
:class:`mirror.store.ingest_writer.MemoryBudget`.

Each fetch has a first connection, which is never held up. Further ones, beside it, are optional.
Each worker process has budgets of its own, as it has for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

MAX_PER_ENDPOINT: Final = 8
"""Connections to one endpoint at which no further one is opened. First connections count: a pull of
eight layers needs no help."""
_REMEMBERED_S: Final = 600.0
"""Seconds for which an endpoint gets no more connections than it accepted: long enough for the
layers of an image, short enough for a limit that was a passing overload."""


class ConnectionBudget:
    """Counts connections by the URL of their endpoint."""

    def __init__(
        self, count_first: Callable[[str], int], clock: Callable[[], float] = monotonic
    ) -> None:
        """Start without further connections.

        Args:
            count_first: Returns the number of fetches that have an endpoint, by its URL.
            clock: Returns seconds.
        """
        self._count_first = count_first
        self._clock = clock
        self._further: dict[Hashable, tuple[str, int]] = {}
        """Owner -> (URL of an endpoint, further connections to it)."""
        self._accepted: dict[str, tuple[int, float]] = {}
        """URL of an endpoint -> (number of connections that it accepted, until when that counts).
        The configuration has a few endpoints."""
        self._paused_until: dict[str, float] = {}
        """URL of an endpoint -> time until which it gets no further connection."""
        self._reclaimed_until: dict[str, float] = {}
        """The same after the initial request of another blob has failed beside them."""

    def hold(self, owner: Hashable, endpoint: str, count: int) -> None:
        """Record that ``owner`` has ``count`` further connections to ``endpoint``."""
        self._further.pop(owner, None)
        if count:
            self._further[owner] = endpoint, count

    def held_by(self, owner: Hashable) -> int:
        """Return the number of further connections of an owner."""
        return self._further.get(owner, ("", 0))[1]

    @contextmanager
    def connection(self, endpoint: str) -> Iterator[None]:
        """Count a further connection to ``endpoint`` while the block runs."""
        owner = object()
        self.hold(owner, endpoint, 1)
        try:
            yield
        finally:
            self.hold(owner, endpoint, 0)

    def count(self, endpoint: str) -> int:
        """Return the number of all connections to an endpoint."""
        return self._count_first(endpoint) + self._count_further(endpoint)

    def _count_further(self, endpoint: str) -> int:
        return sum(count for url, count in self._further.values() if url == endpoint)

    def may_add(self, endpoint: str) -> bool:
        """Return whether a further connection may be opened."""
        if self.is_paused(endpoint) or self.is_reclaimed(endpoint):
            return False
        return self.count(endpoint) < self._limit(endpoint)

    def is_paused(self, endpoint: str) -> bool:
        """Return whether the endpoint has asked for a pause that has not ended."""
        return self._clock() < self._paused_until.get(endpoint, 0.0)

    def _limit(self, endpoint: str) -> int:
        accepted, until = self._accepted.get(endpoint, (MAX_PER_ENDPOINT, 0.0))
        return accepted if self._clock() < until else MAX_PER_ENDPOINT

    def reclaim(self, endpoint: str) -> bool:
        """Ask all transfers to close their further connections to an endpoint. They do in 0.1 s.

        It gets none for ten minutes. The request for another blob got a 429, a 503 or no response
        there, which may be because of them: upstreams and firewalls limit the connections of one
        address.

        Returns:
            True if there are any. See :data:`mirror.upstream.api.ReclaimConnections`.
        """
        has_further = self._count_further(endpoint) > 0
        if has_further:
            self._reclaimed_until[endpoint] = self._clock() + _REMEMBERED_S
        return has_further

    def is_reclaimed(self, endpoint: str) -> bool:
        """Return whether the further connections to an endpoint have to end."""
        return self._clock() < self._reclaimed_until.get(endpoint, 0.0)

    def on_refused(self, endpoint: str, retry_after: float) -> None:
        """Remember that the endpoint refused one of the connections that are counted now.

        ``retry_after``: seconds until the next further connection.
        """
        accepted = min(max(1, self.count(endpoint) - 1), self._limit(endpoint))
        self._accepted[endpoint] = accepted, self._clock() + _REMEMBERED_S
        until = self._clock() + min(retry_after, _REMEMBERED_S)
        self._paused_until[endpoint] = max(until, self._paused_until.get(endpoint, 0.0))

    def on_no_ranges(self, endpoint: str) -> None:
        """Remember for ten minutes that ranges of this endpoint are of no use.

        It ignores ``Range``, or its ranges are slow, fail, or have wrong bytes.
        """
        self._accepted[endpoint] = 0, self._clock() + _REMEMBERED_S
