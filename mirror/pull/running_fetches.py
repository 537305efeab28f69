"""The running fetches of one process.

Lives here: one fetch for each digest, who joins it, when it ends, which endpoints are suspected.
Must not know: how content is fetched (:mod:`mirror.pull.fetch`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from cachetools import TTLCache

from mirror.observability.events import Observer
from mirror.observability.traces import PullTrace
from mirror.oci.reference import Digest, Repository
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.fetch import Fetch
from mirror.pull.parallel import ParallelReader
from mirror.pull.requests import AccessCallbacks, ContentRequest, ContentSource
from mirror.single_flight import SingleFlight
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.store import Store

_SUSPECT_TTL_S: Final = 600.0
"""Seconds for which an endpoint that sent wrong bytes is tried last: longer than clients retry, and
short enough for a repaired endpoint to come back into use."""
_MAX_SUSPECTED_DIGESTS: Final = 1000
"""Digests whose suspected endpoints are kept in memory. Wrong bytes are rare."""


@dataclass(frozen=True, slots=True)
class RunningFetch:
    """A fetch of this process at one moment."""

    digest: Digest
    repository: Repository
    """The repository whose upstream is asked."""
    endpoint: str
    """URL of the endpoint that sent bytes last. Empty if none has."""
    position: int
    """Bytes that have arrived."""
    size: int | None
    """Bytes of the whole content. None while unknown."""
    connections: int
    """Connections to the upstream. 0: another process fetches, and this one follows."""
    followers: int
    """Clients of this process that read it."""


class Suspects:
    """The suspected endpoints, by the content of which they sent wrong bytes."""

    def __init__(self) -> None:
        self._by_digest: TTLCache[Digest, dict[str, str]] = TTLCache(
            _MAX_SUSPECTED_DIGESTS, _SUSPECT_TTL_S
        )

    def of(self, digest: Digest) -> dict[str, str]:
        """Return {URL of the endpoint: its upstream} of one content, the latest one last."""
        return self._by_digest.get(digest) or {}

    def add(self, digest: Digest, endpoints: dict[str, str]) -> None:
        """Add endpoints of one content."""
        earlier = self.of(digest)
        others = {url: earlier[url] for url in earlier if url not in endpoints}
        self._by_digest[digest] = {**others, **endpoints}


class RunningFetches:
    """The running fetches of this process, by digest."""

    def __init__(
        self,
        store: Store,
        single_flight: SingleFlight,
        emit: Observer,
        callbacks: AccessCallbacks,
        *,
        may_finish_abandoned: bool,
    ) -> None:
        """Start empty. ``may_finish_abandoned``: a fetch continues when its last client leaves."""
        self._store = store
        self._single_flight = single_flight
        self._emit = emit
        self._callbacks = callbacks
        self._may_finish_abandoned = may_finish_abandoned
        self.connections = ConnectionBudget(self._count_at)
        self._make_reader = partial(ParallelReader, self.connections, store.memory, emit)
        self._active: dict[Digest, Fetch] = {}
        self.suspects = Suspects()
        """Endpoints that sent wrong bytes."""

    def find_proven(self, request: ContentRequest) -> Ingest | None:
        """Return the ingest of the fetch if it has shown access for ``request``. Else None."""
        fetch = self.find_active(request.digest)
        return fetch.ingest if fetch and request.proof_key in fetch.proven else None

    def join_or_start(self, source: ContentSource) -> tuple[Fetch, Follower, bool]:
        """Join the fetch of this content, or start it.

        Returns:
            The fetch, a follower that the caller closes, and True if the fetch was running already.

        Raises:
            Draining: The process shuts down, so no fetch is started.
            UpstreamRateLimited: This repository's endpoints asked for a pause, and the fetch waits
                for it.
        """
        suspects = self.suspects.of(source.request.digest)
        is_suspect = source.request.repository.upstream in suspects.values()
        source = replace(source, avoid=tuple(suspects), is_suspect=is_suspect)
        fetch = self.find_active(source.request.digest)
        follower = fetch.follow(source.request) if fetch is not None else None
        has_joined = fetch is not None and follower is not None
        if fetch is None or follower is None:
            fetch, follower = self._start(source)
        else:
            fetch.offer(source)
        pull = source.request.pull
        pull.trace = trace = pull.trace or PullTrace()
        trace.progress, trace.is_known = fetch.ingest.progress, source.access_record is not None
        trace.is_damaged = self._store.blobs.is_damaged(source.request.digest)
        return fetch, follower, has_joined

    def find_active(self, digest: Digest) -> Fetch | None:
        """Find the fetch of this content, unless it has failed or ended."""
        fetch = self._active.get(digest)
        if fetch is None or fetch.ingest.failure is not None or fetch.ingest.released.is_set():
            return None
        return fetch

    def progress(self) -> list[RunningFetch]:
        """Return how far each fetch is, the oldest one first."""
        return [
            RunningFetch(
                digest=fetch.ingest.digest,
                repository=fetch.repository,
                endpoint=fetch.endpoint,
                position=fetch.ingest.position,
                size=fetch.ingest.size,
                connections=fetch.connections if fetch.ingest.is_led else 0,
                followers=len(fetch.ingest.followers),
            )
            for fetch in self._active.values()
        ]

    def _start(self, source: ContentSource) -> tuple[Fetch, Follower]:
        digest = source.request.digest
        ingest = self._store.start_ingest(digest)
        add_suspects = partial(self.suspects.add, digest)
        fetch = Fetch(
            ingest,
            source,
            self._emit,
            self._callbacks,
            self._make_reader,
            add_suspects,
            self.connections.reclaim,
        )
        follower = ingest.follow()
        assert follower is not None
        self._active[digest] = fetch
        try:
            key = ("fetch", digest, id(ingest))
            fetch.task = self._single_flight.run(key, fetch.run)
        except BaseException:
            follower.close()
            ingest.release()
            self._remove(fetch)
            raise
        assert fetch.task.task is not None
        # A drain may cancel the task before its first step. Then no line of `fetch.run` runs.
        fetch.task.task.add_done_callback(lambda task: ingest.release())
        fetch.task.task.add_done_callback(lambda task: self._remove(fetch))
        ingest.when_abandoned(lambda: self._cancel(fetch), may_finish=self._may_finish_abandoned)
        return fetch, follower

    def _cancel(self, fetch: Fetch) -> None:
        """Cancel an abandoned fetch. A client that comes now starts a new one, which resumes it."""
        assert fetch.task is not None
        self._remove(fetch)
        fetch.task.cancel()

    def _remove(self, fetch: Fetch) -> None:
        self._store.end_ingest(fetch.ingest)
        if self._active.get(fetch.ingest.digest) is fetch:
            del self._active[fetch.ingest.digest]

    def _count_at(self, endpoint: str) -> int:
        """Return the number of fetches whose latest response came from an endpoint."""
        return sum(1 for fetch in self._active.values() if fetch.endpoint == endpoint)
