"""Growing content that no disk takes: it goes on in memory, and its followers notice nothing."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from mirror.events import Uncached
from mirror.oci.digest import Digest
from mirror.store import disk, growing
from mirror.store.growing import Growing
from mirror.store.reader import MemoryExtent
from tests.store_kit import DATA, DIGEST, bring, kit, pieces, random_bytes, read


@pytest.mark.row("D1")
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
        content = Growing(parts.surroundings, DIGEST, None)
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
        parts.room[0] = False
        content = Growing(parts.surroundings, digest, None)
        follower = content.follow()
        assert follower
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
        assert held <= 2 * growing.PENDING_LIMIT + 65_536
        follower.close()


async def test_memory_that_has_moved_on_is_not_joined(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        parts.room[0] = False
        content = Growing(parts.surroundings, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.lead()
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
