"""Work in threads, and calls that hang."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from mirror.threads import (
    HangingCalls,
    TooManyHangingCalls,
    call_soon_from_any_thread,
    on_running_loop,
    run_in_thread,
)


async def test_work_in_a_thread_returns_its_result_and_raises_its_exception() -> None:
    assert await run_in_thread(sorted, [2, 1]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 1, 0)


@pytest.mark.row("FD7-hanging-dns")
async def test_call_that_hangs_delays_no_call_of_another_key() -> None:
    calls, gate = HangingCalls("test", 3), threading.Event()
    hanging = [asyncio.ensure_future(calls.run(n, gate.wait)) for n in range(2)]  # noqa: TID251 - a test
    try:
        async with asyncio.timeout(5):
            assert await calls.run("other", lambda: 7) == 7
        assert [calls.is_running(key) for key in (0, 1, "other")] == [True, True, False]
    finally:
        gate.set()
    assert await asyncio.gather(*hanging) == [True, True]


@pytest.mark.row("FD7-hanging-dns")
async def test_waiters_for_one_key_share_its_thread_and_a_cancelled_one_ends_no_call() -> None:
    calls, gate, started = HangingCalls("test", 1), threading.Event(), 0

    def work() -> int:
        nonlocal started
        started += 1
        gate.wait(10)
        return started

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await calls.run("key", work)
    waiters = [asyncio.ensure_future(calls.run("key", work)) for _ in range(3)]  # noqa: TID251 - a test
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*waiters) == [1, 1, 1]
    assert await calls.run("key", work) == 2, "a call after the end is a new one"


@pytest.mark.row("FD7-hanging-dns")
async def test_more_hanging_calls_than_allowed_are_refused_at_once() -> None:
    calls, gate = HangingCalls("test", 1), threading.Event()
    hanging = asyncio.ensure_future(calls.run(1, gate.wait))  # noqa: TID251 - a test
    await asyncio.sleep(0)
    with pytest.raises(TooManyHangingCalls, match="1 other calls have not ended"):
        await calls.run(2, gate.wait)
    gate.set()
    await hanging
    assert await calls.run(2, lambda: "free again") == "free again"


async def test_failed_call_raises_for_every_waiter_and_is_forgotten() -> None:
    calls = HangingCalls("test", 1)

    def fail() -> None:
        time.sleep(0.02)
        raise ValueError("no")

    results = await asyncio.gather(
        calls.run("key", fail), calls.run("key", fail), return_exceptions=True
    )
    assert [type(result) for result in results] == [ValueError, ValueError]
    assert not calls.is_running("key")


def test_call_that_hangs_does_not_delay_the_end_of_its_event_loop() -> None:
    calls, gate = HangingCalls("test", 1), threading.Event()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await calls.run("key", gate.wait)

    begun = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - begun < 5
    [thread] = [thread for thread in threading.enumerate() if thread.name == "test"]
    assert thread.daemon
    gate.set()
    thread.join(5)
    assert not calls.is_running("key")


# --- call_soon_from_any_thread --------------------------------------------------------------------


@pytest.mark.parametrize("is_in_thread", [False, True], ids=["on-the-loop", "in-a-thread"])
async def test_idle_loop_calls_the_function_at_once(is_in_thread: bool) -> None:
    call_soon, called = call_soon_from_any_thread(), asyncio.Event()

    def request() -> None:
        time.sleep(0.1)  # The loop waits for something to happen.
        call_soon(called.set)

    if is_in_thread:
        threading.Thread(target=request).start()
    else:
        call_soon(called.set)
    started = time.monotonic()
    async with asyncio.timeout(30):
        await called.wait()
    assert time.monotonic() - started < 20


def test_function_for_a_loop_that_has_ended_is_not_called() -> None:
    async def get() -> Callable[[Callable[[], None]], None]:
        return call_soon_from_any_thread()

    called: list[bool] = []
    call_soon = asyncio.run(get())
    thread = threading.Thread(target=call_soon, args=(lambda: called.append(True),))
    thread.start()
    thread.join()
    assert called == []


def test_value_for_a_loop_that_is_closed_is_dropped() -> None:
    received: list[int] = []

    async def make() -> Callable[[int], None]:
        return on_running_loop(received.append)

    receive = asyncio.run(make())
    receive(1)
    assert received == []
