"""Content to response: the headers of an answer, and its bytes as they become available.

Lives here: ``Range``, conditions, ``HEAD``, ``sendfile``, following growing content, cutting a
connection. Must not know: repositories, upstreams, where content comes from.

Once a byte of a body is out, an error is a cut connection, never a clean end.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import lru_cache
from typing import Final, TypeGuard, cast

import aiofiles
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from mirror.observability.events import BytesSent, Observer, Pull
from mirror.oci.errors import ContentLost, StorageUnavailable
from mirror.oci.headers import (
    Multipart,
    NeedsSize,
    Ranges,
    Span,
    Whole,
    content_range,
    entity_tag,
    not_modified,
    parse_range,
    parse_range_unsized,
    range_applies,
)
from mirror.oci.reference import Digest
from mirror.store.reader import FileExtent, MemoryExtent, Reader
from mirror.web.client_stall import abort_stalled_client
from mirror.web.socket_sendfile import SocketSendfile

SLICE: Final = 4 * 1024 * 1024
"""Bytes that are handed to the kernel at once, at most."""
_FIRST_SLICE: Final = 64 * 1024
PATIENCE: Final = 60.0
"""Seconds for which a client may read nothing: whoever reads at all, at any rate, is served."""
_COPY: Final = 256 * 1024
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Body:
    """What an answer carries: content, its type, and how long it is where that is known."""

    digest: Digest
    media_type: str
    size: int | None
    reader: Reader | bytes | None
    """None: headers only."""


def headers_of(body: Body) -> dict[str, str]:
    """The headers of content (distribution spec, "Pulling manifests" and "Pulling blobs")."""
    headers = {
        "Content-Type": body.media_type,
        "Docker-Content-Digest": str(body.digest),
        "ETag": entity_tag(body.digest),
        "Accept-Ranges": "bytes",
    }
    if body.size is not None:
        headers["Content-Length"] = str(body.size)
    return headers


class SingleWriteResponse(web.StreamResponse):
    """A small answer that is written at once, on a connection that goes on (HTTP/1.1).

    ``web.Response`` decides anew for each answer what holds for all of these; without it twice as
    many are given in the same time.
    """

    def __init__(self, headers: dict[str, str], body: bytes) -> None:
        """``headers`` have to name the length and the type of ``body``."""
        super().__init__()
        self._fields = headers
        self._content = body

    @property
    def keep_alive(self) -> bool:
        """Always."""
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Write all of it. Raises ``ConnectionError`` if the client has left."""
        writer = request.writer
        self._fields["Date"] = _date(int(time.time()))
        # Whoever writes them looks only at their pairs, and refuses those with a line break.
        await writer.write_headers("HTTP/1.1 200 OK", cast("CIMultiDict[str]", self._fields))
        await writer.write_eof(self._content)
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """All was written."""


@lru_cache(2)
def _date(second: int) -> str:
    """``Date`` (RFC 9110, section 6.6.1)."""
    return formatdate(second, usegmt=True)


class Sender:
    """Sends one answer to one client."""

    def __init__(self, request: web.BaseRequest, pull: Pull, emit: Observer) -> None:
        self._request = request
        self._pull = pull
        self._emit = emit
        self._loop = asyncio.get_running_loop()

    async def send(self, body: Body, extra: Mapping[str, str]) -> web.StreamResponse:
        """Answer with ``body``, or the part of it that the request's ``Range`` asks for.

        Raises :class:`mirror.oci.errors.RangeNotSatisfiable` before anything is sent.
        """
        request, etag = self._request, entity_tag(body.digest)
        if not_modified(request.headers.get("If-None-Match"), etag):
            headers = {**headers_of(body), **extra}
            headers.pop("Content-Length", None)
            return web.Response(status=304, headers=headers)
        # RFC 9110, section 14.2: only of a GET is a part asked for.
        wanted = request.headers.get("Range") if request.method == "GET" else None
        if not range_applies(request.headers.get("If-Range"), etag):
            wanted = None
        if body.size is None and isinstance(parse_range_unsized(wanted), NeedsSize):
            body = replace(body, size=await _wait_for_size(body.reader))
        parts = Whole() if body.size is None else parse_range(wanted, body.size)
        headers = {**headers_of(body), **extra}
        if isinstance(parts, Ranges) and body.size is not None:
            return await self._partial(body, body.size, parts.spans, headers)
        if request.method == "HEAD" or _is_small(body.reader):
            return self._small(body, headers)
        return await self._stream(body, (), None, 200, headers)

    async def _partial(
        self, body: Body, size: int, spans: tuple[Span, ...], headers: dict[str, str]
    ) -> web.StreamResponse:
        multipart = None
        if len(spans) == 1:
            headers["Content-Range"] = content_range(spans[0], size)
            headers["Content-Length"] = str(spans[0].length)
        else:
            multipart = Multipart(secrets.token_hex(16), body.media_type, spans, size)
            headers["Content-Type"] = multipart.content_type
            headers["Content-Length"] = str(multipart.length)
        return await self._stream(body, spans, multipart, 206, headers)

    def _small(self, body: Body, headers: dict[str, str]) -> web.StreamResponse:
        request, pull = self._request, self._pull
        if request.method == "HEAD" or not isinstance(body.reader, bytes):
            return web.Response(headers=headers)
        pull.complete = pull.sent_in_one_write = True
        pull.bytes_sent = len(body.reader)
        pull.first_byte = self._loop.time() - pull.started
        if request.version == HttpVersion11 and request.keep_alive:
            return SingleWriteResponse(headers, body.reader)
        return web.Response(headers=headers, body=body.reader)

    async def _stream(
        self,
        body: Body,
        spans: tuple[Span, ...],
        multipart: Multipart | None,
        status: int,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        delimited = "Content-Length" in headers
        if not delimited and self._request.version != HttpVersion10:
            response.enable_chunked_encoding()
        socket_sendfile = self._open_sendfile() if delimited and multipart is None else None
        try:
            with socket_sendfile or nullcontext(), self._pull.stage("send"):
                self._pull.status = status
                async with abort_stalled_client(self._request.transport, PATIENCE):
                    await response.prepare(self._request)
                    for index, span in enumerate(spans):
                        if multipart is not None:
                            await response.write(multipart.head(index))
                        await self._copy(response, body, span.start, span.stop, socket_sendfile)
                    if multipart is not None:
                        await response.write(multipart.tail)
                    if not spans:
                        await self._copy(response, body, 0, body.size, socket_sendfile)
                    await response.write_eof()
            self._pull.complete = True
        except BaseException:
            self._cut(hard=not delimited)
            raise
        return response

    def _open_sendfile(self) -> SocketSendfile | None:
        """None where bytes are encrypted, and the kernel cannot send the file itself.

        Raises :class:`StorageUnavailable` without a descriptor for it: nothing has been sent yet.
        """
        transport = self._request.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return None
        try:
            return SocketSendfile(transport)
        except ConnectionError:
            raise
        except OSError as error:
            raise StorageUnavailable(f"nothing can be sent: {error.strerror}") from error

    async def _copy(
        self,
        response: web.StreamResponse,
        body: Body,
        start: int,
        stop: int | None,
        socket_sendfile: SocketSendfile | None,
    ) -> None:
        """Wait until bytes are there, send them, until ``stop`` (or the end, if that is None)."""
        reader = body.reader
        if isinstance(reader, bytes):
            await response.write(reader[start:stop])
            self._count(len(reader[start:stop]))
            return
        assert _is_reader(reader)
        position = start
        while stop is None or position < stop:
            extent = await reader.wait(position, stop)
            if extent is None:
                break
            # The first slice is small, so that the time to the first byte is about that.
            count = min(extent.stop - position, SLICE if position > start else _FIRST_SLICE)
            if isinstance(extent, MemoryExtent):
                await response.write(extent.data[:count])
                self._count(count)
                sent = count
            elif socket_sendfile is not None:
                sent = await self._send_file(socket_sendfile, extent, position, count)
            else:
                sent = await self._copy_file(response, extent, position, count)
            if sent == 0:
                raise ContentLost("content was cut while it was read")
            position += sent
        if stop is not None and position != stop:
            raise ContentLost("content ended before its announced length")

    async def _send_file(
        self, socket_sendfile: SocketSendfile, extent: FileExtent, position: int, count: int
    ) -> int:
        before = socket_sendfile.total
        try:
            return await socket_sendfile.send(extent.fd, position, count)
        finally:
            self._count(socket_sendfile.total - before)

    async def _copy_file(
        self, response: web.StreamResponse, extent: FileExtent, position: int, count: int
    ) -> int:
        # Readers share the descriptor, so each copy opens the file anew for an offset of its own;
        # by way of the descriptor, because its name may be gone.
        sent = 0
        async with aiofiles.open(f"/proc/self/fd/{extent.fd}", "rb", buffering=0) as file:
            await file.seek(position)
            while sent < count and (data := await file.read(min(_COPY, count - sent))):
                await response.write(data)
                self._count(len(data))
                sent += len(data)
        return sent

    def _count(self, count: int) -> None:
        if count == 0:
            return
        if self._pull.first_byte is None:
            self._pull.first_byte = self._loop.time() - self._pull.started
        self._pull.bytes_sent += count
        self._emit(BytesSent(self._pull.upstream, count))

    def _cut(self, *, hard: bool) -> None:
        """End the connection so that nobody takes the answer for whole.

        ``hard``: where nothing else tells a client that more was to come, with a reset.
        """
        transport = self._request.transport
        if transport is None:
            return
        connection = transport.get_extra_info("socket")
        if hard and connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()


def _is_small(source: Reader | bytes | None) -> bool:
    """Whether so little that a client that reads nothing of it is worth no time limit."""
    return source is None or (isinstance(source, bytes) and len(source) <= _FIRST_SLICE)


def _is_reader(source: Reader | bytes | None) -> TypeGuard[Reader]:
    return source is not None and not isinstance(source, bytes)


async def _wait_for_size(source: Reader | bytes | None) -> int | None:
    """A part of content whose size nobody knows can be named only once all of it is here."""
    if _is_reader(source):
        while source.size is None and await source.wait(source.arrived) is not None:
            pass
        return source.size
    return None
