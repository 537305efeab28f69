"""The fetches of one process: begun once for each content, joined by all who want it.

Lives here: which fetch somebody joins, and how one is begun and given up. Must not know: content
that is whole, who may read what, tags, HTTP.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from mirror.observability.events import Kind, Observer
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Repository
from mirror.pull.fetch import AccessCallbacks, fetch
from mirror.pull.sources import REFUSALS, ProofKey, Source, Sources
from mirror.pull.ttl_cache import TtlLruCache
from mirror.single_flight import SingleFlight
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.store import Store

_SUSPECTED_FOR: Final = 600.0


@dataclass(frozen=True, slots=True)
class Following:
    """One who follows a fetch."""

    follower: Follower
    sources: Sources
    proof_key: ProofKey
    joined: bool
    """Whether somebody else had begun it."""

    async def first_byte(self) -> bool:
        """Wait for it; whether the fetch is proof that the claim's repository has the content.

        Raises what the claim's own upstream said, if it was asked; a no of it at once.
        """
        loop, sources = asyncio.get_running_loop(), self.sources
        try:
            async with asyncio.timeout(None) as limit:
                with sources.on_own_refusal(self.proof_key, lambda: limit.reschedule(loop.time())):
                    await self.follower.wait(0, 1)
        except (MirrorError, TimeoutError) as error:
            raise sources.failures.get(self.proof_key, error) from None
        said = sources.failures.get(self.proof_key)
        if isinstance(said, REFUSALS):
            raise said
        return self.proof_key in sources.proven


class Fetches:
    """Brings in what is missing."""

    def __init__(
        self,
        store: Store,
        single_flight: SingleFlight,
        emit: Observer,
        callbacks: AccessCallbacks,
        *,
        finish: bool,
    ) -> None:
        """``finish``: go on when the last client has left."""
        self._store = store
        self._single_flight = single_flight
        self._emit = emit
        self._callbacks = callbacks
        self._finish = finish
        self._suspects: TtlLruCache[dict[str, str]] = TtlLruCache(1000, _SUSPECTED_FOR, len)
        """Endpoints that gave wrong bytes, the latest one last, and their upstreams."""
        self._sources: dict[Ingest, Sources] = {}

    def proven(self, repository: Repository, digest: Digest, kind: Kind) -> Ingest | None:
        """Content that grows, if its fetch has shown that ``repository`` has it."""
        ingest, sources = self._under_way(digest)
        return ingest if sources is not None and (repository, kind) in sources.proven else None

    def follow(self, source: Source) -> Following:
        """Join the fetch of this content, or begin it. The caller closes the follower.

        Raises :class:`mirror.oci.errors.Draining` where nothing new is begun any more.
        """
        suspects = self._suspects.get(source.digest) or {}
        doubted = source.repository.upstream in suspects.values()
        source = replace(source, avoid=tuple(suspects), doubted=doubted)
        ingest, sources = self._under_way(source.digest)
        follower = ingest.follow() if ingest is not None else None
        if follower is None or sources is None:
            return self._begin(source)
        sources.offer(source)
        return Following(follower, sources, source.proof_key, joined=True)

    def _under_way(self, digest: Digest) -> tuple[Ingest, Sources] | tuple[None, None]:
        """The fetch of this content that has not failed, if there is one."""
        ingest = self._store.active_ingests.get(digest)
        if ingest is None or ingest.failure is not None or ingest not in self._sources:
            return None, None
        return ingest, self._sources[ingest]

    def _begin(self, source: Source) -> Following:
        ingest, sources = self._store.start_ingest(source.digest), Sources(source)
        follower = ingest.follow()
        assert follower is not None
        self._sources[ingest] = sources

        async def work() -> None:
            try:
                await fetch(ingest, sources, self._emit, self._callbacks, suspect)
            finally:
                self._end(ingest)

        def suspect(endpoint: str, upstream: str) -> None:
            suspects = dict(self._suspects.get(source.digest) or {})
            suspects.pop(endpoint, None)
            self._suspects.put(source.digest, {**suspects, endpoint: upstream})

        try:
            shared_task = self._single_flight.run(("fetch", source.digest, id(ingest)), work)
        except BaseException:
            follower.close()
            ingest.release()
            self._end(ingest)
            raise

        def give_up() -> None:
            self._store.end_ingest(
                ingest
            )  # whoever comes now begins anew, and goes on where it ended
            shared_task.cancel()

        ingest.when_abandoned(give_up, keep=self._finish)
        return Following(follower, sources, source.proof_key, joined=False)

    def _end(self, ingest: Ingest) -> None:
        self._store.end_ingest(ingest)
        self._sources.pop(ingest, None)

    async def keep(self, digest: Digest, body: bytes) -> None:
        """Keep small content that came by another way than its digest."""
        ingest = self._store.start_ingest(digest)
        try:
            if await ingest.try_lead() is Role.LEADER:
                await ingest.declare(len(body))
                await ingest.feed(body)
                await ingest.finish()
        except MirrorError as error:
            await ingest.fail(error)
        finally:
            ingest.release()
            self._store.end_ingest(ingest)
