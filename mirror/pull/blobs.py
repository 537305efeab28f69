"""Serve blobs: small ones from memory, all others from their files.

Lives here: the memory for small blobs, and the order of checks for one blob. Must not know: HTTP,
how content is fetched.

Every image has a config blob of a few kilobytes. To open its file takes several hops to threads,
which cost seven times as much as a response from memory.
"""

from __future__ import annotations

from typing import Final

from cachetools import TTLCache

from mirror.observability.events import Kind, Outcome
from mirror.oci.errors import BlobUnknown
from mirror.oci.reference import Digest, Repository
from mirror.pull.content import ContentService
from mirror.pull.requests import ContentRequest
from mirror.pull.results import MEMORY_TTL_S, BlobResult, current_for

_SMALL_BYTES: Final = 64 * 1024
"""Largest blob, in bytes, that is kept in memory: config blobs, and what is sent in one write."""
_MEMORY_BYTES: Final = 16 * 1024 * 1024
"""Bytes for small blobs in memory: a thousand config blobs of common images."""
_ENTRY_BYTES: Final = 1024
"""Bytes that a blob takes in memory beside its body."""


class BlobService:
    """Serves blobs from the store, and fetches missing ones."""

    def __init__(self, content: ContentService) -> None:
        self._content = content
        self._small: TTLCache[tuple[Repository, Digest], BlobResult] = TTLCache(
            _MEMORY_BYTES, MEMORY_TTL_S, getsizeof=lambda blob: _ENTRY_BYTES + (blob.size or 0)
        )

    async def get(self, request: ContentRequest, *, head: bool) -> BlobResult:
        """Serve a blob, complete or while it is fetched.

        Args:
            request: A request of kind ``BLOB``.
            head: True if the client wants no body.

        Raises:
            BlobUnknown: The repository does not have the blob, or has a manifest of that digest.
            MirrorError: As :meth:`ContentService.open` raises it.
        """
        repository, digest, pull = request.repository, request.digest, request.pull
        small = self._small.get((repository, digest))
        if small is None:
            if await self._content.is_manifest(repository, digest):
                # A client that got a manifest here would take it for an octet stream (containerd).
                raise BlobUnknown("this digest is a manifest")
            with pull.stage("index"):
                small = await self._read_small(repository, digest)
        if small is not None:
            pull.outcome = Outcome.HIT
            return small
        if head:
            return BlobResult(digest, await self._content.size_of_blob(request), None)
        reader = await self._content.open(request)
        self._content.store.blobs.mark_used((digest,))
        return BlobResult(digest, reader.size, reader)

    async def _read_small(self, repository: Repository, digest: Digest) -> BlobResult | None:
        """Read a small blob that may be served without the upstream, and keep it in memory.

        Its bytes are hashed at each read. Returns None for any other blob, and for one that is
        missing or damaged.
        """
        record = await self._content.access_record(repository, digest, Kind.BLOB)
        is_small = record is not None and record.size is not None and record.size <= _SMALL_BYTES
        if not is_small or not self._content.may_read_unasked(repository, record):
            return None
        body = await self._content.store.blobs.read(digest, _SMALL_BYTES)
        if body is None:
            return None
        self._content.store.blobs.mark_used((digest,))
        small = BlobResult(digest, len(body), body, current_for(MEMORY_TTL_S))
        self._small[repository, digest] = small
        return small
