"""Serve hosted repositories, as an upstream of their name.

Lives here: the results of the pull service for content that clients have pushed. Must not know:
HTTP, pushes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from mirror.hosted.hosted_service import HostedService
from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.descriptor import (
    MANIFEST_LIMIT,
    ReferrersPage,
    add_referrers,
    parse_referrers_tag,
    referrers_index,
)
from mirror.oci.errors import NotFound, StorageUnavailable
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.pull.results import BlobResult, ManifestResult, RepositoriesResult, TagsResult
from mirror.threads import run_in_thread

_MAX_IN_MEMORY_BYTES: Final = 64 * 1024
"""Bytes of a blob that is read at once: config blobs are smaller, and ``web`` sends so much in one
write."""


class HostedPulls:
    """Serves what hosted repositories have. Another process may have changed it just now."""

    def __init__(self, hosted: HostedService) -> None:
        self.name = hosted.settings.name
        """Name of the upstream that it stands for."""
        self._hosted = hosted

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
        row = await self._hosted.manifests.find(repository.path, reference)
        body = None if is_head else await self._hosted.manifests.read(row)
        self._hosted.manifests.mark_pulled(repository.path, row)
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
        size = await self._hosted.blobs.size(repository.path, digest)
        pull.outcome = Outcome.HIT
        if is_head:
            return BlobResult(digest, size=size, content=None)
        if size <= _MAX_IN_MEMORY_BYTES:
            body = await self._hosted.blobs.read(digest, _MAX_IN_MEMORY_BYTES)
            return BlobResult(digest, size=len(body), content=body)
        reader = await self._hosted.blobs.open(digest, size)
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
        tags, has_more = await self._hosted.lists.tags(repository.path, count, last)
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
        page = await self._hosted.lists.referrers(
            repository.path, digest, artifact_type, last or ""
        )
        pull.outcome = Outcome.HIT
        return page

    # --- what was pushed for an image of an upstream -------------------------------------------

    def _attached(self, repository: Repository) -> Repository:
        """Return the hosted repository for signatures and SBOMs of a repository of an upstream."""
        return Repository(self.name, f"{repository.upstream}/{repository.path}")

    async def attached_manifest(
        self, repository: Repository, reference: Reference, pull: RequestRecord, *, is_head: bool
    ) -> ManifestResult | None:
        """Serve a manifest that was pushed for an image of an upstream. None: there is none.

        Only by its digest, or by a tag of what belongs to a digest: no other tag of an upstream can
        be had from here, lest a push replaces an image of the upstream.

        Args:
            repository: The repository of the upstream.
            reference: A tag or a digest.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the result has no body.
        """
        if isinstance(reference, Tag) and parse_referrers_tag(reference.name) is None:
            return None
        with suppress(NotFound, StorageUnavailable):
            return await self.manifest(self._attached(repository), reference, pull, is_head=is_head)
        return None

    async def attached_blob(
        self, repository: Repository, digest: Digest, pull: RequestRecord, *, is_head: bool
    ) -> BlobResult | None:
        """Serve a blob that was pushed for an image of an upstream. None: there is none.

        Args:
            repository: The repository of the upstream.
            digest: The digest of the blob.
            pull: Record of the client's request.
            is_head: True for a ``HEAD``: the result has no content.
        """
        with suppress(NotFound, StorageUnavailable):
            return await self.blob(self._attached(repository), digest, pull, is_head=is_head)
        return None

    async def attached_referrers(
        self,
        repository: Repository,
        digest: Digest,
        artifact_type: str | None,
        last: str | None,
        body: bytes,
    ) -> ReferrersPage:
        """Return one page of the upstream's referrers and of those that were pushed here.

        Args:
            repository: The repository of the upstream.
            digest: The digest whose referrers are listed.
            artifact_type: Only referrers of this type. None: all.
            last: The page begins after this digest of ours. None: it is the first page, which has
                all those of the upstream.
            body: The index that the upstream has sent.

        Raises:
            ManifestInvalid: ``body`` is no such index.
        """
        path = self._attached(repository).path
        is_first = last is None
        taken = len(body) - len(referrers_index()) if is_first else 0
        page = await self._hosted.lists.referrers(
            path, digest, artifact_type, last or "", MANIFEST_LIMIT - taken
        )
        if not page.count:
            return replace(page, index=body) if is_first else page
        add = partial(add_referrers, is_first_page=is_first)
        return replace(page, index=await run_in_thread(add, body, page.index))

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
        found, has_more = await self._hosted.lists.repositories(count, last, is_visible)
        return RepositoriesResult(tuple(found), has_more)
