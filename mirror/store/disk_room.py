"""Room on the disk for content that does not count against the quota of the cache: for pushes.

Lives here: what gives way to it, in which order. Must not know: what a push is, which content is
evicted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Final, Protocol

_PROMISE_S: Final = 1.0
"""Seconds for which half of the free bytes of a disk may be given without asking it again."""

FreeMore = Callable[[int], Awaitable[None]]
"""Frees so many bytes of the disk, if it can."""


class Evicting(Protocol):
    """The part of :class:`mirror.store.eviction.Evictor` that ``Space`` uses.

    ``eviction`` imports ``space`` for the total and the limits, so that one cannot import it.
    """

    def start(self, need: int) -> asyncio.Future[None] | None:
        """Start an eviction in its own thread, or join the running one. None: none is started."""

    def start_scan(self) -> asyncio.Future[None]:
        """List the directories in the same thread, if that is due and no other process does."""


class DiskRoom:
    """Frees space of a disk. All methods run on the event loop."""

    def __init__(self, evictor: Evicting, read: Callable[[], Awaitable[tuple[int, int]]]) -> None:
        """Start without an answer of the disk.

        Args:
            evictor: Evicts cached content.
            read: Returns the free bytes of the disk, and those that evictions can make it. May
                raise ``OSError``.
        """
        self._evictor = evictor
        self._read = read
        self._promised = 0
        """Bytes of the disk that are given without asking it."""
        self._promised_until = 0.0

    async def make_room(
        self,
        need: int,
        ahead: int = 0,
        before: FreeMore | None = None,
        after: FreeMore | None = None,
    ) -> None:
        """Free space if the disk has fewer than ``need`` free bytes. Evicts content, and waits.

        Frees what it can, and never raises: a write that finds no space fails anyway.

        Args:
            need: Bytes.
            ahead: Bytes that will be needed soon. One eviction frees them, too: it lists all
                content, which is too much work for each chunk of a push.
            before: Called with the missing bytes. Frees what is of less use than cached content.
            after: The same for what is of more use.
        """
        now = monotonic()
        if need <= self._promised and now < self._promised_until:
            self._promised -= need
            return
        with suppress(OSError):
            for free_more in (before, partial(self._evict, ahead), after):
                disk_free, _ = await self._read()
                if disk_free >= need:
                    # Others write, too, and small pushes need not ask the disk for each blob.
                    self._promised = disk_free // 2 - need
                    self._promised_until = now + _PROMISE_S
                    return
                if free_more is not None:
                    await free_more(need - disk_free)

    async def _evict(self, ahead: int, missing: int) -> None:
        """Evict content until the disk has ``missing`` more free bytes, and ``ahead`` if it can.

        Waits for the eviction.
        """
        disk_free, reachable = await self._read()
        need = min(disk_free + missing + ahead, reachable)
        eviction = self._evictor.start(need) if need > 0 else None
        if eviction is not None:
            await asyncio.wait({eviction})
