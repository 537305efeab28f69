"""One reader of growing content.

Lives here: waiting for bytes, and what a reader may still have once the content has ended. Must not
know: where the bytes come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, Protocol

from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError
from mirror.oci.reference import Digest
from mirror.store.reader import Extent

PATIENCE: Final = 5.0
"""Seconds that those who are done with what is in memory wait for one who is not."""


class Waiters:
    """Those who wait for bytes that have not come yet."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def wait(self, start: int) -> None:
        """Return once there are bytes at ``start``, or there will be none."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((start, future))
        await future

    def wake(self, head: int, closed: bool) -> None:
        """Bytes up to ``head`` are there; ``closed``: there will be no more. Wakes no others."""
        waiting, self._waiting = self._waiting, []
        for start, future in waiting:
            if future.done():
                continue  # its client has left
            if start < head or closed:
                future.set_result(None)
            else:
                self._waiting.append((start, future))


class Followed(Protocol):
    """What a follower needs of growing content."""

    digest: Digest
    size: int | None
    failure: MirrorError | None
    verified: bool
    followers: set[Follower]

    @property
    def head(self) -> int:
        """Bytes that may be handed out."""

    def holds_all_from(self, start: int) -> bool:
        """Whether every byte from ``start`` on is here, or is still to come."""

    def extent(self, start: int, stop: int) -> Extent:
        """Bytes that are there."""

    async def progress(self, start: int) -> None:
        """Return once there are bytes at ``start``, or there will be none."""

    def moved(self) -> None:
        """A follower has moved on, or left."""


class Follower:
    """One reader of growing content (see :class:`mirror.store.reader.Reader`)."""

    def __init__(self, ingest: Followed, position: int) -> None:
        self._ingest = ingest
        self._open = True
        self.position = position
        ingest.followers.add(self)

    @property
    def digest(self) -> Digest:
        """The name of the content."""
        return self._ingest.digest

    @property
    def size(self) -> int | None:
        """Bytes of the whole content, once the upstream has said so."""
        return self._ingest.size

    @property
    def arrived(self) -> int:
        """Bytes that are there."""
        return self._ingest.head

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """See :meth:`mirror.store.reader.Reader.wait`."""
        ingest = self._ingest
        if not self._open:
            raise ContentLost("this reader is closed")
        if stop is not None and start >= stop:
            return None
        self.position = start
        if ingest.holds_all_from(start):
            ingest.followers.add(self)  # it may have been left behind as too slow
        ingest.moved()
        while True:
            wrong = isinstance(ingest.failure, DigestMismatch)
            if start < ingest.head and not wrong:
                return ingest.extent(start, ingest.head if stop is None else stop)
            if ingest.failure is not None:
                raise ingest.failure
            if ingest.verified:
                return None
            await ingest.progress(start)

    def close(self) -> None:
        """Leave. The fetch goes on. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._ingest.followers.discard(self)
        self._ingest.moved()


def too_slow(followers: Collection[Follower], head: int, floor: int) -> set[Follower]:
    """Those who hold up the others, who wait at ``head``, by what they need before ``floor``.

    They are not waited for any more. One who comes back in time is counted again; later, it finds
    its bytes gone. Alone, they have all the time.
    """
    if all(follower.position < head for follower in followers):
        return set()
    return {follower for follower in followers if follower.position < floor}
