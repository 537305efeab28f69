"""Whether a client still reads, from what its socket says.

Lives here: the one time limit on clients while they are being answered. Must not know: what they
are given, or how.

What was handed to the kernel says little: a buffer of megabytes fills at once, and is not asked for
more for minutes by a client that reads 10 KB/s. What the client's side has acknowledged says it.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_INFO_SIZE: Final = 128
_ACKNOWLEDGED: Final = 120
"""Offset of ``tcpi_bytes_acked`` (linux/tcp.h)."""


@asynccontextmanager
async def abort_stalled_client(
    transport: asyncio.Transport | None, patience: float
) -> AsyncIterator[None]:
    """Raises ``TimeoutError`` within the block once its client has stopped to read.

    That is: for ``patience`` seconds (noticed after three times as many at the latest) it took
    nothing, though there was something for it all the while.
    """
    loop = asyncio.get_running_loop()
    connection = transport.get_extra_info("socket") if transport is not None else None
    alarm: asyncio.TimerHandle

    def owed() -> int | None:
        """What it has taken so far, if there is more for it; None: it is not to blame."""
        if transport is None or connection is None or not _waiting(connection, transport):
            return None
        return _acknowledged(connection)

    async with asyncio.timeout(None) as limit:

        def look(before: int | None) -> None:
            nonlocal alarm
            now = owed()
            if now is not None and now == before:
                limit.reschedule(loop.time())
            else:
                alarm = loop.call_later(patience, look, now)

        alarm = loop.call_later(patience, look, None)
        try:
            yield
        finally:
            alarm.cancel()


def _acknowledged(connection: socket.socket) -> int | None:
    """Bytes that the other side has taken since it connected; None where the kernel says nothing.

    Then nobody is cut off: a slow client would be taken for one that does not read.
    """
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
        return int(struct.unpack_from("Q", info, _ACKNOWLEDGED)[0])
    except (OSError, struct.error):
        return None


def _waiting(connection: socket.socket, transport: asyncio.Transport) -> bool:
    """Whether there is something that the other side has not taken."""
    if transport.get_write_buffer_size():
        return True
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return False  # it is closed, and whoever writes to it learns that
    return bool(queued.strip(b"\0"))
