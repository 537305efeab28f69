"""A client's TCP socket: detect a stalled client, send parts of files, reset the connection.

Lives here: all that is done below aiohttp's transport. Must not know: HTTP, or which content the
bytes belong to.

:class:`StallWatch` is the only time limit on a client that is receiving a response. It reads from
the kernel how many bytes the client has acknowledged. The number of bytes that the kernel has
accepted would not show a stalled client: the kernel takes megabytes into its buffer at once, and
then accepts no more for minutes, although the client reads 10 KB/s.

``loop.sendfile`` registers the socket again for each piece that the kernel takes, and does not read
from the client until the file is sent. With several streams, registering costs as much CPU time as
sending. With :class:`SocketSendfile` the loop watches the socket until the part is sent, and
aiohttp continues to read, so it notices when the client leaves. The loop does not let others watch
the descriptor of a transport, so another descriptor of the same socket is watched.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Self

CLIENT_STALL_TIMEOUT_S: Final = 60.0
"""Seconds for which a client may acknowledge no byte. A client that reads slowly has no limit."""
_BYTES_ACKED_OFFSET: Final = 120
"""Offset in bytes of ``tcpi_bytes_acked`` in ``struct tcp_info`` (linux/tcp.h)."""
_TCP_INFO_BYTES: Final = 128
"""Bytes to read of ``struct tcp_info``: up to the end of ``tcpi_bytes_acked``."""
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
"""``struct linger``: on, with 0 seconds. Closing the socket then sends a reset (socket(7))."""


class StallWatch:
    """Calls back once a client has stopped reading.

    A client has stopped if it acknowledges no byte for ``seconds`` although the kernel has bytes
    for it all the while. That is detected after at most three times ``seconds``. It is never the
    case for a client that reads slowly, or that waits for us.
    """

    def __init__(
        self, transport: asyncio.Transport, seconds: float, on_stall: Callable[[], None]
    ) -> None:
        """Begin to watch. ``on_stall`` is called at most once."""
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = transport.get_extra_info("socket")
        self._seconds = seconds
        self._on_stall = on_stall
        self._timer = self._loop.call_later(seconds, self._check, None)

    def stop(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def _check(self, previous: int | None) -> None:
        """Compare the acknowledged bytes with those of the last call.

        ``previous``: their number then. None: nothing was queued, or the kernel did not tell.
        """
        acknowledged = _acknowledged_bytes(self._socket) if self._socket is not None else None
        if acknowledged is not None and acknowledged == previous:
            self._on_stall()
        else:
            self._timer = self._loop.call_later(self._seconds, self._check, acknowledged)


@asynccontextmanager
async def abort_stalled_client(
    transport: asyncio.Transport | None, timeout: float
) -> AsyncIterator[None]:
    """Raise ``TimeoutError`` in the block once the client has stopped reading.

    Args:
        transport: The client's connection. None if it is closed: then there is no limit.
        timeout: Seconds, see :class:`StallWatch`.
    """
    if transport is None:
        yield
        return
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        watch = StallWatch(transport, timeout, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            watch.stop()


def _acknowledged_bytes(connection: socket.socket) -> int | None:
    """Return the number of bytes that the client has acknowledged since it connected.

    None if it has acknowledged all. The kernel then has no bytes for it, and neither has the
    transport, because the kernel takes as many as it can. Also None if the kernel does not report
    the number: a slow client and a stalled one would look the same, so no client is cut off.
    """
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        acknowledged = int(struct.unpack_from("Q", info, _BYTES_ACKED_OFFSET)[0])
    except (OSError, ValueError, struct.error):  # ValueError: the socket is closed.
        return None
    return acknowledged if any(queued) else None


def abort_connection(transport: asyncio.Transport | None, *, is_reset: bool) -> None:
    """Close the connection at once, and drop what was not sent yet.

    Args:
        transport: The client's connection. None if it is closed already.
        is_reset: Send a TCP reset, also on a TLS connection. Needed where the end of the
            connection is the end of the body (RFC 9112, section 6.3): a normal close would make
            the client take the truncated body for a complete one.
    """
    if transport is None:
        return
    connection = transport.get_extra_info("socket")
    if is_reset and connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    transport.abort()


class SocketSendfile:
    """Sends parts of files to one socket with ``sendfile(2)``, one part after the other.

    A context manager: its descriptor of the socket is closed at the end of the block.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        """Duplicate the descriptor of the socket.

        Raises:
            ConnectionResetError: The client has left.
            OSError: No descriptor is free.
        """
        connection = transport.get_extra_info("socket")
        if transport.is_closing() or connection is None:
            raise ConnectionResetError("the client has left")
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._socket = os.dup(connection.fileno())
        self._file = -1
        self._offset = 0
        self._remaining = 0
        self._done: asyncio.Future[None] | None = None
        self.bytes_sent = 0
        """Bytes that the socket has accepted, over all parts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._socket)

    async def send(self, file: int, offset: int, count: int) -> int:
        """Send one part of a file, after all bytes that were written to the transport before.

        Args:
            file: Descriptor of the file. Its own position is neither used nor moved.
            offset: First byte of the part.
            count: Length of the part in bytes.

        Returns:
            The number of bytes that were sent: fewer than ``count`` if the file ends before.

        Raises:
            OSError: The file cannot be read, or the client has left (``ConnectionError``).
        """
        self._file, self._offset, self._remaining = file, offset, count
        if not self._send_available():
            self._done = self._loop.create_future()
            self._loop.add_writer(self._socket, self._on_writable)
            try:
                await self._done
            finally:
                self._loop.remove_writer(self._socket)
        return self._offset - offset

    def _on_writable(self) -> None:
        assert self._done is not None
        if self._done.done():
            return
        try:
            if self._send_available():
                self._done.set_result(None)
        except OSError as error:
            self._done.set_exception(error)

    def _send_available(self) -> bool:
        """Send as much as the socket accepts now. Returns True once the part, or the file, ends."""
        if self._transport.is_closing():
            raise ConnectionResetError("the client has left")
        if self._transport.get_write_buffer_size():
            return False  # The transport's own buffer has to be sent first.
        try:
            sent = os.sendfile(self._socket, self._file, self._offset, self._remaining)
        except BlockingIOError:
            return False
        self._offset += sent
        self._remaining -= sent
        self.bytes_sent += sent
        return sent == 0 or self._remaining == 0
