"""The kernel's ``sendfile`` on one client's socket, under an event loop.

Lives here: sending a part of a file whenever the socket takes some. Must not know: which part.

``loop.sendfile`` asks to be told of a writable socket anew for each piece that the kernel took, and
stops reading meanwhile; at several streams that costs as much as the sending. Here the loop tells
until the part is sent, and whoever reads (the server, which so learns of a client that has left)
goes on reading. The loop refuses a second interest in a transport's descriptor, so this is another
descriptor of the same socket.
"""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Self


class SocketSendfile:
    """Sends parts of files to one socket, one after the other. A context manager."""

    def __init__(self, transport: asyncio.Transport) -> None:
        """Raises ``OSError`` if the client has left, or there are no descriptors."""
        connection = transport.get_extra_info("socket")
        if transport.is_closing() or connection is None:
            raise ConnectionResetError("the client has left")
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._socket = os.dup(connection.fileno())
        self._file = -1
        self._offset = 0
        self._left = 0
        self._done: asyncio.Future[None] | None = None
        self.total = 0
        """Bytes that the socket has taken."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._socket)

    async def send(self, file: int, offset: int, count: int) -> int:
        """Send ``count`` bytes of ``file`` from ``offset`` on; returns how many there were.

        Fewer where the file ends. Raises ``OSError`` of the file or of the socket.
        """
        self._file, self._offset, self._left = file, offset, count
        if not self._push():
            self._done = self._loop.create_future()
            self._loop.add_writer(self._socket, self._writable)
            try:
                await self._done
            finally:
                self._loop.remove_writer(self._socket)
        return self._offset - offset

    def _writable(self) -> None:
        assert self._done is not None
        if self._done.done():
            return
        try:
            if self._push():
                self._done.set_result(None)
        except OSError as error:
            self._done.set_exception(error)

    def _push(self) -> bool:
        """Send what the socket takes now; whether that was the rest."""
        if self._transport.is_closing():
            raise ConnectionResetError("the client has left")
        if self._transport.get_write_buffer_size():
            return False  # what was written before comes first
        try:
            sent = os.sendfile(self._socket, self._file, self._offset, self._left)
        except BlockingIOError:
            return False
        self._offset += sent
        self._left -= sent
        self.total += sent
        return sent == 0 or self._left == 0
