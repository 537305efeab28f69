"""Find what was pushed here for an image of an upstream: signatures, SBOMs, attestations.

Lives here: the hosted repository that has them, and the question whether a content of it may be
served in the repository of the upstream. Must not know: HTTP, pushes.

Theory of operation: ``docker.io/library/app`` has its signatures in the hosted repository
``NAME/docker.io/library/app``. That repository has rules of its own, and may have anything. So
only what belongs to an image that the mirror serves is served under the name of the upstream, and
no push replaces an image of the upstream.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

from mirror.observability.events import Kind, RequestRecord
from mirror.oci.descriptor import (
    MANIFEST_LIMIT,
    ReferrersPage,
    add_referrers,
    parse_referrers_tag,
    referrers_index,
)
from mirror.oci.errors import (
    ContentLost,
    Denied,
    NotFound,
    StorageUnavailable,
    Unauthorized,
    UpstreamError,
)
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.pull.admission import Restrictions
from mirror.pull.hosted import HostedPulls
from mirror.pull.manifests import ManifestService
from mirror.pull.requests import ContentRequest
from mirror.threads import run_in_thread


class AttachedPulls:
    """Finds what hosted repositories have for the images of upstreams."""

    def __init__(self, hosted: HostedPulls, manifests: ManifestService) -> None:
        """Create it.

        Args:
            hosted: Serves the hosted repositories.
            manifests: Serves the manifests of upstreams.
        """
        self._hosted = hosted
        self._manifests = manifests

    async def find(
        self,
        repository: Repository,
        reference: Reference,
        pull: RequestRecord,
        restrictions: Restrictions,
    ) -> Repository | None:
        """Return the hosted repository to serve ``reference`` from, in place of the upstream's.

        Args:
            repository: The repository of the upstream.
            reference: A tag, or the digest of a manifest or blob.
            pull: Record of the client's request.
            restrictions: The operator's blocks.

        Returns:
            None: nothing was pushed for an image that the mirror serves, or the client may not pull
            it.
        """
        if isinstance(reference, Tag) and parse_referrers_tag(reference.name) is None:
            return None
        attached = self._find_permitted(repository, reference, pull, restrictions)
        if attached is None:
            return None
        with suppress(StorageUnavailable):
            subjects = await self._hosted.service.manifests.find_subjects(attached.path, reference)
            for subject in subjects:
                if await self._is_served(repository, subject, pull):
                    return attached
        return None

    async def referrers(
        self,
        repository: Repository,
        digest: Digest,
        artifact_type: str | None,
        last: str | None,
        body: bytes,
        pull: RequestRecord,
        restrictions: Restrictions,
    ) -> ReferrersPage:
        """Return one page of the upstream's referrers and of those that were pushed here.

        Args:
            repository: The repository of the upstream.
            digest: The digest whose referrers are listed.
            artifact_type: Only referrers of this type. None: all.
            last: The page begins after this digest of ours. None: it is the first page, which has
                all those of the upstream.
            body: The index that the upstream has sent.
            pull: Record of the client's request.
            restrictions: The operator's blocks.

        Raises:
            ManifestInvalid: ``body`` is no such index.
        """
        is_first = last is None
        page = ReferrersPage(referrers_index())
        attached = self._find_permitted(repository, None, pull, restrictions)
        if attached is not None:
            taken = len(body) - len(page.index) if is_first else 0
            find = self._hosted.service.lists.referrers
            found = await find(
                attached.path, digest, artifact_type, last or "", MANIFEST_LIMIT - taken
            )
            has_ours = found.count > 0 or found.next_last is not None
            if has_ours and await self._is_served(repository, digest, pull):
                page = found
        if not page.count:
            return replace(page, index=body, digest=None) if is_first else page
        add = partial(add_referrers, is_first_page=is_first)
        index = await run_in_thread(add, body, page.index)
        return replace(page, index=index, digest=None)

    def _find_permitted(
        self,
        repository: Repository,
        reference: Reference | None,
        pull: RequestRecord,
        restrictions: Restrictions,
    ) -> Repository | None:
        """Return the hosted repository for an upstream's, unless a rule or a block refuses it."""
        name = f"{repository.upstream}/{repository.path}"
        attached = Repository(self._hosted.name, name)
        is_refused = pull.is_pull_refused is not None and pull.is_pull_refused(attached)
        is_blocked = restrictions.reason_for(attached, reference) is not None
        return None if is_refused or is_blocked else attached

    async def _is_served(self, repository: Repository, digest: Digest, pull: RequestRecord) -> bool:
        """Return whether a repository of an upstream has a manifest, as far as can be known."""
        # Its outcome is not that of the client's request.
        request = ContentRequest(repository, digest, Kind.MANIFEST, replace(pull))
        try:
            await self._manifests.by_digest(request, is_head=True)
        except (NotFound, Denied, Unauthorized):
            return False
        except (UpstreamError, StorageUnavailable, ContentLost):
            # Not known. An outage must not hide signatures (docs/hosting.md, "Sign a mirrored
            # image").
            return True
        return True
