"""Contract of this package: the requests that ``pull`` may send to an upstream registry.

Lives here: one protocol for a registry, one for an arriving body, and the values that they return.
Must not know: HTTP, how any of it is done.

All digests are in the form of the OCI Image specification ("Digests"). Sizes and offsets are in
bytes, times in seconds. Section names below are those of the OCI Distribution specification 1.1.

Errors. Every method raises errors of ``mirror.oci.errors`` only:

- ``NotFound`` (``NameUnknown``, ``ManifestUnknown``, ``BlobUnknown``): all endpoints responded with
  404 to this very request. No other failure is ever reported as ``NotFound``.
- ``Unauthorized``, ``Denied``: all endpoints refused, and at least one, or its token service, with
  401 or 403.
- ``UpstreamRateLimited``: a 429, or a pause after one. ``retry_after`` is in seconds, or None.
- ``UpstreamTimeout``, ``UpstreamUnavailable``, ``AllCircuitsOpen``: no usable response in time.
- ``UpstreamProtocolError``, ``ManifestInvalid``, ``OutboundRefused``: the response violates the
  specification or names a URL that may not be connected to.
- ``Draining``: the process shuts down.

Requests are retried until the response headers are in. A response that cannot be used, such as a
log-in page, leads to the next endpoint. So does the body of a manifest or of a list that breaks. To
resume the broken body of :meth:`Registry.open` is the caller's decision.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from mirror.config.settings import Parallel
from mirror.observability.events import Kind
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Reference, Repository

MIN_PROGRESS_BYTES: Final = 64 * 1024
"""Bytes that a transfer must bring to count as progress. Fewer do not: otherwise a server that
sends one byte for each connection would be retried for ever."""

ReclaimConnections: TypeAlias = Callable[[str], bool]
"""Called with the URL of an endpoint to which a request has failed before an accepted response: by
a 429, a 503, or no response. Returns True if we close further connections to the endpoint, since
they may be the cause. Then the failure is not reported to the circuit breaker, and a 429 starts no
pause."""


def keep_connections(endpoint: str) -> bool:
    """Close no connection. A :data:`ReclaimConnections`."""
    return False


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """Headers of a manifest. ``digest`` and ``size`` are None if the upstream did not send them."""

    digest: Digest | None
    media_type: str
    """``application/octet-stream`` if the upstream sent none, or a generic one."""
    size: int | None
    ruled_out: Mapping[str, MirrorError] = field(default_factory=dict, compare=False)
    """URL of an endpoint to which no ``GET`` is sent after this ``HEAD`` -> its error. For
    :meth:`Registry.get_manifest`."""


@dataclass(frozen=True, slots=True)
class ManifestBody:
    """A complete manifest. ``body`` is unchanged, and at most ``MANIFEST_LIMIT`` bytes long."""

    digest: Digest
    media_type: str
    body: bytes


class ContentStream(Protocol):
    """An arriving body. Iterate it once, inside the context manager that yielded it."""

    @property
    def start(self) -> int:
        """Offset of the first byte that is yielded: the requested offset, or 0."""

    @property
    def total(self) -> int | None:
        """Size of the whole content. None if the upstream did not send it (chunked)."""

    @property
    def media_type(self) -> str:
        """``Content-Type`` without parameters. A generic one is ``application/octet-stream``."""

    @property
    def validator(self) -> str | None:
        """Opaque value to pass to :meth:`Registry.open` for a resume.

        It holds the endpoint and its strong ``ETag``, for ``If-Range`` (RFC 9110, section 13.1.5).
        None if the response had no strong ``ETag``.
        """

    @property
    def endpoint(self) -> str:
        """URL of the endpoint that responded, not of the storage that it redirected to."""

    @property
    def unread(self) -> int:
        """Bytes that have arrived at the socket, and wait to be read. TLS adds a few percent."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield chunks as they arrive.

        Raises:
            UpstreamTimeout: no byte for ``limits.idle`` seconds, or a rate below
                ``limits.min_rate`` bytes a second.
            UpstreamUnavailable: the connection broke, or the body ended before ``total``.
            UpstreamProtocolError: more bytes than ``total``.
        """

    def close(self) -> None:
        """End the transfer at once, although bytes are missing. Safe to call twice."""

    def open_range(self, start: int, stop: int) -> AbstractAsyncContextManager[ContentStream]:
        """Get a range of the same content at the same endpoint, over a further connection.

        May be called until the context manager of this stream exits, also after :meth:`close`. A
        redirect is not resolved again, unless the URL that it led to has expired. The request is
        sent once. A failure is not reported to the circuit breaker, and a 429 starts no pause for
        other requests. So the caller must be able to fetch the range in another way.

        Args:
            start: Offset of the first byte.
            stop: Offset after the last byte. At most ``total``, which must be known.

        Returns:
            A context manager that yields the body once the response headers are in.

        Raises:
            UpstreamRateLimited: a 429 or a 503.
            UpstreamProtocolError: the upstream ignores ``Range``, or its response is another range
                or one of other content.
            MirrorError: any other failure or refusal of this request.
        """


class Registry(Protocol):
    """One upstream. :func:`mirror.upstream.registries.open_registries` opens and closes it."""

    idle: float
    """Seconds without data after which a body is given up (``limits.idle``)."""
    min_rate: int
    """Bytes per second over ``idle`` below which it is given up, too (``limits.min_rate``)."""
    parallel: Parallel
    """How many connections may fetch one blob together."""

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        """Resolve a tag or a digest with ``HEAD``. See "Checking if content exists".

        Registries that meter pulls count ``GET`` of manifests, and not ``HEAD``. Where a ``HEAD``
        is refused or fails, a ``GET`` of the digest decides, and a tag is not resolved.

        Args:
            repository: The repository that has the manifest.
            reference: The tag or the digest of the manifest.
            accept: Media types for ``Accept``. Empty: all manifest types that we know.

        Returns:
            The headers of the manifest. Without a digest, :meth:`get_manifest` has to be called.
            The size is what the upstream states, which may be wrong.

        Raises:
            UpstreamProtocolError: no endpoint sent a usable response. It names another digest than
                ``reference``, or is a web page.
            UpstreamRateLimited: a 429 named a time to wait, and no other endpoint may answer a
                ``GET``.
        """

    async def get_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: Sequence[str],
        ruled_out: Mapping[str, MirrorError] | None = None,
    ) -> ManifestBody:
        """Get a whole manifest. See "Pulling manifests".

        By tag for registries whose response to ``HEAD`` has no digest (private ECR). By digest for
        manifests of schema 1. Any other manifest by digest is content: see :meth:`open`.

        Args:
            repository: The repository that has the manifest.
            reference: The tag or the digest of the manifest.
            accept: Media types for ``Accept``. Empty: all manifest types that we know.
            ruled_out: ``ManifestHead.ruled_out`` of the ``HEAD`` before. None: there was none.

        Returns:
            The manifest. Its digest is computed from the body. That of a signed manifest of
            schema 1 is computed from its payload (:func:`mirror.oci.descriptor.payload_of`).

        Raises:
            UpstreamProtocolError: no endpoint sent a usable body. It is larger than
                ``MANIFEST_LIMIT``, or does not match the digest that was requested, or its
                ``Docker-Content-Digest``, or is no manifest.
        """

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        """Check that the upstream serves a blob. See "Checking if content exists".

        Where a ``HEAD`` is refused or fails, a ``GET`` is sent, and ended after its headers.

        Args:
            repository: The repository that must have the blob: the response proves access to it.
            digest: The digest of the blob.

        Returns:
            The size of the blob as the upstream states it, which may be wrong. None if it did not.

        Raises:
            BlobUnknown: the repository does not have the blob.
        """

    def open(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        *,
        accept: Sequence[str] = (),
        offset: int = 0,
        stop: int | None = None,
        validator: str | None = None,
        total: int | None = None,
        avoid: Collection[str] = (),
        ruled_out: Mapping[str, MirrorError] | None = None,
        reclaim: ReclaimConnections = keep_connections,
    ) -> AbstractAsyncContextManager[ContentStream]:
        """Get a blob or a manifest by digest. See "Pulling blobs" and "Pulling manifests".

        Nothing is hashed here: the caller verifies the digest.

        Args:
            repository: The repository that has the content.
            digest: The digest of the content.
            kind: ``Kind.BLOB`` or ``Kind.MANIFEST``.
            accept: Media types for ``Accept``, beside all manifest types that we know. For
                manifests only.
            offset: First byte to get, with ``Range`` (RFC 9110, section 14.2). A server that cannot
                do this sends everything: see ``ContentStream.start``.
            stop: Offset after the last byte of a range. Then the response has exactly these bytes,
                or ``UpstreamProtocolError`` is raised. The circuit breaker counts the failures of
                such requests apart (as ``GET blob range``). None: all bytes from ``offset`` on.
            validator: ``ContentStream.validator`` of the broken transfer. Sent to the endpoint that
                it belongs to, and to no other.
            total: Size of the content, if it is known.
            avoid: URLs of endpoints to try last, in this order. They are known to have the content,
                but sent wrong bytes or broke off.
            ruled_out: URL of an endpoint that gets no request -> the error that counts as its
                response. ``next_request_in`` of the error says when it may be asked.
            reclaim: See :data:`ReclaimConnections`.

        Returns:
            A context manager that yields the body once the response headers are in, and that ends
            the transfer when it exits.

        Raises:
            UpstreamProtocolError: the response has another range than the requested one, or
                another size than ``total``.
        """

    async def list_tags(self, repository: Repository) -> str:
        """List all tags. See "Listing Tags". Reads all pages of the upstream, by its own links.

        The upstream may order its tags in any way, such as by age.

        Args:
            repository: The repository.

        Returns:
            All tags, each one once (see :mod:`mirror.oci.tag_list`).

        Raises:
            NameUnknown: the upstream does not have the repository.
            UpstreamProtocolError: the list is malformed, or has more than 2000 pages or 32 MiB.
            UpstreamTimeout: the list is not complete after 5 minutes.
        """

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None
    ) -> ManifestBody | None:
        """List the referrers of a manifest. See "Listing Referrers".

        Args:
            repository: The repository that has the manifest.
            digest: The digest of the manifest that the referrers refer to.
            artifact_type: Value of the ``artifactType`` filter. The upstream may ignore it. None:
                no filter.

        Returns:
            An image index, with all pages of the upstream merged. A single page is returned as it
            is. None if the upstream does not support the API.

        Raises:
            UpstreamProtocolError: all pages together are larger than ``MANIFEST_LIMIT``.
        """
