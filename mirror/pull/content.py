"""Content by digest: hit, join or miss, for manifests and blobs alike.

Lives here: the order of questions about one digest. Must not know: tags, HTTP, how content is
brought in (:mod:`mirror.pull.fetches`).

Who may read: content is stored once, but it is served under a repository only if that repository
is known to refer to it: from a manifest pulled through it, or because the upstream says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, assert_never

from mirror.config.settings import Settings, Upstream
from mirror.observability.events import Kind, Observer, Outcome, Pull
from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.errors import (
    BlobUnknown,
    ContentLost,
    DigestMismatch,
    ManifestUnknown,
    MirrorError,
    NotFound,
)
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository
from mirror.pull import freshness
from mirror.pull.fetches import Fetches
from mirror.pull.sources import REFUSALS, Source
from mirror.single_flight import SingleFlight
from mirror.store.reader import Reader
from mirror.store.records import AccessRecord
from mirror.store.store import Store
from mirror.upstream.api import ContentStream, Registry

_UNKNOWN: Final[dict[Kind, type[NotFound]]] = {
    Kind.MANIFEST: ManifestUnknown,
    Kind.BLOB: BlobUnknown,
}


class ContentService:
    """Serves digests of the configured upstreams from the store, and fetches what is missing."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registries: dict[str, Registry],
        single_flight: SingleFlight,
        emit: Observer,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.store = store
        self.registries = registries
        self.single_flight = single_flight
        self.emit = emit
        self.now = now
        self._fetches = Fetches(
            store, single_flight, emit, callbacks=self, finish=settings.abandoned == "finish"
        )

    # --- who may read -----------------------------------------------------------------------

    async def access_record(
        self, repository: Repository, digest: Digest, kind: Kind
    ) -> AccessRecord | None:
        """What is known of ``digest`` in ``repository`` as that kind, however old."""
        return await self.store.index.access_record(repository, digest, kind.value)

    async def is_manifest(self, repository: Repository, digest: Digest) -> bool:
        """Whether it is one to the upstream; an index may call so what others know as a blob."""
        known = await self.access_record(repository, digest, Kind.MANIFEST)
        if known is None or known.referrer is None:
            return known is not None
        return await self.access_record(repository, digest, Kind.BLOB) is None

    def may_read_unasked(self, repository: Repository, known: AccessRecord | None) -> bool:
        """Whether ``repository`` may be read without a question, for what is known."""
        decision = freshness.decide_access(known, self.upstream(repository), self.now())
        return isinstance(decision, freshness.Fresh)

    async def check_access(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        accept: tuple[str, ...] = (),
        patience: float | None = None,
    ) -> int | None:
        """Ask the upstream whether ``repository`` has ``digest``; returns the size if it says so.

        Raises what the upstream says: ``NotFound``, ``Denied``, an ``UpstreamError``.
        """
        await self.raise_if_negative(repository, digest, kind)
        shared_task = self.single_flight.run(
            ("prove", repository, digest, kind),
            lambda: self._ask(repository, digest, kind, accept),
        )
        return await shared_task.wait(patience)

    async def _ask(
        self, repository: Repository, digest: Digest, kind: Kind, accept: tuple[str, ...]
    ) -> int | None:
        registry = self.registries[repository.upstream]
        media_type = ""
        try:
            if kind is Kind.MANIFEST:
                wanted = tuple(dict.fromkeys((*accept, *DEFAULT_ACCEPT)))
                head = await registry.head_manifest(repository, digest, wanted)
                size, media_type = head.size, head.media_type
            else:
                size = await registry.head_blob(repository, digest)
        except REFUSALS as error:
            await self.revoke_access(repository, digest, kind, error)
            raise
        await self._grant(repository, digest, kind, media_type, size)
        return size

    async def _grant(
        self, repository: Repository, digest: Digest, kind: Kind, media_type: str, size: int | None
    ) -> None:
        expires_at = self.now() + freshness.ACCESS_TTL_S
        access_record = AccessRecord(digest, kind.value, media_type, size, None, expires_at)
        await self.store.index.put_access_records(repository, [access_record])

    async def revoke_access(
        self, repository: Repository, digest: Digest, kind: Kind, error: MirrorError
    ) -> None:
        """The upstream says no: what it once granted has ended; a 404 is believed for a while."""
        await self.store.index.revoke_access(repository, digest, kind.value)
        if isinstance(error, NotFound):
            ttl = self.upstream(repository).negative_ttl
            key = _negative(repository, digest, kind)
            await self.store.index.put_negative(key, error.message, ttl)

    async def raise_if_negative(self, repository: Repository, digest: Digest, kind: Kind) -> None:
        """Raises ``NotFound`` if the upstream said so a moment ago."""
        message = await self.store.index.negative(_negative(repository, digest, kind))
        if message is not None:
            raise _UNKNOWN[kind](message)

    def upstream(self, repository: Repository) -> Upstream:
        """How the upstream of ``repository`` is configured."""
        return self.settings.upstreams[repository.upstream]

    def may_ask(self, repository: Repository) -> bool:
        """Whether the policy allows to ask the upstream at all."""
        return self.upstream(repository).pull_policy != "Never"

    # --- content ------------------------------------------------------------------------------

    async def head(self, repository: Repository, digest: Digest, pull: Pull) -> int | None:
        """The size of a blob, for a ``HEAD``: from here if it is here, else the upstream's word."""
        whole = await self.whole(repository, digest, Kind.BLOB, pull)
        if whole is not None:
            whole.close()
            return whole.size
        if not self.may_ask(repository):
            raise BlobUnknown("not in the cache, and the policy is Never")
        ingest = self._fetches.proven(repository, digest, Kind.BLOB)
        if ingest is not None and ingest.size is not None:
            pull.outcome = Outcome.JOIN
            return ingest.size
        pull.outcome = Outcome.MISS
        with pull.stage("upstream"):
            return await self.check_access(repository, digest, Kind.BLOB)

    def used(self, digest: Digest) -> None:
        """A blob that is served has been used just now; no client waits for the note of it."""
        if not self.single_flight.is_draining:
            self.single_flight.run(("touch", digest), lambda: self.store.touch([digest]))

    async def whole(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        pull: Pull,
        accept: tuple[str, ...] = (),
    ) -> Reader | None:
        """Content that is here, for a repository that may read it; None if it is not here.

        Raises what stands against it. The caller closes the reader.
        """
        return (await self._look(repository, digest, kind, pull, accept))[1]

    async def _look(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        pull: Pull,
        accept: tuple[str, ...],
    ) -> tuple[AccessRecord | None, Reader | None]:
        with pull.stage("index"):
            known = await self.access_record(repository, digest, kind)
            whole = await self.store.blobs.find(digest, known.size if known else None)
        if whole is not None:
            believed = self.may_read_unasked(repository, known)
            pull.outcome = Outcome.HIT if believed else Outcome.REVALIDATED
            try:
                await self._authorise(repository, digest, kind, known, pull, accept)
            except BaseException:
                whole.close()
                raise
        return known, whole

    async def open(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        pull: Pull,
        accept: tuple[str, ...] = (),
    ) -> Reader:
        """Content for reading: whole, ageing or growing. The caller closes the reader.

        Returns once the first byte can be read, so that a failure before it is still an error and
        not a broken answer. Raises ``NotFound`` and what the upstream's failure is.
        """
        known, whole = await self._look(repository, digest, kind, pull, accept)
        if whole is not None:
            return whole
        if not self.may_ask(repository):
            raise _UNKNOWN[kind]("not in the cache, and the policy is Never")
        if known is None:
            # What is known was learned after any 404, which would have withdrawn it.
            await self.raise_if_negative(repository, digest, kind)
        try:
            return await self._follow(repository, digest, kind, known, pull, accept)
        except (DigestMismatch, ContentLost):
            # Nothing has been sent yet, and the next fetch avoids who sent wrong bytes.
            return await self._follow(repository, digest, kind, known, pull, accept)

    async def _authorise(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        known: AccessRecord | None,
        pull: Pull,
        accept: tuple[str, ...],
    ) -> None:
        """Return if ``repository`` may read ``digest``; raise what stands against it.

        An upstream that cannot be asked takes away nothing that it once granted.
        """
        upstream = self.upstream(repository)
        match freshness.decide_access(known, upstream, self.now()):
            case freshness.Fresh():
                return
            case freshness.Refuse():
                raise _UNKNOWN[kind]("not known in this repository, and the policy is Never")
            case freshness.Ask():
                pass
            case unknown:
                assert_never(unknown)
        held = known is not None
        try:
            with pull.stage("upstream"):
                patience = freshness.patience(upstream, held=held)
                await self.check_access(repository, digest, kind, accept, patience)
        except MirrorError as error:
            fallback = freshness.after_failure(error, upstream, held=held)
            if isinstance(fallback, freshness.Fail):
                raise
            pull.outcome, pull.warning = Outcome.STALE, fallback.why

    async def _follow(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        known: AccessRecord | None,
        pull: Pull,
        accept: tuple[str, ...],
    ) -> Reader:
        typed = (known.media_type, *accept) if known and known.media_type else accept
        registry = self.registries[repository.upstream]
        following = self._fetches.follow(Source(registry, repository, digest, kind, typed, known))
        reader = following.follower
        pull.outcome = Outcome.MISS
        if following.joined:
            pull.outcome, pull.joined_at = Outcome.JOIN, reader.arrived
        try:
            with pull.stage("wait"):
                proven = await following.first_byte()
            if not proven:
                # It may have been meanwhile, by another process whose fetch this is.
                known = await self.access_record(repository, digest, kind)
                await self._authorise(repository, digest, kind, known, pull, accept)
        except BaseException:
            reader.close()
            raise
        return reader

    def on_granted(self, source: Source, stream: ContentStream) -> None:
        """The upstream sends the content: see :class:`mirror.pull.fetch.AccessCallbacks`."""
        known = source.known
        listed = source.kind is Kind.MANIFEST and known is not None and known.referrer is not None
        # An index called it something; bytes of no type are no other word.
        typed = listed and stream.media_type != OCTET_STREAM
        if self.single_flight.is_draining or not (
            typed or not self.may_read_unasked(source.repository, known)
        ):
            return
        said = source.repository, source.digest, source.kind, stream.media_type, stream.total
        self.single_flight.run(("grant", *said), lambda: self._grant(*said))

    async def on_refused(self, source: Source, error: MirrorError) -> None:
        """The upstream says no: see :class:`mirror.pull.fetch.AccessCallbacks`."""
        await self.revoke_access(source.repository, source.digest, source.kind, error)

    async def keep(self, digest: Digest, body: bytes) -> None:
        """Keep small content that came by another way than its digest."""
        await self._fetches.keep(digest, body)


def _negative(repository: Repository, digest: Digest, kind: Kind) -> str:
    return f"{kind.value} {repository}@{digest}"
