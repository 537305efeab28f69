"""Serve manifests by digest and by tag, from the cache or the upstream, by the pull policy.

Lives here: the order of checks for one manifest, the access records that a pulled manifest creates
for its parts, LRU recency by image. Must not know: HTTP, how content is fetched.

A tag is resolved by ``HEAD``, and the manifest is fetched by its digest. So there is one way to
fetch content, a tag may move in between without harm, and registries do not bill a ``HEAD``.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Final, TypeAlias, assert_never

from cachetools import TTLCache

from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.oci.accept import has_media_types, is_acceptable, variant_of
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    MANIFEST_LIMIT,
    SCHEMA1_TYPES,
    sniff_media_type,
)
from mirror.oci.errors import (
    ManifestInvalid,
    ManifestUnknown,
    MirrorError,
    NotFound,
    UpstreamError,
    UpstreamProtocolError,
    WholeManifestNeeded,
)
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import freshness
from mirror.pull.content import NOT_CACHED_MESSAGE, ContentService
from mirror.pull.requests import ContentRequest, TagRequest
from mirror.pull.results import MEMORY_TTL_S, IsFresh, ManifestResult, fresh_for
from mirror.store.reader import read_all
from mirror.store.records import (
    AccessRecord,
    TagRecord,
    confirm,
    manifest_record,
    parse_with_records,
)
from mirror.threads import parse_in_thread_if_large
from mirror.upstream.api import ManifestBody, ManifestHead

_RESULT_CACHE_BYTES: Final = 32 * 1024 * 1024
"""Bytes for manifests in memory. One takes 12 MiB at most (see ``_weight``), so every one fits."""
_TAG_CACHE_SIZE: Final = 20_000
"""Tag records in memory: 15 MB, and up to 100 MB if every tag has moved 16 times."""
_SCHEMA1_TTL_S: Final = 30 * 86400.0
"""Seconds (30 days) for which a manifest of schema 1 is kept, so that its tag can be served while
the upstream is down."""
_MAX_ROWS_AT_ONCE: Final = 1000
"""Access records per write to the index. A manifest of 4 MiB has 20,000: written at once, they
would delay other requests."""

_TagKey: TypeAlias = tuple[Repository, Tag, str]
"""A tag, and the variant of its record (see :meth:`mirror.store.index.Index.tag`)."""


class ManifestService:
    """Serves manifests from the store, and fetches missing ones."""

    def __init__(self, content: ContentService) -> None:
        self._content = content
        self._index = content.store.index
        self._single_flight = content.single_flight
        self._results: TTLCache[tuple[Repository, Digest], ManifestResult] = TTLCache(
            _RESULT_CACHE_BYTES, MEMORY_TTL_S, getsizeof=_weight
        )
        self._records: TTLCache[_TagKey, tuple[TagRecord, IsFresh]] = TTLCache(
            _TAG_CACHE_SIZE, MEMORY_TTL_S
        )

    # --- by digest ------------------------------------------------------------------------------

    async def by_digest(self, request: ContentRequest, *, is_head: bool) -> ManifestResult:
        """Serve a manifest by digest. A cached one is served without asking the upstream.

        Args:
            request: A request of kind ``MANIFEST``.
            is_head: True if the client wants no body. A ``HEAD`` on a miss stays a ``HEAD``
                upstream, once this upstream has stated right sizes.

        Raises:
            ManifestUnknown: The repository does not have the manifest.
            ManifestInvalid: The content is no JSON object, or nested too deeply.
            MirrorError: As :meth:`ContentService.open` raises it.
        """
        repository, digest, pull = request.repository, request.digest, request.pull
        cached = await self._find_cached(repository, digest)
        if cached is not None:
            pull.outcome = Outcome.HIT
            return cached
        reader = None
        if is_head:
            _, reader = await self._content.find_whole(request)
            is_exact = self._content.has_right_sizes(repository)
            if reader is None and is_exact and self._content.may_ask(repository):
                result = await self._head_by_digest(request)
                if result is not None:
                    return result
        if reader is None:
            try:
                reader = await self._content.open(request)
            except WholeManifestNeeded:
                # Another client may have fetched it since the first look.
                cached = await self._find_cached(repository, digest)
                if cached is not None:
                    return cached
                manifest = await self._fetch_whole(request)
                return await self._record_parts(request, manifest.body)
        try:
            with pull.stage("fetch"):
                body = await read_all(reader, MANIFEST_LIMIT)
        finally:
            reader.close()
        return await self._record_parts(request, body)

    async def _find_cached(self, repository: Repository, digest: Digest) -> ManifestResult | None:
        """Find a cached manifest that may be read without the upstream, and record its use."""
        result = self._results.get((repository, digest))
        if result is not None:
            return result
        access_record = await self._index.access_record(repository, digest, Kind.MANIFEST.value)
        if access_record is None or not self._content.may_read_unasked(repository, access_record):
            return None
        if access_record.media_type.lower() in SCHEMA1_TYPES:
            body = await self._read_schema1(repository, digest)
        else:
            body = await self._content.read_small(digest, MANIFEST_LIMIT)
        if body is None:
            return None
        parsed, records = await parse_in_thread_if_large(parse_with_records, body, access_record)
        if not access_record.has_parts:
            # It was fetched through another repository.
            await self._put_records(repository, records)
        elif access_record.media_type not in ("", parsed.media_type):
            await self._put_records(repository, records[-1:])  # The manifest's own record.
        return self._remember(repository, ManifestResult.of_body(digest, body, parsed))

    async def _put_records(self, repository: Repository, records: list[AccessRecord]) -> None:
        for start in range(0, len(records), _MAX_ROWS_AT_ONCE):
            rows = records[start : start + _MAX_ROWS_AT_ONCE]
            if not await self._index.put_access_records(repository, rows):
                return  # The last record must not say that all are there.

    async def _fetch_whole(self, request: ContentRequest) -> ManifestBody:
        """Fetch a manifest that may be of schema 1. Concurrent clients share one request."""
        repository, digest = request.repository, request.digest

        async def fetch() -> ManifestBody:
            registry = self._content.registries[repository.upstream]
            manifest = await registry.get_manifest(repository, digest, request.accept)
            await self._store(repository, manifest)
            record = await self._index.access_record(repository, digest, Kind.MANIFEST.value)
            is_known = self._content.may_read_unasked(repository, record)
            if manifest.media_type != OCTET_STREAM or not is_known:
                await self._content.grant_access(request, manifest.media_type, len(manifest.body))
            return manifest

        with request.pull.stage("fetch"):
            return await self._single_flight.share(("manifest", repository, digest), fetch)

    async def _read_schema1(self, repository: Repository, digest: Digest) -> bytes | None:
        text = await self._index.cached_list(_schema1_key(repository, digest))
        return None if text is None else base64.b64decode(text)

    async def _store(self, repository: Repository, manifest: ManifestBody) -> None:
        """Store a manifest that was received in one piece.

        The store keeps content by the digest of all its bytes. So the index keeps a manifest of
        schema 1, whose digest may be that of a part of them.
        """
        if manifest.media_type.lower() in SCHEMA1_TYPES:
            text = base64.b64encode(manifest.body).decode("ascii")
            key = _schema1_key(repository, manifest.digest)
            await self._index.put_list(key, text, _SCHEMA1_TTL_S)
        else:
            await self._content.store_body(manifest.digest, manifest.body)

    async def _head_by_digest(self, request: ContentRequest) -> ManifestResult | None:
        """Serve a ``HEAD`` by a ``HEAD``.

        Returns None if the response states no size or no media type, or another size than an index
        does, or violates the specification. Then the manifest has to be fetched.
        """
        request.pull.outcome = Outcome.MISS
        try:
            with request.pull.stage("upstream"):
                size = await self._content.check_access(request)
        except UpstreamProtocolError:
            # It does not prove that the manifest exists. A GET is verified by its digest.
            return None
        access_record = await self._index.access_record(
            request.repository, request.digest, Kind.MANIFEST.value
        )
        if not size or access_record is None or access_record.media_type in ("", OCTET_STREAM):
            return None
        if access_record.size not in (None, size):
            return None
        return ManifestResult(request.digest, access_record.media_type, size=size, body=None)

    async def _record_parts(self, request: ContentRequest, body: bytes) -> ManifestResult:
        """Parse a fetched manifest, record the access to its parts, and return the result.

        Records nothing if the pull was served stale.
        """
        repository, digest = request.repository, request.digest
        root = await self._index.access_record(repository, digest, Kind.MANIFEST.value)
        if root is None:
            root = manifest_record(digest, sniff_media_type(body), len(body))
        root = replace(root, expires_at=None)
        parsed, records = await parse_in_thread_if_large(parse_with_records, body, root)
        result = ManifestResult.of_body(digest, body, parsed)
        if request.pull.outcome is Outcome.STALE:
            return result  # The upstream has not confirmed it: the next request asks again.
        await self._put_records(repository, records)
        return self._remember(repository, result)

    def _remember(self, repository: Repository, result: ManifestResult) -> ManifestResult:
        """Keep a result in memory, and record the use of the manifest and of all its parts.

        A node that has a base layer never requests it again. If recency were kept by layer, the
        layers that most images share would be evicted first.
        """
        result = replace(result, is_fresh=fresh_for(MEMORY_TTL_S))
        self._results[repository, result.digest] = result
        if result.parsed is not None:
            parts = (*result.parsed.children, *result.parsed.blobs)
            digests = (result.digest, *(part.digest for part in parts))
            is_due = self._content.store.blobs.mark_used(digests)
            if is_due and result.parsed.children and not self._single_flight.is_draining:
                children = [child.digest for child in result.parsed.children]
                self._single_flight.run(
                    ("use", result.digest), lambda: self._mark_children_used(repository, children)
                )
        return result

    async def _mark_children_used(self, repository: Repository, digests: list[Digest]) -> None:
        """Record the use of each cached child manifest and of its parts.

        :meth:`_find_cached` does this as a side effect.
        """
        for digest in digests:
            await self._find_cached(repository, digest)

    # --- by tag ---------------------------------------------------------------------------------

    async def by_tag(self, request: TagRequest) -> ManifestResult:
        """Serve a manifest by tag, as fresh as the upstream's pull policy demands.

        Raises:
            ManifestUnknown: The repository does not have the tag.
            MirrorError: The error of the upstream, if no cached manifest may be served instead.
                Also as :meth:`by_digest` raises it.
        """
        with request.pull.stage("index"):
            record, cached = await self._find_tag(request)
        if request.is_refresh:
            return await self._revalidate(request, cached)
        match self._decide(request.repository, record, cached):
            case freshness.Fresh():
                assert cached is not None
                request.pull.outcome = Outcome.HIT
                return cached
            case freshness.Stale(reason):
                assert cached is not None
                return _stale(request.pull, reason, cached)
            case freshness.Refuse():
                raise ManifestUnknown(NOT_CACHED_MESSAGE)
            case freshness.Ask():
                upstream, now = self._content.upstream(request.repository), self._content.now()
                request.pull.trace = freshness.trace_tag(record, upstream, now)
                return await self._revalidate(request, cached)
            case unknown:
                assert_never(unknown)

    async def _find_tag(
        self, request: TagRequest
    ) -> tuple[TagRecord | None, ManifestResult | None]:
        """Find the tag's record and the newest cached manifest of it that suits the client."""
        repository, tag = request.repository, request.tag
        record, cached = await self._find_variant(repository, tag, "")
        variant = variant_of(request.accept)
        # A registry may send another manifest to an old client than the one that is cached here.
        is_accepted = cached is not None and is_acceptable(request.accept, cached.media_type)
        if not variant or (is_accepted and self._is_fresh(repository, record, cached)):
            return record, cached
        own_record, own_cached = await self._find_variant(repository, tag, variant)
        if is_accepted and not self._is_fresh(repository, own_record, own_cached):
            return record, cached
        return own_record, own_cached

    def _is_fresh(
        self, repository: Repository, record: TagRecord | None, cached: ManifestResult | None
    ) -> bool:
        return isinstance(self._decide(repository, record, cached), freshness.Fresh)

    def _decide(
        self, repository: Repository, record: TagRecord | None, cached: ManifestResult | None
    ) -> freshness.Decision | freshness.Stale:
        upstream = self._content.upstream(repository)
        digest = cached.digest if cached is not None else None
        return freshness.decide_tag(record, digest, upstream, self._content.now())

    async def _find_variant(
        self, repository: Repository, tag: Tag, variant: str
    ) -> tuple[TagRecord | None, ManifestResult | None]:
        key = (repository, tag, variant)
        known = self._records.get(key)
        if known is None:
            found = await self._index.tag(repository, tag, variant)
            if found is None:
                return None, None
            known = self._remember_tag(key, found)
        record, is_record_fresh = known
        cached = await self._find_newest(repository, record)
        if cached is None:
            return record, None

        # `web` stores this function. It must not keep the manifest and the previous digests alive.
        # It is called for each repeated request, so it does as little as possible.
        confirmed = record.confirmed if cached.digest == record.digest else None
        upstream, now = self._content.upstream(repository), self._content.now
        is_cached_fresh = cached.is_fresh

        def is_fresh() -> bool:
            is_in_memory = is_record_fresh() and is_cached_fresh()
            return is_in_memory and freshness.is_fresh(confirmed, upstream, now())

        return record, replace(cached, is_fresh=is_fresh)

    def _remember_tag(self, key: _TagKey, record: TagRecord) -> tuple[TagRecord, IsFresh]:
        self._records[key] = known = record, fresh_for(MEMORY_TTL_S)
        return known

    async def _find_newest(
        self, repository: Repository, record: TagRecord
    ) -> ManifestResult | None:
        """Find the newest cached manifest of a tag: its current digest, or an earlier one."""
        for digest in record.digests:
            try:
                cached = await self._find_cached(repository, digest)
            except ManifestInvalid:
                continue
            if cached is not None:
                return cached
        return None

    async def _revalidate(
        self, request: TagRequest, cached: ManifestResult | None
    ) -> ManifestResult:
        """Resolve the tag at the upstream, and serve the manifest that it names now.

        If the upstream fails and ``serve_stale`` is set, ``cached`` is served, unless the request
        is a refresh.
        """
        repository, pull = request.repository, request.pull
        has_fallback = cached is not None and not request.is_refresh
        upstream = self._content.upstream(repository)
        try:
            with pull.stage("resolve"):
                timeout = freshness.confirm_timeout(upstream, has_fallback=has_fallback)
                head = await self._resolve(request, timeout)
            return await self._serve_resolved(request, head, cached)
        except MirrorError as error:
            match freshness.after_failure(error, upstream, has_fallback=has_fallback):
                case freshness.Stale(reason):
                    assert cached is not None
                    return _stale(pull, reason, cached)
                case freshness.Fail():
                    raise
                case unknown:
                    assert_never(unknown)

    async def _serve_resolved(
        self, request: TagRequest, head: ManifestHead, cached: ManifestResult | None
    ) -> ManifestResult:
        """Serve the manifest that the tag names now: ``cached`` if it has that digest."""
        repository, pull = request.repository, request.pull
        if cached is not None and cached.digest == head.digest:
            pull.outcome = Outcome.REVALIDATED
            self._content.compare_sizes(repository, head.size, cached.size)
            return cached
        assert head.digest is not None
        is_exact = self._content.has_right_sizes(repository)
        if request.is_head and is_exact and head.size and head.media_type != OCTET_STREAM:
            result = await self._find_cached(repository, head.digest)
            pull.outcome = Outcome.REVALIDATED if result else Outcome.MISS
            return result or ManifestResult(head.digest, head.media_type, size=head.size, body=None)
        try:
            result = await self._fetch_resolved(request, head.digest)
        except UpstreamError:
            if not request.is_head:
                raise
            # The upstream has answered the HEAD. Only the size is not known.
            return ManifestResult(head.digest, head.media_type, size=None, body=None)
        if pull.outcome is Outcome.HIT:
            pull.outcome = Outcome.REVALIDATED
        self._content.compare_sizes(repository, head.size, result.size)
        return result

    async def _fetch_resolved(self, request: TagRequest, digest: Digest) -> ManifestResult:
        """Fetch the manifest ``digest``, which the ``HEAD`` of a tag has named.

        If it is not there, the tag has moved since, or the ``HEAD`` was wrong. The ``GET`` of the
        tag decides then.
        """
        repository, pull, accept = request.repository, request.pull, request.accept
        by_digest = ContentRequest(repository, digest, Kind.MANIFEST, pull, accept)
        try:
            return await self.by_digest(by_digest, is_head=False)
        except NotFound:
            head = await self._resolve(request, None, is_by_get=True)
            assert head.digest is not None
            return await self.by_digest(replace(by_digest, digest=head.digest), is_head=False)

    async def _resolve(
        self, request: TagRequest, timeout: float | None, *, is_by_get: bool = False
    ) -> ManifestHead:
        """Ask the upstream for the tag's digest. Concurrent clients share one request.

        After ``timeout`` seconds this raises ``UpstreamTimeout``, and the request continues: later
        clients get its result.

        Args:
            request: The client's request.
            timeout: Seconds. None: there is no limit beside those of the request to the upstream.
            is_by_get: Send a ``GET``, and no ``HEAD``.
        """
        repository, tag = request.repository, request.tag
        accept = request.accept if has_media_types(request.accept) else DEFAULT_ACCEPT
        key = f"tag {repository}:{tag} {','.join(accept)}"
        if not request.is_refresh:
            await self._content.raise_if_negative(key, ManifestUnknown)
        shared_task = self._single_flight.run(
            ("resolve", key, is_by_get),
            lambda: self._request_tag(repository, tag, accept, key, is_by_get=is_by_get),
        )
        return await shared_task.wait(timeout)

    async def _request_tag(
        self,
        repository: Repository,
        tag: Tag,
        accept: tuple[str, ...],
        key: str,
        *,
        is_by_get: bool,
    ) -> ManifestHead:
        """Send the ``HEAD`` or the ``GET`` for a tag, and record the digest that it names."""
        registry = self._content.registries[repository.upstream]
        head = ManifestHead(digest=None, media_type=OCTET_STREAM, size=None)
        try:
            if not is_by_get:
                head = await registry.head_manifest(repository, tag, accept)
            if head.digest is None:
                manifest = await registry.get_manifest(repository, tag, accept, head.ruled_out)
                await self._store(repository, manifest)
                head = ManifestHead(
                    digest=manifest.digest,
                    media_type=manifest.media_type,
                    size=len(manifest.body),
                )
        except NotFound as error:
            await self._content.put_negative(repository, key, error)
            raise
        assert head.digest is not None
        access_record = manifest_record(head.digest, head.media_type, None)
        await self._index.put_access_records(repository, [access_record])
        variant = variant_of(accept)
        earlier, cached = await self._find_variant(repository, tag, variant)
        keep = cached.digest if cached is not None else None
        record = await self._index.confirm_tag(repository, tag, head.digest, variant, keep)
        if record is None:  # The index could not be written.
            record = confirm(earlier, repository, tag, head.digest, self._content.now(), keep)
        self._remember_tag((repository, tag, variant), record)
        return head


def _weight(result: ManifestResult) -> int:
    """Estimate the bytes of memory that a result takes: its body, and its parsed form."""
    return 1024 + 3 * (result.size or 0)


def _schema1_key(repository: Repository, digest: Digest) -> str:
    return f"schema 1 {repository}@{digest}"


def _stale(pull: RequestRecord, reason: str, cached: ManifestResult) -> ManifestResult:
    pull.outcome, pull.warning = Outcome.STALE, reason
    return cached
