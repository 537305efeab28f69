"""Ranges on trial, in virtual time: the plain response is given up only for what works better."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from mirror.config.settings import Parallel
from mirror.observability.events import BackedOff, Event, PieceCut
from mirror.oci.errors import UpstreamRateLimited, UpstreamUnavailable
from mirror.pull.connection_budget import ConnectionBudget
from mirror.store.ingest_writer import MemoryBudget
from tests.unit.pull.simulation import (
    CHUNK_BYTES,
    MIB,
    Result,
    Stream,
    Upstream,
    run_virtually,
    transfer,
)
from tests.unit.store.kit import random_bytes

DATA = random_bytes(96 * MIB, 11)
ONE_S = 9.6
"""Seconds that one connection takes."""
BROKEN = UpstreamUnavailable("connection reset")
BAD_RANGES: dict[str, Callable[[], Upstream]] = {
    "half-as-fast": lambda: Upstream(DATA, slow=lambda n: 0.5 if n else 1.0),
    "a-third-as-fast": lambda: Upstream(DATA, slow=lambda n: 0.35 if n else 1.0),
    "a-seventh-as-fast": lambda: Upstream(DATA, slow=lambda n: 0.15 if n else 1.0),
    "begin-0.6-s-late": lambda: Upstream(DATA, begins_late=lambda n: 0.6 if n else 0.0),
    "begin-2-s-late": lambda: Upstream(DATA, begins_late=lambda n: 2.0 if n else 0.0),
    "headers-after-2-s": lambda: Upstream(DATA, latency=2.0),
    "trickle": lambda: Upstream(DATA, slow=lambda n: 0.001 if n else 1.0),
    "stop-after-256-KiB": lambda: Upstream(DATA, stalls=lambda n: CHUNK_BYTES if n else None),
    "break-after-512-KiB": lambda: Upstream(
        DATA, error=BROKEN, breaks=lambda n: MIB // 2 if n else None
    ),
    "silent": lambda: Upstream(DATA, is_silent=lambda n: n > 0),
    "refused": lambda: Upstream(DATA, max_connections=1, retry_after=60.0),
    "wrong": lambda: Upstream(DATA, has_ranges=False),
    "shared-rate": lambda: Upstream(DATA, total_rate=10 * MIB),
}


def pull(upstream: Upstream, **how: object) -> Result:
    """Transfer in virtual time. The bytes must be right, and all budgets free at the end."""
    result = run_virtually(transfer(upstream, **how))  # type: ignore[arg-type] # its arguments
    assert result.is_right
    assert result.reader.memory.total == upstream.connections == 0
    return result


def reasons(result: Result) -> list[str]:
    return [event.reason for event in result.happened(BackedOff)]


@pytest.mark.parametrize("kind", BAD_RANGES)
def test_ranges_worse_than_the_plain_response_cost_at_most_3_percent_and_2_requests(
    kind: str,
) -> None:
    upstream = BAD_RANGES[kind]()
    result = pull(upstream)
    assert result.seconds <= 1.03 * ONE_S
    assert upstream.sent <= 1.011 * len(DATA)
    assert len(upstream.asked) <= 2
    assert len(reasons(result)) == 1


@pytest.mark.parametrize("memory", [2 * MIB, 7 * MIB], ids=["for-the-trial", "for-one-piece"])
@pytest.mark.parametrize("kind", ["half-as-fast", "stop-after-256-KiB", "shared-rate"])
def test_bad_ranges_cost_at_most_3_percent_with_little_memory_too(kind: str, memory: int) -> None:
    upstream = BAD_RANGES[kind]()
    result = pull(upstream, memory=MemoryBudget(memory))
    assert result.seconds <= 1.03 * ONE_S
    assert result.memory <= memory


@pytest.mark.parametrize("late", [1, 2])
def test_late_part_of_the_trial_leaves_the_plain_response(late: int) -> None:
    upstream = Upstream(DATA, slow=lambda number: 0.001 if number == late else 1.0)
    result = pull(upstream)
    assert (reasons(result), len(upstream.asked)) == (["slow_ranges"], late)
    assert result.seconds <= 1.01 * ONE_S
    assert upstream.sent <= 1.01 * len(DATA)


def test_blob_of_more_than_a_hundred_times_the_memory_is_read_by_several_connections() -> None:
    upstream = Upstream(DATA)
    pull(upstream, parallel=Parallel(part=65_536), memory=MemoryBudget(700_000))
    assert upstream.most > 1


def test_bad_ranges_are_remembered_for_the_other_blobs_of_the_endpoint_for_ten_minutes() -> None:
    async def read() -> list[int]:
        loop, asked = asyncio.get_running_loop(), []
        connections = ConnectionBudget(lambda endpoint: 1, loop.time)
        for pause in (0, 0, 600):
            await asyncio.sleep(pause)
            upstream = BAD_RANGES["half-as-fast"]()
            await transfer(upstream, connections=connections)
            asked.append(len(upstream.asked))
        return asked

    assert run_virtually(read()) == [1, 0, 1]


def test_shared_rate_is_not_remembered_as_it_may_be_free_for_the_next_blob() -> None:
    assert pull(BAD_RANGES["shared-rate"]()).reader.connections.may_add(Stream.endpoint)


@pytest.mark.parametrize(("share", "most"), [(1.0, 0.35), (0.8, 0.42), (0.7, 0.52)])
def test_good_ranges_are_as_fast_as_without_a_trial(share: float, most: float) -> None:
    upstream = Upstream(DATA, slow=lambda n: share if n else 1.0)
    assert pull(upstream).seconds < most * ONE_S
    assert upstream.sent <= 1.01 * len(DATA)


def test_512_mib_at_100_mb_per_second_take_less_than_045_of_the_time_of_one_connection() -> None:
    upstream = Upstream(bytes(512 * MIB), rate=1e8, buffer=MIB)
    assert pull(upstream).seconds < 0.45 * 5.37
    assert upstream.sent <= 1.01 * 512 * MIB


def test_plain_response_that_starves_during_the_trial_is_given_up_for_a_range_that_does_not() -> (
    None
):
    upstream = Upstream(DATA)
    upstream.slow = lambda n: 1.0 if n or upstream.sent < 5 * MIB else 0.001
    assert pull(upstream).seconds < 0.5 * ONE_S


def test_upstream_that_keeps_the_newest_connection_is_asked_for_the_rest_once() -> None:
    upstream = Upstream(DATA, keeps_newest=True)
    result = pull(upstream, sources=3)
    assert len(upstream.asked) <= 2
    assert result.seconds < 1.05 * ONE_S
    assert not result.reader.connections.may_add(Stream.endpoint)


@pytest.mark.parametrize("begins", [5, 8])
def test_ranges_that_begin_to_break_later_are_replaced_by_one_request_after_three(
    begins: int,
) -> None:
    """Whatever they have brought. The one request is for all that is missing."""
    upstream = Upstream(DATA, error=BROKEN)
    upstream.breaks = lambda n: MIB if n in (begins, begins + 5, begins + 9) else None
    result = pull(upstream)
    assert (upstream.broken, reasons(result)) == (3, ["failed"])
    assert len(upstream.asked) <= begins + 16, "and the gaps of those that broke"
    assert upstream.requested[-1][1] == len(DATA)
    assert not result.reader.connections.may_add(Stream.endpoint)


@pytest.mark.parametrize("retry_after", [20.0, 60.0])
def test_limit_of_the_number_of_requests_is_waited_for(retry_after: float) -> None:
    """One connection would have needed one request, so that clients are not cut off for it."""
    upstream = Upstream(DATA, burst=8, refill=1 / retry_after, retry_after=retry_after)
    result = pull(upstream, sources=3)
    assert result.longest_wait < 5.0, "others can be asked while nobody fetches the front"
    assert result.seconds < ONE_S + 2 * retry_after
    assert len(upstream.refused) <= 3
    assert result.happened(BackedOff)[-1].connections == 1


@pytest.mark.parametrize("seconds", [0.5, 0.65, 0.82], ids=["asked", "response", "bytes"])
def test_transfer_that_is_cancelled_during_the_trial_is_not_remembered_for_the_endpoint(
    seconds: float,
) -> None:
    """A client that leaves, a full disk, or a shutdown says nothing about ranges."""

    async def read() -> None:
        loop, events = asyncio.get_running_loop(), list[Event]()
        connections = ConnectionBudget(lambda endpoint: 1, loop.time)
        upstream = Upstream(DATA, latency=0.15, begins_late=lambda n: 0.2 if n else 0.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await transfer(upstream, connections=connections, events=events)
        assert (len(upstream.asked), upstream.connections) == (1, 0)
        assert [event for event in events if isinstance(event, BackedOff)] == []
        assert connections.may_add(Stream.endpoint)

    run_virtually(read())


@pytest.mark.parametrize("has_response", [False, True])
def test_plain_response_that_breaks_during_the_trial_tells_about_ranges_only_after_one_came(
    has_response: bool,
) -> None:
    """Some upstreams close the older one of two connections."""
    upstream = Upstream(DATA, error=BROKEN, latency=0.02 if has_response else 0.4)
    upstream.breaks = lambda n: None if n else 5 * MIB
    result = pull(upstream)
    assert (len(upstream.asked), reasons(result)) == (2, ["failed"])
    assert result.seconds <= 1.06 * ONE_S
    assert result.reader.connections.may_add(Stream.endpoint) is not has_response


@pytest.mark.parametrize(
    "factors", [(1.0, 0.95, 0.9, 0.1), (1.0, 1.0, 1.0, 0.05), (1.0, 1.0, 0.1, 0.1)], ids=str
)
def test_connections_that_slow_each_other_down_are_taken_back(factors: tuple[float, ...]) -> None:
    """A disk that seeks, or a server that slows down an address with many connections."""
    upstream = Upstream(DATA)
    upstream.slow = lambda number: factors[upstream.connections - 1]
    result = pull(upstream)
    assert "no_gain" in reasons(result)
    assert result.seconds < ONE_S


def test_nothing_is_cut_while_one_connection_is_wanted() -> None:
    """A rate that comes in bursts looks late each time."""
    upstream = Upstream(DATA, max_connections=1)
    upstream.slow = lambda n: 1.0 if asyncio.get_running_loop().time() % 4 < 3 else 0.01
    assert pull(upstream).happened(PieceCut) == []


def test_connections_that_are_reclaimed_end_at_once_and_one_request_brings_the_rest() -> None:
    async def read() -> None:
        connections = ConnectionBudget(lambda url: 1, asyncio.get_running_loop().time)
        upstream = Upstream(DATA)

        async def need_one() -> None:
            await asyncio.sleep(2.0)
            assert upstream.connections == 4
            assert connections.reclaim(Stream.endpoint)
            await asyncio.sleep(0.15)
            assert upstream.connections == 1
            await asyncio.sleep(2.0)
            assert upstream.connections == 1

        async with asyncio.TaskGroup() as group:
            group.create_task(need_one())
            result = await transfer(upstream, connections=connections)
        assert result.is_right
        assert reasons(result) == ["reclaimed"]
        assert upstream.sent <= 1.01 * len(DATA)

    run_virtually(read())


LARGE = bytes(64 * MIB)


@pytest.mark.parametrize("seed", range(40))
def test_random_upstream_whose_ranges_are_never_faster_is_not_slower_than_by_one_connection(
    seed: int,
) -> None:
    """It never fails. Each range has a rate of its own, at most that of the plain response."""
    r = random.Random(seed)
    rate, total = r.choice([2, 5, 10, 30]) * MIB, r.choice([None, None, 1.0, 1.2, 1.6, 2.5])
    shares = r.choice([[1.0], [1.0, 0.8], [0.7], [0.5], [0.35], [1.0, 0.5, 0.3]])
    slow = [1.0, *(r.choice(shares) for _ in range(1000))]
    latency = r.choice([0.005, 0.02, 0.1, 0.3, 0.7, 1.2])
    seconds = [
        pull(
            Upstream(
                LARGE,
                rate=rate,
                total_rate=total and rate * total,
                latency=latency,
                slow=lambda number: slow[number],
            ),
            parallel=Parallel(connections=connections),
        ).seconds
        for connections in (1, 4)
    ]
    assert seconds[1] <= 1.03 * seconds[0]


def test_429_to_the_trial_leaves_the_plain_response_alone() -> None:
    upstream = Upstream(DATA, fails=lambda n: UpstreamRateLimited("429", retry_after=5.0))
    result = pull(upstream)
    assert (len(upstream.asked), reasons(result)) == (1, ["rate_limited"])
    assert result.seconds <= 1.03 * ONE_S


@pytest.mark.parametrize("kind", ["refused", "headers-after-2-s", "begin-2-s-late", "wrong"])
def test_plain_response_of_another_endpoint_is_not_given_up_for_ranges_without_a_trial(
    kind: str,
) -> None:
    """The first one fails in the middle of the blob, when some bytes have arrived ahead."""
    first, second = Upstream(DATA, error=BROKEN), BAD_RANGES[kind]()
    first.breaks = lambda n: MIB if n == 6 else None
    first.fails = lambda n: BROKEN if first.broken else None
    second.endpoint = "https://another.example"
    result = pull(first, sources=2, second=second)
    assert result.longest_wait < 1
    assert result.seconds < ONE_S
    assert len(second.asked) <= 2
