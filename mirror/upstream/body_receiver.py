"""Receives what upstreams send on their connections: large bodies, and bytes after a body.

Lives here: the two protocols that a connection has in turn, and the connector of aiohttp that uses
them. Must not know: requests, what a status means, where the bytes go.

:class:`UpstreamConnection` is the protocol of aiohttp, which parses responses. It also ends a
connection on which bytes arrive that belong to no response.

:class:`BodyReceiver` is the protocol while a large body of known length arrives. aiohttp reads
256 KiB at a time from the socket, parses and copies each piece, and then stops reading until the
piece is taken. Most of the time of a fetch without a limit went into that, and nothing has to be
parsed in such a body. So this protocol takes as much as has arrived, up to 1 MiB.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import weakref
from collections import deque
from functools import partial
from typing import Any, Final, cast

import aiohttp
from aiohttp import StreamReader, hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage

_MIN_BODY_BYTES: Final = 1024 * 1024
"""Missing bytes from which the protocol is changed. Fewer bytes come in a few reads anyway."""
_MAX_READ_BYTES: Final = 1024 * 1024
"""Bytes of one read at most. With 256 KiB, a fetch takes a quarter more time of the processor."""
_MIN_READ_BYTES: Final = 128 * 1024
"""Bytes of one read, however many bodies arrive at the same time."""
_ALL_READS_BYTES: Final = 4 * 1024 * 1024
"""Bytes that one read of each body may have together: these wait in memory if a disk is slow."""
_TLS_RECORD_BYTES: Final = 16 * 1024
"""Bytes of a TLS record (RFC 8446, section 5.1): as much may be decrypted and not handed over."""
_MAX_WAITING_BYTES: Final = 128 * 1024
"""Received bytes of one body from which reading stops until the fetch has taken them."""


class UpstreamConnection(ResponseHandler):
    """The connection of aiohttp. It closes if bytes arrive that belong to no response.

    aiohttp would parse such bytes as one more response, and give it to the next request.
    """

    _is_idle = True
    """Whether no response is expected: none was requested, or the last one has arrived."""

    def set_response_params(self, **options: Any) -> None:
        """Prepare for the response to a request. See ``aiohttp.client_proto.ResponseHandler``."""
        self._is_idle = False
        super().set_response_params(**options)

    async def read(self) -> tuple[RawResponseMessage, StreamReader]:
        """Return the header and the body of a response. The end of the body is its end."""
        message, body = await super().read()
        if not 100 <= message.code <= 199:
            body.on_eof(self._end_response)
        return message, body

    def _end_response(self) -> None:
        self._is_idle = True

    def data_received(self, data: bytes) -> None:
        """Parse a part of a response. See :class:`asyncio.Protocol`."""
        if not self._is_idle:
            super().data_received(data)
            data = b""
        # What has followed the end of the response in the same read was parsed, and is queued.
        if self._is_idle and (data or self._buffer):
            self.abort()


class UpstreamConnector(aiohttp.TCPConnector):
    """Makes an :class:`UpstreamConnection` for each connection. Otherwise as in aiohttp."""

    def __init__(self, **options: Any) -> None:
        """Create a connector. ``options``: those of ``aiohttp.TCPConnector``."""
        super().__init__(**options)
        factory = partial(UpstreamConnection, loop=self._loop)
        self._factory = cast("partial[ResponseHandler]", factory)


class BodyReceiver(asyncio.BufferedProtocol):
    """Receives the rest of one body.

    All connections of the process read into one buffer. That is safe, because the event loop hands
    over the bytes in the same callback in which it has read them.
    """

    _buffer: Final = memoryview(bytearray(_MAX_READ_BYTES))
    _receivers: Final = weakref.WeakSet["BodyReceiver"]()
    """All of the process whose body has not been taken as a whole."""

    def __init__(self, response: aiohttp.ClientResponse, missing: int) -> None:
        """Take over the connection of a response. ``missing``: bytes that have not arrived."""
        connection = response.connection
        assert connection is not None, "the body has not ended"
        assert connection.protocol is not None, "the connection is open"
        assert isinstance(connection.transport, asyncio.Transport), "it is that of a socket"
        self._content = response.content
        self._aiohttp_protocol = connection.protocol
        self._transport = connection.transport
        self._missing = missing
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._arrival: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        """Why the connection was lost. The transport may be closing some time before that."""
        self._receivers.add(self)
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def readany(self) -> bytes:
        """Return what has arrived, at least one byte. Empty at the end of the body.

        Raises ``ClientPayloadError`` if the connection broke.
        """
        while not self._chunks:
            if not self._missing:
                return b""
            if self._error is not None:
                raise aiohttp.ClientPayloadError("the connection was lost") from self._error
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        chunk = self._chunks.popleft()
        self._waiting -= len(chunk)
        if not self._chunks and not self._missing:
            self._receivers.discard(self)
        elif not self._chunks and not self._transport.is_closing():
            self._transport.resume_reading()
        return chunk

    # --- called by the event loop ---------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read to. See :class:`asyncio.BufferedProtocol`.

        ``sizehint``: bytes that wait in the TLS layer. All have to fit: if the upstream has closed
        the connection, asyncio reads once more, and drops the rest. With a socket, it is negative.
        """
        share = max(_MIN_READ_BYTES, _ALL_READS_BYTES // len(self._receivers))
        return self._buffer[: max(share, sizehint + _TLS_RECORD_BYTES)]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read. See :class:`asyncio.BufferedProtocol`."""
        count = min(nbytes, self._missing)
        self._chunks.append(bytes(self._buffer[:count]))
        self._missing -= count
        self._waiting += count
        if not self._missing:
            self._return_connection(bytes(self._buffer[count:nbytes]))
        elif self._waiting >= _MAX_WAITING_BYTES:
            self._transport.pause_reading()
        self._wake()

    def _return_connection(self, surplus: bytes) -> None:
        """Let aiohttp keep the connection for its next request. ``surplus`` came after the body."""
        self._transport.set_protocol(self._aiohttp_protocol)
        self._content.feed_eof()
        self._aiohttp_protocol.data_received(surplus)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader and aiohttp. See :class:`asyncio.BaseProtocol`."""
        self._error = exc or ConnectionResetError("it was closed")
        self._receivers.discard(self)
        self._wake()
        self._aiohttp_protocol.connection_lost(exc)

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


def take_over(response: aiohttp.ClientResponse, received: int) -> BodyReceiver | None:
    """Return the receiver of the rest of a body. None if aiohttp has to read it.

    Args:
        response: The response.
        received: Bytes of its body that were read.
    """
    missing = (response.content_length or 0) - received
    is_chunked = hdrs.TRANSFER_ENCODING in response.headers
    if is_chunked or missing < _MIN_BODY_BYTES or response.content.total_bytes > received:
        return None
    connection = response.connection
    if connection is None or connection.transport is None or connection.transport.is_closing():
        return None
    return BodyReceiver(response, missing)


def count_unread(response: aiohttp.ClientResponse) -> int:
    """Return the bytes that wait in the socket of a response. 0 after its end."""
    connection = response.connection
    if connection is None or connection.transport is None or connection.transport.is_closing():
        return 0
    socket = connection.transport.get_extra_info("socket")
    count: int = struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.FIONREAD, bytes(4)))[0]
    return count
