"""Running many pieces of work, a few at a time."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from mirror.oci.errors import Draining
from mirror.operations.limited import run_limited
from mirror.single_flight import SingleFlight


async def test_all_work_is_done_and_at_most_the_limit_at_once() -> None:
    running = most = 0
    done: list[int] = []

    async def work(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(number)

    async with SingleFlight() as single_flight:
        await run_limited(single_flight, [partial(work, n) for n in range(10)], 3)
        await run_limited(single_flight, [], 3)
    assert sorted(done) == list(range(10))
    assert most == 3


async def test_cancelled_caller_ends_the_work_that_runs() -> None:
    ended: list[str] = []
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    async with SingleFlight() as single_flight:
        caller = asyncio.get_running_loop().create_task(
            run_limited(single_flight, [work, work, work], 2)
        )
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended == ["work", "work"]
        assert len(single_flight) == 0


async def test_process_that_ends_ends_the_work() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    async with SingleFlight() as single_flight:
        caller = asyncio.get_running_loop().create_task(run_limited(single_flight, [work], 1))
        await asyncio.sleep(0)
        await single_flight.drain(0.0)
        with pytest.raises(Draining):
            await caller
