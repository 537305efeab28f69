"""Bodies of more than 64 KiB that are in memory while they are sent.

Lives here: how many bytes they have together, and which clients give way. Must not know: HTTP, what
a body is.

A list of referrers has up to 4 MiB, and each client that reads it slowly holds it in memory. So
equal bodies are one, all of them share a limit, and each has to be taken in a limited time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from mirror.web import client_socket

_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""Bytes of all bodies of one process: 16 of the largest ones. Clients that read them at the same
time finish in a second."""
_MIN_BYTES_PER_S: Final = 16 * 1024
"""A client that reads slower than this is cut off, once it could also have been silent for
``CLIENT_STALL_TIMEOUT_S``. A body that is read from a file has no such limit."""


@dataclass(slots=True)
class _SentBody:
    """A body that is being sent to one client, or to several."""

    size: int
    body: bytes | None
    """None: others cannot use it."""
    limits: set[asyncio.Timeout] = field(default_factory=set)
    """The time limits of the clients."""


class LargeBodies:
    """The large bodies in memory that are being sent, the least recently requested one first."""

    def __init__(self, limit: int = _LIMIT_BYTES) -> None:
        """Create it. ``limit``: bytes of all of them."""
        self._limit = limit
        self._sent: dict[Hashable, _SentBody] = {}

    def find_equal(self, key: Hashable, body: bytes) -> bytes:
        """Return an equal body that is being sent under the same key, or else ``body``."""
        sent = self._sent.get(key)
        return sent.body if sent is not None and sent.body == body else body

    @asynccontextmanager
    async def hold(
        self, key: Hashable, size: int, body: bytes | None = None
    ) -> AsyncIterator[None]:
        """Count a body in the block, in which it is sent to one client.

        If all bodies have too many bytes, the clients of the one that was requested least recently
        are cut off.

        Args:
            key: Identifies the body.
            size: Its bytes.
            body: The body, for :meth:`find_equal`.

        Raises:
            TimeoutError: The client reads too slowly.
        """
        seconds = client_socket.CLIENT_STALL_TIMEOUT_S + size / _MIN_BYTES_PER_S
        async with asyncio.timeout(seconds) as limit:
            sent = self._sent.pop(key, None) or _SentBody(size, body)
            sent.limits.add(limit)
            self._sent[key] = sent
            self._cut_off_oldest()
            try:
                yield
            finally:
                sent.limits.discard(limit)
                if not sent.limits and self._sent.get(key) is sent:
                    del self._sent[key]

    def _cut_off_oldest(self) -> None:
        now = asyncio.get_running_loop().time()
        while len(self._sent) > 1 and sum(one.size for one in self._sent.values()) > self._limit:
            oldest = self._sent.pop(next(iter(self._sent)))
            for limit in oldest.limits:
                if not limit.expired():
                    limit.reschedule(now)


LARGE_BODIES: Final = LargeBodies()
"""Those of this process, at all listeners."""
