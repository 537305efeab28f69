"""A body that is arriving (see :class:`mirror.upstream.api.ContentStream`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import aiohttp
from aiohttp import hdrs

from mirror.config.settings import Limits
from mirror.oci.errors import UpstreamProtocolError
from mirror.oci.headers import media_type_of
from mirror.upstream.api import PROGRESS
from mirror.upstream.transport import read_chunks


class BodyStream:
    """The body of one response, from offset ``start`` of content of ``total`` bytes."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        start: int,
        total: int | None,
        endpoint: str,
        limits: Limits,
        count: Callable[[int], None],
        report_success: Callable[[], None],
    ) -> None:
        """``works`` is called once there is progress."""
        encoding = response.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        if encoding not in ("", "identity"):
            raise UpstreamProtocolError("a content encoding that nobody asked for")
        self.start = start
        self.total = total
        self.endpoint = endpoint
        self.media_type = media_type_of(response.headers.get(hdrs.CONTENT_TYPE))
        tag = response.headers.get(hdrs.ETAG)
        strong = tag is not None and tag.startswith('"')
        self.validator = f"{endpoint} {tag}" if strong else None
        self._response = response
        self._limits = limits
        self._count = count
        self._report_success = report_success

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See :meth:`mirror.upstream.api.ContentStream.__aiter__`."""
        expected = self.total - self.start if self.total is not None else None
        received = 0
        async for chunk in read_chunks(self._response, self._limits, expected):
            if received < PROGRESS <= received + len(chunk):
                self._report_success()
            received += len(chunk)
            self._count(len(chunk))
            yield chunk
