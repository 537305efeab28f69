"""The memory that all manifests which are pushed at the same time may hold."""

from __future__ import annotations

import asyncio

import pytest

from mirror.hosted import manifest_memory
from mirror.hosted.manifest_memory import UNCOUNTED_BYTES, ManifestMemory
from mirror.oci.errors import TooManyRequests

LARGE = 4 * UNCOUNTED_BYTES


async def hold(memory: ManifestMemory, may_end: asyncio.Event, size: int = LARGE) -> None:
    with memory.share() as share:
        await share.reach(size, size)
        await may_end.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_large_manifests_wait_in_order_until_others_are_done() -> None:
    memory, ends = ManifestMemory(2 * LARGE), [asyncio.Event() for _ in range(4)]
    order: list[int] = []

    async def push(number: int) -> None:
        with memory.share() as share:
            await share.reach(LARGE, LARGE)
            order.append(number)
            await ends[number].wait()

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(push(number))
        await settle()
        assert order == [0, 1]
        ends[1].set()
        await settle()
        assert order == [0, 1, 2]
        for end in ends:
            end.set()
    assert order == [0, 1, 2, 3]


async def test_small_manifest_never_waits() -> None:
    memory, end = ManifestMemory(LARGE), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(hold(memory, end))
        await settle()
        with memory.share() as share:
            await asyncio.wait_for(share.reach(UNCOUNTED_BYTES, LARGE), 1)
        async with asyncio.timeout(1), memory.parsing(LARGE), memory.parsing(UNCOUNTED_BYTES):
            pass
        end.set()


async def test_manifest_that_has_come_holds_no_more_than_its_bytes() -> None:
    memory = ManifestMemory(LARGE)
    with memory.share() as first, memory.share() as second:
        await first.reach(UNCOUNTED_BYTES + 1, LARGE)
        first.shrink(LARGE // 2)
        await asyncio.wait_for(second.reach(LARGE // 2, LARGE // 2), 1)


async def test_wait_has_a_limit_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_memory, "_WAIT_S", 0.01)
    memory, end = ManifestMemory(LARGE), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(hold(memory, end))
        await settle()
        with pytest.raises(TooManyRequests, match="large manifests") as refused:
            await hold(memory, end)
        assert refused.value.retry_after > 0
        end.set()
    await asyncio.wait_for(hold(memory, end), 1)


async def test_client_that_disconnects_while_it_waits_lets_the_next_one_in() -> None:
    memory, end, never = ManifestMemory(LARGE), asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(hold(memory, never, LARGE // 2)).add_done_callback(lambda _: end.set())
        await settle()
        gone = group.create_task(hold(memory, never))
        await settle()
        next_one = group.create_task(hold(memory, end, LARGE // 2))
        await settle()
        gone.cancel()
        await settle()
        assert memory._free == 0
        never.set()
    assert next_one.done()
    assert memory._free == LARGE


async def test_client_that_disconnects_when_its_turn_comes_gives_it_back() -> None:
    memory, end = ManifestMemory(LARGE), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(hold(memory, end))
        await settle()
        gone = group.create_task(hold(memory, asyncio.Event()))
        await settle()
        first.add_done_callback(lambda _: gone.cancel())
        end.set()
    assert gone.cancelled()
    assert memory._free == LARGE


async def test_large_manifests_are_parsed_one_at_a_time() -> None:
    memory, running, most = ManifestMemory(), 0, 0

    async def parse() -> None:
        nonlocal running, most
        async with memory.parsing(LARGE):
            running += 1
            most = max(most, running)
            await settle()
            running -= 1

    await asyncio.gather(*(parse() for _ in range(3)))
    assert most == 1
