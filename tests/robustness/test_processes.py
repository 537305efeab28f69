"""Rows C7, C10, M, R1, R9: killed or stopped processes, many workers, few descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mirror.oci.reference import Digest
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.process import need, wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.kit import every_file_hashes_to_its_name, is_served, run_in_threads, try_pull
from tests.unit.store.kit import random_bytes

SIZE = 3_000_000
CLIENTS = 16
DATA = random_bytes(8_000_000, 81)


def leader(mirror: Mirror, digest: Digest) -> int:
    """Return the pid of the process that holds the lock of an ingest."""
    ingest = mirror.data_dir / "ingest" / "sha256" / digest.hex
    inode = f":{ingest.stat().st_ino} "
    (pid,) = (int(line.split()[4]) for line in _locks() if inode in line and "WRITE" in line)
    return pid


def _locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


class StalledFetch:
    """Clients in threads that wait for a blob whose upstream has stopped sending."""

    def __init__(self, fake: FakeRegistry, mirror: Mirror, digest: Digest) -> None:
        self.fake, self.mirror, self.digest = fake, mirror, digest
        self._threads = ThreadPoolExecutor(CLIENTS + 4)
        self._clients = [self._attempt() for _ in range(CLIENTS)]

    def _attempt(self) -> asyncio.Future[bool]:
        return self.beside(try_pull, self.mirror, str(self.digest))

    def beside(self, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Run a blocking function in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which is polled."""
        await self.beside(wait_until, condition, "the condition did not become true", 20)

    async def results(self) -> list[bool]:
        """Return whether each client was served, after all have ended."""
        return await asyncio.gather(*self._clients)

    async def again(self) -> bool:
        """Return whether a new client is served."""
        return await self._attempt()


@asynccontextmanager
async def stalled_fetch(
    stall_at: int, gate: asyncio.Event | None = None, **settings: Any
) -> AsyncIterator[StalledFetch]:
    """Build a fetch whose upstream is silent after ``stall_at`` bytes, until ``gate`` is set.

    All clients are connected, and these bytes have arrived.
    """
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=stall_at, gate=gate))
        # The upstream is silent for as long as the test wants.
        upstream = {"endpoints": [fake.url], "limits": {"idle": "150s"}}
        mirror = Mirror({"docker.io": upstream}, **settings)
        try:
            await run_in_thread(mirror.start)
            made = StalledFetch(fake, mirror, digest)
            await fake.stalled.wait()
            ingest = mirror.data_dir / "ingest" / "sha256" / digest.hex
            await made.until(lambda: ingest.stat().st_size == stall_at)
            # the request for the metrics is one more
            await made.until(lambda: mirror.metric("oci_mirror_requests_in_flight") > CLIENTS)
            yield made
        finally:
            await run_in_thread(mirror.close)


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
async def test_followers_continue_when_the_fetching_worker_is_killed(part: float) -> None:
    """Followers in the other process are served, and the upstream sends at most 1 % again."""
    async with stalled_fetch(int(len(DATA) * part), workers=2) as fetch:
        fetch.mirror.kill_worker(leader(fetch.mirror, fetch.digest))
        killed = time.monotonic()
        results = await fetch.results()
        assert set(results) == {True, False}, "the clients of the other worker are served"
        # At once, and not after the ten seconds that a follower waits for a silent lock holder.
        assert fetch.fake.requests[-1].at - killed < 3
        assert await fetch.again()
        assert fetch.fake.count("GET") == 2
        assert fetch.fake.bytes_sent <= len(DATA) * 1.01


@pytest.mark.row("C10-stop-among-pulls")
async def test_sigterm_lets_pulls_end() -> None:
    gate = asyncio.Event()
    async with stalled_fetch(2_000_000, gate, drain_timeout="30s") as fetch:
        stopped = fetch.beside(fetch.mirror.stop, 40)
        await fetch.until(lambda: fetch.mirror.ask("/readyz").status == 503)
        gate.set()
        assert await fetch.results() == [True] * CLIENTS
        assert await stopped == 0
        assert fetch.mirror.content(str(fetch.digest)).exists()


@pytest.mark.row("C10-stop-among-pulls")
async def test_pulls_are_cut_at_the_drain_timeout() -> None:
    async with stalled_fetch(2_000_000, drain_timeout="200ms") as fetch:
        assert await fetch.beside(fetch.mirror.stop, 20) == 0
        assert await fetch.results() == [False] * CLIENTS


@pytest.mark.row("C10-stop-among-pulls")
async def test_sigkill_while_draining_loses_nothing() -> None:
    """Kubernetes does this at its own time limit. The next start serves the blob."""
    async with stalled_fetch(2_000_000, drain_timeout="30s") as fetch:
        os.kill(fetch.mirror.pid, signal.SIGTERM)
        await fetch.until(lambda: fetch.mirror.ask("/readyz").status == 503)
        await fetch.beside(fetch.mirror.kill)
        assert await fetch.results() == [False] * CLIENTS
        every_file_hashes_to_its_name(fetch.mirror.data_dir)
        await run_in_thread(fetch.mirror.start)
        assert await fetch.again()


@pytest.mark.row("M2-stopped-leader")
@pytest.mark.long(60)
@pytest.mark.timeout(200)
async def test_leader_stopped_for_a_minute_delays_only_its_own_clients() -> None:
    gate = asyncio.Event()
    async with stalled_fetch(2_000_000, gate, workers=2) as fetch:
        stopped = leader(fetch.mirror, fetch.digest)
        os.kill(stopped, signal.SIGSTOP)
        try:
            # The followers of the other process fetch by themselves. Those of this process wait.
            await asyncio.sleep(60)
            assert fetch.fake.count("GET") == 2
        finally:
            os.kill(stopped, signal.SIGCONT)
        gate.set()
        assert await fetch.results() == [True] * CLIENTS
        assert await fetch.again()
        every_file_hashes_to_its_name(fetch.mirror.data_dir)


@pytest.mark.row("M1-many-workers")
def test_100_clients_of_4_workers_cost_one_fetch(tried: Callable[[int], None]) -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", 10_000_000)
        with (
            NginxFront(registry.url, limit_rate=6_000_000) as front,
            Mirror({"docker.io": front.url}, workers=4) as mirror,
        ):
            assert run_in_threads(100, lambda _: is_served(mirror, digest)) == [True] * 100
            assert len(front.blob_gets(digest)) == 1
            tried(100)


def is_served_by(mirrors: Sequence[Mirror], digest: str, number: int) -> bool:
    """Return whether one of ``mirrors``, in turn by ``number``, serves a blob."""
    return is_served(mirrors[number % len(mirrors)], digest)


@pytest.mark.row("M6-publish-twice")
@pytest.mark.row("M7-shared-directory")
def test_two_servers_in_one_directory_share_fetches(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    with DockerRegistry() as registry:
        digests = [registry.push_large("library/app", SIZE, seed=n) for n in range(8)]
        with (
            NginxFront(registry.url) as front,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as one,
            Mirror({"docker.io": front.url}, data_dir=tmp_path) as two,
        ):
            for digest in digests:
                served = run_in_threads(8, partial(is_served_by, (one, two), digest))
                assert served == [True] * 8
                assert len(front.blob_gets(digest)) == 1
                tried(1)
            every_file_hashes_to_its_name(one.data_dir)


@pytest.mark.row("R1-few-descriptors")
def test_64_descriptors_serve_one_client_and_overload_does_no_harm() -> None:
    """One client is served as usual. More clients than descriptors do no harm."""
    with DockerRegistry() as registry:
        digest, other = (registry.push_large("library/app", SIZE, seed=n) for n in (1, 2))
        prefix = [need("prlimit"), "--nofile=64"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert is_served(mirror, digest)
            assert any(run_in_threads(60, lambda _: try_pull(mirror, other)))
            assert is_served(mirror, digest)
            assert is_served(mirror, other)
            assert mirror.metric("oci_mirror_digest_mismatches_total") == 0
            every_file_hashes_to_its_name(mirror.data_dir)


@pytest.mark.row("R9-blocked-stdout")
def test_full_stdout_stops_no_pull() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", SIZE)
        prefix = ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"]
        with Mirror({"docker.io": registry.url}, prefix=prefix) as mirror:
            assert is_served(mirror, digest)
