"""Growing content that no disk takes: it goes on in memory, and its followers notice nothing."""

from __future__ import annotations

import asyncio
import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.observability.events import Uncached
from mirror.oci.errors import ContentLost
from mirror.oci.reference import Digest
from mirror.store import disk, ingest
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.reader import MemoryExtent
from tests.unit.store.kit import DATA, DIGEST, Kit, bring, kit, pieces, random_bytes, read


def in_memory(parts: Kit, digest: Digest, count: int) -> tuple[Ingest, *tuple[Follower, ...]]:
    """Content that finds no room on the disk, and ``count`` that follow it."""
    parts.room[0] = False
    content = Ingest(parts.ingest_context, digest, None)
    return content, *(Follower(content, 0) for _ in range(count))


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.parametrize("limit", [0, 1, 65_535, 1_000_000, len(DATA) - 1])
async def test_a_disk_that_is_full_does_not_fail_a_pull(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.write_all

    def full(fd: int, chunks: list[bytes], offset: int) -> int:
        end = offset + sum(map(len, chunks))
        if end <= limit:
            return real(fd, chunks, offset)
        room = max(0, limit - offset)
        real(fd, [b"".join(chunks)[:room]], offset)
        raise disk.ShortWrite(OSError(errno.ENOSPC, "full"), offset + room)

    monkeypatch.setattr(disk, "write_all", full)
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        followers = [content.follow() for _ in range(3)]
        results = await asyncio.gather(
            bring(content), *(read(follower) for follower in followers if follower)
        )
        assert all(result == DATA for result in results[1:])
        assert not parts.layout.blob(DIGEST).exists()
        assert [e.reason for e in parts.events if isinstance(e, Uncached)] == ["full"]
        for follower in followers:
            assert follower
            follower.close()
        assert not list((tmp_path / "ingest" / "sha256").iterdir())


async def test_no_room_means_memory_and_bounded(tmp_path: Path) -> None:
    data = random_bytes(40_000_000)
    digest = Digest.of(data)
    with kit(tmp_path) as parts:
        content, follower = in_memory(parts, digest, 1)
        held = 0

        async def slow() -> bytes:
            nonlocal held
            got = bytearray()
            while extent := await follower.wait(len(got)):
                assert isinstance(extent, MemoryExtent)
                got += extent.data
                held = max(held, content.head - len(got))
                await asyncio.sleep(0)
            return bytes(got)

        _, got = await asyncio.gather(bring(content, data, len(data)), slow())
        assert got == data
        assert held <= 2 * ingest.PENDING_LIMIT + 65_536
        follower.close()


async def test_memory_that_has_moved_on_is_not_joined(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content, follower = in_memory(parts, DIGEST, 1)
        await content.try_lead()
        await content.declare(len(DATA))
        for piece in pieces(DATA[:1_000_000]):
            await content.feed(piece)
        assert await read(follower, 0, 500_000) == DATA[:500_000]
        await follower.wait(500_000)
        assert content.follow(0) is None
        late = content.follow(500_000)
        assert late
        assert await read(late, 500_000, 600_000) == DATA[500_000:600_000]
        content.release()
        follower.close()
        late.close()


@pytest.mark.row("D1-no-space-at-a-write")
async def test_one_that_reads_nothing_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PATIENCE", 0.05)
    data = random_bytes(40_000_000)
    with kit(tmp_path) as parts:
        content, stuck, *others = in_memory(parts, Digest.of(data), 3)
        fetch = asyncio.gather(bring(content, data, len(data)), *map(read, others))
        await stuck.wait(0)
        assert (await fetch)[1:] == [data, data]
        with pytest.raises(ContentLost):
            await stuck.wait(1_000_000)
        for follower in (stuck, *others):
            follower.close()


async def test_one_that_was_left_behind_and_comes_back_in_time_is_waited_for_again(
    tmp_path: Path,
) -> None:
    with kit(tmp_path) as parts:
        content, slow, quick = in_memory(parts, DIGEST, 2)
        await content.try_lead()
        await content.declare(len(DATA))
        await content.feed(DATA[:65_536])
        await quick.wait(0)
        content.followers -= {slow}
        await slow.wait(0)
        await quick.wait(65_535)
        content.moved()
        assert await read(slow, 0, 65_536) == DATA[:65_536]
        content.followers -= {slow}
        await slow.wait(0)
        assert content.followers >= {slow}
        content.followers -= {slow}
        await content.feed(DATA[65_536:131_072])
        await quick.wait(131_071)
        content.moved()
        with pytest.raises(ContentLost):
            await slow.wait(0)
        assert slow not in content.followers, "what it needs has gone: nobody waits for it"
        content.release()
        slow.close()
        quick.close()


async def test_one_that_reads_nothing_is_waited_for_where_nobody_else_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PATIENCE", 0.01)
    data = random_bytes(20_000_000)
    with kit(tmp_path) as parts:
        content, follower = in_memory(parts, Digest.of(data), 1)
        fetch = asyncio.gather(bring(content, data, len(data)))
        await follower.wait(0)
        await asyncio.sleep(0.2)
        assert content.followers == {follower}
        assert await read(follower) == data
        await fetch
        follower.close()


@pytest.mark.row("R8-beyond-the-quota")
@pytest.mark.parametrize("granted", [0, 1, 3])
async def test_content_of_unknown_size_asks_for_room_as_it_grows(
    tmp_path: Path, granted: int
) -> None:
    data = random_bytes(30_000_000)
    digest = Digest.of(data)
    asked: list[int] = []
    with kit(tmp_path) as parts:

        async def make_room(need: int) -> bool:
            asked.append(need)
            return len(asked) <= granted

        content = Ingest(replace(parts.ingest_context, make_room=make_room), digest, None)
        follower = content.follow()
        assert follower
        _, got = await asyncio.gather(bring(content, data, None), read(follower))
        assert got == data
        assert not parts.layout.blob(digest).exists()
        assert [e.reason for e in parts.events if isinstance(e, Uncached)] == ["full"]
        assert len(asked) == granted + 1
        # beside what it wants to come, a piece that waits to be known as the last one or not
        step = range(ingest.PENDING_LIMIT, ingest.PENDING_LIMIT + 65_537)
        assert all(need in step for need in asked)
        follower.close()


async def test_content_of_unknown_size_is_kept_where_there_is_room(tmp_path: Path) -> None:
    data = random_bytes(30_000_000)
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, Digest.of(data), None)
        await bring(content, data, None)
        assert parts.layout.blob(Digest.of(data)).read_bytes() == data


@pytest.mark.row("D1-no-space-at-a-write")
async def test_a_disk_that_fills_up_while_room_is_asked_for_mixes_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes while a batch is on its way, of which the disk takes a part."""
    data = random_bytes(12_000_000)
    real, slow = disk.write_all, threading.Event()

    def write_all(fd: int, chunks: list[bytes], offset: int) -> int:
        if offset == 0:
            return real(fd, chunks, offset)
        slow.wait(30)
        end = real(fd, [b"".join(chunks)[:1000]], offset)
        raise disk.ShortWrite(OSError(errno.ENOSPC, "full"), end)

    monkeypatch.setattr(disk, "write_all", write_all)
    with kit(tmp_path) as parts:
        asked = 0

        async def make_room(need: int) -> bool:
            nonlocal asked
            asked += 1
            return asked == 1

        content = Ingest(replace(parts.ingest_context, make_room=make_room), Digest.of(data), None)
        follower = content.follow()
        assert follower
        fetch = asyncio.ensure_future(bring(content, data, None))  # noqa: TID251 - a test
        assert await read(follower, 0, 1000) == data[:1000]
        asyncio.get_running_loop().call_later(0.05, slow.set)
        assert await read(follower, 1000) == data[1000:]
        await fetch
        follower.close()
