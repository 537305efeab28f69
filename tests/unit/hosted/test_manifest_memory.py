"""The memory that all manifests which are pushed at the same time may hold."""

from __future__ import annotations

import asyncio

import pytest

from mirror.hosted import manifest_memory
from mirror.hosted.manifest_memory import MIN_BYTES_PER_S, UNCOUNTED_BYTES, ManifestMemory
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import TooManyRequests

LARGE = 4 * UNCOUNTED_BYTES


async def hold(memory: ManifestMemory, may_end: asyncio.Event, size: int = LARGE) -> None:
    with memory.share() as share:
        await share.reach(size, size)
        await may_end.wait()


class Clock:
    """Moves the time of the event loop, and with it all timeouts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._time, self._passed = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: self._time() + self._passed)

    async def pass_time(self, seconds: float) -> None:
        await settle()
        self._passed += seconds
        await settle()


async def receive(
    memory: ManifestMemory, parts: asyncio.Queue[int], most: int = MANIFEST_LIMIT
) -> int:
    """Receive a manifest whose parts have these sizes. Returns its bytes."""
    size = 0
    with memory.share() as share:
        async with share.receiving(60):
            while size < most and (part := await parts.get()):
                size += part
                await share.reach(size, most)
    return size


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


async def test_half_sent_manifests_hold_only_what_has_come() -> None:
    memory = ManifestMemory()
    async with asyncio.TaskGroup() as group:
        stalled = [asyncio.Queue[int]() for _ in range(8)]
        tasks = [group.create_task(receive(memory, parts)) for parts in stalled]
        for parts in stalled:
            parts.put_nowait(MANIFEST_LIMIT // 2)
        await settle()
        with memory.share() as share:
            await asyncio.wait_for(share.reach(MANIFEST_LIMIT, MANIFEST_LIMIT), 1)
        for task in tasks:
            task.cancel()


async def test_manifests_that_fill_the_memory_together_all_end() -> None:
    memory, all_parts = ManifestMemory(), [asyncio.Queue[int]() for _ in range(20)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(receive(memory, parts)) for parts in all_parts]
        for _ in range(MANIFEST_LIMIT // UNCOUNTED_BYTES):
            for parts in all_parts:
                parts.put_nowait(UNCOUNTED_BYTES)
            await settle()
            assert memory._free >= 0
    assert [task.result() for task in tasks] == [MANIFEST_LIMIT] * 20


async def test_slowest_client_gives_way_to_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, clock = ManifestMemory(2 * LARGE), Clock(monkeypatch)
    slow, silent, late = asyncio.Queue[int](), asyncio.Queue[int](), asyncio.Queue[int]()
    async with asyncio.TaskGroup() as group:

        async def give_way() -> None:
            with pytest.raises(TooManyRequests, match="large manifests"):
                await receive(memory, silent, LARGE)

        first = group.create_task(receive(memory, slow, LARGE))
        refused = group.create_task(give_way())
        for parts in (slow, silent):
            parts.put_nowait(UNCOUNTED_BYTES + 1)
        await settle()
        for _ in range(40):
            slow.put_nowait(1000)
            await clock.pass_time(1)
        waiting = group.create_task(receive(memory, late, LARGE))
        late.put_nowait(LARGE)
        await settle()
        assert [task.done() for task in (waiting, refused, first)] == [True, True, False]
        slow.put_nowait(0)


async def test_client_that_sends_fast_never_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_memory, "_LOOK_S", 0.0)
    memory, clock = ManifestMemory(MANIFEST_LIMIT), Clock(monkeypatch)
    fast, late = asyncio.Queue[int](), asyncio.Queue[int]()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(receive(memory, fast))
        fast.put_nowait(MANIFEST_LIMIT // 16)
        await settle()
        second = group.create_task(receive(memory, late))
        late.put_nowait(MANIFEST_LIMIT)
        for _ in range(15):
            await clock.pass_time(0.5)
            assert [task.done() for task in (first, second)] == [False, False]
            fast.put_nowait(MANIFEST_LIMIT // 16)
    assert first.result() == second.result() == MANIFEST_LIMIT


async def test_slow_line_may_take_longer_than_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, clock, parts = ManifestMemory(), Clock(monkeypatch), asyncio.Queue[int]()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(receive(memory, parts))
        for _ in range(67):
            await clock.pass_time(1)
            parts.put_nowait(62_500)
        parts.put_nowait(MANIFEST_LIMIT - 67 * 62_500)
    assert task.result() == MANIFEST_LIMIT


async def test_client_that_trickles_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, clock, parts = ManifestMemory(), Clock(monkeypatch), asyncio.Queue[int]()

    async def be_cut_off() -> None:
        with pytest.raises(TimeoutError):
            await receive(memory, parts)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(be_cut_off())
        for _ in range(115):
            await clock.pass_time(1)
            assert not task.done()
            parts.put_nowait(MIN_BYTES_PER_S // 2)
        for _ in range(5):
            parts.put_nowait(1)
            await clock.pass_time(1)
    assert not memory.receiving


async def test_wait_for_others_is_no_silence_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, clock = ManifestMemory(LARGE), Clock(monkeypatch)
    end, parts = asyncio.Event(), asyncio.Queue[int]()
    async with asyncio.TaskGroup() as group:
        group.create_task(hold(memory, end))
        task = group.create_task(receive(memory, parts, LARGE))
        await clock.pass_time(40)
        parts.put_nowait(UNCOUNTED_BYTES + 1)
        await clock.pass_time(9)
        end.set()
        await clock.pass_time(20)
        parts.put_nowait(LARGE - UNCOUNTED_BYTES - 1)
    assert task.result() == LARGE
