"""The lock of an ingest: one holder at a time in all processes, also after kills and cancels."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mirror.observability.events import Uncached
from mirror.oci.errors import UpstreamUnavailable
from mirror.store import disk, ingest_lock, other_process
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.threads import run_in_thread
from tests.unit.store.kit import DATA, DIGEST, bring, flip, go_on, kit, put, read
from tests.waiting import until

LEADER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from mirror.store.ingest import Ingest
    from tests.unit.store.kit import DATA, DIGEST, kit, pieces

    async def main():
        with kit(Path(sys.argv[1])) as parts:
            content = Ingest(parts.ingest_context, DIGEST, None)
            print(await content.try_lead(), flush=True)
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
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout
    assert process.stdout.readline() == b"Role.LEADER\n"
    assert process.stdout.readline() == b"fed\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


async def test_second_process_reads_along_until_the_content_is_published(tmp_path: Path) -> None:
    process = leader(tmp_path, 1_000_000)
    try:
        with kit(tmp_path) as parts:
            content = Ingest(parts.ingest_context, DIGEST, None)
            follower = content.follow()
            assert follower
            following = asyncio.ensure_future(go_on(content))  # noqa: TID251 - a test
            assert await read(follower, 0, 1_000_000) == DATA[:1_000_000]
            assert content.size == len(DATA)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert await read(follower, 1_000_000) == DATA[1_000_000:]
            await following
            follower.close()
            assert await run_in_thread(process.wait, 20) == 0
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
    finally:
        end(process)


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
async def test_the_fetch_of_a_killed_process_is_taken_over_within_5_seconds(
    tmp_path: Path, part: float
) -> None:
    stop = int(len(DATA) * part)
    process = leader(tmp_path, stop)
    try:
        with kit(tmp_path) as parts:
            content = Ingest(parts.ingest_context, DIGEST, None)
            follower = content.follow()
            assert follower
            assert await content.try_lead() is Role.FOLLOWER
            following = asyncio.ensure_future(go_on(content))  # noqa: TID251 - a test
            assert await read(follower, 0, stop) == DATA[:stop]
            killed = time.monotonic()
            end(process)
            await follower.wait(stop)
            assert time.monotonic() - killed < 5
            assert await read(follower, stop) == DATA[stop:]
            await following
            follower.close()
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
    finally:
        end(process)


@pytest.mark.row("M2-stopped-leader")
async def test_follower_of_a_stopped_process_continues_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_process, "STALLED_S", 1.5)
    process = leader(tmp_path, 1_000_000)
    try:
        process.send_signal(signal.SIGSTOP)
        with kit(tmp_path) as parts:
            content = Ingest(parts.ingest_context, DIGEST, None)
            follower = content.follow()
            assert follower
            _, got = await asyncio.gather(go_on(content), read(follower))
            assert got == DATA
            assert [e.reason for e in parts.events if isinstance(e, Uncached)] == ["stalled"]
            process.send_signal(signal.SIGCONT)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdin.close()
            process.stdin = None
            assert await run_in_thread(process.wait, 20) == 0
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
            follower.close()
    finally:
        end(process)


@pytest.mark.row("M4-relocking")
async def test_repeated_lock_and_unlink_never_makes_two_leaders(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        leaders = 0
        most = 0

        async def contend(rounds: int) -> None:
            nonlocal leaders, most
            for _ in range(rounds):
                mine = ingest_lock.IngestLock(parts.ingest_context, DIGEST)
                role = await mine.try_acquire(None, 0)
                if role is Role.LEADER:
                    leaders += 1
                    most = max(most, leaders)
                    await asyncio.sleep(0)
                    leaders -= 1
                    mine.remove_file()
                    await mine.wait_for_threads()
                mine.release()

        await asyncio.gather(*(contend(250) for _ in range(4)))
        assert most == 1


# --- threads outlive cancelled waiters ------------------------------------------------------------


def descriptors(root: Path) -> list[str]:
    """The files below a data directory that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in found if name.startswith(f"{root}/")]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], threading.Event]]:
    """``gate(name)`` makes that function of ``disk`` wait until the returned event is set."""
    gates = []

    def close(name: str) -> threading.Event:
        event, real = threading.Event(), getattr(disk, name)
        gates.append(event)

        def wait(*arguments: object) -> object:
            event.wait(30)
            return real(*arguments)

        monkeypatch.setattr(disk, name, wait)
        return event

    yield close
    for event in gates:
        event.set()


@pytest.mark.parametrize("call", ["open_ingest", "try_lock", "write_state"])
async def test_fetch_cancelled_while_it_locks_leaves_no_lock_and_no_descriptor(
    tmp_path: Path, call: str, gate: Callable[[str], threading.Event]
) -> None:
    opened = gate(call)
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        fetch = asyncio.ensure_future(content.try_lead())  # noqa: TID251 - a test
        await asyncio.sleep(0.05)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        content.release()
        opened.set()
        await content.lock.wait_for_threads()
        await until(lambda: not descriptors(tmp_path))
        again = Ingest(parts.ingest_context, DIGEST, None)
        await bring(again)
        assert parts.layout.blob(DIGEST).read_bytes() == DATA


async def test_fetch_cancelled_while_it_publishes_still_publishes(
    tmp_path: Path, gate: Callable[[str], threading.Event]
) -> None:
    synced = gate("publish")
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        fetch = asyncio.ensure_future(bring(content))  # noqa: TID251 - a test
        assert await read(follower) == DATA
        await asyncio.sleep(0)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        content.release()
        follower.close()
        assert descriptors(tmp_path), "the thread still needs the file"
        synced.set()
        await until(lambda: not descriptors(tmp_path))
        assert parts.layout.blob(DIGEST).read_bytes() == DATA


async def test_followers_learn_of_a_failure_while_the_disk_hangs(
    tmp_path: Path, gate: Callable[[str], threading.Event]
) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        followers = [content.follow() for _ in range(100)]
        await content.try_lead()
        await content.declare(len(DATA))
        await content.feed(DATA[:1000])
        await until(lambda: content.head == 1000)
        hangs = gate("write_state")
        waits = [asyncio.ensure_future(f.wait(1000)) for f in followers if f]  # noqa: TID251 - a test
        await asyncio.sleep(0)
        failing = asyncio.ensure_future(content.fail(UpstreamUnavailable("gone")))  # noqa: TID251 - a test
        async with asyncio.timeout(10):
            results = await asyncio.gather(*waits, return_exceptions=True)
        assert [str(result) for result in results] == ["gone"] * 100
        assert not failing.done()
        hangs.set()
        await failing
        content.release()
        for follower in followers:
            assert follower
            follower.close()
        assert not descriptors(tmp_path)


async def test_content_published_before_the_lock_was_taken_is_hashed_before_use(
    tmp_path: Path,
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, DATA)
        content = Ingest(parts.ingest_context, digest, None)
        assert await content.try_lead() is Role.DONE
        follower = content.follow()
        assert follower
        assert await read(follower) == DATA
        content.release()
        follower.close()
        flip(parts.layout.blob(digest), 1000)
        content = Ingest(parts.ingest_context, digest, None)
        await bring(content)
        assert parts.layout.blob(digest).read_bytes() == DATA
        assert parts.layout.quarantine(digest).exists()
        assert not descriptors(tmp_path)
        assert not list(parts.layout.ingest(digest).parent.iterdir())


@pytest.mark.row("D12-odd-files")
async def test_link_at_the_ingest_path_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"stays")
    with kit(tmp_path) as parts:
        parts.layout.ingest(DIGEST).symlink_to(target)
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        _, got = await asyncio.gather(bring(content), read(follower))
        assert got == DATA, "it must be served although it is not stored"
        follower.close()
    assert target.read_bytes() == b"stays"
