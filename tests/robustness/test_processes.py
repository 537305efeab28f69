"""Rows C7, C10, M, R1, R9: processes that are killed, stopped, many, or short of everything."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.process import need, wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.kit import at_once, attempt, every_file_hashes_to_its_name, right
from tests.unit.store.kit import random_bytes

SIZE = 3_000_000
CLIENTS = 16
DATA = random_bytes(8_000_000, 81)


def leader(mirror: Mirror, digest: Digest) -> int:
    """The process that holds the lock on growing content."""
    ingest = mirror.data_dir / "ingest" / "sha256" / digest.hex
    inode = f":{ingest.stat().st_ino} "
    (pid,) = (int(line.split()[4]) for line in _locks() if inode in line and "WRITE" in line)
    return pid


def _locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


class SharedTask:
    """Clients in threads, all of whom wait for a blob whose upstream has fallen silent."""

    def __init__(self, fake: FakeRegistry, mirror: Mirror, digest: Digest) -> None:
        self.fake, self.mirror, self.digest = fake, mirror, digest
        self._threads = ThreadPoolExecutor(CLIENTS + 4)
        self._clients = [self._attempt() for _ in range(CLIENTS)]

    def _attempt(self) -> asyncio.Future[bool]:
        return self.beside(attempt, self.mirror, str(self.digest))

    def beside(self, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Do something that blocks, in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what only looking shows."""
        await self.beside(wait_until, condition, "it did not come to that", 20)

    async def results(self) -> list[bool]:
        """Whether each client was served, once all have ended."""
        return await asyncio.gather(*self._clients)

    async def again(self) -> bool:
        """Whether one that comes now is served."""
        return await self._attempt()


@asynccontextmanager
async def shared_task(
    stall_at: int, gate: asyncio.Event | None = None, **settings: Any
) -> AsyncIterator[SharedTask]:
    """Until ``gate`` is set the upstream is silent after so many bytes, which have all arrived."""
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=stall_at, gate=gate))
        mirror = Mirror({"docker.io": fake.url}, **settings)
        try:
            await asyncio.to_thread(mirror.start)
            made = SharedTask(fake, mirror, digest)
            await fake.stalled.wait()
            ingest = mirror.data_dir / "ingest" / "sha256" / digest.hex
            await made.until(lambda: ingest.stat().st_size == stall_at)
            # the question itself is one more
            await made.until(lambda: mirror.metric("oci_mirror_requests_in_flight") > CLIENTS)
            yield made
        finally:
            await asyncio.to_thread(mirror.close)


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
async def test_the_fetching_worker_is_killed(part: float) -> None:
    """Followers in the other process go on, and the upstream sends hardly a byte twice."""
    async with shared_task(int(len(DATA) * part), workers=2) as stage:
        stage.mirror.kill_worker(leader(stage.mirror, stage.digest))
        killed = time.monotonic()
        results = await stage.results()
        assert set(results) == {True, False}, "those of the other worker went on"
        # at once, that is; what it must not wait for is the ten seconds of a holder that is silent
        assert stage.fake.requests[-1].at - killed < 3
        assert await stage.again()
        assert stage.fake.count("GET") == 2
        assert stage.fake.bytes_sent <= len(DATA) * 1.01


@pytest.mark.row("C10-stop-among-pulls")
async def test_a_term_lets_pulls_end() -> None:
    gate = asyncio.Event()
    async with shared_task(2_000_000, gate, drain_timeout="30s") as stage:
        stopped = stage.beside(stage.mirror.stop, 40)
        await stage.until(lambda: stage.mirror.ask("/readyz").status == 503)
        gate.set()
        assert await stage.results() == [True] * CLIENTS
        assert await stopped == 0
        assert stage.mirror.content(str(stage.digest)).exists()


@pytest.mark.row("C10-stop-among-pulls")
async def test_a_limit_ends_the_pulls() -> None:
    async with shared_task(2_000_000, drain_timeout="200ms") as stage:
        assert await stage.beside(stage.mirror.stop, 20) == 0
        assert await stage.results() == [False] * CLIENTS


@pytest.mark.row("C10-stop-among-pulls")
async def test_a_kill_while_pulls_may_end() -> None:
    """As Kubernetes does at its own limit: the next start serves all the same."""
    async with shared_task(2_000_000, drain_timeout="30s") as stage:
        os.kill(stage.mirror.pid, signal.SIGTERM)
        await stage.until(lambda: stage.mirror.ask("/readyz").status == 503)
        await stage.beside(stage.mirror.kill)
        assert await stage.results() == [False] * CLIENTS
        every_file_hashes_to_its_name(stage.mirror.data_dir)
        await asyncio.to_thread(stage.mirror.start)
        assert await stage.again()


@pytest.mark.row("M2-stopped-leader")
@pytest.mark.long
@pytest.mark.timeout(200)
async def test_a_leader_that_is_stopped_for_a_minute() -> None:
    gate = asyncio.Event()
    async with shared_task(2_000_000, gate, workers=2) as stage:
        stopped = leader(stage.mirror, stage.digest)
        os.kill(stopped, signal.SIGSTOP)
        try:
            # the followers of the other process fetch by themselves, those of this one wait
            await asyncio.sleep(60)
            assert stage.fake.count("GET") == 2
        finally:
            os.kill(stopped, signal.SIGCONT)
        gate.set()
        assert await stage.results() == [True] * CLIENTS
        assert await stage.again()
        every_file_hashes_to_its_name(stage.mirror.data_dir)


@pytest.mark.row("M1-many-workers")
def test_four_workers_a_hundred_clients_one_fetch(tried: Callable[[int], None]) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", 10_000_000)
        with (
            NginxFront(registry.url, limit_rate=6_000_000) as front,
            Mirror({"docker.io": front.url}, workers=4) as mirror,
        ):
            assert at_once(100, lambda _: right(mirror, digest)) == [True] * 100
            assert len(front.blob_gets(digest)) == 1
            tried(100)


@pytest.mark.row("M6-publish-twice")
@pytest.mark.row("M7-shared-directory")
def test_two_servers_share_a_directory(tmp_path: Path, tried: Callable[[int], None]) -> None:
    with DockerRegistry() as registry:
        digests = [registry.push_large("library/app", SIZE, seed=n) for n in range(8)]
        with (
            NginxFront(registry.url) as front,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as one,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as two,
        ):
            for digest in digests:
                assert at_once(8, lambda n: right((one, two)[n % 2], digest)) == [True] * 8  # noqa: B023 - it is over before the next
                assert len(front.blob_gets(digest)) == 1
                tried(1)
            every_file_hashes_to_its_name(one.data_dir)


@pytest.mark.row("R1-few-descriptors")
def test_few_descriptors() -> None:
    """One client is served as ever, and more than there are descriptors for do no harm."""
    with DockerRegistry() as registry:
        digest, other = (registry.push_large("library/app", SIZE, seed=n) for n in (1, 2))
        prefix = [need("prlimit"), "--nofile=64"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert right(mirror, digest)
            assert any(at_once(60, lambda _: attempt(mirror, other)))
            assert right(mirror, digest)
            assert right(mirror, other)
            assert mirror.metric("oci_mirror_digest_mismatches_total") == 0
            every_file_hashes_to_its_name(mirror.data_dir)


@pytest.mark.row("R9-blocked-stdout")
def test_stdout_that_takes_nothing() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        prefix = ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert right(mirror, digest)
