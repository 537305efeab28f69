"""Receives large bodies of known length.

Lives here: the protocol that a connection has while such a body arrives. Must not know: requests,
what a status means, where the bytes go.

aiohttp reads 256 KiB at a time from the socket, parses and copies each piece, and then stops to
read until the piece is taken. Most of the time of a fetch without a limit went into that. Nothing
has to be parsed in a body of known length. So its connection gets another protocol, which takes as
much as has arrived, up to 1 MiB, and gives the connection back to aiohttp at its end.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from typing import Final

import aiohttp
from aiohttp import hdrs

_MIN_BODY_BYTES: Final = 1024 * 1024
"""Missing bytes from which another protocol is worth its while. The others come in a few reads."""
_MAX_READ_BYTES: Final = 1024 * 1024
"""Bytes of one read at most. With 256 KiB, a fetch takes a quarter more time of the processor."""
_MIN_READ_BYTES: Final = 128 * 1024
"""Bytes of one read, however many bodies arrive at the same time."""
_ALL_READS_BYTES: Final = 16 * 1024 * 1024
"""Bytes that one read of each body may have together: these wait in memory if a disk is slow."""


class BodyReceiver(asyncio.BufferedProtocol):
    """Receives the rest of one body.

    All of them read into one buffer. That is safe, because the event loop hands over the bytes in
    the same callback in which it has read them.
    """

    _buffer: Final = memoryview(bytearray(_MAX_READ_BYTES))
    _receivers: Final = weakref.WeakSet["BodyReceiver"]()

    def __init__(self, response: aiohttp.ClientResponse, missing: int) -> None:
        """Take over the connection of a response. ``missing``: bytes that have not arrived."""
        connection = response.connection
        assert connection is not None, "the body has not ended"
        assert connection.protocol is not None, "the connection is open"
        assert isinstance(connection.transport, asyncio.Transport), "it is that of a socket"
        self._content = response.content
        self._owner = connection.protocol
        self._transport = connection.transport
        self._missing = missing
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._arrival: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._receivers.add(self)
        # The timer of aiohttp would not hear of what arrives.
        self._owner.read_timeout = None
        self._owner.start_timeout()
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def readany(self, idle: float) -> bytes:
        """Return what has arrived, at least one byte. Empty at the end of the body.

        Raises:
            TimeoutError: no byte for ``idle`` seconds.
            ClientPayloadError: the connection broke.
        """
        while not self._chunks:
            if not self._missing:
                return b""
            if self._error is not None:
                raise aiohttp.ClientPayloadError("the connection was lost") from self._error
            self._arrival = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(idle):
                await self._arrival
        chunk = self._chunks.popleft()
        self._waiting -= len(chunk)
        if not self._chunks and self._error is None:
            if not self._missing:
                # aiohttp keeps the connection for its next request.
                self._receivers.discard(self)
                self._transport.set_protocol(self._owner)
                self._content.feed_eof()
            self._transport.resume_reading()
        return chunk

    # --- called by the event loop ---------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read to. See :class:`asyncio.BufferedProtocol`."""
        share = max(_MIN_READ_BYTES, _ALL_READS_BYTES // len(self._receivers))
        return self._buffer[:share]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read. See :class:`asyncio.BufferedProtocol`."""
        count = min(nbytes, self._missing)
        if count < nbytes:
            # Bytes after the body must not become the response to the next request.
            self._owner.force_close()
        if count:
            self._chunks.append(bytes(self._buffer[:count]))
        self._missing -= count
        self._waiting += count
        if self._waiting >= _MIN_READ_BYTES:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader and aiohttp. See :class:`asyncio.BaseProtocol`."""
        self._error = exc or ConnectionResetError("it was closed")
        self._receivers.discard(self)
        self._wake()
        self._owner.connection_lost(exc)

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
