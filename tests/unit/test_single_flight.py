"""Single flight: one task for each key, its outcome for every waiter, no task left at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from mirror.oci.errors import Draining, UpstreamTimeout, UpstreamUnavailable
from mirror.single_flight import SingleFlight


async def test_concurrent_runs_of_one_key_share_one_task() -> None:
    calls = 0

    async def work() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return 42

    async with SingleFlight() as single_flight:
        results = await asyncio.gather(
            *(single_flight.run(("key",), work).wait() for _ in range(100))
        )
    assert results == [42] * 100
    assert calls == 1


@pytest.mark.row("U7-waiters-of-a-failing-fetch")
async def test_every_waiter_gets_the_failure_and_the_next_run_starts_anew() -> None:
    calls = 0

    async def work() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        raise UpstreamUnavailable("down")

    async with SingleFlight() as single_flight:
        waits = [single_flight.run(("key",), work).wait() for _ in range(100)]
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(result, UpstreamUnavailable) for result in results)
        assert calls == 1
        with pytest.raises(UpstreamUnavailable):
            await single_flight.run(("key",), work).wait()
        assert calls == 2


async def test_cancelled_waiters_do_not_cancel_the_task() -> None:
    gate = asyncio.Event()

    async def work() -> str:
        await gate.wait()
        return "done"

    async with SingleFlight() as single_flight:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(single_flight.run(("k",), work).wait()) for _ in range(9)]
            await asyncio.sleep(0)
            for task in tasks[:4]:
                task.cancel()
            await asyncio.sleep(0)
            gate.set()
        assert [task.cancelled() for task in tasks] == [True] * 4 + [False] * 5
        assert {task.result() for task in tasks[4:]} == {"done"}


async def test_unexpected_error_does_not_end_other_tasks() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    async def fine() -> str:
        await asyncio.sleep(0.01)
        return "fine"

    async with SingleFlight() as single_flight:
        other = single_flight.run(("fine",), fine)
        with pytest.raises(ZeroDivisionError):
            await single_flight.run(("broken",), broken).wait()
        assert await other.wait() == "fine"


async def test_unexpected_error_is_reported_without_a_waiter_and_a_mirror_error_is_not() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    unexpected = ZeroDivisionError()

    async def fail(error: Exception) -> None:
        raise error

    async with SingleFlight() as single_flight:
        single_flight.run(("broken", "secret"), lambda: fail(unexpected))
        single_flight.run(("down",), lambda: fail(UpstreamUnavailable("down")))
        single_flight.run(("cancelled",), asyncio.Event().wait).cancel()
        await single_flight.drain(5.0)
    assert reported == [{"message": "unexpected error in the task broken", "exception": unexpected}]


async def test_drain_waits_then_cancels_and_refuses_new_tasks() -> None:
    async def quick() -> str:
        await asyncio.sleep(0.05)
        return "quick"

    async def endless() -> None:
        await asyncio.Event().wait()

    async with SingleFlight() as single_flight:
        first, second = (
            single_flight.run(("quick",), quick),
            single_flight.run(("endless",), endless),
        )
        assert await single_flight.drain(0.2) == 1
        assert await first.wait() == "quick"
        with pytest.raises(Draining):
            await second.wait()
        with pytest.raises(Draining):
            single_flight.run(("more",), quick)
    assert len(single_flight) == 0


async def test_task_cancelled_before_its_first_step_ends_its_waiters_and_frees_its_key() -> None:
    async def work() -> str:
        return "done"

    async with SingleFlight() as single_flight:
        first = single_flight.run(("key",), work)
        first.cancel()
        with pytest.raises(Draining):
            await asyncio.wait_for(first.wait(), 5.0)
        second = single_flight.run(("key",), work)
        assert second is not first
        assert await second.wait() == "done"


async def test_shared_task_that_ends_by_the_starters_time_limit_is_run_again_for_others() -> None:
    calls: list[int] = []
    gate = asyncio.Event()

    async def work() -> str:
        calls.append(len(calls))
        if calls == [0]:
            await gate.wait()
            raise UpstreamTimeout("late")
        return "done"

    async with SingleFlight() as single_flight, asyncio.TaskGroup() as group:
        waits = [group.create_task(_outcome(single_flight.share(("key",), work))) for _ in range(5)]
        await asyncio.sleep(0)
        gate.set()
        outcomes = await asyncio.gather(*waits)
    assert outcomes == ["UpstreamTimeout", "done", "done", "done", "done"]
    assert calls == [0, 1]


async def _outcome(shared: Awaitable[str]) -> str:
    try:
        return await shared
    except UpstreamTimeout:
        return "UpstreamTimeout"
