"""Rows C7, D2, L1, U1, U4, U6, U9 with several connections for one blob."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mirror.config.settings import Limits, Parallel, Storage
from mirror.observability.events import BackedOff, DigestMismatched, Uncached
from mirror.oci.reference import Digest
from mirror.pull import ramp, trial
from mirror.store import ingest_writer
from mirror.threads import run_in_thread
from tests.fakes.registry import Answer, FakeRegistry, Fault, ReceivedRequest
from tests.real.process import wait_until
from tests.real.server import Mirror
from tests.robustness.kit import every_file_hashes_to_its_name, run_in_threads, try_pull
from tests.robustness.test_processes import leader
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes
from tests.waiting import until

DATA = random_bytes(4_000_000, 1101)
PART = 65_536
PARALLEL = Parallel(part=PART)
LOST = 1_048_576
"""Bytes that may be sent twice: those in the buffers of a connection that ends early, as the first
one does, and responses that the first one has overtaken. They do not depend on the size of a blob.
Of 512 MiB they are 0.2 % (tests/unit/pull/test_parallel.py has that blob, in virtual time)."""


@pytest.fixture(autouse=True)
def quick_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a connection be added after a moment, so that blobs may be small."""
    monkeypatch.setattr(ramp, "MEASURE_S", 0.05)
    monkeypatch.setattr(ramp, "_MIN_REMAINING_S", 0.1)
    monkeypatch.setattr(trial, "_MIN_BYTES", 32_768)
    monkeypatch.setattr(trial, "_MIN_LEFT_S", 0.05)
    monkeypatch.setattr(ramp, "_MAX_PAUSED", 1.0)  # On a busy machine, the reader takes most of it.


@asynccontextmanager
async def slow_upstream(
    root: Path, *endpoints: str, **more: Any
) -> AsyncIterator[tuple[FakeRegistry, Server, Digest]]:
    """Serve a blob whose upstream sends 4 MB/s by each connection."""
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        fake.blob_rate = 4_000_000
        async with running(root, fake.url, *endpoints, parallel=PARALLEL, **more) as server:
            yield fake, server, digest


async def pull(server: Server, digest: Digest) -> bool:
    """Return whether a blob is served. Asserts that no complete response has wrong bytes."""
    try:
        status, _, body = await server.get(server.blob(digest))
    except aiohttp.ClientError:
        return False
    assert status != 200 or Digest.of(body) == digest
    return status == 200


async def test_blob_is_fetched_by_several_connections_and_each_byte_once(tmp_path: Path) -> None:
    async with slow_upstream(tmp_path) as (fake, server, digest):
        assert await asyncio.gather(*(pull(server, digest) for _ in range(4))) == [True] * 4
        await server.store.idle()
        assert fake.most_transfers > 1
        assert fake.bytes_sent <= len(DATA) + LOST
        assert server.store.memory.total == 0
        first = next(record for record in await server.records() if record.outcome == "miss")
        assert 2 <= first.connections <= fake.most_transfers
        every_file_hashes_to_its_name(tmp_path)
        assert await pull(server, digest)
        await until(lambda: fake.transfers == 0)


@pytest.mark.row("U1-reset-at-a-byte")
@pytest.mark.parametrize("seed", range(4))
async def test_connections_that_break_at_random_lose_nothing(
    tmp_path: Path, seed: int, tried: Callable[[int], None]
) -> None:
    rng = random.Random(seed)
    async with slow_upstream(tmp_path) as (fake, server, digest):
        path = f"blobs/{digest}"
        fake.fault(path, Fault(reset_at=rng.randrange(1_000_000, 3_000_000)))
        for _ in range(12):
            at = rng.choice([0, 1, PART - 1, rng.randrange(PART)])
            fake.fault(path, rng.choice([Fault(reset_at=at), Fault(end_at=at), Fault()]))
        assert await pull(server, digest)
        assert server.store.memory.total == 0
        await until(lambda: fake.transfers == 0)
        tried(12)


@pytest.mark.row("U6-wrong-bit")
async def test_wrong_bit_of_one_part_is_served_to_nobody_and_the_next_try_is_by_one_connection(
    tmp_path: Path,
) -> None:
    async with slow_upstream(tmp_path) as (fake, server, digest):
        path = f"blobs/{digest}"
        # The whole body is flipped before the range is cut from it.
        fake.fault(path, Fault(), Fault(), Fault(flip=len(DATA) - 10, times=None))
        assert await asyncio.gather(*(pull(server, digest) for _ in range(3))) == [False] * 3
        assert any(isinstance(event, DigestMismatched) for event in server.events)
        fake.faults.clear()
        await until(lambda: fake.transfers == 0)
        fake.most_transfers = 0
        assert await pull(server, digest)
        assert fake.most_transfers == 1
        other = fake.add_blob(DATA[::-1])
        assert (await server.get(server.blob(other)))[2] == DATA[::-1]
        assert fake.most_transfers == 1, "the other blobs of an image do not fail the same way"


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_refused_range_of_a_further_connection_fails_no_pull_and_is_not_remembered(
    tmp_path: Path, status: int
) -> None:
    """The upstream sends the whole blob, some ranges, and then no range for a while."""
    async with slow_upstream(tmp_path) as (fake, server, digest):
        ranges = refused = 0

        def guard(seen: ReceivedRequest) -> Answer | None:
            nonlocal ranges, refused
            if "/blobs/" not in seen.path or "range" not in seen.headers:
                return None
            ranges += 1
            if ranges <= 2 or refused >= 5:
                return None
            refused += 1
            return status, {}, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}'

        fake.guard = guard
        for number in range(1, 6):  # On a busy machine, a blob may be whole before its third range.
            assert await asyncio.gather(*(pull(server, digest) for _ in range(3))) == [True] * 3
            if refused:
                break
            digest = fake.add_blob(DATA[number:] + DATA[:number])
        assert refused
        await server.store.idle()
        assert await pull(server, digest)
        every_file_hashes_to_its_name(tmp_path)


@pytest.mark.row("U4-wrong-range")
async def test_nodes_with_other_entity_tags_do_not_make_a_fetch_begin_again(tmp_path: Path) -> None:
    async with slow_upstream(tmp_path) as (fake, server, digest):
        other = Fault(headers={"ETag": '"another node"'}, times=None)
        fake.fault(f"blobs/{digest}", Fault(), Fault(), other)
        assert await pull(server, digest)
        assert fake.count_to_end() == 1
        assert fake.bytes_sent <= len(DATA) + 2 * LOST


@pytest.mark.row("U5-odd-framing")
async def test_ranges_whose_bodies_do_not_end_hold_up_nothing(tmp_path: Path) -> None:
    async with slow_upstream(tmp_path, limits=Limits(idle=60.0)) as (fake, server, digest):
        unended = Fault(chunked=True, unended=True, times=None)
        fake.fault(f"blobs/{digest}", Fault(), unended)
        async with asyncio.timeout(30):
            assert await pull(server, digest)


@pytest.mark.row("U9-rate-limits")
async def test_429_of_a_further_connection_disturbs_no_other_pull(tmp_path: Path) -> None:
    async with slow_upstream(tmp_path) as (fake, server, digest):
        other = fake.add_blob(DATA[:100_000])
        fake.max_transfers = 1
        pulling = asyncio.gather(pull(server, digest))
        await until(lambda: any(isinstance(e, BackedOff) for e in server.events))
        fake.max_transfers = None
        status, _, body = await server.get(server.blob(other))
        assert (status, body) == (200, DATA[:100_000])
        assert await pulling == [True]
        assert fake.count("GET", f"blobs/{digest}") == 2


@pytest.mark.row("U9-rate-limits")
async def test_pulls_beside_one_of_several_connections_do_not_fail_by_the_limit_of_the_upstream(
    tmp_path: Path,
) -> None:
    """It sends three blobs at a time, and the first pull has taken all three places."""
    async with slow_upstream(tmp_path) as (fake, server, digest):
        fake.blob_rate = 1_000_000
        others = [fake.add_blob(DATA[:count]) for count in (100_000, 200_000)]
        refused = 0

        def guard(seen: ReceivedRequest) -> Answer | None:
            nonlocal refused
            if "/blobs/" not in seen.path or fake.transfers < 3:
                return None
            refused += "range" not in seen.headers
            return 429, {"Retry-After": "0"}, b""

        fake.guard = guard
        pulling = asyncio.gather(pull(server, digest))
        await until(lambda: fake.transfers == 3)
        answers = await asyncio.gather(*(server.get(server.blob(other)) for other in others))
        assert [status for status, _, _ in answers] == [200, 200]
        assert [len(body) for _, _, body in answers] == [100_000, 200_000]
        assert await pulling == [True]
        assert refused


@pytest.mark.row("U4-wrong-range")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True, times=None),
        Fault(content_range="bytes 5-9/10", times=None),
        Fault(headers={"ETag": '"new"'}, times=None),
    ],
)
async def test_upstream_without_right_ranges_is_read_by_its_first_response(
    tmp_path: Path, fault: Fault
) -> None:
    async with slow_upstream(tmp_path) as (fake, server, digest):
        fake.fault(f"blobs/{digest}", Fault(), fault)
        assert await pull(server, digest)
        assert fake.count("GET", f"blobs/{digest}") == 2
        assert [e.reason for e in server.events if isinstance(e, BackedOff)] == ["no_ranges"]


@pytest.mark.row("D2-full-disk")
async def test_disk_that_refuses_does_not_disturb_several_connections(tmp_path: Path) -> None:
    storage = Storage(max_size=100_000)
    async with slow_upstream(tmp_path, storage=storage) as (fake, server, digest):
        assert await asyncio.gather(*(pull(server, digest) for _ in range(3))) == [True] * 3
        assert fake.most_transfers > 1
        assert any(isinstance(event, Uncached) for event in server.events)
        await until(lambda: server.store.memory.total == 0)


@pytest.mark.row("D1-no-space-at-a-write")
@pytest.mark.parametrize("at", [1, 1_000_000, 3_000_000])
async def test_disk_that_fills_in_mid_blob_does_not_disturb_several_connections(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ingest_writer.write_all

    def write(fd: int, chunks: list[bytes], offset: int) -> int:
        if offset + sum(map(len, chunks)) > at:
            raise ingest_writer.ShortWrite(OSError(errno.ENOSPC, "full"), offset)
        return real(fd, chunks, offset)

    monkeypatch.setattr(ingest_writer, "write_all", write)
    async with slow_upstream(tmp_path) as (fake, server, digest):
        assert await asyncio.gather(*(pull(server, digest) for _ in range(3))) == [True] * 3
        assert fake.most_transfers > 1
        assert any(isinstance(event, Uncached) for event in server.events)
        assert fake.bytes_sent <= len(DATA) + LOST
        await until(lambda: server.store.memory.total == 0)


@pytest.mark.row("L1-client-that-leaves")
@pytest.mark.parametrize("after", [0.1, 0.3, 0.5])
async def test_fetch_that_is_cancelled_frees_its_connections_and_is_resumed(
    tmp_path: Path, after: float
) -> None:
    async with slow_upstream(tmp_path, abandoned="cancel") as (fake, server, digest):
        leaving = server.client.get(server.blob(digest))
        response = await leaving
        await asyncio.sleep(after)
        response.close()
        await until(lambda: fake.transfers == 0)
        await server.store.idle()
        assert server.store.memory.total == 0
        assert await pull(server, digest)
        every_file_hashes_to_its_name(tmp_path)


@pytest.mark.row("C7-sigkill-of-the-fetcher")
@pytest.mark.parametrize("part", [0.5, pytest.param(0.9, marks=pytest.mark.long)])
async def test_followers_continue_when_a_worker_with_several_connections_is_killed(
    part: float,
) -> None:
    """Only what had arrived ahead of the file is fetched again: it was in memory.

    That is less than two parts of each connection, and what is in the buffers of their sockets.
    """
    data = random_bytes(5_000_000, 1102)
    async with FakeRegistry() as fake:
        digest, fake.blob_rate = fake.add_blob(data), 1_000_000
        upstream = {"endpoints": [fake.url], "parallel": {"part": "64KiB"}}
        mirror = Mirror({"docker.io": upstream}, workers=2)
        try:
            await run_in_thread(mirror.start)
            pulls = asyncio.get_running_loop().run_in_executor(
                None, run_in_threads, 12, lambda _: try_pull(mirror, str(digest))
            )
            ingest = mirror.data_dir / "ingest" / "sha256" / digest.hex

            def is_reached() -> bool:
                return ingest.exists() and ingest.stat().st_size > len(data) * part

            await run_in_thread(wait_until, is_reached, "bytes have arrived", 30)
            assert fake.transfers > 1
            mirror.kill_worker(leader(mirror, digest))
            assert set(await pulls) == {True, False}
            assert await run_in_thread(try_pull, mirror, str(digest))
            every_file_hashes_to_its_name(mirror.data_dir)
            assert fake.bytes_sent <= len(data) * 1.01 + 8 * PART + LOST
        finally:
            await run_in_thread(mirror.close)
