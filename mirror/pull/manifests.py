"""Manifests by digest and by tag: the cache first, the upstream where the policy wants it.

Lives here: the order of questions about one manifest; what a manifest pulled through a repository
says about its blobs; recency by image. Must not know: HTTP, how content is fetched.

A tag is resolved by ``HEAD``, and content is fetched by digest: one way in, whatever a client
asks, a tag that moves in between does no harm, and a ``HEAD`` is not billed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final, assert_never

from mirror.config.settings import Upstream
from mirror.observability.events import Kind, Outcome, Pull
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    MANIFEST_LIMIT,
    Manifest,
    sniff_media_type,
)
from mirror.oci.errors import ManifestInvalid, ManifestUnknown, MirrorError, NotFound
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import freshness
from mirror.pull.content import ContentService
from mirror.pull.results import ManifestResult
from mirror.pull.ttl_cache import TtlLruCache
from mirror.store.reader import Reader, read_all
from mirror.store.records import (
    AccessRecord,
    TagRecord,
    access_records_of,
    confirm,
    parse_as_recorded,
)
from mirror.threads import parse_in_thread_if_large
from mirror.upstream.api import ManifestHead

_CURRENT: Final = frozenset(DEFAULT_ACCEPT) - {"*/*"}
_REMEMBERED: Final = 32 * 1024 * 1024
_ROWS: Final = 1000
"""Parts that are put into the index at once: 4 MiB name 20,000, too many for one callback."""
_LIFETIME: Final = 1.0
"""Seconds that one worker process may be behind another."""
_RECENCY_STEP: Final = 60.0
"""Seconds between two updates of the same image's recency."""


class ManifestService:
    """Serves manifests from the store, and brings in what is missing."""

    def __init__(self, content: ContentService) -> None:
        self._content = content
        self._index = content.store.index
        self._single_flight = content.single_flight
        self._results: TtlLruCache[ManifestResult] = TtlLruCache(
            _REMEMBERED, _LIFETIME, lambda result: 1024 + 3 * result.size
        )
        self._records: TtlLruCache[TagRecord] = TtlLruCache(20_000, _LIFETIME, lambda record: 1)
        self._used: TtlLruCache[bool] = TtlLruCache(
            50_000, _RECENCY_STEP, lambda used: 1, content.now
        )

    def remembered(self, repository: Repository, digest: Digest) -> ManifestResult | None:
        """An answer given a moment ago: the whole of a hot hit."""
        result = self._results.get((repository, digest))
        if result is not None:
            self._use(repository, result)
        return result

    # --- by digest ------------------------------------------------------------------------------

    async def by_digest(
        self,
        repository: Repository,
        digest: Digest,
        accept: tuple[str, ...],
        pull: Pull,
        *,
        head: bool,
    ) -> ManifestResult:
        """A manifest by digest; never asks the upstream once it is cached.

        Raises ``ManifestUnknown``, ``ManifestInvalid`` or what the upstream's failure is.
        """
        held = await self.held(repository, digest)
        if held is not None:
            pull.outcome = Outcome.HIT
            return held
        reader: Reader | None = None
        if head:
            reader = await self._content.whole(repository, digest, Kind.MANIFEST, pull, accept)
            if reader is None and self._content.may_ask(repository):
                result = await self._head_by_digest(repository, digest, accept, pull)
                if result is not None:
                    return result
        if reader is None:
            reader = await self._content.open(repository, digest, Kind.MANIFEST, pull, accept)
        try:
            with pull.stage("fetch"):
                body = await read_all(reader, MANIFEST_LIMIT)
        finally:
            reader.close()
        return await self._accept(repository, digest, body, pull)

    async def held(self, repository: Repository, digest: Digest) -> ManifestResult | None:
        """A manifest that is here, and may be read through ``repository`` without a question."""
        result = self.remembered(repository, digest)
        if result is not None:
            return result
        known = await self._content.access_record(repository, digest, Kind.MANIFEST)
        if known is None or not self._content.may_read_unasked(repository, known):
            return None
        body = await self._content.store.blobs.read(digest, MANIFEST_LIMIT)
        if body is None:
            return None
        parsed = await parse_in_thread_if_large(parse_as_recorded, body, known)
        if known.media_type not in ("", parsed.media_type):
            said = replace(known, media_type=parsed.media_type)
            await self._index.put_access_records(repository, [said])
        return self._remember(
            repository, ManifestResult(digest, parsed.media_type, len(body), body, parsed)
        )

    async def _head_by_digest(
        self, repository: Repository, digest: Digest, accept: tuple[str, ...], pull: Pull
    ) -> ManifestResult | None:
        """A ``HEAD`` on a miss stays a ``HEAD``; None if its answer does not say enough."""
        pull.outcome = Outcome.MISS
        with pull.stage("upstream"):
            size = await self._content.check_access(repository, digest, Kind.MANIFEST, accept)
        known = await self._content.access_record(repository, digest, Kind.MANIFEST)
        if size is None or known is None or not known.media_type:
            return None
        return ManifestResult(digest, known.media_type, size, None)

    async def _accept(
        self, repository: Repository, digest: Digest, body: bytes, pull: Pull
    ) -> ManifestResult:
        """Take what a manifest that was pulled through ``repository`` says of its parts."""
        known = await self._content.access_record(repository, digest, Kind.MANIFEST)
        if known is None:
            media_type = sniff_media_type(body)
            known = AccessRecord(digest, "manifest", media_type, len(body), None, None)
        parsed, members = await parse_in_thread_if_large(_parse, body, known)
        result = ManifestResult(digest, parsed.media_type, len(body), body, parsed)
        if pull.outcome is Outcome.STALE:
            return result  # nobody has confirmed it: the next one asks again
        for start in range(0, len(members), _ROWS):
            await self._index.put_access_records(repository, members[start : start + _ROWS])
        return self._remember(repository, result)

    def _remember(self, repository: Repository, result: ManifestResult) -> ManifestResult:
        self._results.put((repository, result.digest), result)
        self._use(repository, result)
        return result

    # --- by tag -----------------------------------------------------------------------------------

    async def by_tag(
        self,
        repository: Repository,
        tag: Tag,
        accept: tuple[str, ...],
        pull: Pull,
        *,
        head: bool,
    ) -> ManifestResult:
        """A manifest by tag, as fresh as the upstream's policy demands.

        Raises ``ManifestUnknown`` and the upstream's other answers, or its failure where nothing
        that is held may stand in for it.
        """
        upstream = self._content.upstream(repository)
        with pull.stage("index"):
            record, held = await self._look_up(repository, tag, accept)
        match self._decide(repository, record, held):
            case freshness.Fresh():
                assert held is not None
                pull.outcome = Outcome.HIT
                return held
            case freshness.Stale(why):
                assert held is not None
                pull.outcome, pull.warning = Outcome.STALE, why
                return held
            case freshness.Refuse():
                raise ManifestUnknown("not in the cache, and the policy is Never")
            case freshness.Ask():
                return await self._ask(repository, tag, accept, held, upstream, pull, head)
            case unknown:
                assert_never(unknown)

    async def _look_up(
        self, repository: Repository, tag: Tag, accept: tuple[str, ...]
    ) -> tuple[TagRecord | None, ManifestResult | None]:
        record, held = await self._look_up_variant(repository, tag, "")
        variant = variant_of(accept)
        # A registry may answer an old client with another manifest than the one held here.
        fits = held is not None and accepts(accept, held.media_type)
        if not variant or (fits and self._is_fresh(repository, record, held)):
            return record, held
        own, theirs = await self._look_up_variant(repository, tag, variant)
        if fits and not self._is_fresh(repository, own, theirs):
            return record, held
        return own, theirs

    def _is_fresh(
        self, repository: Repository, record: TagRecord | None, held: ManifestResult | None
    ) -> bool:
        return isinstance(self._decide(repository, record, held), freshness.Fresh)

    def _decide(
        self, repository: Repository, record: TagRecord | None, held: ManifestResult | None
    ) -> freshness.Decision | freshness.Stale:
        upstream = self._content.upstream(repository)
        digest = held.digest if held is not None else None
        return freshness.decide_tag(record, digest, upstream, self._content.now())

    async def _look_up_variant(
        self, repository: Repository, tag: Tag, variant: str
    ) -> tuple[TagRecord | None, ManifestResult | None]:
        record = self._records.get((repository, tag, variant))
        if record is None:
            record = await self._index.tag(repository, tag, variant)
            if record is None:
                return None, None
            self._records.put((repository, tag, variant), record)
        return record, await self._newest_held(repository, record)

    async def _newest_held(
        self, repository: Repository, record: TagRecord
    ) -> ManifestResult | None:
        """What the tag is, or else the newest of what it was: the upstream may name it alone."""
        for digest in record.digests:
            try:
                held = await self.held(repository, digest)
            except ManifestInvalid:
                continue
            if held is not None:
                return held
        return None

    async def _ask(
        self,
        repository: Repository,
        tag: Tag,
        accept: tuple[str, ...],
        held: ManifestResult | None,
        upstream: Upstream,
        pull: Pull,
        head: bool,
    ) -> ManifestResult:
        try:
            with pull.stage("resolve"):
                patience = freshness.patience(upstream, held=held is not None)
                found = await self._resolve(repository, tag, accept, patience)
            if held is not None and held.digest == found.digest:
                pull.outcome = Outcome.REVALIDATED
                return held
            assert found.digest is not None
            if head and found.size is not None:
                present = await self.held(repository, found.digest)
                pull.outcome = Outcome.REVALIDATED if present else Outcome.MISS
                return present or ManifestResult(found.digest, found.media_type, found.size, None)
            result = await self.by_digest(repository, found.digest, accept, pull, head=head)
            if pull.outcome is Outcome.HIT:
                pull.outcome = Outcome.REVALIDATED
            return result
        except MirrorError as error:
            match freshness.after_failure(error, upstream, held=held is not None):
                case freshness.Stale(why):
                    assert held is not None
                    pull.outcome, pull.warning = Outcome.STALE, why
                    return held
                case freshness.Fail():
                    raise
                case unknown:
                    assert_never(unknown)

    async def _resolve(
        self, repository: Repository, tag: Tag, accept: tuple[str, ...], patience: float | None
    ) -> ManifestHead:
        """What the upstream says that a tag is, now; one question for all who ask at once.

        Where something is held that may stand in, a slow upstream is waited for briefly; the
        question goes on, and whoever comes after its answer profits.
        """
        asked = accept if _names_types(accept) else DEFAULT_ACCEPT
        key = f"tag {repository}:{tag} {','.join(asked)}"
        message = await self._index.negative(key)
        if message is not None:
            raise ManifestUnknown(message)
        shared_task = self._single_flight.run(
            ("resolve", key), lambda: self._resolve_now(repository, tag, asked, key)
        )
        return await shared_task.wait(patience)

    async def _resolve_now(
        self, repository: Repository, tag: Tag, accept: tuple[str, ...], key: str
    ) -> ManifestHead:
        registry = self._content.registries[repository.upstream]
        try:
            found = await registry.head_manifest(repository, tag, accept)
            if found.digest is None:
                body = await registry.get_manifest(repository, tag, accept)
                await self._content.keep(body.digest, body.body)
                found = ManifestHead(body.digest, body.media_type, len(body.body))
        except NotFound as error:
            ttl = self._content.upstream(repository).negative_ttl
            await self._index.put_negative(key, error.message, ttl)
            raise
        assert found.digest is not None
        said = AccessRecord(found.digest, "manifest", found.media_type, found.size, None, None)
        await self._index.put_access_records(repository, [said])
        variant = variant_of(accept)
        known, held = await self._look_up_variant(repository, tag, variant)
        keep = held.digest if held is not None else None
        record = await self._index.confirm_tag(repository, tag, found.digest, variant, keep)
        if record is None:
            record = confirm(known, repository, tag, found.digest, self._content.now(), keep)
        self._records.put((repository, tag, variant), record)
        return found

    # --- recency ------------------------------------------------------------------------------

    def _use(self, repository: Repository, result: ManifestResult) -> None:
        """A manifest that is served refreshes the recency of all that it refers to.

        A node that has a base layer never asks for it again: by layer, those that are shared most
        would be evicted first.
        """
        key = (repository, result.digest)
        if self._used.get(key) or self._single_flight.is_draining:
            return
        self._used.put(key, True)
        self._single_flight.run(("use", result.digest), lambda: self._touch(repository, result))

    async def _touch(self, repository: Repository, result: ManifestResult) -> None:
        if result.parsed is None:
            return
        parts = (*result.parsed.children, *result.parsed.blobs)
        await self._content.store.touch([result.digest, *(part.digest for part in parts)])
        for child in result.parsed.children:
            # Looking at it is using it, with all that it refers to.
            await self.held(repository, child.digest)


@lru_cache(256)
def variant_of(accept: tuple[str, ...]) -> str:
    """Names what clients accept who do not take every manifest; empty for those who do."""
    if set(accept) >= _CURRENT or not _names_types(accept):
        return ""
    return f" {Digest.of(','.join(sorted(accept)).encode()).hex[:16]}"


def _names_types(accept: tuple[str, ...]) -> bool:
    return any(value.strip() != "*/*" for value in accept)


def _parse(body: bytes, known: AccessRecord) -> tuple[Manifest, list[AccessRecord]]:
    """A manifest, and what its repository is known to have because of it: itself, and its parts."""
    parsed = parse_as_recorded(body, known)
    root = replace(known, media_type=parsed.media_type, size=len(body), expires_at=None)
    return parsed, [root, *access_records_of(root, parsed)]


def accepts(accept: tuple[str, ...], media_type: str) -> bool:
    """Whether a client that sent ``accept`` takes ``media_type`` (RFC 9110, section 12.5.1)."""
    if not accept:
        return True
    family = media_type.split("/", 1)[0] + "/*"
    ranges = {value.split(";", 1)[0].strip().lower() for value in accept}
    return bool(ranges & {"*/*", family, media_type.lower()})
