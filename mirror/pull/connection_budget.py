"""The connections of one process to each endpoint, while they transfer blobs.

Lives here: how many there may be, and what an endpoint has refused. Must not know: what is
transferred, how a connection is made. The memory for what arrives is in
:class:`mirror.store.ingest_writer.MemoryBudget`.

Each fetch has a first connection, which is never held up. Further ones, beside it, are optional.
Each worker process has budgets of its own, as it has for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

from mirror.oci.errors import (
    MirrorError,
    StorageRefused,
    UpstreamRateLimited,
    UpstreamUnavailable,
)

MAX_PER_ENDPOINT: Final = 8
"""Connections to one endpoint at which no further one is opened. First connections count: a pull of
eight layers needs no help."""
_REMEMBERED_S: Final = 600.0
"""Seconds for which an endpoint gets no more connections than it accepted: long enough for the
layers of an image, short enough for a limit that was a passing overload."""


_CROWDED_S: Final = 5.0
"""Seconds in which further connections end their parts and are not replaced, after a first request
has failed. A first request that fails in this time may have met them."""


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
        self._crowded_until: dict[str, float] = {}
        """Upstream -> time until which our further connections may make its first requests fail."""

    def hold(self, owner: Hashable, endpoint: str, count: int) -> None:
        """Record that ``owner`` has ``count`` further connections to ``endpoint``."""
        self._further.pop(owner, None)
        if count:
            self._further[owner] = endpoint, count

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
        further = sum(count for url, count in self._further.values() if url == endpoint)
        return self._count_first(endpoint) + further

    def may_add(self, endpoint: str) -> bool:
        """Return whether a further connection may be opened."""
        return not self.is_paused(endpoint) and self.count(endpoint) < self._limit(endpoint)

    def is_paused(self, endpoint: str) -> bool:
        """Return whether the endpoint has asked for a pause that has not ended."""
        return self._clock() < self._paused_until.get(endpoint, 0.0)

    def _limit(self, endpoint: str) -> int:
        accepted, until = self._accepted.get(endpoint, (MAX_PER_ENDPOINT, 0.0))
        return accepted if self._clock() < until else MAX_PER_ENDPOINT

    def on_refused(self, endpoint: str, retry_after: float) -> None:
        """Remember that the endpoint refused one of the connections that are counted now.

        ``retry_after``: seconds until the next further connection.
        """
        accepted = min(max(1, self.count(endpoint) - 1), self._limit(endpoint))
        self._accepted[endpoint] = accepted, self._clock() + _REMEMBERED_S
        until = self._clock() + min(retry_after, _REMEMBERED_S)
        self._paused_until[endpoint] = max(until, self._paused_until.get(endpoint, 0.0))

    def may_be_crowded(self, upstream: str, error: MirrorError) -> bool:
        """Return whether a first request may have failed because of further connections.

        If so, these give way to it, and it is to be sent again.

        An endpoint, or a firewall before it, may permit a few connections of one address.

        Args:
            upstream: Its name.
            error: How the request has ended.
        """
        if not isinstance(error, UpstreamUnavailable) or isinstance(error, StorageRefused):
            return False
        if error.is_without_token:
            return False
        if any(url == error.endpoint for url, _ in self._further.values()):
            retry_after = error.retry_after if isinstance(error, UpstreamRateLimited) else None
            pause = max(retry_after or 0.0, _CROWDED_S)
            self.on_refused(error.endpoint, pause)
            self._crowded_until[upstream] = self._clock() + min(pause, _REMEMBERED_S) + _CROWDED_S
        return self._clock() < self._crowded_until.get(upstream, 0.0)

    def on_wrong_bytes(self, endpoints: Iterable[str]) -> None:
        """Remember that bytes of ranges may have been wrong: the rest of an image is by one."""
        for endpoint in endpoints:
            self.on_no_ranges(endpoint)

    def on_no_ranges(self, endpoint: str) -> None:
        """Remember that the endpoint sends no ranges, so that a further connection is useless."""
        self._accepted[endpoint] = 0, self._clock() + _REMEMBERED_S
