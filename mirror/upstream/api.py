"""What the pull room may ask of an upstream: one protocol, its answers, nothing else.

Every method raises only errors of ``mirror.oci.errors``: ``NotFound``/``NameUnknown``/
``ManifestUnknown``/``BlobUnknown`` only when the upstream said 404 of this very thing,
``Unauthorized``/``Denied`` when it said 401/403, and an ``UpstreamError`` for all else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from mirror.observability.events import Kind
from mirror.oci.reference import Digest, Reference, Repository, Tag

PROGRESS: Final = 64 * 1024
"""Bytes that count as progress: a server that gives one byte for each connection gives none."""


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """The answer to a ``HEAD`` of a manifest. None: the upstream did not say."""

    digest: Digest | None
    media_type: str
    size: int | None


@dataclass(frozen=True, slots=True)
class ManifestBody:
    """A manifest, read whole (at most ``MANIFEST_LIMIT``), its bytes as they came."""

    digest: Digest
    media_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class TagsPage:
    """Tags of a repository, sorted, and whether there are more."""

    tags: tuple[str, ...]
    more: bool


class ContentStream(Protocol):
    """A body that is arriving. Iterate it once, inside its context manager."""

    @property
    def start(self) -> int:
        """Offset of the first byte that will be yielded: what was asked, or 0."""

    @property
    def total(self) -> int | None:
        """Bytes of the whole content; None if the upstream did not say (chunked)."""

    @property
    def media_type(self) -> str:
        """``Content-Type`` without parameters."""

    @property
    def validator(self) -> str | None:
        """What to give to ``open`` to resume, where the answer had a strong ``ETag``: with
        ``If-Range``, at the same endpoint. Opaque.
        """

    @property
    def endpoint(self) -> str:
        """The endpoint that answers (not the CDN that it redirected to)."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Chunks as they come. Raises ``UpstreamTimeout`` after 30 s of silence or below the rate
        floor, ``UpstreamUnavailable`` on a break or an end short of ``total``,
        ``UpstreamProtocolError`` on more bytes than ``total``.
        """


class Registry(Protocol):
    """One upstream: its endpoints, tokens, retries and circuits."""

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        """Resolve a reference without being billed."""

    async def get_manifest(
        self, repository: Repository, tag: Tag, accept: Sequence[str]
    ) -> ManifestBody:
        """A manifest by tag, for registries whose ``HEAD`` names no digest (private ECR)."""

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        """Whether the upstream serves this blob in this repository; its size where it says."""

    def open(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        *,
        accept: Sequence[str] = (),
        offset: int = 0,
        validator: str | None = None,
        total: int | None = None,
        avoid: Collection[str] = (),
    ) -> AbstractAsyncContextManager[ContentStream]:
        """``GET`` a blob or a manifest by digest, from ``offset`` on where the server can.

        ``total``: what is known already; an answer that disagrees is ``UpstreamProtocolError``.
        ``avoid``: endpoints to try last, in this order: they had it, but what they gave was wrong,
        or broke. No other one's no counts until they say it too.
        Fails over and retries until response headers are in; not afterwards.
        """

    async def list_tags(
        self, repository: Repository, count: int | None, last: str | None
    ) -> TagsPage:
        """One page of tags after ``last`` (exclusive), at most ``count`` (1 or more; None: all)."""

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None
    ) -> ManifestBody | None:
        """The referrers index, all pages merged; None where the API is not supported."""

    async def close(self) -> None:
        """Close connections."""
