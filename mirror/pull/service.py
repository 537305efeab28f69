"""The pull service: one door for the web, the command line and the tests.

Lives here: admission before anything else, and which service a typed request belongs to. Must not
know: HTTP.
"""

from __future__ import annotations

from typing import assert_never

from mirror.observability.events import Kind, Outcome, Pull
from mirror.oci.errors import BlobUnknown, Denied
from mirror.oci.reference import Digest, Reference, Repository
from mirror.pull import admission
from mirror.pull.content import ContentService
from mirror.pull.lists import ListService
from mirror.pull.manifests import ManifestService
from mirror.pull.results import BlobResult, ManifestResult, TagsResult


class PullService:
    """Every answer about content passes here, once."""

    def __init__(self, content: ContentService) -> None:
        self._content = content
        self._manifests = ManifestService(content)
        self._lists = ListService(content, self._manifests)

    def _admit(self, repository: Repository, pull: Pull) -> Digest | None:
        """Raises :class:`Denied`; returns the digest that is to be served instead, if any."""
        match admission.admit(repository, self._content.upstream(repository)):
            case admission.Serve():
                return None
            case admission.Instead(digest):
                return digest
            case admission.Refuse(_, why):
                pull.outcome = Outcome.DENIED
                raise Denied(why)
            case unknown:
                assert_never(unknown)

    async def manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: tuple[str, ...],
        pull: Pull,
        *,
        head: bool,
    ) -> ManifestResult:
        """A manifest by tag or digest."""
        reference = self._admit(repository, pull) or reference
        if isinstance(reference, Digest):
            return await self._manifests.by_digest(repository, reference, accept, pull, head=head)
        return await self._manifests.by_tag(repository, reference, accept, pull, head=head)

    async def blob(
        self, repository: Repository, digest: Digest, pull: Pull, *, head: bool
    ) -> BlobResult:
        """A blob. The caller closes the answer's reader."""
        if self._admit(repository, pull) is not None:
            raise BlobUnknown("another image is served in place of this one")
        if await self._content.is_manifest(repository, digest):
            # A client that got a manifest here would take it for an octet stream (containerd).
            raise BlobUnknown("this digest is a manifest")
        if head:
            size = await self._content.head(repository, digest, pull)
            return BlobResult(digest, size, None)
        reader = await self._content.open(repository, digest, Kind.BLOB, pull)
        self._content.used(digest)
        return BlobResult(digest, reader.size, reader)

    async def tags(
        self, repository: Repository, count: int | None, last: str | None, pull: Pull
    ) -> TagsResult:
        """One page of a repository's tags."""
        self._admit(repository, pull)
        return await self._lists.tags(repository, count, last, pull)

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None, pull: Pull
    ) -> bytes:
        """What refers to a digest, as an OCI index."""
        self._admit(repository, pull)
        return await self._lists.referrers(repository, digest, artifact_type, pull)
