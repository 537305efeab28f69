"""The bytes of an ingest that are in memory only, in a window that slides with its followers.

Lives here: memory that is bounded by the position of the slowest follower. Must not know: files,
hashes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterable

from mirror.oci.errors import ContentLost
from mirror.store.reader import MemoryExtent


class Window:
    """The bytes from ``start`` to ``stop``. Its writer calls :meth:`wait_until_freed`."""

    def __init__(self, start: int) -> None:
        self.origin = start
        """Offset of the first byte that is not on disk."""
        self.start = start
        """Offset of the first byte that is still in memory."""
        self.stop = start
        """Offset after the last byte."""
        self._chunks: list[bytes | bytearray] = []
        self._offsets: list[int] = []
        self._freed: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def append(self, chunks: Iterable[bytes | bytearray]) -> None:
        """Add the next bytes."""
        for chunk in chunks:
            if chunk:
                self._chunks.append(chunk)
                self._offsets.append(self.stop)
                self.stop += len(chunk)

    def has_all_from(self, position: int) -> bool:
        """Return whether a follower at ``position`` finds every byte, in memory or on disk."""
        return self.start == self.origin or position >= self.start

    def extent(self, start: int, stop: int) -> MemoryExtent:
        """Return the bytes from ``start`` to at most ``stop``, without a copy.

        Raises ``ContentLost`` if they have left memory, or have not arrived.
        """
        index = bisect_right(self._offsets, start) - 1
        if index < 0 or start >= self.stop:
            raise ContentLost("these bytes of content that is not cached have left memory")
        offset = self._offsets[index]
        view = memoryview(self._chunks[index])[start - offset : stop - offset]
        return MemoryExtent(view, start)

    def slide(self, positions: Iterable[int]) -> None:
        """Free the chunks before the lowest of ``positions``; all chunks if there is none."""
        lowest = min(positions, default=self.stop)
        count = 0
        while (
            count < len(self._chunks) and self._offsets[count] + len(self._chunks[count]) <= lowest
        ):
            count += 1
        if count == 0:
            return
        del self._chunks[:count], self._offsets[:count]
        self.start = self._offsets[0] if self._offsets else self.stop
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)
        self._freed = None

    @property
    def first_chunk_end(self) -> int:
        """Offset up to which every follower has to read before memory is freed again."""
        return self._offsets[0] + len(self._chunks[0]) if self._chunks else self.stop

    async def wait_until_freed(self, timeout: float) -> bool:
        """Wait until the window has freed memory. Returns False after ``timeout`` seconds."""
        if self._freed is None or self._freed.done():
            self._freed = asyncio.get_running_loop().create_future()
        return bool((await asyncio.wait({self._freed}, timeout=timeout))[0])
