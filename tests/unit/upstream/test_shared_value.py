"""Kept answers: asked for once, whoever leaves meanwhile; a failure reaches all who waited."""

from __future__ import annotations

import asyncio

import pytest

from mirror.oci.errors import UpstreamUnavailable
from mirror.upstream.shared_value import SharedValue
from tests.unit.upstream.kit import at_once


class Source:
    """Numbers its answers; each comes when the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.asked = 0
        self.error: UpstreamUnavailable | None = None

    async def ask(self) -> int:
        self.asked += 1
        self.begun.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.asked


def fresh(value: int) -> bool:
    return True


def stale(value: int) -> bool:
    return False


async def waiting(kept: SharedValue[int], source: Source, count: int) -> list[asyncio.Task[int]]:
    """Tasks that wait, the first one of them for the source itself."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(kept.get(fresh, source.ask)) for _ in range(count)]
    await source.begun.wait()
    return tasks


async def test_many_ask_and_one_is_asked() -> None:
    kept, source = SharedValue[int](), Source()
    source.gate.set()
    assert await at_once(50, lambda: kept.get(fresh, source.ask)) == [1] * 50
    assert await kept.get(fresh, source.ask) == 1
    assert (kept.value, source.asked) == (1, 1)


async def test_what_is_not_good_any_more_is_asked_anew_once_for_all() -> None:
    kept, source = SharedValue[int](), Source()
    source.gate.set()
    await kept.get(fresh, source.ask)
    # They take what came while they waited, though it is no better by their own measure.
    assert await at_once(50, lambda: kept.get(stale, source.ask)) == [2] * 50
    assert source.asked == 2


async def test_everybody_gets_the_failure_and_the_next_one_asks_again() -> None:
    kept, source = SharedValue[int](), Source()
    source.error = UpstreamUnavailable("down")
    source.gate.set()
    results = await at_once(50, lambda: kept.get(fresh, source.ask))
    assert results == [source.error] * 50
    assert source.asked == 1
    source.error = None
    assert await kept.get(fresh, source.ask) == 2


async def test_those_who_wait_may_leave() -> None:
    kept, source = SharedValue[int](), Source()
    tasks = await waiting(kept, source, 9)
    for task in tasks[1:5]:
        task.cancel()
    source.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results if result == 1] == [1] * 5
    assert source.asked == 1


async def test_the_one_who_asks_may_leave_and_the_next_one_asks() -> None:
    kept, source = SharedValue[int](), Source()
    tasks = await waiting(kept, source, 9)
    tasks[0].cancel()
    source.gate.set()
    results = await asyncio.gather(*tasks[1:])
    assert results == [2] * 8
    assert tasks[0].cancelled()


async def test_nobody_gets_a_failure_of_before_because_another_one_left() -> None:
    kept, source = SharedValue[int](), Source()
    source.error = UpstreamUnavailable("down")
    source.gate.set()
    with pytest.raises(UpstreamUnavailable):
        await kept.get(fresh, source.ask)
    source.error, source.asked = None, 0
    source.gate.clear()
    source.begun.clear()
    tasks = await waiting(kept, source, 3)
    tasks[0].cancel()
    source.gate.set()
    assert await asyncio.gather(*tasks[1:]) == [2, 2]


async def test_a_fault_of_ours_is_not_kept() -> None:
    kept = SharedValue[int]()

    async def broken() -> int:
        raise ZeroDivisionError

    async def fine() -> int:
        return 7

    with pytest.raises(ZeroDivisionError):
        await kept.get(fresh, broken)
    assert await kept.get(fresh, fine) == 7
