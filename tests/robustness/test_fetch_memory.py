"""Rows FE3, G7: the memory of a process whose disk is slower than the upstream, or full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.fetch_memory import MEMORY_BOUND, MIB, measure
from mirror.config.settings import Storage
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import running
from tests.unit.store.kit import random_bytes


@pytest.mark.row("FE3-memory-of-cold-blobs")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "rate", [10_000_000, pytest.param(0, marks=pytest.mark.long)], ids=["slow-disk", "full-disk"]
)
def test_40_cold_blobs_at_once_stay_within_150_mib(rate: int, tried: Callable[[int], None]) -> None:
    """All blobs together have 240 MiB."""
    idle, peak, _ = measure(blobs=40, size=6 * MIB, rate=rate)
    tried(40)
    assert idle < peak <= MEMORY_BOUND


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("max_size", [2**30, 1], ids=["to-disk", "in-memory"])
async def test_pulls_end_with_a_budget_of_one_byte_beside_clients_that_read_nothing(
    tmp_path: Path, max_size: int, tried: Callable[[int], None]
) -> None:
    """Each fetch has its minimum. Clients that stopped to read get their bytes when they go on."""
    storage = Storage(memory=1, max_size=max_size)
    blobs = [random_bytes(4_000_000, 900 + number) for number in range(6)]
    async with FakeRegistry() as fake, running(tmp_path, fake.url, storage=storage) as server:
        digests = [fake.add_blob(data) for data in blobs]
        for digest in digests[::2]:
            fake.fault(f"blobs/{digest}", Fault(chunked=True))
        async with asyncio.timeout(60):
            stopped = [await server.client.get(server.blob(digest)) for digest in digests[:3]]
            got = await asyncio.gather(*(server.get(server.blob(digest)) for digest in digests[3:]))
            assert [body for _, _, body in got] == blobs[3:]
            assert [await response.read() for response in stopped] == blobs[:3]
        assert [fake.count("GET", f"blobs/{digest}") for digest in digests] == [1] * len(digests)
        tried(len(digests))
