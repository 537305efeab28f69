"""Bytes of growing content that are on no disk, in a window that slides with its readers.

Lives here: memory bounded by what the slowest reader still needs. Must not know: files, hashes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterable

from mirror.oci.errors import ContentLost
from mirror.store.reader import MemoryExtent


class Window:
    """The content from ``start`` to ``stop``; whoever appends waits for :meth:`room`."""

    def __init__(self, start: int) -> None:
        self.origin = start
        """Where the disk ends and memory began."""
        self.start = start
        self.stop = start
        self._chunks: list[bytes] = []
        self._offsets: list[int] = []
        self._slid: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def append(self, chunks: Iterable[bytes]) -> None:
        """Take the next bytes."""
        for chunk in chunks:
            if chunk:
                self._chunks.append(chunk)
                self._offsets.append(self.stop)
                self.stop += len(chunk)

    def holds_all_from(self, position: int) -> bool:
        """Whether a reader at ``position`` finds every byte, here or on the disk before."""
        return self.start == self.origin or position >= self.start

    def extent(self, start: int, stop: int) -> MemoryExtent:
        """Bytes from ``start`` to at most ``stop``. Raises ``ContentLost`` if they are gone."""
        index = bisect_right(self._offsets, start) - 1
        if index < 0 or start >= self.stop:
            raise ContentLost("uncached content has moved on")
        offset = self._offsets[index]
        view = memoryview(self._chunks[index])[start - offset : stop - offset]
        return MemoryExtent(view, start)

    def slide(self, positions: Iterable[int]) -> None:
        """Drop what every reader (at ``positions``) has behind it; all of it if there is none."""
        floor = min(positions, default=self.stop)
        drop = 0
        while drop < len(self._chunks) and self._offsets[drop] + len(self._chunks[drop]) <= floor:
            drop += 1
        if drop == 0:
            return
        del self._chunks[:drop], self._offsets[:drop]
        self.start = self._offsets[0] if self._offsets else self.stop
        if self._slid is not None and not self._slid.done():
            self._slid.set_result(None)
        self._slid = None

    @property
    def next_drop(self) -> int:
        """Where the last reader has to get to before anything is dropped."""
        return self._offsets[0] + len(self._chunks[0]) if self._chunks else self.stop

    async def room(self, patience: float) -> bool:
        """Wait until something was dropped, for at most ``patience`` seconds; whether it was."""
        if self._slid is None or self._slid.done():
            self._slid = asyncio.get_running_loop().create_future()
        return bool((await asyncio.wait({self._slid}, timeout=patience))[0])
