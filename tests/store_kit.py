"""What the tests of growing and whole content share: surroundings without an index."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mirror.events import Event
from mirror.oci.digest import Digest
from mirror.store import disk
from mirror.store.claim import Surroundings
from mirror.store.content import Contents
from mirror.store.layout import Layout
from mirror.store.reader import FileExtent, Reader


def random_bytes(size: int, seed: int = 1) -> bytes:
    """The same bytes for the same seed."""
    return random.Random(seed).randbytes(size)


@dataclass
class Verified:
    """Verification times, in memory."""

    times: dict[Digest, float] = field(default_factory=dict)

    async def verified_at(self, digest: Digest) -> float | None:
        return self.times.get(digest)

    async def set_verified(self, entries: list[tuple[Digest, float]]) -> None:
        self.times.update(entries)


@dataclass
class Kit:
    """One store's worth of parts."""

    layout: Layout
    surroundings: Surroundings
    contents: Contents
    events: list[Event]
    pools: list[ThreadPoolExecutor]
    room: list[bool]


@contextmanager
def kit(root: Path, reverify: float = 86400.0) -> Iterator[Kit]:
    """Parts over ``root``; threads end with the context."""
    layout = Layout(root)
    for directory in (*layout.content_directories(), *layout.ingest_directories()):
        directory.mkdir(parents=True, exist_ok=True)
    pools = [ThreadPoolExecutor(4) for _ in range(4)]
    events: list[Event] = []
    room = [True]

    async def make_room(need: int) -> bool:
        return room[0]

    contents = Contents(
        layout,
        Verified(),
        reverify=reverify,
        opening=pools[2],
        hashing=pools[3],
        emit=events.append,
        now=time.time,
    )
    surroundings = Surroundings(
        layout=layout,
        io=pools[0],
        publishing=pools[1],
        emit=events.append,
        make_room=make_room,
        published=contents.published,
        now=time.time,
        boot=disk.boot_id(),
    )
    try:
        yield Kit(layout, surroundings, contents, events, pools, room)
    finally:
        for pool in pools:
            pool.shutdown()


async def read(reader: Reader, start: int = 0, stop: int | None = None) -> bytes:
    """All that a client would get."""
    parts = []
    position = start
    while stop is None or position < stop:
        extent = await reader.wait(position, stop)
        if extent is None:
            break
        if isinstance(extent, FileExtent):
            import os

            data = os.pread(extent.fd, extent.stop - position, position)
            assert data, "an extent was promised"
        else:
            data = bytes(extent.data)
        parts.append(data)
        position += len(data)
        await asyncio.sleep(0)
    return b"".join(parts)
