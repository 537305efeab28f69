"""The memory for manifests that clients push: one limit for all of them.

Lives here: how many bytes all may hold, who waits, for how long, and who gives way. Must not know:
HTTP, what a manifest is.

Theory of operation: usual manifests have 1 to 20 KiB, and never wait. A large one takes memory as
its bytes arrive, as long as that leaves room for one of the largest size. After that, it waits
until it can have all that it lacks, in the order of arrival. So one that waits has only to wait for
some that need nothing more, and no two wait for each other. If the first one waits for clients
that send slowly or not at all, the slowest of them give way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import TooManyRequests

_LIMIT_BYTES: Final = 32 * 1024 * 1024
"""Bytes of all large manifests that are received, parsed and stored at a time: eight of the largest
size. A server that takes 50 pushes at once stays below 150 MiB."""
UNCOUNTED_BYTES: Final = 64 * 1024
"""Bytes that each manifest may have anyway. A connection costs as much."""
_WAIT_S: Final = 10.0
"""Seconds that a large manifest waits for others. Clients time out after about 30 s."""
_LOOK_S: Final = 0.25
"""Seconds after which the first one that waits looks again for others that give way."""
MIN_BYTES_PER_S: Final = 16 * 1024
"""Rate of a client at least, beside the silence that it is permitted: a line of 128 kbit/s."""
_HALF_LIFE_S: Final = 1.5
"""Seconds after which received bytes count half as recent."""
_SLOW_BYTES: Final = 512 * 1024
"""A client with fewer recent bytes gives way: it sends less than about 240 KiB/s. No more than
twice as many count, so a client that stops is slow after a half-life."""


class ManifestMemory:
    """The memory that all manifests which are pushed to one process may hold."""

    def __init__(self, limit: int = _LIMIT_BYTES) -> None:
        """Start with no manifest. ``limit``: bytes. No manifest may have more."""
        self._free = limit
        self._parsing = asyncio.Lock()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.receiving: set[ManifestShare] = set()
        """The shares that wait for nothing but their clients."""

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

    def try_take(self, count: int, reserve: int = 0) -> bool:
        """Take ``count`` bytes if nobody waits, and ``reserve`` bytes are left."""
        if self._waiting or self._free - count < reserve:
            return False
        self._free -= count
        return True

    async def take(self, count: int) -> None:
        """Take ``count`` bytes, after those that wait already. Raises ``TooManyRequests``."""
        if self.try_take(count):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            async with asyncio.timeout(_WAIT_S):
                while not turn.done():
                    if self._waiting[0][1] is turn:
                        self._let_slowest_give_way(count)
                    await asyncio.wait([turn], timeout=_LOOK_S)
        except BaseException as error:
            if turn.done():
                self._free += count  # Its turn came at the same moment.
            with suppress(ValueError):
                self._waiting.remove((count, turn))
            self._let_next_in()
            if not isinstance(error, TimeoutError):
                raise
            raise _too_many() from None

    def give_back(self, count: int) -> None:
        """Free ``count`` bytes."""
        self._free += count
        self._let_next_in()

    def _let_next_in(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            self._free -= count
            turn.set_result(None)

    def _let_slowest_give_way(self, count: int) -> None:
        """Let the slowest shares give way until ``count`` bytes are about to be free."""
        now = asyncio.get_running_loop().time()
        missing = count - self._free
        found = [(one.recent_bytes(now), id(one), one) for one in self.receiving if one.held]
        for recent, _, share in sorted(found):
            if missing <= 0 or recent >= _SLOW_BYTES:
                return
            share.give_way(now)
            missing -= share.held


class ManifestShare:
    """The memory that one manifest holds. Created by :meth:`ManifestMemory.share`."""

    def __init__(self, memory: ManifestMemory) -> None:
        """Hold nothing yet."""
        self.held = 0
        """Bytes that it holds."""
        self._memory = memory
        self._size = 0
        self._silence = 0.0
        self._deadline = asyncio.timeout(None)
        self._recent = 2.0 * _SLOW_BYTES
        self._progress_at = 0.0
        self._has_given_way = False

    @asynccontextmanager
    async def receiving(self, silence: float) -> AsyncIterator[None]:
        """Receive the manifest in the block, by :meth:`reach` for each part of it.

        Args:
            silence: Seconds for which the client may send nothing. They are used up while it sends
                less than :data:`MIN_BYTES_PER_S`, and come back while it sends more.

        Raises:
            TimeoutError: The client is too slow.
            TooManyRequests: It has given way to another one.
        """
        self._progress_at = asyncio.get_running_loop().time()
        self._silence = silence
        self._deadline = asyncio.timeout_at(self._progress_at + silence)
        try:
            async with self._deadline:
                self._memory.receiving.add(self)
                yield
        except TimeoutError:
            if not self._has_given_way:
                raise
            raise _too_many() from None
        finally:
            self._memory.receiving.discard(self)

    async def reach(self, size: int, most: int) -> None:
        """Wait until the manifest may have ``size`` bytes. Raises ``TooManyRequests``.

        Args:
            size: Its bytes so far.
            most: The bytes that it may have in the end. All are taken once it has to wait.
        """
        self._record_progress(size)
        if size <= max(UNCOUNTED_BYTES, self.held):
            return
        if self._memory.try_take(size - self.held, reserve=MANIFEST_LIMIT):
            self.held = size
            return
        with self._paused():
            await self._memory.take(most - self.held)
        self.held = most

    def shrink(self, size: int) -> None:
        """Hold no more than ``size`` bytes."""
        surplus = max(0, self.held - size)
        self.held -= surplus
        self._memory.give_back(surplus)

    def recent_bytes(self, now: float) -> float:
        """Return how many bytes have come lately. ``now``: seconds, as of the event loop."""
        return float(self._recent * 0.5 ** ((now - self._progress_at) / _HALF_LIFE_S))

    def give_way(self, now: float) -> None:
        """Let :meth:`receiving` raise ``TooManyRequests``. ``now``: as of the event loop."""
        self._memory.receiving.discard(self)
        self._has_given_way = True
        self._deadline.reschedule(now)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Wait for others in the block. Its time does not count: the client cannot send."""
        receiving, end = self._memory.receiving, self._deadline.when()
        if self not in receiving or end is None:
            yield
            return
        receiving.discard(self)
        self._deadline.reschedule(None)
        yield
        waited = asyncio.get_running_loop().time() - self._progress_at
        self._progress_at += waited
        self._deadline.reschedule(end + waited)
        receiving.add(self)

    def _record_progress(self, size: int) -> None:
        now = asyncio.get_running_loop().time()
        count = size - self._size
        self._recent = min(2.0 * _SLOW_BYTES, self.recent_bytes(now) + count)
        self._size, self._progress_at = size, now
        if self in self._memory.receiving:
            earned = (self._deadline.when() or now) + count / MIN_BYTES_PER_S
            self._deadline.reschedule(min(now + self._silence, earned))


def _too_many() -> TooManyRequests:
    return TooManyRequests(
        "too many large manifests are pushed at the same time: try again later",
        retry_after=_WAIT_S,
    )
