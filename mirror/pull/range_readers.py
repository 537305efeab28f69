"""Readers of ranges that are requested by themselves, for one client each.

Lives here: the wait for a range, beside a running fetch or without one. Must not know: which ranges
are requested, how a request is sent (:mod:`mirror.pull.aside`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError
from mirror.oci.headers import Span
from mirror.oci.reference import Digest, Repository
from mirror.single_flight import SharedTask
from mirror.store.follower import Follower
from mirror.store.reader import Extent, MemoryExtent

_EXTENT_BYTES: Final = 256 * 1024
"""Bytes that a reader returns at a time: what is sent to a slow client is copied."""

SpanKey: TypeAlias = tuple[Digest, Repository, Span]


@dataclass(slots=True, eq=False)
class AsideRequest:
    """A request for one span, and the number of its readers."""

    key: SpanKey
    task: SharedTask[bytearray]
    readers: int = 0

    @property
    def span(self) -> Span:
        """The requested bytes."""
        return self.key[2]

    @contextmanager
    def when_done(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` soon after the request has ended, if that is within the block."""
        task = self.task.task
        assert task is not None
        has_left = False

        def on_done(_: object) -> None:
            if not has_left:
                callback()

        task.add_done_callback(on_done)
        try:
            yield
        finally:
            has_left = True  # A callback that is scheduled already is not removed.
            task.remove_done_callback(on_done)


class RangesReader:
    """A reader of the spans of some requests (see ``mirror.store.reader.Reader``)."""

    def __init__(
        self,
        size: int,
        asides: Sequence[AsideRequest],
        pull: RequestRecord,
        release: Callable[[AsideRequest], None],
    ) -> None:
        """Create a reader.

        Args:
            size: Bytes of the whole content.
            asides: The requests, one reader of each being this one.
            pull: Record of the client's request. The bytes of the requests are counted there.
            release: Called for each of ``asides`` at the end.
        """
        self._size = size
        self._asides = asides
        self._pull = pull
        self._release = release
        self._is_open = True
        self._counted_to = 0
        """Offset up to which bytes of the requests were counted."""

    @property
    def digest(self) -> Digest:
        """The name of the content."""
        return self._asides[0].key[0]

    @property
    def size(self) -> int | None:
        """Bytes of the whole content."""
        return self._size

    async def wait_for_size(self) -> int | None:
        """Return the size."""
        return self._size

    async def wait_for_all(self) -> None:
        """Wait until all spans have arrived. Raises the error of a request that failed."""
        for aside in self._asides:
            await aside.task.wait()

    def find(self, start: int) -> AsideRequest | None:
        """Return the request for the byte at ``start``. None: it was not requested."""
        has_start = (a for a in self._asides if a.span.start <= start < a.span.stop)
        return next(has_start, None) if self._is_open else None

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """Wait for the byte at ``start`` (see :meth:`mirror.store.reader.Reader.wait`)."""
        if stop is not None and start >= stop:
            return None
        aside = self.find(start)
        if aside is None:
            raise ContentLost("this range was not requested, or its reader is closed")
        data = await aside.task.wait()
        first = start - aside.span.start
        last = min(len(data), first + _EXTENT_BYTES)
        if stop is not None:
            last = min(last, stop - aside.span.start)
        self._pull.outcome = Outcome.ASIDE
        # A caller that takes less than it got asks for the rest again.
        stop = aside.span.start + last
        self._pull.aside_bytes += max(0, stop - max(start, self._counted_to))
        self._counted_to = stop
        return MemoryExtent(memoryview(data)[first:last], start)

    def close(self) -> None:
        """Stop reading. Safe to call twice."""
        if self._is_open:
            self._is_open = False
            for aside in self._asides:
                self._release(aside)


class AsideReader(RangesReader):
    """A follower that takes some spans from aside requests, if they arrive there first."""

    def __init__(
        self,
        follower: Follower,
        asides: Sequence[AsideRequest],
        pull: RequestRecord,
        release: Callable[[AsideRequest], None],
    ) -> None:
        """Create a reader.

        Args:
            follower: Reads the running fetch, whose size is known. Closed with this reader.
            asides: See :class:`RangesReader`.
            pull: See :class:`RangesReader`.
            release: See :class:`RangesReader`.
        """
        assert follower.size is not None
        super().__init__(follower.size, asides, pull, release)
        self._follower = follower

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """Wait for the byte at ``start`` (see :meth:`mirror.store.reader.Reader.wait`)."""
        aside = self.find(start)
        if aside is None:
            return await self._follower.wait(start, stop)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                with aside.when_done(lambda: limit.reschedule(loop.time())):
                    return await self._follower.wait(start, stop)
        except DigestMismatch:
            raise  # The content is wrong, so the range may be wrong, too.
        except (TimeoutError, MirrorError):
            pass  # The range has arrived first, or the fetch has failed. The request decides.
        try:
            return await super().wait(start, stop)
        except MirrorError:
            return await self._follower.wait(start, stop)

    def close(self) -> None:
        """Stop reading. The fetch continues. Safe to call twice."""
        super().close()
        self._follower.close()
