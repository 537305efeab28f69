"""Flights: one piece of work a key, every waiter its outcome, nothing left at the end."""

from __future__ import annotations

import asyncio

import pytest

from mirror.oci.errors import Draining, UpstreamUnavailable
from mirror.single_flight import SingleFlight


async def test_many_ask_and_one_works() -> None:
    calls = 0

    async def work() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return 42

    async with SingleFlight() as single_flight:
        results = await asyncio.gather(*(single_flight.run("key", work).wait() for _ in range(100)))
    assert results == [42] * 100
    assert calls == 1


@pytest.mark.row("U7-waiters-of-a-failing-fetch")
async def test_every_waiter_gets_the_failure_and_the_next_one_asks_again() -> None:
    calls = 0

    async def work() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        raise UpstreamUnavailable("down")

    async with SingleFlight() as single_flight:
        waits = [single_flight.run("key", work).wait() for _ in range(100)]
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(result, UpstreamUnavailable) for result in results)
        assert calls == 1
        with pytest.raises(UpstreamUnavailable):
            await single_flight.run("key", work).wait()
        assert calls == 2


async def test_waiters_that_leave_cancel_nothing() -> None:
    gate = asyncio.Event()

    async def work() -> str:
        await gate.wait()
        return "done"

    async with SingleFlight() as single_flight:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(single_flight.run("k", work).wait()) for _ in range(9)]
            await asyncio.sleep(0)
            for task in tasks[:4]:
                task.cancel()
            await asyncio.sleep(0)
            gate.set()
        assert [task.cancelled() for task in tasks] == [True] * 4 + [False] * 5
        assert {task.result() for task in tasks[4:]} == {"done"}


async def test_an_unexpected_error_does_not_end_the_others() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    async def fine() -> str:
        await asyncio.sleep(0.01)
        return "fine"

    async with SingleFlight() as single_flight:
        other = single_flight.run("fine", fine)
        with pytest.raises(ZeroDivisionError):
            await single_flight.run("broken", broken).wait()
        assert await other.wait() == "fine"


async def test_draining_waits_then_gives_up_and_takes_nothing_new() -> None:
    async def quick() -> str:
        await asyncio.sleep(0.05)
        return "quick"

    async def endless() -> None:
        await asyncio.Event().wait()

    async with SingleFlight() as single_flight:
        first, second = single_flight.run("quick", quick), single_flight.run("endless", endless)
        assert await single_flight.drain(0.2) == 1
        assert await first.wait() == "quick"
        with pytest.raises(Draining):
            await second.wait()
        with pytest.raises(Draining):
            single_flight.run("more", quick)
    assert len(single_flight) == 0
