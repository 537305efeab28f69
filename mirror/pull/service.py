"""The pull service: the interface of this package, for ``web`` and ``server``.

Lives here: admission before anything else, the choice of the service for a request, and small blobs
in memory. Must not know: HTTP.

Every image has a config blob of a few kilobytes. To open its file takes several hops to threads,
which cost seven times as much as a response from memory. So blobs of at most 64 KiB that their
repository may read without the upstream are kept in memory for a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, assert_never

from cachetools import TTLCache

from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.traces import PullTrace
from mirror.oci.accept import is_acceptable
from mirror.oci.descriptor import ReferrersPage, referrers_index
from mirror.oci.errors import BlobUnknown, Denied, NotFound, StorageUnavailable, UpstreamError
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.pull import admission
from mirror.pull.admission import NO_RESTRICTIONS, Restrictions
from mirror.pull.attached import AttachedPulls
from mirror.pull.content import ContentService
from mirror.pull.hosted import HostedPulls
from mirror.pull.lists import ListService
from mirror.pull.manifests import ManifestService
from mirror.pull.repositories import RepositoryService
from mirror.pull.requests import ContentRequest, SpanSelector, TagRequest
from mirror.pull.results import (
    MEMORY_TTL_S,
    BlobResult,
    ManifestResult,
    RepositoriesResult,
    TagsResult,
    fresh_for,
)

_MAX_BLOB_BYTES: Final = 64 * 1024
"""Largest blob, in bytes, that is kept in memory: config blobs are smaller, and ``web`` sends so
much in one write."""
_BLOBS_BYTES: Final = 16 * 1024 * 1024
"""Bytes for small blobs in memory: a thousand config blobs of common images."""
_BLOB_EXTRA_BYTES: Final = 1024
"""Bytes that a blob takes in memory beside its body."""


class PullService:
    """Serves manifests, blobs, tag lists and referrers.

    Every method takes the ``pull`` record of the client's request and writes its outcome, its
    stages and its warning there. Every method raises :class:`mirror.oci.errors.Denied` if the
    request is not admitted or the upstream says 403, ``Unauthorized`` if the upstream says 401,
    an ``UpstreamError`` if the upstream fails and no cached result may be served instead,
    ``StorageUnavailable`` or ``ContentLost`` if content cannot be opened or read, and ``Draining``
    while the process shuts down.
    """

    def __init__(self, content: ContentService, hosted: HostedPulls | None = None) -> None:
        self._content = content
        self._hosted = hosted
        self._hosted_name = None if hosted is None else hosted.name
        self._manifests = ManifestService(content)
        self._attached = None if hosted is None else AttachedPulls(hosted, self._manifests)
        self._small_blobs: TTLCache[tuple[Repository, Digest], BlobResult] = TTLCache(
            _BLOBS_BYTES, MEMORY_TTL_S, getsizeof=lambda b: _BLOB_EXTRA_BYTES + (b.size or 0)
        )
        self._lists = ListService(content, self._manifests)
        self._repositories = RepositoryService(content, lambda: self.restrictions)
        self.restrictions = NO_RESTRICTIONS
        """The operator's blocks and freezes that are in force."""

    def restrict(self, restrictions: Restrictions) -> None:
        """Apply these blocks and freezes to all requests from now on."""
        self.restrictions = restrictions

    def is_admitted(self, repository: Repository, reference: Reference | None = None) -> bool:
        """Return whether no block or list refuses a repository, and a tag or digest of it.

        False while the operator's marks are not known.
        """
        return isinstance(self._decide(repository, reference), admission.Allow)

    def _decide(self, repository: Repository, reference: Reference | None) -> admission.Admission:
        restrictions = self.restrictions
        if repository.upstream == self._hosted_name:
            return admission.admit(repository, None, restrictions, reference)
        content = self._content
        return admission.admit_with_nested(
            repository, content.upstreams, content.registry_names, restrictions, reference
        )

    def _admit(
        self, repository: Repository, pull: RequestRecord, reference: Reference | None = None
    ) -> None:
        _apply(self._decide(repository, reference), pull)

    def _admit_digest(self, digest: Digest, pull: RequestRecord) -> None:
        """Raise ``Denied`` if the manifest of a tag is blocked."""
        _apply(admission.admit_digest(digest, self.restrictions), pull)

    async def manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: tuple[str, ...],
        pull: RequestRecord,
        *,
        is_head: bool,
        is_refresh: bool = False,
    ) -> ManifestResult:
        """Serve a manifest.

        Args:
            repository: The repository that the client named.
            reference: A tag or a digest.
            accept: Media types of the client's ``Accept`` header. Empty if it sent none.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the body of the result may be None.
            is_refresh: True to ask the upstream for a tag also if the cached one is fresh, or if a
                404 is remembered, and to serve nothing stale.

        Returns:
            The manifest, byte for byte as the upstream sent it.

        Raises:
            ManifestUnknown: The upstream says 404, or nothing is cached and the pull policy is
                ``Never``.
            ManifestInvalid: The content is no JSON object, nested too deeply, or larger than 4 MiB.

        A tag that the operator has frozen is served as a digest, and the upstream is not asked for
        it. What the upstream does not have, or cannot be asked for, is served if it was pushed for
        an image of this repository (see :mod:`mirror.pull.attached`).
        """
        self._admit(repository, pull, reference)
        if isinstance(reference, Tag):
            frozen = self.restrictions.frozen.get((repository, reference))
            if frozen is not None:
                return await self._frozen(repository, frozen, accept, pull, is_head=is_head)
        return await self._find_manifest(
            repository, reference, accept, pull, is_head=is_head, is_refresh=is_refresh
        )

    async def _find_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: tuple[str, ...],
        pull: RequestRecord,
        *,
        is_head: bool,
        is_refresh: bool = False,
    ) -> ManifestResult:
        """Serve a manifest that is hosted here, or that an upstream has."""
        if self._hosted is not None and repository.upstream == self._hosted_name:
            result = await self._hosted.manifest(repository, reference, pull, is_head=is_head)
            self._admit_digest(result.digest, pull)
            return result
        try:
            if isinstance(reference, Digest):
                request = ContentRequest(repository, reference, Kind.MANIFEST, pull, accept)
                return await self._manifests.by_digest(request, is_head=is_head)
            return await self._by_tag(
                TagRequest(
                    repository,
                    reference,
                    pull,
                    accept=accept,
                    is_head=is_head,
                    is_refresh=is_refresh,
                )
            )
        except (NotFound, UpstreamError):
            if is_refresh:
                raise
            attached = await self._find_attached(repository, reference, pull)
            if attached is not None:
                with suppress(NotFound, StorageUnavailable):
                    return await self._find_manifest(
                        attached, reference, accept, pull, is_head=is_head
                    )
            raise

    async def _find_attached(
        self, repository: Repository, reference: Reference, pull: RequestRecord
    ) -> Repository | None:
        """Return the hosted repository that has this for an image of the upstream, or None."""
        if self._attached is None:
            return None
        return await self._attached.find(repository, reference, pull, self.restrictions)

    async def _frozen(
        self,
        repository: Repository,
        digests: tuple[Digest, ...],
        accept: tuple[str, ...],
        pull: RequestRecord,
        *,
        is_head: bool,
    ) -> ManifestResult:
        """Serve the first manifest of a frozen tag that the client accepts, else the first one."""
        pull.trace = PullTrace(is_frozen=True)
        results: list[ManifestResult] = []
        for digest in digests:
            self._admit_digest(digest, pull)
            results.append(
                await self._find_manifest(repository, digest, accept, pull, is_head=is_head)
            )
            if is_acceptable(accept, results[-1].media_type):
                return results[-1]
        return results[0]

    async def _by_tag(self, request: TagRequest) -> ManifestResult:
        result = await self._manifests.by_tag(request)
        # Only now is it known which manifest the tag has.
        self._admit_digest(result.digest, request.pull)
        return result

    async def blob(
        self,
        repository: Repository,
        digest: Digest,
        pull: RequestRecord,
        *,
        is_head: bool,
        select_spans: SpanSelector | None = None,
    ) -> BlobResult:
        """Serve a blob, complete or while it is fetched.

        Args:
            repository: The repository that the client named.
            digest: The digest of the blob.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the result has no reader.
            select_spans: Returns the spans that the client wants, if it wants only parts.

        Returns:
            The blob. Its first byte can be read at once. The caller closes the reader, if there is
            one: a small blob may be in memory.

        Raises:
            BlobUnknown: The repository does not have the blob, or has a manifest of that digest.
            Draining: The process shuts down, so no fetch is started.
        """
        self._admit(repository, pull, digest)
        if self._hosted is not None and repository.upstream == self._hosted_name:
            return await self._hosted.blob(repository, digest, pull, is_head=is_head)
        try:
            small = self._small_blobs.get((repository, digest))
            if small is None:
                if await self._content.is_manifest(repository, digest):
                    # Clients would take it for an octet stream (containerd).
                    raise BlobUnknown("this digest is a manifest")
                with pull.stage("index"):
                    small = await self._read_small_blob(repository, digest)
            if small is not None:
                pull.outcome = Outcome.HIT
                return small
            request = ContentRequest(repository, digest, Kind.BLOB, pull, select_spans=select_spans)
            if is_head:
                size = await self._content.size_of_blob(request)
                return BlobResult(digest, size=size, content=None)
            reader = await self._content.open(request)
        except (NotFound, UpstreamError):
            attached = await self._find_attached(repository, digest, pull)
            if self._hosted is not None and attached is not None:
                with suppress(NotFound, StorageUnavailable):
                    return await self._hosted.blob(attached, digest, pull, is_head=is_head)
            raise
        self._content.store.blobs.mark_used((digest,))
        return BlobResult(digest, size=reader.size, content=reader)

    async def _read_small_blob(self, repository: Repository, digest: Digest) -> BlobResult | None:
        """Read a small blob that may be served without the upstream, and keep it in memory.

        It is hashed at each read. Returns None for any other blob, and for one that is missing or
        damaged.
        """
        record = await self._content.access_record(repository, digest, Kind.BLOB)
        size = record.size if record is not None else None
        is_small = size is not None and size <= _MAX_BLOB_BYTES
        if not is_small or not self._content.may_read_unasked(repository, record):
            return None
        body = await self._content.read_small(digest, _MAX_BLOB_BYTES)
        if body is None:
            return None
        self._content.store.blobs.mark_used((digest,))
        is_fresh = fresh_for(MEMORY_TTL_S)
        small = BlobResult(digest, size=len(body), content=body, is_fresh=is_fresh)
        self._small_blobs[repository, digest] = small
        return small

    async def repositories(
        self,
        upstream: str | None,
        count: int | None,
        last: str,
        is_visible: Callable[[Repository], bool] | None = None,
    ) -> RepositoriesResult:
        """Return one page of the repositories that have a manifest on disk, in order.

        The list may be a minute old. Repositories that are not admitted are left out.

        Args:
            upstream: Only repositories of this upstream, named by their paths. None: those of all
                upstreams, named ``docker.io/library/alpine``.
            count: Names on the page at most. None for as many as one page may have.
            last: The page starts after this name. Empty for the first page.
            is_visible: Returns whether the client may know of a repository. None: of all.

        Raises:
            StorageUnavailable: The index cannot be read.
        """
        if self.restrictions.unknown_why:
            raise StorageUnavailable(self.restrictions.unknown_why)
        if self._hosted is not None and upstream == self._hosted_name:

            def may_list(repository: Repository) -> bool:
                is_known = is_visible is None or is_visible(repository)
                return is_known and self.is_admitted(repository)

            return await self._hosted.repositories(count, last, may_list)
        return await self._repositories.page(upstream, count, last, is_visible)

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: RequestRecord
    ) -> TagsResult:
        """Serve one page of a repository's tags.

        Args:
            repository: The repository that the client named.
            count: Tags on the page at most. None for as many as a client can
                read at once, about 100,000.
            last: The page starts after this tag. None for the first page.
            pull: Record of the client's request.

        Returns:
            The page, and whether there are more tags.

        Raises:
            NameUnknown: The upstream says 404, or no tag is cached and the pull policy is
                ``Never``.
        """
        self._admit(repository, pull)
        if self._hosted is not None and repository.upstream == self._hosted_name:
            return await self._hosted.tags(repository, count, last, pull)
        return await self._lists.tags(repository, count, last, pull)

    async def referrers(
        self,
        repository: Repository,
        digest: Digest,
        artifact_type: str | None,
        pull: RequestRecord,
        last: str | None = None,
    ) -> ReferrersPage:
        """Serve one page of the referrers of a digest (Distribution, "Listing Referrers").

        Args:
            repository: The repository that the client named.
            digest: The digest whose referrers are listed.
            artifact_type: Only referrers of this type. None for all.
            pull: Record of the client's request.
            last: The page begins after this digest, or with the first one that was pushed here if
                it is empty. None: it is the first page.

        Returns:
            An OCI image index. Empty if nothing refers to ``digest``. The first page has all
            referrers of the upstream, and the pages together all that were pushed here, too.

        Raises:
            ManifestInvalid: The upstream sent no list of referrers.
        """
        self._admit(repository, pull)
        if self._hosted is not None and repository.upstream == self._hosted_name:
            return await self._hosted.referrers(repository, digest, artifact_type, last, pull)
        failure = None
        try:
            body = await self._lists.referrers(repository, digest, artifact_type, pull)
        except UpstreamError as error:
            body, failure = referrers_index(), error
        page = ReferrersPage(body)
        if self._attached is not None:
            page = await self._attached.referrers(
                repository, digest, artifact_type, last, body, pull, self.restrictions
            )
        if failure is not None:
            if not page.count:
                raise failure
            # A list without those of the upstream is not whole. Say so, as of a stale one.
            pull.outcome, pull.warning = Outcome.STALE, failure.message
        return page


def _apply(decision: admission.Admission, pull: RequestRecord) -> None:
    """Raise ``Denied`` for a request that is refused, ``StorageUnavailable`` if it may be."""
    match decision:
        case admission.Allow():
            return
        case admission.Deny(reason):
            pull.outcome = Outcome.DENIED
            raise Denied(reason)
        case admission.Undecided(reason):
            raise StorageUnavailable(reason)
        case unknown:
            assert_never(unknown)
