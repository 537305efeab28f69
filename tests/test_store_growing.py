"""Growing content: one writer, many followers, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mirror.events import Published, Uncached
from mirror.oci.digest import Digest
from mirror.oci.errors import DigestMismatch, UpstreamProtocolError, UpstreamUnavailable
from mirror.store import claim, disk, growing
from mirror.store.claim import Role
from mirror.store.growing import Growing
from mirror.store.reader import MemoryExtent
from tests.store_kit import Kit, kit, random_bytes, read

DATA = random_bytes(3_000_000)
DIGEST = Digest.of(DATA)


def pieces(data: bytes, size: int = 65_536) -> list[bytes]:
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


async def test_followers_get_all_bytes_and_the_content_is_published(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        followers = [content.follow() for _ in range(8)]
        results = await asyncio.gather(
            bring(content), *(read(follower) for follower in followers if follower)
        )
        assert all(result == DATA for result in results[1:])
        assert parts.layout.blob(DIGEST).read_bytes() == DATA
        assert not list((tmp_path / "ingest" / "sha256").iterdir())
        assert [event for event in parts.events if isinstance(event, Published)]
        for follower in followers:
            assert follower
            follower.close()


async def test_a_follower_streams_before_the_end_is_there(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.lead()
        await content.declare(len(DATA))
        await content.feed(DATA[:1000])
        assert await read(follower, 0, 1000) == DATA[:1000]
        assert follower.size == len(DATA)
        await content.feed(DATA[1000:])
        await content.finish()
        assert await read(follower, 1000) == DATA[1000:]
        content.release()
        follower.close()


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_wrong_bytes_are_never_handed_out_whole(tmp_path: Path, size: int | None) -> None:
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.lead()
        await content.declare(size)
        for piece in pieces(wrong):
            await content.feed(piece)
        with pytest.raises(DigestMismatch) as caught:
            await content.finish()
        assert content.head < len(DATA)
        await content.fail(caught.value)
        with pytest.raises(DigestMismatch):
            await follower.wait(0)
        content.release()
        follower.close()
        assert not parts.layout.blob(DIGEST).exists()
        assert not parts.layout.ingest(DIGEST).exists()


@pytest.mark.parametrize("data", [b"", b"x", random_bytes(65_536), random_bytes(65_537)])
@pytest.mark.parametrize("declared", [True, False])
async def test_every_length_arrives(tmp_path: Path, data: bytes, declared: bool) -> None:
    digest = Digest.of(data, "sha512")
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, digest, None)
        follower = content.follow()
        assert follower
        _, got = await asyncio.gather(
            bring(content, data, len(data) if declared else None), read(follower)
        )
        assert got == data
        assert parts.layout.blob(digest).read_bytes() == data
        follower.close()


async def test_a_fetch_that_stopped_is_resumed_where_it_ended(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        first = Growing(parts.surroundings, DIGEST, None)
        await first.lead()
        await first.declare(len(DATA))
        await first.feed(DATA[:1_000_000])
        await first.fail(UpstreamUnavailable("gone"))
        first.release()
        second = Growing(parts.surroundings, DIGEST, None)
        assert await second.lead() is Role.LEAD
        assert second.position == 1_000_000
        follower = second.follow()
        assert follower
        _, got = await asyncio.gather(bring(second), read(follower))
        assert got == DATA
        follower.close()


@pytest.mark.row("C8")
@pytest.mark.parametrize("garbage", [b"\0" * 4096, random_bytes(4096, 9), b"\0" * 5_000_000])
async def test_garbage_behind_an_ingest_is_not_resumed(tmp_path: Path, garbage: bytes) -> None:
    with kit(tmp_path) as parts:
        first = Growing(parts.surroundings, DIGEST, None)
        await first.lead()
        await first.declare(len(DATA))
        await first.feed(DATA[:1_000_000])
        await first.fail(UpstreamUnavailable("gone"))
        first.release()
        with parts.layout.ingest(DIGEST).open("ab") as file:
            file.write(garbage)
        second = Growing(parts.surroundings, DIGEST, None)
        await bring(second)
        assert parts.layout.blob(DIGEST).read_bytes() == DATA


async def test_more_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        await content.lead()
        await content.declare(10)
        with pytest.raises(UpstreamProtocolError):
            await content.feed(b"x" * 11)
        content.release()


async def test_another_total_is_refused(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        await content.lead()
        await content.declare(10)
        with pytest.raises(UpstreamProtocolError):
            await content.declare(11)
        content.release()


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
            got = b""
            while extent := await follower.wait(len(got)):
                assert isinstance(extent, MemoryExtent)
                got += extent.data
                held = max(held, content.head - len(got))
                await asyncio.sleep(0)
            return got

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


@pytest.mark.row("D4")
@pytest.mark.parametrize("call", ["fsync", "rename", "utime"])
async def test_publishing_that_fails_publishes_nothing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        raise OSError(errno.EIO, "broken")

    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        follower = content.follow()
        assert follower
        with monkeypatch.context() as patch:
            target = Path if call == "rename" else os
            patch.setattr(target, call, broken)
            _, got = await asyncio.gather(bring(content), read(follower))
        assert got == DATA
        assert len(calls) == 1, "what failed once is not tried again"
        assert not parts.layout.blob(DIGEST).exists()
        assert not parts.layout.ingest(DIGEST).exists()
        follower.close()


@pytest.mark.row("L5")
async def test_a_range_far_ahead_waits_without_being_woken(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        ahead = content.follow(2_900_000)
        assert ahead
        waits = 0
        real = content.progress

        async def counted(start: int) -> None:
            nonlocal waits
            waits += 1
            await real(start)

        content.progress = counted  # type: ignore[method-assign] # counts the wake-ups
        _, got = await asyncio.gather(bring(content), read(ahead, 2_900_000, 2_900_100))
        assert got == DATA[2_900_000:2_900_100]
        assert waits == 1
        ahead.close()


async def test_a_waiter_that_is_cancelled_takes_nobody_along(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Growing(parts.surroundings, DIGEST, None)
        followers = [content.follow() for _ in range(10)]
        readers = [asyncio.ensure_future(read(f)) for f in followers if f]  # noqa: TID251 - a test
        await asyncio.sleep(0)
        for reader in readers[::3]:
            reader.cancel()
        await bring(content)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [r == DATA for r in results] == [i % 3 != 0 for i in range(10)]
        for follower in followers:
            assert follower
            follower.close()


# --- across processes -----------------------------------------------------------------------------

LEADER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from mirror.oci.digest import Digest
    from mirror.store.growing import Growing
    from tests.store_kit import kit, random_bytes
    from tests.test_store_growing import DATA, DIGEST, pieces

    async def main():
        with kit(Path(sys.argv[1])) as parts:
            content = Growing(parts.surroundings, DIGEST, None)
            print(await content.lead(), flush=True)
            await content.declare(len(DATA))
            stop = int(sys.argv[2])
            for piece in pieces(DATA[:stop]):
                await content.feed(piece)
            while content.head < min(stop, len(DATA) - 1):
                await asyncio.sleep(0.01)
            print("fed", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            for piece in pieces(DATA[stop:]):
                await content.feed(piece)
            await content.finish()
            content.release()
    asyncio.run(main())
    """
)


def leader(root: Path, stop: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEADER, str(root), str(stop)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout
    assert process.stdout.readline() == b"Role.LEAD\n"
    assert process.stdout.readline() == b"fed\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


async def go_on(content: Growing, parts: Kit) -> None:
    """What the fetch loop does: tail, then lead where it has to."""
    while (role := await content.lead()) is Role.TAIL:
        await content.tail()
    if role is Role.LEAD:
        await bring(content)
    else:
        content.release()


async def test_another_process_streams_along_and_sees_the_end(tmp_path: Path) -> None:
    process = leader(tmp_path, 1_000_000)
    try:
        with kit(tmp_path) as parts:
            content = Growing(parts.surroundings, DIGEST, None)
            follower = content.follow()
            assert follower
            tailing = asyncio.ensure_future(go_on(content, parts))  # noqa: TID251 - a test
            assert await read(follower, 0, 1_000_000) == DATA[:1_000_000]
            assert content.size == len(DATA)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert await read(follower, 1_000_000) == DATA[1_000_000:]
            await tailing
            follower.close()
            assert parts.layout.blob(DIGEST).exists()
    finally:
        end(process)


@pytest.mark.row("C7")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
async def test_a_killed_fetch_is_taken_over_where_it_ended(tmp_path: Path, part: float) -> None:
    stop = int(len(DATA) * part)
    process = leader(tmp_path, stop)
    try:
        with kit(tmp_path) as parts:
            content = Growing(parts.surroundings, DIGEST, None)
            follower = content.follow()
            assert follower
            assert await content.lead() is Role.TAIL
            tailing = asyncio.ensure_future(go_on(content, parts))  # noqa: TID251 - a test
            assert await read(follower, 0, stop) == DATA[:stop]
            killed = time.monotonic()
            end(process)
            await follower.wait(stop)
            assert time.monotonic() - killed < 5
            assert await read(follower, stop) == DATA[stop:]
            await tailing
            follower.close()
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
    finally:
        end(process)


@pytest.mark.row("M2")
async def test_a_stopped_fetch_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "STALLED", 1.5)
    process = leader(tmp_path, 1_000_000)
    try:
        process.send_signal(signal.SIGSTOP)
        with kit(tmp_path) as parts:
            content = Growing(parts.surroundings, DIGEST, None)
            follower = content.follow()
            assert follower
            _, got = await asyncio.gather(go_on(content, parts), read(follower))
            assert got == DATA
            assert [e.reason for e in parts.events if isinstance(e, Uncached)] == ["stalled"]
            process.send_signal(signal.SIGCONT)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdin.close()
            process.stdin = None
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
            follower.close()
    finally:
        end(process)


@pytest.mark.row("M4")
async def test_lock_unlink_lock_again_never_makes_two_leaders(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        leaders = 0
        most = 0

        async def contend(rounds: int) -> None:
            nonlocal leaders, most
            for _ in range(rounds):
                mine = claim.Claim(parts.surroundings, DIGEST)
                role = await asyncio.to_thread(mine.take, None, 0)
                if role is Role.LEAD:
                    leaders += 1
                    most = max(most, leaders)
                    await asyncio.sleep(0)
                    leaders -= 1
                    mine.drop()
                    mine.let_go()
                mine.close()

        await asyncio.gather(*(contend(250) for _ in range(4)))
        assert most == 1
