"""Client of one registry: requests of the OCI Distribution specification, checks of the responses.

Lives here: the requests of :class:`mirror.upstream.api.Registry`, the meaning of response headers
and bodies, pagination. Must not know: endpoints, tokens, retries, the store, our clients.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, TypeVar

from aiohttp import hdrs

from mirror.config.settings import Limits, Parallel
from mirror.observability.events import BytesFetched, Kind, Observer
from mirror.oci import tag_list
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    MANIFEST_LIMIT,
    OCI_INDEX,
)
from mirror.oci.errors import (
    DigestInvalid,
    ManifestUnknown,
    MirrorError,
    NotFound,
    UpstreamProtocolError,
)
from mirror.oci.headers import OCTET_STREAM, manifest_type_of, media_type_of, parse_content_range
from mirror.oci.reference import Digest, Reference, Repository
from mirror.threads import parse_in_thread_if_large, run_in_thread
from mirror.upstream.api import (
    MIN_PROGRESS_BYTES,
    ContentStream,
    ManifestBody,
    ManifestHead,
    ReclaimConnections,
    keep_connections,
)
from mirror.upstream.body_receiver import count_unread
from mirror.upstream.documents import (
    identify_manifest,
    merge_referrers,
    require_manifest,
)
from mirror.upstream.failover import FailoverClient
from mirror.upstream.heads import Heads
from mirror.upstream.messages import AcceptedResponse, RegistryRequest
from mirror.upstream.paging import ListMemory, collect_pages
from mirror.upstream.ranges import FurtherRanges, total_of_range
from mirror.upstream.retry import is_transient
from mirror.upstream.transport import Response, check_encoding, read_body, read_chunks

T = TypeVar("T")

_MAX_TAG_PAGE_BYTES: Final = 16 * 1024 * 1024
"""Bytes of one page of tags at most: an upstream may ignore ``n`` and send all of them, and gcr.io
sends 300 bytes for each manifest beside them. Parsing as many bytes takes 0.2 s in a thread."""
_MAX_TAG_LIST_BYTES: Final = 32 * 1024 * 1024
"""Bytes of all tags of a repository at most: a million tags of 32 characters."""
_MAX_LISTS_BYTES: Final = 2 * _MAX_TAG_LIST_BYTES
"""Bytes of all lists of one upstream that are collected at the same time."""
_TAGS_PER_PAGE: Final = 1000
"""Value of ``n``. Private ECR refuses more."""


class HttpRegistry:
    """One upstream over HTTP. See :class:`mirror.upstream.api.Registry` for the methods."""

    def __init__(
        self,
        name: str,
        client: FailoverClient,
        limits: Limits,
        parallel: Parallel,
        emit: Observer,
    ) -> None:
        """Create a registry.

        Args:
            name: Name of the upstream, for events.
            client: Sends the requests.
            limits: ``idle`` and ``min_rate`` of bodies.
            parallel: How many connections a fetch may have.
            emit: Receives an event for the bytes that arrive.
        """
        self._name = name
        self._client = client
        self._limits = limits
        self._emit = emit
        self.idle, self.min_rate = limits.idle, limits.min_rate
        self.parallel = parallel
        self._list_memory = ListMemory(_MAX_LISTS_BYTES)
        self._heads = Heads(client)

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        """See :meth:`mirror.upstream.api.Registry.head_manifest`."""
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        request = RegistryRequest(
            "HEAD", repository, f"manifests/{reference}", Kind.MANIFEST, headers
        )

        async def read(response: AcceptedResponse) -> ManifestHead:
            return _head_of(await _headers_of_content(response), reference)

        head, ruled_out = await self._heads.ask(request, read)
        if head is None and isinstance(reference, Digest):
            get = replace(request, method="GET", ruled_out=ruled_out)
            head = await self._client.fetch(get, read)
        return head or ManifestHead(
            digest=None, media_type=OCTET_STREAM, size=None, ruled_out=ruled_out
        )

    async def get_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: Sequence[str],
        ruled_out: Mapping[str, MirrorError] | None = None,
    ) -> ManifestBody:
        """See :meth:`mirror.upstream.api.Registry.get_manifest`."""
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        request = RegistryRequest(
            "GET",
            repository,
            f"manifests/{reference}",
            Kind.MANIFEST,
            headers,
            ruled_out=ruled_out or {},
        )
        return await self._client.fetch(
            request, lambda response: self._read_manifest(response, reference)
        )

    async def _read_manifest(
        self, response: AcceptedResponse, reference: Reference
    ) -> ManifestBody:
        body = await read_body(response, MANIFEST_LIMIT)
        self._report_bytes(len(body))
        received = response.http.headers
        media_type = manifest_type_of(received.get(hdrs.CONTENT_TYPE))
        if isinstance(reference, Digest):
            expected: Digest | None = reference
        else:
            expected = digest_of(received)
            await parse_in_thread_if_large(require_manifest, body, media_type)
        return await parse_in_thread_if_large(identify_manifest, body, media_type, expected)

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        """See :meth:`mirror.upstream.api.Registry.head_blob`."""
        request = RegistryRequest("HEAD", repository, f"blobs/{digest}", Kind.BLOB)
        headers, ruled_out = await self._heads.ask(request, _headers_of_content)
        if headers is None:
            get = replace(request, method="GET", ruled_out=ruled_out)
            headers = await self._client.fetch(get, _headers_of_content)
        return length_of(headers)

    @asynccontextmanager
    async def open(
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
    ) -> AsyncIterator[ContentStream]:
        """See :meth:`mirror.upstream.api.Registry.open`."""
        headers: dict[str, str] = {}
        path = f"blobs/{digest}"
        if kind is Kind.MANIFEST:
            path = f"manifests/{digest}"
            headers["Accept"] = ", ".join(dict.fromkeys((*accept, *DEFAULT_ACCEPT)))
        endpoint_headers: dict[str, dict[str, str]] = {}
        if offset or stop is not None:
            headers["Range"] = f"bytes={offset}-{'' if stop is None else stop - 1}"
            if validator is not None:
                endpoint, _, entity_tag = validator.partition(" ")
                endpoint_headers[endpoint] = {"If-Range": entity_tag}
        request = RegistryRequest(
            "GET",
            repository,
            path,
            kind,
            headers,
            endpoint_headers=endpoint_headers,
            ruled_out=ruled_out or {},
            reclaim=reclaim,
            is_accepted=_is_range_response,
            may_retry=is_transient if stop is None else lambda failure: False,
            is_range=stop is not None,
        )

        async def read(response: AcceptedResponse) -> BodyStream:
            start, size = _range_of(response, offset, stop)
            if total is not None and size not in (None, total):
                raise UpstreamProtocolError(f"the upstream has {size} bytes, not {total}")
            return BodyStream(response, start, size, self._limits, self._report_bytes, stop=stop)

        async with self._client.send(request, read, avoid) as stream:
            yield stream

    def _report_bytes(self, count: int) -> None:
        self._emit(BytesFetched(self._name, count))

    async def list_tags(self, repository: Repository) -> str:
        """See :meth:`mirror.upstream.api.Registry.list_tags`."""
        request = RegistryRequest("GET", repository, "tags/list", Kind.TAGS)
        size = {"n": str(_TAGS_PER_PAGE)}
        pages = await self._collect_tags(
            replace(request, query=size, is_accepted=_is_page_size_refused)
        )
        if pages is None:
            pages = await self._collect_tags(request)
        return await run_in_thread(tag_list.join_pages, pages or ())

    async def _collect_tags(self, request: RegistryRequest) -> list[str] | None:
        return await collect_pages(
            self._client,
            request,
            tag_list.parse_page,
            lambda response: response.http.status == 200,
            self._list_memory,
            max_page_bytes=_MAX_TAG_PAGE_BYTES,
            max_bytes=_MAX_TAG_LIST_BYTES,
        )

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None
    ) -> ManifestBody | None:
        """See :meth:`mirror.upstream.api.Registry.referrers`."""
        request = RegistryRequest(
            "GET",
            repository,
            f"referrers/{digest}",
            Kind.REFERRERS,
            {"Accept": OCI_INDEX},
            query={"artifactType": artifact_type} if artifact_type else {},
            may_follow_redirects=False,
        )
        try:
            pages = await collect_pages(
                self._client,
                request,
                bytes,
                _is_referrers_page,
                self._list_memory,
                max_page_bytes=MANIFEST_LIMIT,
                max_bytes=MANIFEST_LIMIT,
            )
        except NotFound:
            return None  # No endpoint has this API.
        assert pages is not None
        body = pages[0] if len(pages) == 1 else await run_in_thread(merge_referrers, pages)
        return ManifestBody(Digest.of(body), OCI_INDEX, body)


# --- bodies ---------------------------------------------------------------------------------------


class BodyStream:
    """An arriving body. See :class:`mirror.upstream.api.ContentStream` for the attributes."""

    def __init__(
        self,
        response: AcceptedResponse,
        start: int,
        total: int | None,
        limits: Limits,
        report_bytes: Callable[[int], None],
        *,
        stop: int | None = None,
    ) -> None:
        """Create a stream. Raises ``UpstreamProtocolError`` for a compressed body.

        Args:
            response: The response. Its ``report_success`` is called once there is progress.
            start: Offset of its first byte.
            total: Size of the whole content. None: not known.
            limits: ``idle`` and ``min_rate`` of the body.
            report_bytes: Called with the length of each chunk.
            stop: Offset after its last byte. None: the end of the content.
        """
        check_encoding(response.http)
        self.start = start
        self.total = total
        self.endpoint = response.endpoint
        entity_tag = response.http.headers.get(hdrs.ETAG)
        # A weak ETag starts with W/ (RFC 9110, section 8.8.3) and must not be used for If-Range.
        is_strong = entity_tag is not None and entity_tag.startswith('"')
        self.validator = f"{self.endpoint} {entity_tag}" if is_strong else None
        self._stop = stop if stop is not None else total
        self._response = response
        self._limits = limits
        self._report_bytes = report_bytes
        self._ranges: FurtherRanges | None = None

    @property
    def media_type(self) -> str:
        """See :attr:`mirror.upstream.api.ContentStream.media_type`."""
        return manifest_type_of(self._response.http.headers.get(hdrs.CONTENT_TYPE))

    @property
    def unread(self) -> int:
        """See :attr:`mirror.upstream.api.ContentStream.unread`."""
        return count_unread(self._response.http)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See :meth:`mirror.upstream.api.ContentStream.__aiter__`."""
        expected = self._stop - self.start if self._stop is not None else None
        received = 0
        async for chunk in read_chunks(self._response.http, self._limits, expected):
            if received < MIN_PROGRESS_BYTES <= received + len(chunk):
                self._response.report_success()
            received += len(chunk)
            self._report_bytes(len(chunk))
            yield chunk

    def close(self) -> None:
        """See :meth:`mirror.upstream.api.ContentStream.close`."""
        self._response.http.close()

    @asynccontextmanager
    async def open_range(self, start: int, stop: int) -> AsyncIterator[ContentStream]:
        """See :meth:`mirror.upstream.api.ContentStream.open_range`."""
        if self._ranges is None:
            entity_tag = self.validator.partition(" ")[2] if self.validator is not None else None
            self._ranges = FurtherRanges(self._response, self.total, entity_tag)
        async with self._ranges.open(start, stop) as response:
            yield BodyStream(
                response, start, self.total, self._limits, self._report_bytes, stop=stop
            )


def _range_of(response: Response, offset: int, stop: int | None) -> tuple[int, int | None]:
    """Return (offset of the first byte, size of the whole content or None).

    Raises ``UpstreamProtocolError`` unless the response has all bytes, or all from ``offset`` on.
    With ``stop`` it must have those from ``offset`` up to ``stop``.
    """
    if response.http.status == 416:
        raise UpstreamProtocolError("the upstream has fewer bytes than have been received")
    if response.http.status != 206:
        if stop is not None:
            raise UpstreamProtocolError("the upstream ignores Range")
        return 0, length_of(response.http.headers)
    if stop is not None:
        return offset, total_of_range(response.http, offset, stop)
    content_range = parse_content_range(response.http.headers.get(hdrs.CONTENT_RANGE))
    if content_range is None or content_range.start != offset:
        raise UpstreamProtocolError("the response has another range than the requested one")
    if content_range.total is not None and content_range.stop != content_range.total:
        raise UpstreamProtocolError("the range of the response ends too early")
    return offset, content_range.total if content_range.total is not None else content_range.stop


def _is_range_response(response: Response) -> bool:
    return response.http.status in (206, 416)


# --- headers and documents ------------------------------------------------------------------------


def digest_of(headers: Mapping[str, str]) -> Digest | None:
    """Return ``Docker-Content-Digest``. None if it is missing, or if we cannot read it.

    See "Pulling manifests". The header is a hint. Without it, the content states its digest.
    """
    try:
        return Digest.parse(headers.get("Docker-Content-Digest", ""))
    except DigestInvalid:
        return None


async def _headers_of_content(response: AcceptedResponse) -> Mapping[str, str]:
    """Return the header fields. Raises ``UpstreamProtocolError`` for a web page.

    A log-in page has status 200, too, and does not prove that the content exists. Content that is
    received proves itself by its digest.
    """
    headers = response.http.headers
    is_page = media_type_of(headers.get(hdrs.CONTENT_TYPE)).lower() == "text/html"
    if is_page and "Docker-Content-Digest" not in headers:
        raise UpstreamProtocolError("the upstream sent a web page, such as a log-in page")
    return headers


def _head_of(headers: Mapping[str, str], reference: Reference) -> ManifestHead:
    """Read the header fields of a manifest.

    Raises ``UpstreamProtocolError`` if they name another digest than ``reference``.
    """
    digest = digest_of(headers)
    if isinstance(reference, Digest):
        # A registry may name its own digest of the content, by another algorithm.
        is_comparable = digest is not None and digest.algorithm == reference.algorithm
        if is_comparable and digest != reference:
            raise UpstreamProtocolError("the response is for another digest")
        digest = reference
    media_type = manifest_type_of(headers.get(hdrs.CONTENT_TYPE))
    # No manifest is empty. Some registries state the length of the empty body of a HEAD.
    return ManifestHead(digest=digest, media_type=media_type, size=length_of(headers) or None)


def length_of(headers: Mapping[str, str]) -> int | None:
    """Return ``Content-Length`` in bytes. None if it is missing or malformed.

    ``Transfer-Encoding: chunked`` overrides it (RFC 9112, section 6.3).
    """
    value = headers.get(hdrs.CONTENT_LENGTH, "")
    is_chunked = "chunked" in headers.get(hdrs.TRANSFER_ENCODING, "").lower()
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) and not is_chunked else None


def _is_page_size_refused(response: AcceptedResponse) -> bool:
    """Return whether an upstream refuses our ``n``. The caller then repeats the request without."""
    return response.http.status == 400


def _is_referrers_page(response: AcceptedResponse) -> bool:
    """Return True. Raises ``ManifestUnknown`` if the endpoint does not have the API."""
    if media_type_of(response.http.headers.get(hdrs.CONTENT_TYPE)) != OCI_INDEX:
        raise ManifestUnknown("the upstream does not list referrers")
    return True
