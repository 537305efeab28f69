"""Requests for ranges of content over further connections.

Lives here: where they are requested, and the checks of their responses. Must not know: which
endpoint is asked, how many connections a fetch has, how a body is read.

A further range is requested where the first response came from. So redirects are resolved once. A
signed URL that expired is renewed once for all connections, and so is one of a storage that fails:
the registry may name another node by now. The outbound guard has checked it, and the rule for
addresses applies to each socket.

Nodes of a storage may have different tags for the same content. So a range that was not sent
because of ``If-Range`` is an error, and the next request has no such field: the digest is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import aiohttp
from aiohttp import hdrs

from mirror.observability.events import Kind
from mirror.oci.errors import UpstreamProtocolError, UpstreamRateLimited, UpstreamUnavailable
from mirror.oci.headers import parse_content_range
from mirror.upstream.messages import AcceptedResponse
from mirror.upstream.statuses import error_of
from mirror.upstream.transport import retry_after_of

_NOT_EXPIRED_STATUSES: Final = (416, 429)
"""Statuses from 400 to 499 that another URL would not change."""


def _may_be_renewed(response: AcceptedResponse) -> bool:
    """Return whether another URL may bring the range. A storage that asks to wait is not asked."""
    status = response.http.status
    if status < 500:
        return status >= 400 and status not in _NOT_EXPIRED_STATUSES
    return response.is_cross_origin and retry_after_of(response.http) is None


def total_of_range(response: aiohttp.ClientResponse, start: int, stop: int) -> int | None:
    """Return the size in bytes of the whole content that a 206 states. None: it states none.

    Raises ``UpstreamProtocolError`` unless the response has exactly the bytes from ``start`` up to
    ``stop`` (RFC 9110, section 14.4).
    """
    found = parse_content_range(response.headers.get(hdrs.CONTENT_RANGE))
    if found is None or (found.start, found.stop) != (start, stop):
        host = response.url.origin()
        raise UpstreamProtocolError(f"{host} sent another range than was requested")
    return found.total


class FurtherRanges:
    """The further ranges of one content, at the endpoint of its first response."""

    def __init__(self, first: AcceptedResponse, total: int | None, entity_tag: str | None) -> None:
        """Start with where the first response came from.

        Args:
            first: The first response.
            total: Bytes of the content.
            entity_tag: Its strong ``ETag``, for ``If-Range``. None: the digest has to be enough.
        """
        self._first = first
        self._total = total
        self._entity_tag = entity_tag
        self._destination = first.destination
        self._renewal = asyncio.Lock()

    @asynccontextmanager
    async def open(self, start: int, stop: int) -> AsyncIterator[AcceptedResponse]:
        """Request a range. See :meth:`mirror.upstream.api.ContentStream.open_range`."""
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if self._entity_tag is not None:
            headers["If-Range"] = self._entity_tag
        async with AsyncExitStack() as stack:
            response = await self._send(stack, headers)
            if response.http.status == 200:
                self._entity_tag = None
            await self._check(response, start, stop)
            yield response

    async def _send(self, stack: AsyncExitStack, headers: dict[str, str]) -> AcceptedResponse:
        """Send a request to where the first response came from. Renews a signed URL that fails.

        Storages respond to an expired URL with different statuses (400, 401, 403, 410). So each one
        from 400 to 499 leads to a renewal, if another URL may change it.
        """
        destination = self._destination
        try:
            response = await stack.enter_async_context(self._first.repeat(headers, destination))
            if not _may_be_renewed(response):
                return response
        except UpstreamUnavailable:
            if not destination.is_cross_origin:
                raise
        await stack.aclose()
        async with self._renewal:
            if self._destination is not destination:  # Another connection has renewed it.
                return await stack.enter_async_context(
                    self._first.repeat(headers, self._destination)
                )
            response = await stack.enter_async_context(self._first.repeat(headers, None))
            if response.http.status in (200, 206):
                self._destination = response.destination
            return response

    async def _check(self, response: AcceptedResponse, start: int, stop: int) -> None:
        """Raise the error of a response that is not exactly the range that was requested."""
        http = response.http
        host = http.url.origin()
        match http.status:
            case 206:
                if total_of_range(http, start, stop) not in (None, self._total):
                    raise UpstreamProtocolError(f"{host} has content of another size")
            case 200 | 416:
                raise UpstreamProtocolError(f"{host} does not send ranges of this content")
            case 429 | 503:
                raise UpstreamRateLimited(
                    f"{host} accepts no further connection", retry_after=retry_after_of(http)
                )
            case _:
                raise await error_of(response, Kind.BLOB)
