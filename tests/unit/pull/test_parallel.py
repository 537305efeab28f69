"""One blob by several connections, in virtual time: the kinds of upstreams, failures, budgets."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from mirror.config.settings import Parallel
from mirror.observability.events import BackedOff, ConnectionsChanged, PieceCut
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.connection_budget import ConnectionBudget
from mirror.store.ingest_writer import MemoryBudget
from tests.unit.pull.kit import MemoryRegistry
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
ALONE = Parallel(connections=1)
BROKEN = UpstreamUnavailable("connection reset")


def pull(upstream: Upstream, parallel: Parallel | None = None, **how: object) -> Result:
    """Transfer in virtual time. The bytes must be right, and all budgets free at the end."""
    result = run_virtually(transfer(upstream, parallel, **how))  # type: ignore[arg-type] # its arguments
    assert result.is_right
    assert result.reader.memory.total == 0
    assert sum(event.change for event in result.happened(ConnectionsChanged)) == 0
    assert upstream.connections == 0
    return result


def reasons(result: Result) -> list[str]:
    return [event.reason for event in result.happened(BackedOff)]


def test_upstream_that_limits_each_connection_is_read_by_four() -> None:
    upstream = Upstream(DATA)
    result = pull(upstream)
    assert upstream.most == 4
    assert result.seconds < 0.45 * 9.6
    assert upstream.sent <= 1.01 * len(DATA)
    assert reasons(result) == []


def test_upstream_that_limits_all_connections_together_is_read_by_as_many_as_reach_it() -> None:
    upstream = Upstream(DATA, total_rate=24 * MIB)
    result = pull(upstream)
    assert result.seconds < 5.2
    assert upstream.most <= 4
    assert "no_gain" in reasons(result)


def test_connection_that_brings_no_gain_is_closed_and_none_follows() -> None:
    upstream = Upstream(DATA, rate=20 * MIB, total_rate=20 * MIB)
    result = pull(upstream)
    assert result.seconds <= 1.03 * 4.8
    assert upstream.most == 2
    assert reasons(result) == ["no_gain"]


def test_429_above_two_connections_goes_on_with_two() -> None:
    upstream = Upstream(DATA, max_connections=2)
    result = pull(upstream)
    assert result.seconds < 5.6
    assert reasons(result) == ["rate_limited"]


def test_429_of_the_second_connection_leaves_the_first_response_alone() -> None:
    upstream = Upstream(DATA, max_connections=1)
    result = pull(upstream)
    assert result.seconds < 1.03 * 9.6
    assert (reasons(result), upstream.opened) == (["rate_limited"], 1)


def test_ignored_range_goes_on_with_the_first_response_and_is_remembered() -> None:
    upstream = Upstream(DATA, has_ranges=False)
    result = pull(upstream)
    assert result.seconds < 1.03 * 9.6
    assert (reasons(result), upstream.opened) == (["no_ranges"], 1)
    assert not result.reader.connections.may_add(Stream.endpoint)


@pytest.mark.parametrize(
    "upstream",
    [
        Upstream(DATA, rate=200 * MIB),
        Upstream(DATA[: 16 * MIB - 1]),
        Upstream(DATA[: 20 * MIB], rate=40 * MIB),
    ],
    ids=["rest-of-less-than-a-second", "less-than-four-parts", "little-remains"],
)
def test_blob_that_ends_soon_is_read_by_one_connection(upstream: Upstream) -> None:
    pull(upstream)
    assert upstream.opened == 1


def test_blob_without_a_size_is_read_by_one_connection() -> None:
    async def read() -> int:
        upstream = Upstream(DATA)
        stream = upstream.stream()
        stream.total = None
        upstream.stream = lambda start=0: stream  # type: ignore[method-assign] # of this test
        await transfer(upstream)
        return upstream.opened

    assert run_virtually(read()) == 1


@pytest.mark.parametrize("late", [3, 4])
def test_late_part_is_cut_and_fetched_by_another_connection(late: int) -> None:
    """The first two are the trial: a late one leaves the plain response alone."""
    upstream = Upstream(DATA, slow=lambda number: 0.001 if number == late else 1.0)
    result = pull(upstream)
    assert len(result.happened(PieceCut)) >= 1
    assert result.seconds < 6.5
    assert upstream.sent <= 1.01 * len(DATA)


def test_first_response_that_starves_is_cut_too() -> None:
    class Starving(Upstream):
        pass

    upstream = Upstream(DATA)
    upstream.slow = lambda number: 1.0 if number or upstream.sent < 5 * MIB else 0.001
    result = pull(upstream)
    assert result.happened(PieceCut)
    assert result.seconds < 7


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_connection_that_breaks_gives_its_part_back(number: int) -> None:
    upstream = Upstream(
        DATA, error=BROKEN, breaks=lambda n: 6 * MIB if n == number and number else None
    )
    if number == 0:
        upstream.breaks = lambda n: 7 * MIB if n == 0 else None
    result = pull(upstream)
    assert result.seconds < 5.5
    assert upstream.sent <= len(DATA) * 1.01


def test_connections_that_all_break_at_once_keep_what_arrived_ahead() -> None:
    upstream = Upstream(DATA, error=BROKEN, breaks=lambda n: 3 * MIB if 0 < n < 8 else None)
    result = pull(upstream, sources=8)
    assert upstream.sent <= len(DATA) * 1.01
    assert result.seconds < 9.6


def test_transfer_ends_with_the_error_of_its_last_connection() -> None:
    upstream = Upstream(DATA, error=BROKEN, breaks=lambda n: 0 if n else 10 * MIB)
    with pytest.raises(UpstreamUnavailable, match="connection reset"):
        pull(upstream)
    assert upstream.connections == 0


def test_fetches_share_the_connections_of_an_endpoint() -> None:
    async def read() -> list[Upstream]:
        data = DATA[: 32 * MIB]
        upstreams = [Upstream(data) for _ in range(5)]
        connections = ConnectionBudget(lambda endpoint: 5, asyncio.get_running_loop().time)
        counted = 0

        async def watch() -> None:
            nonlocal counted
            while True:
                counted = max(counted, sum(upstream.connections for upstream in upstreams))
                await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            fetches = [
                group.create_task(transfer(upstream, connections=connections))
                for upstream in upstreams
            ]
            await asyncio.wait(fetches)
            watching.cancel()
        assert all(fetch.result().is_right for fetch in fetches)
        assert counted <= 8
        return upstreams

    assert sum(upstream.opened > 1 for upstream in run_virtually(read())) >= 1


def test_refusal_is_remembered_for_ten_minutes() -> None:
    async def read() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        connections = ConnectionBudget(lambda endpoint: 1, loop.time)
        first = Upstream(DATA, max_connections=2)
        await transfer(first, connections=connections)
        second = Upstream(DATA)
        await transfer(second, connections=connections)
        await asyncio.sleep(600)
        third = Upstream(DATA)
        await transfer(third, connections=connections)
        return second.most, third.most

    assert run_virtually(read()) == (2, 4)


def test_without_memory_a_fetch_has_one_connection() -> None:
    upstream = Upstream(DATA)
    pull(upstream, memory=MemoryBudget(1))
    assert upstream.opened == 1


@pytest.mark.parametrize("limit", [7 * MIB, 13 * MIB, 48 * MIB])
def test_bytes_ahead_stay_within_the_budget(limit: int) -> None:
    """Also if the reader is far slower than the upstream."""
    upstream = Upstream(DATA)
    result = pull(
        upstream, memory=MemoryBudget(limit), pause=lambda at: 1.0 if at % (10 * MIB) == 0 else 0.0
    )
    assert result.memory <= limit + MIB


@pytest.mark.parametrize("retry_after", [0.5, 1.0, 3.0, 20.0, 3600.0])
def test_pause_that_a_refusal_asks_for_is_kept_while_a_connection_is_open(
    retry_after: float,
) -> None:
    """The plain response still runs, and brings the rest meanwhile."""
    upstream = Upstream(DATA, max_connections=2, retry_after=retry_after)
    result = pull(upstream)
    assert reasons(result) == ["rate_limited"]
    assert result.seconds < (6.5 if retry_after <= 1.0 else 1.03 * 9.6)
    refused_at = upstream.refused[0]
    assert [at for at in upstream.asked if refused_at < at < refused_at + retry_after] == []
    assert upstream.sent <= 1.03 * len(DATA), "the plain response runs on over what was ahead"


@pytest.mark.parametrize("retry_after", [None, 10.0, 25.0])
def test_upstream_that_limits_requests_is_read_to_the_end(retry_after: float | None) -> None:
    upstream = Upstream(DATA, burst=4, refill=0.1, retry_after=retry_after)
    result = pull(upstream, sources=3)
    assert result.longest_wait < 5.0, "others can be asked while nobody fetches the front"
    assert result.happened(BackedOff)[-1].connections == 1
    assert len(upstream.refused) <= 5
    assert result.seconds < 9.6 + 2 * 25.0


@pytest.mark.parametrize("retry_after", [None, 5.0, 60.0])
def test_refusals_of_every_request_end_with_the_last_error_in_a_moment(
    retry_after: float | None,
) -> None:
    """The fetch loop decides who waits."""
    upstream = Upstream(DATA, burst=4, retry_after=retry_after)
    with pytest.raises(UpstreamRateLimited):
        pull(upstream)
    assert len(upstream.refused) <= 2
    assert upstream.refused[-1] - upstream.refused[0] <= 2.0


@pytest.mark.parametrize("error", [BlobUnknown("404"), Denied("403"), UpstreamProtocolError("400")])
def test_refusal_of_a_further_connection_is_no_refusal_of_the_content(error: MirrorError) -> None:
    upstream = Upstream(DATA, error=error, breaks=lambda n: 0 if n > 2 else None)
    with pytest.raises(UpstreamUnavailable):
        pull(upstream)
    assert upstream.opened > 3


@pytest.mark.parametrize("last", range(1, 6))
def test_failures_after_an_addition_without_gain_are_errors_of_the_upstream(last: int) -> None:
    upstream = Upstream(DATA, rate=20 * MIB, total_rate=20 * MIB, error=BROKEN)
    upstream.breaks = lambda n: 0 if n > last else None
    with suppress(UpstreamUnavailable):
        pull(upstream)
    assert upstream.connections == 0


@pytest.mark.parametrize("retry_after", [0.0, 0.01])
def test_refusals_that_ask_for_no_pause_are_paused_after(retry_after: float) -> None:
    upstream = Upstream(DATA, burst=3, retry_after=retry_after)
    with pytest.raises(UpstreamRateLimited):
        pull(upstream)
    assert len(upstream.refused) <= 8


def test_no_third_range_is_requested_after_the_first_two_failed() -> None:
    """However much the first response brings meanwhile."""
    upstream = Upstream(DATA, error=BROKEN, fails=lambda n: BROKEN, latency=0.3)
    result = pull(upstream)
    assert len(upstream.asked) == 2
    assert reasons(result) == ["failed"]


@pytest.mark.parametrize("trickle", [0.0, 5.0], ids=["no-bytes", "less-than-the-least-rate"])
def test_upstream_that_stops_on_all_connections_ends_the_transfer_in_the_time_of_a_body(
    trickle: float,
) -> None:
    async def read() -> float:
        loop = asyncio.get_running_loop()
        upstream = Upstream(DATA, starves_at=loop.time() + 3, trickle=trickle)
        with pytest.raises(UpstreamTimeout):
            await transfer(upstream)
        assert upstream.most > 1
        return loop.time() - upstream.starves_at

    assert run_virtually(read()) < MemoryRegistry().idle + 2


def test_time_in_which_the_reader_takes_nothing_is_no_silence_of_the_upstream() -> None:
    pauses = iter([0.0] * 100 + [100.0])
    result = pull(Upstream(DATA), pause=lambda position: next(pauses, 0.0))
    assert result.seconds < 110


@pytest.mark.parametrize(("every", "expected"), [(8, ["failed"]), (9, []), (10, []), (12, [])])
def test_single_failures_take_no_connection_away(every: int, expected: list[str]) -> None:
    """Unless three are within 16 whole ranges: then one request brings the rest."""
    upstream = Upstream(
        DATA, error=BROKEN, breaks=lambda n: 0 if n and n % every == 0 else None, buffer=1
    )
    result = pull(upstream)
    assert result.seconds < 0.45 * 9.6
    assert reasons(result) == expected


@pytest.mark.parametrize(("every", "most"), [(4, 0.6), (6, 0.6), (10, 0.5)])
def test_starved_connections_hold_up_a_fetch_for_a_moment_each(every: int, most: float) -> None:
    upstream = Upstream(DATA, slow=lambda n: 0.001 if n and n % every == 0 else 1.0)
    result = pull(upstream)
    assert result.happened(PieceCut)
    assert result.seconds < most * 9.6


@pytest.mark.parametrize(
    ("rate", "latency", "most"),
    [
        (10, 0.2, 0.5),
        (10, 0.3, 0.55),
        (10, 0.5, 0.65),
        (20, 0.1, 0.52),
        (20, 0.15, 0.62),
        (20, 0.2, 0.65),
        (20, 0.3, 0.75),
    ],
)
def test_storage_that_takes_long_to_respond_is_read_by_larger_requests(
    rate: int, latency: float, most: float
) -> None:
    upstream = Upstream(DATA, rate=rate * MIB, latency=latency)
    assert pull(upstream).seconds < most * len(DATA) / upstream.rate
    is_larger = max(stop - start for start, stop in upstream.requested) > 6 * MIB
    assert is_larger is (rate * latency > 2.0), "more than one piece in three times the latency"


@pytest.mark.parametrize("latency", [0.1, 0.3, 1.0])
def test_rate_that_is_shared_is_not_lost_by_slow_responses(latency: float) -> None:
    upstream = Upstream(DATA, rate=10 * MIB, total_rate=10 * MIB, latency=latency)
    assert pull(upstream).seconds < 1.05 * 9.6


def test_fetch_that_loses_its_further_connections_goes_on_with_one_request() -> None:
    """Other fetches take the connections of the endpoint after a second."""

    async def read() -> tuple[float, Upstream]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        connections = ConnectionBudget(lambda url: 8 if loop.time() > begun + 1 else 1, loop.time)
        upstream = Upstream(DATA, latency=0.2)
        result = await transfer(upstream, connections=connections)
        return result.seconds, upstream

    seconds, upstream = run_virtually(read())
    assert seconds < 9.6
    assert upstream.opened < 8


def test_further_connections_come_back_when_the_endpoint_has_some_again() -> None:
    async def read() -> Upstream:
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def count_first(endpoint: str) -> int:
            return 8 if begun + 1 < loop.time() < begun + 4 else 1

        upstream = Upstream(DATA, rate=40 * MIB, slow=lambda n: 0.25)
        await transfer(
            upstream,
            Parallel(part=MIB),
            connections=ConnectionBudget(count_first, loop.time),
        )
        return upstream

    upstream = run_virtually(read())
    assert upstream.opened > 40
    assert upstream.sent <= 1.01 * len(DATA)


@pytest.mark.parametrize("rate", [12 * MIB, 40 * MIB])
def test_reader_that_is_slower_than_one_connection_gets_no_second_one(rate: int) -> None:
    """What further connections bring would only fill the memory."""
    upstream = Upstream(DATA, rate=200 * MIB)
    pull(upstream, pause=lambda at: CHUNK_BYTES / rate)
    assert upstream.opened == 1


def test_connection_whose_bytes_wait_in_its_socket_gets_no_second_one() -> None:
    """The reader or the processor is slower than it. Closing it early would lose these bytes."""
    upstream = Upstream(DATA, unread=2 * MIB, buffer=10 * MIB)
    pull(upstream)
    assert (upstream.opened, upstream.sent) == (1, len(DATA))


def test_fetch_that_lacks_memory_for_a_while_closes_no_further_connection_early() -> None:
    """Its connections do not help then, and one of them brings several pieces."""
    memory, other = MemoryBudget(12 * MIB), object()

    async def read() -> Upstream:
        upstream = Upstream(DATA, buffer=4 * MIB, latency=0.05)

        async def use_memory() -> None:
            while True:
                await asyncio.sleep(1.5)
                memory.hold_ahead(other, 12 * MIB)
                await asyncio.sleep(1.5)
                memory.hold_ahead(other, 0)

        async with asyncio.TaskGroup() as group:
            using = group.create_task(use_memory())
            result = await transfer(upstream, Parallel(part=MIB), memory=memory)
            using.cancel()
        assert result.is_right
        return upstream

    upstream = run_virtually(read())
    assert max(stop - start for start, stop in upstream.requested) > 4 * MIB
    assert upstream.sent <= len(DATA) + upstream.buffer + CHUNK_BYTES, "the first response alone"


def test_upstream_sends_less_than_1_percent_twice_of_512_mib_at_100_mb_per_second() -> None:
    """Each connection that is closed early loses what is in its buffers."""
    blob = bytes(512 * MIB)
    upstream = Upstream(blob, rate=100_000_000, buffer=MIB, latency=0.05)
    result = run_virtually(transfer(upstream))
    assert result.is_right
    assert upstream.sent <= 542_239_621, "1.01 times 536,870,912 bytes"
    assert upstream.most == 4


def test_transfer_whose_later_requests_all_get_a_429_ends_with_one() -> None:
    upstream = Upstream(DATA, retry_after=60.0)
    upstream.breaks = lambda n: None

    async def read() -> None:
        async def limit() -> None:
            while upstream.sent < 30 * MIB:  # noqa: ASYNC110 - in virtual time
                await asyncio.sleep(0.01)
            upstream.max_connections = 0

        async with asyncio.TaskGroup() as group:
            group.create_task(limit())
            with pytest.raises(UpstreamRateLimited):
                await transfer(upstream)

    run_virtually(read())
