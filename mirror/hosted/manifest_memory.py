"""The memory for manifests that clients push: one limit for all of them.

Lives here: how many bytes all may hold, who waits, and for how long. Must not know: HTTP, what a
manifest is.

Usual manifests have 1 to 20 KiB, and never wait. A large one waits until the large ones before it
are stored or refused. It takes all its memory at once, so that no two wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

from mirror.oci.errors import TooManyRequests

_LIMIT_BYTES: Final = 32 * 1024 * 1024
"""Bytes of all large manifests that are received, parsed and stored at a time: eight of the largest
size. A server that takes 50 pushes at once stays below 150 MiB."""
UNCOUNTED_BYTES: Final = 64 * 1024
"""Bytes that each manifest may have anyway. A connection costs as much."""
_WAIT_S: Final = 10.0
"""Seconds that a large manifest waits for others. Clients time out after about 30 s."""


class ManifestMemory:
    """The memory that all manifests which are pushed to one process may hold."""

    def __init__(self, limit: int = _LIMIT_BYTES) -> None:
        """Start with no manifest. ``limit``: bytes. No manifest may have more."""
        self._free = limit
        self._parsing = asyncio.Lock()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextmanager
    def share(self) -> Iterator[ManifestShare]:
        """Return the share of one manifest. It is free again at the end of the block."""
        share = ManifestShare(self)
        try:
            yield share
        finally:
            share.shrink(0)

    @asynccontextmanager
    async def parsing(self, size: int) -> AsyncIterator[None]:
        """Parse a manifest of ``size`` bytes in the block: one large one at a time.

        What is parsed may need 20 times the memory of its bytes for a moment.
        """
        if size <= UNCOUNTED_BYTES:
            yield
            return
        async with self._parsing:
            yield

    async def take(self, count: int) -> None:
        """Take ``count`` bytes, after those that wait already. Raises ``TooManyRequests``."""
        if not self._waiting and count <= self._free:
            self._free -= count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            async with asyncio.timeout(_WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._free += count  # Its turn came at the same moment.
            with suppress(ValueError):
                self._waiting.remove((count, turn))
            self._let_next_in()
            if not isinstance(error, TimeoutError):
                raise
            raise TooManyRequests(
                "too many large manifests are pushed at the same time: try again later",
                retry_after=_WAIT_S,
            ) from None

    def give_back(self, count: int) -> None:
        """Free ``count`` bytes."""
        self._free += count
        self._let_next_in()

    def _let_next_in(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            count, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= count
                turn.set_result(None)


class ManifestShare:
    """The memory that one manifest holds. Created by :meth:`ManifestMemory.share`."""

    def __init__(self, memory: ManifestMemory) -> None:
        """Hold nothing yet."""
        self._memory = memory
        self._held = 0

    async def reach(self, size: int, most: int) -> None:
        """Wait until the manifest may have ``size`` bytes. Raises ``TooManyRequests``.

        Args:
            size: Its bytes so far.
            most: The bytes that it may have in the end. All are taken once it is large.
        """
        if size > UNCOUNTED_BYTES and not self._held:
            await self._memory.take(most)
            self._held = most

    def shrink(self, size: int) -> None:
        """Hold no more than ``size`` bytes."""
        surplus = max(0, self._held - size)
        self._held -= surplus
        self._memory.give_back(surplus)
