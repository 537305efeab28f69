"""How to ask one registry: requests of the OCI Distribution specification, and what answers mean.

Lives here: the questions, failover and retries between them, statuses as typed errors. Must not
know: the store, our clients.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from aiohttp import hdrs

from mirror.config.settings import Limits
from mirror.observability.events import BytesFetched, Kind, Observer
from mirror.oci.descriptor import DEFAULT_ACCEPT, MANIFEST_LIMIT, OCI_INDEX, parse_referrers
from mirror.oci.errors import UpstreamProtocolError
from mirror.oci.headers import media_type_of, parse_content_range
from mirror.oci.links import next_link
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.upstream.api import ContentStream, ManifestBody, ManifestHead, TagsPage
from mirror.upstream.failover import FailoverClient, RegistryRequest
from mirror.upstream.responses import digest_of, length_of, tag_names
from mirror.upstream.stream import BodyStream
from mirror.upstream.transport import Response, read_body

_LIST_LIMIT: Final = 8 * 1024 * 1024
_PAGES: Final = 200
_PAGE: Final = 1000
"""Tags asked for at once: private ECR refuses more."""
_NO_HEAD: Final = frozenset({401, 403, 405, 501})
_NO_REFERRERS: Final = frozenset({301, 302, 303, 307, 308, 400, 404, 405, 406, 501})
_INLINE: Final = 64 * 1024
"""Answers up to this size are parsed on the event loop; larger ones would hold it up."""
T = TypeVar("T")


class HttpRegistry:
    """One upstream over HTTP (see :class:`mirror.upstream.api.Registry`)."""

    def __init__(self, name: str, client: FailoverClient, limits: Limits, emit: Observer) -> None:
        self._name = name
        self._client = client
        self._limits = limits
        self._emit = emit

    # --- questions ----------------------------------------------------------------------------

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        """See :meth:`mirror.upstream.api.Registry.head_manifest`."""
        path = f"manifests/{reference}"
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        request = RegistryRequest("HEAD", repository, path, Kind.MANIFEST, headers)
        async with self._client.ask(request) as (answer, _):
            found = answer.response.headers
            digest = digest_of(found)
            if isinstance(reference, Digest):
                if digest not in (None, reference):
                    raise UpstreamProtocolError("the answer is for another digest")
                digest = reference
            return ManifestHead(
                digest, media_type_of(found.get(hdrs.CONTENT_TYPE)), length_of(found)
            )

    async def get_manifest(
        self, repository: Repository, tag: Tag, accept: Sequence[str]
    ) -> ManifestBody:
        """See :meth:`mirror.upstream.api.Registry.get_manifest`."""
        headers = {"Accept": ", ".join(accept or DEFAULT_ACCEPT)}
        request = RegistryRequest("GET", repository, f"manifests/{tag}", Kind.MANIFEST, headers)
        async with self._client.ask(request) as (answer, _):
            body = await read_body(answer.response, MANIFEST_LIMIT)
            said = digest_of(answer.response.headers)
            digest = Digest.of(body, said.algorithm if said is not None else "sha256")
            if said not in (None, digest):
                raise UpstreamProtocolError("a manifest that does not hash to its digest header")
            self._emit(BytesFetched(self._name, len(body)))
            media_type = media_type_of(answer.response.headers.get(hdrs.CONTENT_TYPE))
            return ManifestBody(digest, media_type, body)

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        """See :meth:`mirror.upstream.api.Registry.head_blob`.

        Signed URLs refuse ``HEAD`` (GHCR, GitLab), each in its own way, and so do some registries
        (public ECR): there a ``GET`` is begun, and ended after its headers.
        """

        def is_accepted(answer: Response) -> bool:
            return answer.redirected or answer.response.status in _NO_HEAD

        path = f"blobs/{digest}"
        head = RegistryRequest("HEAD", repository, path, Kind.BLOB, is_accepted=is_accepted)
        async with self._client.ask(head) as (answer, _):
            if answer.response.status == 200:
                return length_of(answer.response.headers)
        async with self._client.ask(RegistryRequest("GET", repository, path, Kind.BLOB)) as (
            answer,
            _,
        ):
            return length_of(answer.response.headers)

    @asynccontextmanager
    async def open(
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
    ) -> AsyncIterator[ContentStream]:
        """See :meth:`mirror.upstream.api.Registry.open`."""
        headers: dict[str, str] = {}
        path = f"blobs/{digest}"
        if kind is Kind.MANIFEST:
            path = f"manifests/{digest}"
            headers["Accept"] = ", ".join(dict.fromkeys((*accept, *DEFAULT_ACCEPT)))
        only: dict[str, dict[str, str]] = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator is not None:
                where, _, tag = validator.partition(" ")
                only[where] = {"If-Range": tag}
        request = RegistryRequest("GET", repository, path, kind, headers, only, is_accepted=_parts)
        async with self._client.ask(request, avoid) as (answer, endpoint):
            response = answer.response
            start, whole = 0, length_of(response.headers)
            if response.status == 416:
                raise UpstreamProtocolError("the upstream has fewer bytes than are here")
            if response.status == 206:
                span = parse_content_range(response.headers.get(hdrs.CONTENT_RANGE))
                if span is None or span.start != offset:
                    raise UpstreamProtocolError("another range than was asked for")
                if span.total is not None and span.stop != span.total:
                    raise UpstreamProtocolError("a range that does not reach the end")
                start, whole = offset, span.total if span.total is not None else span.stop
            if total is not None and whole not in (None, total):
                raise UpstreamProtocolError(f"upstream offers {whole} bytes, not {total}")
            yield BodyStream(
                response,
                start,
                whole,
                str(endpoint),
                self._limits,
                self._count,
                answer.report_success,
            )

    def _count(self, count: int) -> None:
        self._emit(BytesFetched(self._name, count))

    async def list_tags(
        self, repository: Repository, count: int | None, last: str | None
    ) -> TagsPage:
        """See :meth:`mirror.upstream.api.Registry.list_tags`."""
        wanted = count if count is not None else _PAGES * _PAGE
        query: dict[str, str] = {"n": str(min(wanted, _PAGE))}
        if last is not None:
            query["last"] = last
        tags: set[str] = set()
        more = True
        page: str | None = None
        seen: set[str] = set()

        def later(body: bytes) -> set[str]:
            return {name for name in tag_names(body) if last is None or name > last}

        while more and len(tags) < wanted and len(seen) < _PAGES:
            request = RegistryRequest(
                "GET", repository, "tags/list", Kind.TAGS, query=query, page=page
            )
            async with self._client.ask(request) as (answer, _):
                body = await read_body(answer.response, _LIST_LIMIT)
                tags |= await _aside(body, later)
                page = next_link(answer.response.headers.getall(hdrs.LINK, ()))
                # A page that was seen already would be the next one for ever.
                more = page is not None and page not in seen
                seen.add(page or "")
        ordered = await asyncio.to_thread(sorted, tags)
        return TagsPage(tuple(ordered[:wanted]), more or len(ordered) > wanted)

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None
    ) -> ManifestBody | None:
        """See :meth:`mirror.upstream.api.Registry.referrers`."""
        query = {"artifactType": artifact_type} if artifact_type else {}
        entries: list[Any] = []
        page: str | None = None
        seen: set[str] = set()
        size = 0
        while len(seen) < _PAGES:
            request = RegistryRequest(
                "GET",
                repository,
                f"referrers/{digest}",
                Kind.REFERRERS,
                {"Accept": OCI_INDEX},
                query=query,
                page=page,
                is_accepted=_unsupported,
                follow=False,
            )
            async with self._client.ask(request) as (answer, _):
                found = answer.response.headers
                if answer.response.status != 200:
                    return None
                if media_type_of(found.get(hdrs.CONTENT_TYPE)) != OCI_INDEX:
                    return None
                body = await read_body(answer.response, MANIFEST_LIMIT)
                page = next_link(found.getall(hdrs.LINK, ()))
            size += len(body)
            if not entries and page is None:
                return ManifestBody(Digest.of(body), OCI_INDEX, body)
            if size > MANIFEST_LIMIT:
                break  # more than one answer may hold
            entries += await _aside(body, _entries)
            if page is None or page in seen:
                break
            seen.add(page)
        body = await asyncio.to_thread(_merged, entries)
        return ManifestBody(Digest.of(body), OCI_INDEX, body)

    async def close(self) -> None:
        """Close connections."""
        await self._client.close()


def _parts(answer: Response) -> bool:
    return answer.response.status in (206, 416)


def _unsupported(answer: Response) -> bool:
    return answer.response.status in _NO_REFERRERS


def _entries(body: bytes) -> list[Any]:
    """The entries of a referrers index, as they came. Raises ``ManifestInvalid``."""
    parse_referrers(body)
    return list(json.loads(body)["manifests"])


def _merged(entries: list[Any]) -> bytes:
    merged = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return json.dumps(merged, separators=(",", ":")).encode()


async def _aside(body: bytes, parse: Callable[[bytes], T]) -> T:
    """What ``parse`` makes of a body, in a thread where it would take long."""
    return parse(body) if len(body) <= _INLINE else await asyncio.to_thread(parse, body)
