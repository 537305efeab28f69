"""Ingests that the disk refuses: they continue in memory, and their followers notice nothing."""

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
from mirror.store import follower as follower_module
from mirror.store import ingest_writer
from mirror.store.follower import Follower
from mirror.store.ingest import RESERVE_STEP_BYTES, Ingest
from mirror.store.ingest_writer import MAX_SHARE_BYTES
from mirror.store.reader import MemoryExtent
from tests.unit.store.kit import DATA, DIGEST, Kit, bring, kit, pieces, random_bytes, read


def in_memory(parts: Kit, digest: Digest, count: int) -> tuple[Ingest, *tuple[Follower, ...]]:
    """An ingest without space on the disk, and ``count`` followers."""
    parts.room[0] = False
    content = Ingest(parts.ingest_context, digest, None)
    return content, *(Follower(content, 0) for _ in range(count))


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.parametrize("limit", [0, 1, 65_535, 1_000_000, len(DATA) - 1])
async def test_full_disk_does_not_fail_a_pull_and_leaves_no_file(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ingest_writer.write_all

    def full(fd: int, chunks: list[bytes], offset: int) -> int:
        end = offset + sum(map(len, chunks))
        if end <= limit:
            return real(fd, chunks, offset)
        room = max(0, limit - offset)
        real(fd, [b"".join(chunks)[:room]], offset)
        raise ingest_writer.ShortWrite(OSError(errno.ENOSPC, "full"), offset + room)

    monkeypatch.setattr(ingest_writer, "write_all", full)
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


async def test_without_space_content_passes_through_bounded_memory(tmp_path: Path) -> None:
    data = random_bytes(40_000_000)
    digest = Digest.of(data)
    with kit(tmp_path) as parts:
        content, follower = in_memory(parts, digest, 1)
        unread = 0

        async def slow() -> bytes:
            nonlocal unread
            got = bytearray()
            while extent := await follower.wait(len(got)):
                assert isinstance(extent, MemoryExtent)
                got += extent.data
                unread = max(unread, content.head - len(got))
                await asyncio.sleep(0)
            return bytes(got)

        _, got = await asyncio.gather(bring(content, data, len(data)), slow())
        assert got == data
        assert unread <= MAX_SHARE_BYTES + 65_536
        follower.close()


async def test_ingest_in_memory_cannot_be_joined_before_its_window(tmp_path: Path) -> None:
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
async def test_follower_that_reads_nothing_is_dropped_when_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "FOLLOWER_TIMEOUT_S", 0.05)
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


async def test_dropped_follower_counts_again_if_it_returns_in_time(
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
        content.on_follower_moved()
        assert await read(slow, 0, 65_536) == DATA[:65_536]
        content.followers -= {slow}
        await slow.wait(0)
        assert content.followers >= {slow}
        content.followers -= {slow}
        await content.feed(DATA[65_536:131_072])
        await quick.wait(131_071)
        content.on_follower_moved()
        with pytest.raises(ContentLost):
            await slow.wait(0)
        assert slow not in content.followers, (
            "its bytes have left memory, so the fetch must not wait for it"
        )
        content.release()
        slow.close()
        quick.close()


async def test_follower_that_reads_nothing_is_not_dropped_when_it_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "FOLLOWER_TIMEOUT_S", 0.01)
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
async def test_content_of_unknown_size_reserves_space_step_by_step(
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
        # each request is for one step, and for the chunk that is held back as the possible end
        step = range(RESERVE_STEP_BYTES, RESERVE_STEP_BYTES + 65_537)
        assert all(need in step for need in asked)
        follower.close()


async def test_content_of_unknown_size_is_published_if_there_is_space(tmp_path: Path) -> None:
    data = random_bytes(30_000_000)
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, Digest.of(data), None)
        await bring(content, data, None)
        assert parts.layout.blob(Digest.of(data)).read_bytes() == data


@pytest.mark.row("D1-no-space-at-a-write")
async def test_short_write_during_a_reservation_keeps_the_order_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes a part of a batch while the fetch waits to reserve the next step."""
    data = random_bytes(12_000_000)
    real, slow = ingest_writer.write_all, threading.Event()

    def write_all(fd: int, chunks: list[bytes], offset: int) -> int:
        if offset == 0:
            return real(fd, chunks, offset)
        slow.wait(30)
        end = real(fd, [b"".join(chunks)[:1000]], offset)
        raise ingest_writer.ShortWrite(OSError(errno.ENOSPC, "full"), end)

    monkeypatch.setattr(ingest_writer, "write_all", write_all)
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


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.parametrize("written", [0, 1000, 65_536])
async def test_short_write_of_a_batch_that_is_in_memory_mode_by_now_keeps_the_order_of_bytes(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed transfer asks for room, and is refused, while the last batch is being written."""
    real, slow = ingest_writer.write_all, threading.Event()

    def write_all(fd: int, chunks: list[bytes], offset: int) -> int:
        slow.wait(30)
        end = real(fd, [b"".join(chunks)[:written]], offset)
        if written == 65_536:
            return end
        raise ingest_writer.ShortWrite(OSError(errno.ENOSPC, "full"), end)

    monkeypatch.setattr(ingest_writer, "write_all", write_all)
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.try_lead()
        await content.declare(len(DATA))
        await content.feed(DATA[:65_536])
        parts.room[0] = False
        await content.declare(len(DATA))
        assert content.window is not None
        asyncio.get_running_loop().call_later(0.05, slow.set)
        _, got = await asyncio.gather(bring(content), read(follower))
        assert got == DATA
        follower.close()
