"""Arriving bodies of content, and further ranges of the same content.

Lives here: :class:`mirror.upstream.api.ContentStream` over HTTP. Must not know: which endpoint is
asked, how many connections a fetch has, where the bytes go.

A further range is requested where the first response came from. So redirects are resolved once, and
a signed URL that expired is renewed once for all connections. The outbound guard has checked it,
and the rule for addresses applies to each socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import hdrs

from mirror.config.settings import Limits
from mirror.observability.events import Kind
from mirror.oci.errors import UpstreamProtocolError, UpstreamRateLimited
from mirror.oci.headers import manifest_type_of, parse_content_range
from mirror.upstream.api import MIN_PROGRESS_BYTES, ContentStream
from mirror.upstream.failover import AcceptedResponse
from mirror.upstream.statuses import error_of
from mirror.upstream.transport import check_encoding, read_chunks, retry_after_of


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
        self._entity_tag = entity_tag if is_strong else None
        self._stop = stop if stop is not None else total
        self._response = response
        self._limits = limits
        self._report_bytes = report_bytes
        self._destination = response.destination
        self._renewal: asyncio.Lock | None = None

    @property
    def media_type(self) -> str:
        """See :attr:`mirror.upstream.api.ContentStream.media_type`."""
        return manifest_type_of(self._response.http.headers.get(hdrs.CONTENT_TYPE))

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

    # --- further ranges -------------------------------------------------------------------------

    @asynccontextmanager
    async def open_range(self, start: int, stop: int) -> AsyncIterator[ContentStream]:
        """See :meth:`mirror.upstream.api.ContentStream.open_range`."""
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if self._entity_tag is not None:
            headers["If-Range"] = self._entity_tag
        async with AsyncExitStack() as stack:
            response = await self._send(stack, headers)
            await self._check_range(response, start, stop)
            yield BodyStream(
                response, start, self.total, self._limits, self._report_bytes, stop=stop
            )

    async def _send(self, stack: AsyncExitStack, headers: dict[str, str]) -> AcceptedResponse:
        """Send a request to where this body came from. Renews a signed URL that is refused."""
        destination = self._destination
        response = await stack.enter_async_context(self._response.repeat(headers, destination))
        if not (response.is_cross_origin and response.http.status in (401, 403)):
            return response
        await stack.aclose()
        self._renewal = self._renewal or asyncio.Lock()
        async with self._renewal:
            if self._destination is not destination:  # Another connection has renewed it.
                return await stack.enter_async_context(
                    self._response.repeat(headers, self._destination)
                )
            response = await stack.enter_async_context(self._response.repeat(headers, None))
            if response.http.status in (200, 206):
                self._destination = response.destination
            return response

    async def _check_range(self, response: AcceptedResponse, start: int, stop: int) -> None:
        """Raise the error of a response that is not exactly the range that was requested."""
        http = response.http
        host = http.url.origin()
        match http.status:
            case 206:
                found = parse_content_range(http.headers.get(hdrs.CONTENT_RANGE))
                is_right = found is not None and (found.start, found.stop) == (start, stop)
                if not is_right or found is None or found.total not in (None, self.total):
                    raise UpstreamProtocolError(f"{host} sent another range than was requested")
            case 200 | 416:
                raise UpstreamProtocolError(f"{host} does not send ranges of this content")
            case 429 | 503:
                raise UpstreamRateLimited(
                    f"{host} accepts no further connection", retry_after=retry_after_of(http)
                )
            case _:
                raise await error_of(response, Kind.BLOB)
