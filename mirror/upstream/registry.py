"""Client of one registry: requests of the OCI Distribution specification, checks of the responses.

Lives here: the requests of :class:`mirror.upstream.api.Registry`, the meaning of response headers
and bodies, pagination. Must not know: endpoints, tokens, retries, the store, our clients.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from aiohttp import hdrs

from mirror.config.settings import Limits, Parallel
from mirror.observability.events import BytesFetched, Kind, Observer
from mirror.oci import tag_list
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    DOCKER_SCHEMA1_SIGNED,
    MANIFEST_LIMIT,
    OCI_INDEX,
    SCHEMA1_TYPES,
    parse_manifest,
    parse_referrers,
    payload_of,
    referrers_index,
    sniff_media_type,
)
from mirror.oci.errors import (
    Denied,
    DigestInvalid,
    FailureScope,
    ManifestInvalid,
    NotFound,
    Unauthorized,
    UpstreamError,
    UpstreamProtocolError,
)
from mirror.oci.headers import OCTET_STREAM, manifest_type_of, media_type_of, parse_content_range
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.threads import parse_in_thread_if_large, run_in_thread
from mirror.upstream.api import (
    ContentStream,
    ManifestBody,
    ManifestHead,
)
from mirror.upstream.bodies import BodyStream
from mirror.upstream.failover import AcceptedResponse, FailoverClient, RegistryRequest
from mirror.upstream.paging import ListMemory, collect_pages
from mirror.upstream.retry import is_transient
from mirror.upstream.transport import Response, read_body

_MAX_TAG_PAGE_BYTES: Final = 16 * 1024 * 1024
"""Bytes of one page of tags at most: an upstream may ignore ``n`` and send all of them, and gcr.io
sends 300 bytes for each manifest beside them. Parsing as many bytes takes 0.2 s in a thread."""
_MAX_TAG_LIST_BYTES: Final = 32 * 1024 * 1024
"""Bytes of all tags of a repository at most: a million tags of 32 characters."""
_MAX_LISTS_BYTES: Final = 2 * _MAX_TAG_LIST_BYTES
"""Bytes of all lists of one upstream that are collected at the same time."""
_TAGS_PER_PAGE: Final = 1000
"""Value of ``n``. Private ECR refuses more."""
_NO_MANIFEST: Final = "the upstream sent no manifest for the tag, but for example a log-in page"
_BELIEVED_OF_HEAD: Final = frozenset({408, 429, 502, 503, 504})
"""Statuses of a ``HEAD`` that a ``GET`` would get as well: the upstream is busy, or cannot be
reached."""


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
        self.idle = limits.idle
        self.parallel = parallel
        self._list_memory = ListMemory(_MAX_LISTS_BYTES)
        self._answered_heads: set[tuple[str, Kind]] = set()
        """(URL of an endpoint, kind of content) for which a ``HEAD`` got a 200."""

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        """See :meth:`mirror.upstream.api.Registry.head_manifest`."""
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        path = f"manifests/{reference}"
        received = await self._head(repository, path, Kind.MANIFEST, headers)
        if received is None:
            if isinstance(reference, Tag):
                return ManifestHead(None, OCTET_STREAM, None)
            get = RegistryRequest("GET", repository, path, Kind.MANIFEST, headers)
            async with self._client.send(get) as response:
                received = response.http.headers
        digest = digest_of(received)
        if isinstance(reference, Digest):
            _refuse_page(received)
            # A registry may name its own digest of the content, by another algorithm.
            is_comparable = digest is not None and digest.algorithm == reference.algorithm
            if is_comparable and digest != reference:
                raise UpstreamProtocolError("the response is for another digest")
            digest = reference
        media_type = manifest_type_of(received.get(hdrs.CONTENT_TYPE))
        # No manifest is empty. Some registries state the length of the empty body of a HEAD.
        return ManifestHead(digest, media_type, length_of(received) or None)

    async def _head(
        self,
        repository: Repository,
        path: str,
        kind: Kind,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Mapping[str, str] | None:
        """Send a ``HEAD``. Returns its header fields, or None if a ``GET`` has to decide.

        Registries refuse ``HEAD`` where they would answer a ``GET``: with 405 or 501, with 400, 401
        or 403 (public ECR), with a 404, with a 500. Signed URLs refuse it too (GHCR, GitLab), each
        in its own way. So only these responses are believed: a 404 of an endpoint that has answered
        such a ``HEAD`` with 200 before; a 429; and a 408, 502, 503 or 504, which would be the
        response to a ``GET``, too.
        """
        has_doubt = has_status = False

        def may_be_wrong(response: AcceptedResponse) -> bool:
            nonlocal has_doubt, has_status
            has_status = True
            status, is_elsewhere = response.http.status, response.is_cross_origin
            if status == 404 and (kind is Kind.MANIFEST or not is_elsewhere):
                is_believed = (response.endpoint, kind) in self._answered_heads
            else:
                is_believed = status in _BELIEVED_OF_HEAD and not is_elsewhere
            has_doubt = has_doubt or not is_believed
            # After a 4xx, another endpoint may answer the HEAD. A 5xx would be tried again.
            return not is_believed and (is_elsewhere or status >= 500)

        request = RegistryRequest("HEAD", repository, path, kind, headers, is_accepted=may_be_wrong)
        try:
            async with self._client.send(request) as response:
                if response.http.status != 200:
                    return None
                self._answered_heads.add((response.endpoint, kind))
                return response.http.headers
        except (NotFound, Denied, Unauthorized, UpstreamError) as error:
            # A front may drop the connection of each HEAD.
            is_dropped = (
                not has_status and is_transient(error) and error.scope is FailureScope.SUBJECT
            )
            if not (has_doubt or is_dropped):
                raise
            return None

    async def get_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestBody:
        """See :meth:`mirror.upstream.api.Registry.get_manifest`."""
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        path = f"manifests/{reference}"
        request = RegistryRequest("GET", repository, path, Kind.MANIFEST, headers)
        useless: list[str] = []
        while True:
            endpoint = ""
            try:
                async with self._client.send(request, useless) as response:
                    endpoint = response.endpoint
                    return await self._read_manifest(response, reference)
            except UpstreamProtocolError:
                # Another endpoint may send more than a log-in page.
                if endpoint in ("", *useless) or self._client.endpoint_count == len(useless) + 1:
                    raise
                useless.append(endpoint)

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
            await parse_in_thread_if_large(_refuse_what_is_no_manifest, body, media_type)
        return await parse_in_thread_if_large(_identify_manifest, body, media_type, expected)

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        """See :meth:`mirror.upstream.api.Registry.head_blob`."""
        path = f"blobs/{digest}"
        received = await self._head(repository, path, Kind.BLOB)
        if received is None:
            get = RegistryRequest("GET", repository, path, Kind.BLOB)
            async with self._client.send(get) as response:
                received = response.http.headers
        _refuse_page(received)
        return length_of(received)

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
            is_accepted=_is_range_response,
            is_part=stop is not None,
        )
        async with self._client.send(request, avoid) as response:
            start, size = _range_of(response, offset, stop)
            if total is not None and size not in (None, total):
                raise UpstreamProtocolError(f"the upstream has {size} bytes, not {total}")
            yield BodyStream(response, start, size, self._limits, self._report_bytes, stop=stop)

    def _report_bytes(self, count: int) -> None:
        self._emit(BytesFetched(self._name, count))

    async def list_tags(self, repository: Repository) -> str:
        """See :meth:`mirror.upstream.api.Registry.list_tags`."""
        request = RegistryRequest("GET", repository, "tags/list", Kind.TAGS)
        size = {"n": str(_TAGS_PER_PAGE)}
        pages = await self._collect_tags(
            replace(request, query=size, is_accepted=_refuses_page_size)
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
            follow_redirects=False,
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
        if pages is None:
            return None
        body = pages[0] if len(pages) == 1 else await run_in_thread(_merge_referrers, pages)
        return ManifestBody(Digest.of(body), OCI_INDEX, body)


# --- ranges ---------------------------------------------------------------------------------------


def _range_of(response: Response, offset: int, stop: int | None) -> tuple[int, int | None]:
    """Return (offset of the first byte, size of the whole content or None).

    Raises ``UpstreamProtocolError`` unless the response has all bytes, or all from ``offset`` on.
    With ``stop`` it must have those from ``offset`` up to ``stop``.
    """
    if response.http.status == 416:
        raise UpstreamProtocolError("the upstream has fewer bytes than have been received")
    if response.http.status != 206 and stop is None:
        return 0, length_of(response.http.headers)
    if response.http.status != 206:
        raise UpstreamProtocolError("the upstream ignores Range")
    content_range = parse_content_range(response.http.headers.get(hdrs.CONTENT_RANGE))
    if content_range is None or content_range.start != offset:
        raise UpstreamProtocolError("the response has another range than the requested one")
    if stop is not None:
        if content_range.stop != stop:
            raise UpstreamProtocolError("the range of the response has another end")
        return offset, content_range.total
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


def _refuse_page(headers: Mapping[str, str]) -> None:
    """Raise ``UpstreamProtocolError`` for a web page, which does not prove that content exists.

    A log-in page has status 200, too. Content that is received proves itself by its digest.
    """
    is_page = media_type_of(headers.get(hdrs.CONTENT_TYPE)).lower() == "text/html"
    if is_page and "Docker-Content-Digest" not in headers:
        raise UpstreamProtocolError("the upstream sent a web page, such as a log-in page")


def _refuse_what_is_no_manifest(body: bytes, media_type: str) -> None:
    """Raise ``UpstreamProtocolError`` unless the response for a tag is recognized as a manifest.

    A response without a digest has no other proof: a log-in page comes with status 200, too.
    """
    try:
        parse_manifest(body, media_type)
        is_manifest = {media_type, sniff_media_type(body)} != {OCTET_STREAM}
    except ManifestInvalid as error:
        raise UpstreamProtocolError(f"{_NO_MANIFEST}: {error.message}") from error
    if not is_manifest:
        raise UpstreamProtocolError(_NO_MANIFEST)


def _identify_manifest(body: bytes, media_type: str, expected: Digest | None) -> ManifestBody:
    """Return a manifest with its digest, also a signed one of schema 1.

    Raises ``UpstreamProtocolError`` if it does not match ``expected``. None: any digest is right.
    """
    algorithm = expected.algorithm if expected is not None else "sha256"
    digest = of_payload = Digest.of(body, algorithm)
    if media_type == OCTET_STREAM or media_type.lower() in SCHEMA1_TYPES:
        of_payload = Digest.of(payload_of(body), algorithm)
    if expected not in (None, digest, of_payload):
        raise UpstreamProtocolError("the manifest does not match its digest")
    if digest in (of_payload, expected):
        return ManifestBody(digest, media_type, body)
    is_stated = media_type != OCTET_STREAM
    return ManifestBody(of_payload, media_type if is_stated else DOCKER_SCHEMA1_SIGNED, body)


def length_of(headers: Mapping[str, str]) -> int | None:
    """Return ``Content-Length`` in bytes. None if it is missing or malformed.

    ``Transfer-Encoding: chunked`` overrides it (RFC 9112, section 6.3).
    """
    value = headers.get(hdrs.CONTENT_LENGTH, "")
    is_chunked = "chunked" in headers.get(hdrs.TRANSFER_ENCODING, "").lower()
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) and not is_chunked else None


def _refuses_page_size(response: AcceptedResponse) -> bool:
    """Return whether an upstream refuses our ``n``. It is asked without ``n`` then."""
    return response.http.status == 400


def _is_referrers_page(response: AcceptedResponse) -> bool:
    media_type = media_type_of(response.http.headers.get(hdrs.CONTENT_TYPE))
    return response.http.status == 200 and media_type == OCI_INDEX


def _merge_referrers(pages: Sequence[bytes]) -> bytes:
    """Join referrers indexes to one. Raises ``ManifestInvalid``."""
    return referrers_index([entry for body in pages for entry in parse_referrers(body)])
