"""The contract of readers, tested on each state that content can be in."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from mirror.oci.errors import ContentLost, DigestMismatch, MirrorError
from mirror.store import blobs as blobs_module
from mirror.store import disk
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.layout import Layout
from mirror.store.reader import Extent, FileExtent, Reader, read_all
from tests.unit.store.kit import (
    Kit,
    go_on,
    kit,
    no_trace,
    pieces,
    put,
    random_bytes,
    read,
)
from tests.waiting import until

DATA = random_bytes(blobs_module.SMALL_BYTES + 700_000, 81)
WRONG = DATA[:-1] + bytes([DATA[-1] ^ 1])


@dataclass
class Scene:
    """Content in one state, and how a test completes it."""

    layout: Layout
    open: Callable[[], Awaitable[Reader]]
    finish: Callable[[], Awaitable[None]]
    """Completes and verifies the content."""
    waits: bool = True
    """Whether a reader has to wait for the end."""
    is_stored: bool = True
    """Whether the content is on disk in the end."""


Making: TypeAlias = Callable[[Path, bytes], AbstractAsyncContextManager[Scene]]


@asynccontextmanager
async def trusted(root: Path, data: bytes) -> AsyncIterator[Scene]:
    with kit(root) as parts:
        digest = await put(parts, DATA)
        parts.layout.blob(digest).write_bytes(data)
        no_trace(parts.layout.blob(digest))

        async def finish() -> None:
            return None

        yield Scene(parts.layout, _finder(parts), finish, waits=False)


@asynccontextmanager
async def ageing(root: Path, data: bytes) -> AsyncIterator[Scene]:
    gate = threading.Event()
    with kit(root, reverify=0) as parts:
        digest = await put(parts, DATA)
        parts.layout.blob(digest).write_bytes(data)
        no_trace(parts.layout.blob(digest))
        for _ in range(4):  # hashing waits for the gate
            parts.pools[3].submit(gate.wait)

        async def finish() -> None:
            gate.set()

        try:
            yield Scene(parts.layout, _finder(parts), finish)
        finally:
            gate.set()


def _finder(parts: Kit) -> Callable[[], Awaitable[Reader]]:
    async def find() -> Reader:
        reader = await parts.blobs.find(DIGEST)
        assert reader
        return reader

    return find


@asynccontextmanager
async def ingest(
    root: Path, data: bytes, *, has_size: bool = True, is_stored: bool = True, resumed_from: int = 0
) -> AsyncIterator[Scene]:
    with kit(root) as parts:
        parts.room[0] = is_stored
        if resumed_from:
            await _leave_file(parts, data[:resumed_from])
        content = Ingest(parts.ingest_context, DIGEST, None)
        assert await content.try_lead() is Role.LEADER
        assert content.position == resumed_from
        await content.declare(len(data) if has_size else None)

        async def follow() -> Reader:
            follower = content.follow()
            assert follower
            return follower

        async with asyncio.TaskGroup() as group:
            first = asyncio.Event()
            fetch = group.create_task(_fetch(content, data, first))

            async def finish() -> None:
                first.set()

            yield Scene(parts.layout, follow, finish, is_stored=is_stored)
            first.set()
            await fetch


async def _leave_file(parts: Kit, data: bytes) -> None:
    """Leave the file of a fetch that failed after ``data``."""
    content = Ingest(parts.ingest_context, DIGEST, None)
    await content.try_lead()
    await content.declare(len(DATA))
    await content.feed(data)
    await content.fail(MirrorError("broken"))
    content.release()


async def _fetch(content: Ingest, data: bytes, first: asyncio.Event) -> None:
    """Feed all chunks but the last, and that one once ``first`` is set."""
    try:
        chunks = pieces(data[content.position :])
        for chunk in chunks[:-1]:
            await content.feed(chunk)
        await first.wait()
        await content.feed(chunks[-1])
        await content.finish()
    except MirrorError as error:
        await content.fail(error)
    finally:
        content.release()


@asynccontextmanager
async def other_process(root: Path, data: bytes, *, has_size: bool = True) -> AsyncIterator[Scene]:
    """Another process's fetch: a ``flock`` belongs to an open file, so two kits act as two."""
    async with ingest(root, data, has_size=has_size) as scene:
        with kit(root) as parts:
            content = Ingest(parts.ingest_context, DIGEST, None)
            assert await content.try_lead() is Role.FOLLOWER

            async def follow() -> Reader:
                follower = content.follow()
                assert follower
                return follower

            async def fetch() -> None:
                try:
                    await go_on(content, DATA)
                except MirrorError as error:
                    await content.fail(error)
                    content.release()

            async with asyncio.TaskGroup() as group:
                group.create_task(fetch())
                yield Scene(scene.layout, follow, scene.finish)
                await scene.finish()


def _with(make: Callable[..., AbstractAsyncContextManager[Scene]], **options: object) -> Making:
    return lambda root, data: make(root, data, **options)


STATES: dict[str, Making] = {
    "trusted": trusted,
    "ageing": ageing,
    "ingest": ingest,
    "ingest, resumed": _with(ingest, resumed_from=1_000_000),
    "ingest, of unknown size": _with(ingest, has_size=False),
    "in memory": _with(ingest, is_stored=False),
    "in memory, of unknown size": _with(ingest, has_size=False, is_stored=False),
    "in another process": other_process,
    "in another process, of unknown size": _with(other_process, has_size=False),
}
DIGEST = blobs_module.Digest.of(DATA)
every_state = pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
every_state_that_waits = pytest.mark.parametrize(
    "make", [make for make in STATES.values() if make is not trusted], ids=list(STATES)[1:]
)


@asynccontextmanager
async def readers(scene: Scene, count: int) -> AsyncIterator[list[Reader]]:
    opened = [await scene.open() for _ in range(count)]
    try:
        yield opened
    finally:
        for reader in opened:
            reader.close()


def taken(extent: Extent, start: int) -> bytes:
    """The bytes of an extent, which must begin at ``start``."""
    assert extent.start == start < extent.stop
    if isinstance(extent, FileExtent):
        return os.pread(extent.fd, extent.stop - start, start)
    return bytes(extent.data)


@every_state
async def test_wait_returns_all_bytes_and_then_none(tmp_path: Path, make: Making) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 3) as opened:
        await scene.finish()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*(read(reader) for reader in opened))
        assert [result == DATA for result in results] == [True] * 3
        for reader in opened:
            assert (reader.digest, reader.size) == (DIGEST, len(DATA))
            assert await reader.wait_for_size() == len(DATA)
            for beyond in (0, 1, 10**9):
                assert await reader.wait(len(DATA) + beyond) is None
                assert await reader.wait(len(DATA) + beyond, 10**12) is None


@every_state
async def test_extents_begin_at_start_and_end_at_stop_at_most(tmp_path: Path, make: Making) -> None:
    chance = random.Random(5)
    edges = sorted(chance.sample(range(len(DATA)), 20))
    async with make(tmp_path, DATA) as scene, readers(scene, 1) as (reader,):
        await scene.finish()
        async with asyncio.timeout(30):
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                position = start
                while position < stop:
                    extent = await reader.wait(position, stop)
                    assert extent
                    assert extent.stop <= stop
                    assert taken(extent, position) == DATA[position : extent.stop]
                    position = extent.stop
                assert await reader.wait(stop, stop) is None
                assert await reader.wait(stop, start) is None
            whole = await reader.wait(edges[-1])
            assert whole
            assert taken(whole, edges[-1]) == DATA[edges[-1] : whole.stop]


@every_state
async def test_closed_reader_raises_content_lost_and_others_read_on(
    tmp_path: Path, make: Making
) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 2) as (gone, stays):
        gone.close()
        gone.close()
        for start in (0, len(DATA)):
            with pytest.raises(ContentLost):
                await gone.wait(start)
        await scene.finish()
        async with asyncio.timeout(30):
            assert await read(stays) == DATA


@every_state_that_waits
async def test_the_last_byte_waits_until_the_digest_is_verified(
    tmp_path: Path, make: Making
) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 2) as (first, last):
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            begin = await first.wait(0)
            assert begin, "bytes that have arrived must not wait"
            assert taken(begin, 0) == DATA[: begin.stop]
            end = group.create_task(last.wait(len(DATA) - 1))
            beyond = group.create_task(last.wait(len(DATA) - 1, len(DATA)))
            rest = group.create_task(read(first))
            done, _ = await asyncio.wait({end, beyond, rest}, timeout=0.05)
            assert not done
            await scene.finish()
        assert rest.result() == DATA
        for task in (end, beyond):
            extent = task.result()
            assert extent
            assert taken(extent, len(DATA) - 1) == DATA[-1:]


@every_state_that_waits
async def test_no_reader_gets_the_end_of_wrong_content(tmp_path: Path, make: Making) -> None:
    async with make(tmp_path, WRONG) as scene, readers(scene, 3) as opened:
        got = [b"", b"", b""]

        async def follow(number: int) -> None:
            while (extent := await opened[number].wait(len(got[number]))) is not None:
                got[number] += taken(extent, len(got[number]))

        tasks = asyncio.gather(*(follow(n) for n in range(3)), return_exceptions=True)
        await scene.finish()
        async with asyncio.timeout(30):
            ends = await tasks
        if make not in (other_process, STATES["in another process, of unknown size"]):
            assert [type(end) for end in ends] == [DigestMismatch] * 3
        for end, data in zip(ends, got, strict=True):
            # A second process may fetch again by itself. Its readers may then get another error, or
            # the right content: here, the second fetch gets the right bytes.
            assert data == DATA if end is None else len(data) < len(DATA)
            assert end is None or isinstance(end, MirrorError)
        published = scene.layout.blob(DIGEST)
        assert not published.exists() or published.read_bytes() == DATA


@every_state_that_waits
async def test_cancelled_wait_does_not_disturb_other_readers(tmp_path: Path, make: Making) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 9) as opened:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            waits = [group.create_task(r.wait(len(DATA) - 1)) for r in opened]
            await asyncio.wait(waits, timeout=0.05)
            for wait in waits[::3]:
                wait.cancel()
            await asyncio.wait(waits[::3])
            await scene.finish()
        for number, wait in enumerate(waits):
            assert wait.cancelled() == (number % 3 == 0)
            if not wait.cancelled():
                extent = wait.result()
                assert extent
                assert taken(extent, len(DATA) - 1) == DATA[-1:]
        async with asyncio.timeout(30):
            assert (await opened[0].wait(len(DATA) - 1)) is not None, (
                "a reader may wait again after a cancelled wait"
            )


@every_state
async def test_open_content_is_not_evicted_and_unlinked_content_stays_readable(
    tmp_path: Path, make: Making
) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 1) as (reader,):
        path = scene.layout.blob(DIGEST)
        await scene.finish()
        async with asyncio.timeout(30):
            assert await read(reader, 0, 1000) == DATA[:1000]
            assert await read(reader, len(DATA) - 1) == DATA[-1:]
        if not scene.is_stored:
            assert not path.exists()
            return
        await until(path.exists)
        # Until the end of the fetch, its exclusive lock protects the content.
        await until(lambda: is_shared(path))
        assert not can_be_evicted(path)
        path.unlink()
        assert await read(reader, 5, 2000) == DATA[5:2000]
        reader.close()


def is_shared(path: Path) -> bool:
    """Whether readers hold leases, and no fetch holds the lock of its own."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return not can_be_evicted(path)


def can_be_evicted(path: Path) -> bool:
    """Whether no reader holds a lease: the check that eviction makes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return disk.try_lock(fd)
    finally:
        os.close(fd)


@every_state
async def test_content_can_be_evicted_after_its_last_reader_is_closed(
    tmp_path: Path, make: Making
) -> None:
    async with make(tmp_path, DATA) as scene:
        async with readers(scene, 2) as (first, second):
            await scene.finish()
            async with asyncio.timeout(30):
                assert await read(first) == DATA
                assert await read(second) == DATA
        path = scene.layout.blob(DIGEST)
        if scene.is_stored:
            await until(lambda: path.exists() and can_be_evicted(path))


@every_state
async def test_read_all_returns_verified_content_up_to_its_limit(
    tmp_path: Path, make: Making
) -> None:
    async with make(tmp_path, DATA) as scene, readers(scene, 2) as (first, second):
        await scene.finish()
        async with asyncio.timeout(30):
            assert await read_all(first, len(DATA)) == DATA
            with pytest.raises(ContentLost, match="more than"):
                await read_all(second, len(DATA) - 1)


async def test_read_all_of_a_file_that_was_cut_raises_content_lost(tmp_path: Path) -> None:
    async with trusted(tmp_path, DATA) as scene, readers(scene, 1) as (reader,):
        os.truncate(scene.layout.blob(DIGEST), 1000)
        with pytest.raises(ContentLost, match="cut"):
            await read_all(reader, len(DATA))
