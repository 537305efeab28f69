"""A claim on growing content: one holder at a time, in whichever process it is."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mirror.events import Uncached
from mirror.store import claim, growing
from mirror.store.claim import Role
from mirror.store.growing import Growing
from tests.store_kit import DATA, DIGEST, go_on, kit, read

LEADER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from mirror.store.growing import Growing
    from tests.store_kit import DATA, DIGEST, kit, pieces

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


async def test_another_process_streams_along_and_sees_the_end(tmp_path: Path) -> None:
    process = leader(tmp_path, 1_000_000)
    try:
        with kit(tmp_path) as parts:
            content = Growing(parts.surroundings, DIGEST, None)
            follower = content.follow()
            assert follower
            tailing = asyncio.ensure_future(go_on(content))  # noqa: TID251 - a test
            assert await read(follower, 0, 1_000_000) == DATA[:1_000_000]
            assert content.size == len(DATA)
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert await read(follower, 1_000_000) == DATA[1_000_000:]
            await tailing
            follower.close()
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert parts.layout.blob(DIGEST).read_bytes() == DATA
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
            tailing = asyncio.ensure_future(go_on(content))  # noqa: TID251 - a test
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
            _, got = await asyncio.gather(go_on(content), read(follower))
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
                role = await mine.take(None, 0)
                if role is Role.LEAD:
                    leaders += 1
                    most = max(most, leaders)
                    await asyncio.sleep(0)
                    leaders -= 1
                    mine.drop()
                    await mine.settled()
                    mine.let_go()
                mine.close()

        await asyncio.gather(*(contend(250) for _ in range(4)))
        assert most == 1
