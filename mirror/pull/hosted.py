"""Serve hosted repositories, as an upstream of their name.

Lives here: the results of the pull service for content that clients have pushed. Must not know:
HTTP, pushes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mirror.hosted.hosted_service import HostedService
from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.descriptor import ReferrersPage
from mirror.oci.reference import Digest, Reference, Repository
from mirror.pull.results import BlobResult, ManifestResult, RepositoriesResult, TagsResult

_MAX_IN_MEMORY_BYTES: Final = 64 * 1024
"""Bytes of a blob that is read at once: config blobs are smaller, and ``web`` sends so much in one
write."""


class HostedPulls:
    """Serves what hosted repositories have. Another process may have changed it just now."""

    def __init__(self, hosted: HostedService) -> None:
        self.name = hosted.settings.name
        """Name of the upstream that it stands for."""
        self.service = hosted

    async def manifest(
        self, repository: Repository, reference: Reference, pull: RequestRecord, *, is_head: bool
    ) -> ManifestResult:
        """Serve a manifest (see :meth:`mirror.pull.service.PullService.manifest`).

        Args:
            repository: The repository that the client named.
            reference: A tag or a digest.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the result has no body.
        """
        row = await self.service.manifests.find(repository.path, reference)
        if is_head:
            body = None
            self.service.manifests.check_file(row)
        else:
            body = await self.service.manifests.read(row)
        self.service.manifests.mark_pulled(repository.path, row)
        pull.outcome = Outcome.HIT
        return ManifestResult(row.digest, row.media_type, size=row.size, body=body)

    async def blob(
        self, repository: Repository, digest: Digest, pull: RequestRecord, *, is_head: bool
    ) -> BlobResult:
        """Serve a blob (see :meth:`mirror.pull.service.PullService.blob`).

        Args:
            repository: The repository that the client named.
            digest: The digest of the blob.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the result has no content.
        """
        blobs = self.service.blobs
        if is_head:
            size = await blobs.size(repository.path, digest)
            pull.outcome = Outcome.HIT
            return BlobResult(digest, size=size, content=None)
        size = await blobs.recorded_size(repository.path, digest)
        pull.outcome = Outcome.HIT
        if size <= _MAX_IN_MEMORY_BYTES:
            body = await blobs.read(digest, _MAX_IN_MEMORY_BYTES)
            return BlobResult(digest, size=len(body), content=body)
        reader = await blobs.open(digest, size)
        return BlobResult(digest, size=reader.size, content=reader)

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: RequestRecord
    ) -> TagsResult:
        """Serve one page of tags (see :meth:`mirror.pull.service.PullService.tags`).

        Args:
            repository: The repository that the client named.
            count: Tags on the page at most. None: as many as one page may have.
            last: The page starts after this tag. None: the first page.
            pull: Record of the client's request.
        """
        tags, has_more = await self.service.lists.tags(repository.path, count, last)
        pull.outcome = Outcome.HIT
        return TagsResult(text="\n".join(tags), has_more=has_more)

    async def referrers(
        self,
        repository: Repository,
        digest: Digest,
        artifact_type: str | None,
        last: str | None,
        pull: RequestRecord,
    ) -> ReferrersPage:
        """Serve one page of referrers (see :meth:`mirror.pull.service.PullService.referrers`).

        Args:
            repository: The repository that the client named.
            digest: The digest whose referrers are listed.
            artifact_type: Only referrers of this type. None: all.
            last: The page begins after this digest. None: it is the first page.
            pull: Record of the client's request.
        """
        page = await self.service.lists.referrers(
            repository.path, digest, artifact_type, last or ""
        )
        pull.outcome = Outcome.HIT
        return page

    async def repositories(
        self,
        count: int | None,
        last: str,
        is_visible: Callable[[Repository], bool] | None = None,
    ) -> RepositoriesResult:
        """Return one page of the repositories that have a manifest.

        Args:
            count: Names on the page at most. None: as many as one page may have.
            last: The page starts after this name. Empty: the first page.
            is_visible: Returns whether the client may know of a repository. None: of all.
        """
        found, has_more = await self.service.lists.repositories(count, last, is_visible)
        return RepositoriesResult(tuple(found), has_more)
