"""The memory of all fetches of a process: bounded together, and no fetch waits for another one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import DigestMismatch, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import ingest_writer
from mirror.store.follower import Follower
from mirror.store.ingest import Ingest
from mirror.store.ingest_writer import MAX_SHARE_BYTES, MIN_SHARE_BYTES, MemoryBudget
from mirror.threads import run_in_thread
from tests.unit.store.kit import Kit, bring, kit, pieces, random_bytes, read
from tests.waiting import until

LIMIT = 12 * 2**20
PIECE = 65_536
CONTENTS = [random_bytes(1_500_000, 700 + number) for number in range(40)]


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Kit]:
    with kit(tmp_path, memory_limit=LIMIT) as made:
        yield made


def start(parts: Kit, data: bytes) -> tuple[Ingest, Follower]:
    ingest = Ingest(parts.ingest_context, Digest.of(data), None)
    follower = ingest.follow()
    assert follower
    return ingest, follower


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20 * 2**20)), max_size=30))
def test_total_is_the_sum_of_what_is_held_and_the_minimum_is_always_granted(
    changes: list[tuple[int, int]],
) -> None:
    budget, held = MemoryBudget(LIMIT), dict.fromkeys(range(6), 0)
    for ingest, count in changes:
        held[ingest] = count
        budget.hold(ingest, count)
        assert budget.total == sum(held.values())
        holders = sum(1 for value in held.values() if value)
        for number, value in held.items():
            may = budget.may_take(number)
            if value < MIN_SHARE_BYTES:
                assert may
            elif budget.total >= LIMIT or value >= min(MAX_SHARE_BYTES, LIMIT // holders):
                assert not may
            else:
                assert may


def test_bytes_ahead_and_bytes_that_wait_have_a_limit_each_and_one_together() -> None:
    budget, most = MemoryBudget(LIMIT), LIMIT * 4 // 3
    budget.hold_ahead("fetch", LIMIT - 1)
    assert budget.free_ahead() == 1
    budget.hold("ingest", most - LIMIT)
    assert budget.may_take("ingest"), "bytes ahead leave a third"
    assert budget.free_ahead() == 1
    budget.hold("ingest", most - LIMIT + 1)
    assert not budget.may_take("ingest")
    assert budget.free_ahead() <= 0
    budget.hold_ahead("fetch", 0)
    assert budget.may_take("ingest")
    budget.hold("others", LIMIT)
    assert not budget.may_take("ingest")
    assert budget.total == most + 1
    assert budget.free_ahead() <= 0


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("is_full", [False, True], ids=["slow-disk", "full-disk"])
async def test_40_fetches_hold_no_more_memory_than_the_budget(
    parts: Kit, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk, and in memory with clients of different speed."""
    real, memory = ingest_writer.write_all, parts.memory
    parts.room[0] = not is_full

    def slow(fd: int, chunks: list[bytes], offset: int) -> int:
        time.sleep(0.005)
        return real(fd, chunks, offset)

    monkeypatch.setattr(ingest_writer, "write_all", slow)
    started = [start(parts, data) for data in CONTENTS]
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, parts.memory.total)
            await asyncio.sleep(0)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        fetches = [
            group.create_task(bring(ingest, data, len(data)))
            for (ingest, _), data in zip(started, CONTENTS, strict=True)
        ]
        got = await asyncio.gather(*(read(follower) for _, follower in started))
        await asyncio.wait(fetches)
        watching.cancel()
    assert got == CONTENTS
    allowed = len(CONTENTS) * (MIN_SHARE_BYTES + PIECE)
    assert peak <= LIMIT + allowed, "each may always hold the minimum, and the chunk that it got"
    for _, follower in started:
        follower.close()
    assert memory.total == 0


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("is_full", [False, True], ids=["to-disk", "in-memory"])
@pytest.mark.parametrize("size_is_known", [True, False])
async def test_clients_that_read_nothing_use_up_the_budget_and_stop_no_other_fetch(
    parts: Kit, is_full: bool, size_is_known: bool
) -> None:
    """The stuck fetches end, too, once their clients read."""
    memory = parts.memory
    parts.room[0] = False
    stuck = [start(parts, data) for data in CONTENTS[:20]]
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for (ingest, _), data in zip(stuck, CONTENTS, strict=False):
            group.create_task(bring(ingest, data, len(data)))
        await until(lambda: memory.total >= LIMIT)
        parts.room[0] = not is_full
        for data in CONTENTS[20:23]:
            ingest, follower = start(parts, data)
            size = len(data) if size_is_known else None
            _, got = await asyncio.gather(bring(ingest, data, size), read(follower))
            assert got == data
            follower.close()
        assert memory.total >= LIMIT, "the others still wait for their clients"
        for (_, follower), data in zip(stuck, CONTENTS, strict=False):
            assert await read(follower) == data
            follower.close()
    assert memory.total == 0


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("is_full", [False, True], ids=["to-disk", "in-memory"])
async def test_chunks_larger_than_the_minimum_share_are_no_deadlock(
    parts: Kit, is_full: bool
) -> None:
    """Without a size the newest chunk is held back, and its client cannot read it."""
    parts.memory.hold("others", LIMIT)
    parts.room[0] = not is_full
    data = CONTENTS[0]
    ingest, follower = start(parts, data)

    async def fetch() -> None:
        await ingest.try_lead()
        await ingest.declare(None)
        for piece in pieces(data, 2 * MIN_SHARE_BYTES):
            await ingest.feed(piece)
        await ingest.finish()
        ingest.release()

    async with asyncio.timeout(10):
        _, got = await asyncio.gather(fetch(), read(follower))
    assert got == data
    follower.close()
    assert parts.memory.total == LIMIT


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("is_full", [False, True], ids=["to-disk", "in-memory"])
@pytest.mark.parametrize("end", ["fails", "is cancelled", "is wrong"])
async def test_fetch_that_ends_early_gives_its_memory_back(
    parts: Kit, is_full: bool, end: str
) -> None:
    parts.room[0] = not is_full
    data = CONTENTS[0]
    ingest, follower = start(parts, data)
    await ingest.try_lead()
    await ingest.declare(len(data))
    stuck = threading.Event()
    for _ in range(4):
        parts.ingest_context.io.submit(stuck.wait, 30)
    await ingest.feed(data[:100_000])
    assert parts.memory.total == 100_000
    asyncio.get_running_loop().call_later(0.05, stuck.set)
    if end == "fails":
        await ingest.fail(UpstreamUnavailable("gone"))
    elif end == "is wrong":
        await ingest.feed(bytes(len(data) - 100_000))
        with pytest.raises(DigestMismatch) as wrong:
            await ingest.finish()
        await ingest.fail(wrong.value)
    ingest.release()
    follower.close()
    assert parts.memory.total == 0
    await run_in_thread(stuck.wait, 30)
    await ingest.lock.wait_for_threads()
    assert parts.memory.total == 0


@pytest.mark.row("G7-memory-budget")
@pytest.mark.parametrize("is_full", [False, True], ids=["to-disk", "in-memory"])
@pytest.mark.parametrize("size_is_known", [True, False])
async def test_chunks_of_256_bytes_cost_little_cpu(
    parts: Kit, is_full: bool, size_is_known: bool
) -> None:
    """8 MiB took 5 s when each chunk added up the lengths of all that waited."""
    parts.room[0] = not is_full
    data = random_bytes(8 * 2**20)
    ingest, follower = start(parts, data)

    async def fetch() -> None:
        await ingest.try_lead()
        await ingest.declare(len(data) if size_is_known else None)
        for piece in pieces(data, 256):
            await ingest.feed(piece)
        await ingest.finish()
        ingest.release()

    begun = time.process_time()
    _, got = await asyncio.gather(fetch(), read(follower))
    assert got == data
    assert time.process_time() - begun < 1.5
    follower.close()


@given(st.lists(st.integers(0, 200_000), max_size=40))
def test_chunks_are_joined_in_order_to_few_blocks(sizes: list[int]) -> None:
    blocks: list[bytes | bytearray] = []
    chunks = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    for chunk in chunks:
        ingest_writer.append_joined(blocks, chunk)
    assert b"".join(blocks) == b"".join(chunks)
    assert all(blocks)
    assert len(blocks) <= 2 * (sum(sizes) // PIECE) + 1
