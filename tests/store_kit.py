"""What the tests of growing and whole content share: surroundings without an index."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mirror.events import Event
from mirror.oci.digest import Digest
from mirror.store import disk
from mirror.store.claim import Role, Surroundings
from mirror.store.content import Contents
from mirror.store.growing import Growing
from mirror.store.layout import Layout
from mirror.store.reader import FileExtent, Reader
from tests.real.process import need


def random_bytes(size: int, seed: int = 1) -> bytes:
    """The same bytes for the same seed."""
    return random.Random(seed).randbytes(size)


DATA = random_bytes(3_000_000)
DIGEST = Digest.of(DATA)


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
            data = os.pread(extent.fd, extent.stop - position, position)
            assert data, "an extent was promised"
        else:
            data = bytes(extent.data)
        parts.append(data)
        position += len(data)
        await asyncio.sleep(0)
    return b"".join(parts)


# --- growing content ------------------------------------------------------------------------------


def pieces(data: bytes, size: int = 65_536) -> list[bytes]:
    """``data`` as an upstream sends it."""
    return [data[i : i + size] for i in range(0, len(data), size)]


async def bring(content: Growing, data: bytes = DATA, size: int | None = len(DATA)) -> None:
    """A fetch that goes well, from wherever it is to be resumed."""
    assert await content.lead() is Role.LEAD
    await content.declare(size)
    for piece in pieces(data[content.position :]):
        await content.feed(piece)
        await asyncio.sleep(0)
    await content.finish()
    content.release()


async def go_on(content: Growing, data: bytes = DATA) -> None:
    """What a fetch does beside another process's: follow it, then lead where it has to."""
    while (role := await content.lead()) is Role.TAIL:
        await content.tail()
    if role is Role.LEAD:
        await bring(content, data, len(data))
    else:
        content.release()


# --- whole content --------------------------------------------------------------------------------


async def put(parts: Kit, data: bytes) -> Digest:
    """Content as publishing leaves it."""
    digest = Digest.of(data)
    path = parts.layout.blob(digest)
    path.write_bytes(data)
    no_trace(path)
    await parts.contents.published(digest)
    return digest


def flip(path: Path, offset: int) -> None:
    """One wrong bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def no_trace(path: Path) -> None:
    """Times as we set them: what was done to the file was rot, and not a stranger's write."""
    now = int(time.time())
    os.utime(path, (now, now))


# --- disks ----------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, size: str = "2m") -> Iterator[Path]:
    """A disk of its own. Needs root, as the suite has it in a container."""
    path.mkdir(parents=True, exist_ok=True)
    mount = [need("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run([need("umount"), "-l", path], check=True)


def make_read_only(path: Path) -> None:
    """From now on the disk at ``path`` takes nothing."""
    subprocess.run([need("mount"), "-o", "remount,ro", path], check=True)


def fill_up(path: Path) -> None:
    """Take all that the disk at ``path`` has left."""
    fill = [need("dd"), "if=/dev/zero", f"of={path}/filler", "bs=4k"]
    assert subprocess.run(fill, capture_output=True).returncode != 0
