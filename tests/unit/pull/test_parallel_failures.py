"""One blob by several connections that fail, in virtual time: each transfer ends, and in time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

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
BROKEN = UpstreamUnavailable("connection reset")
STATUSES = [UpstreamUnavailable("500"), Denied("403"), BlobUnknown("404"), UpstreamTimeout("none")]
LIMITED = UpstreamRateLimited("429", retry_after=0.0)


def pull(upstream: Upstream, **how: object) -> Result:
    """Transfer within five minutes of virtual time. All budgets must be free at the end."""

    async def within_limit() -> Result:
        async with asyncio.timeout(300):
            return await transfer(upstream, **how)  # type: ignore[arg-type] # its arguments

    result = run_virtually(within_limit())
    assert result.reader.memory.total == 0
    assert sum(event.change for event in result.happened(ConnectionsChanged)) == 0
    assert upstream.connections == 0
    assert result.longest_wait <= upstream.idle + 0.5
    return result


def reasons(result: Result) -> list[str]:
    return [event.reason for event in result.happened(BackedOff)]


# --- the front is nobody's ------------------------------------------------------------------------


def test_transfer_of_a_silent_upstream_ends_in_the_time_of_a_silent_body() -> None:
    """Both the connections that are open and the requests for the rest of their pieces."""
    upstream = Upstream(DATA, idle=5.0)
    upstream.is_silent = lambda number: upstream.sent > 40 * MIB
    result = pull(upstream, may_fail=True)
    assert not result.is_right
    assert result.seconds < 3 + 5.5
    assert len(upstream.asked) < 16


def test_front_that_stands_still_ends_a_transfer_although_others_bring_bytes() -> None:
    """All connections to one place of the blob starve."""
    upstream = Upstream(DATA, idle=5.0)
    upstream.is_silent = lambda number: any(
        start <= 30 * MIB < stop for start, stop in upstream.requested[number - 1 : number]
    )
    result = pull(upstream, may_fail=True)
    assert not result.is_right
    assert len(upstream.asked) < 25


def test_three_wrong_ranges_in_a_row_of_an_upstream_that_sends_right_ones_cost_a_moment() -> None:
    """As nodes of a storage, of which some ignore ``Range``. No byte is fetched twice."""
    upstream = Upstream(DATA)
    upstream.fails = lambda number: UpstreamProtocolError("200") if 4 <= number <= 6 else None
    result = pull(upstream)
    assert (result.is_right, reasons(result)[0]) == (True, "no_ranges")
    assert upstream.sent <= 1.01 * len(DATA)
    assert result.longest_wait < 1.0


# --- how often is asked ---------------------------------------------------------------------------


@pytest.mark.parametrize("retry_after", [0.0, 0.001, None])
@pytest.mark.parametrize("accepted", [2, 3, 8])
def test_429_without_a_time_to_wait_is_followed_by_longer_and_longer_pauses(
    retry_after: float | None, accepted: int
) -> None:
    error = UpstreamRateLimited("429", retry_after=retry_after)
    upstream = Upstream(DATA, fails=lambda number: error if number > accepted else None)
    with pytest.raises(UpstreamRateLimited):
        pull(upstream)
    assert upstream.failed <= 4


@pytest.mark.parametrize("error", STATUSES, ids=repr)
def test_ranges_that_are_always_refused_are_asked_for_twice_and_then_remembered(
    error: MirrorError,
) -> None:
    """While the plain response runs on. Its bytes are no progress of further connections."""

    async def read() -> None:
        loop = asyncio.get_running_loop()
        connections = ConnectionBudget(lambda endpoint: 1, loop.time)
        upstream = Upstream(DATA, latency=0.05, fails=lambda number: error)
        result = await transfer(upstream, connections=connections)
        assert result.is_right
        assert result.seconds < 1.03 * 9.6
        assert (len(upstream.asked), reasons(result)) == (2, ["failed"])
        assert upstream.asked[1] - upstream.asked[0] >= 0.1
        assert not connections.may_add(Stream.endpoint)
        await transfer(upstream, connections=connections)
        assert len(upstream.asked) == 2, "remembered for other blobs"

    run_virtually(read())


def test_gap_at_the_front_is_requested_while_a_large_request_ahead_waits_for_the_front() -> None:
    """When the reader pauses, other fetches have the connections, and a piece breaks off.

    Then two requests without a limit of memory follow, and both wait for the front: the first for
    the rest of that piece, the second for the end of the blob. The first one breaks at the front.
    """

    async def read() -> tuple[Result, Upstream, float]:
        loop, resumed_at = asyncio.get_running_loop(), 0.0
        upstream = Upstream(DATA, error=BROKEN)
        upstream.breaks = {7: 19 * CHUNK_BYTES, 9: MIB}.get
        begun = loop.time()

        def pause(position: int) -> float:
            nonlocal resumed_at
            if resumed_at or position < 38 * MIB:
                return 0.0
            resumed_at = loop.time() + 4
            return 4.0

        connections = ConnectionBudget(
            lambda url: 8 if loop.time() > begun + 1.62 else 1, loop.time
        )
        result = await transfer(upstream, connections=connections, pause=pause)
        return result, upstream, resumed_at

    result, upstream, resumed_at = run_virtually(read())
    assert upstream.broken == 2
    (rest, end, gap), asked = upstream.requested[-3:], upstream.asked[-3:]
    assert rest[1] == gap[1] < end[0] < end[1] == len(DATA)
    assert asked[1] < resumed_at < asked[2], "two requests wait for the front"
    assert result.is_right
    assert result.longest_wait < 1


def test_connections_that_break_together_are_one_failure() -> None:
    upstream = Upstream(DATA)

    def slow(number: int) -> float:
        """Break all connections that were open 2.5 seconds after the start."""
        if asyncio.get_running_loop().time() < 1002.5:
            open_then.add(number)
        elif number in open_then:
            raise BROKEN
        return 1.0

    open_then = set[int]()
    upstream.slow = slow
    result = pull(upstream)
    assert (result.is_right, upstream.most, reasons(result)) == (True, 4, [])
    assert result.seconds < 0.45 * 9.6


@pytest.mark.parametrize(("latency", "most"), [(0.9, 0.89), (1.5, 1.01), (3.0, 1.01)])
def test_upstream_with_slow_headers_is_learned_by_a_few_requests(
    latency: float, most: float
) -> None:
    upstream = Upstream(DATA, latency=latency)
    result = pull(upstream)
    assert len(result.happened(PieceCut)) <= 3
    assert result.seconds < most * 9.6
    assert len(upstream.asked) <= 16


def test_request_that_gets_no_response_until_the_plain_one_meets_it_is_the_last_one() -> None:
    async def read() -> None:
        connections = ConnectionBudget(lambda url: 1, asyncio.get_running_loop().time)
        upstream = Upstream(DATA, is_silent=lambda number: upstream.connections > 0 and number > 0)
        result = await transfer(upstream, connections=connections)
        assert result.is_right
        assert (len(upstream.asked), reasons(result)) == (1, ["slow_ranges"])
        assert result.seconds < 1.03 * 9.6
        assert not connections.may_add(Stream.endpoint)

    run_virtually(read())


# --- random sequences -----------------------------------------------------------------------------

SMALL = random_bytes(24 * MIB, 12)
PIECES = 24
"""Of 1 MiB each."""
ERRORS: dict[str, Callable[[random.Random], MirrorError]] = {
    "500": lambda r: UpstreamUnavailable("500"),
    "403": lambda r: Denied("403"),
    "404": lambda r: BlobUnknown("404"),
    "200": lambda r: UpstreamProtocolError("no ranges"),
    "429": lambda r: UpstreamRateLimited("429", retry_after=r.choice([None, 0.0, 0.5, 4.0, 60.0])),
    "no headers": lambda r: UpstreamTimeout("no headers"),
}


def odd_upstream(r: random.Random) -> Upstream:
    """Return an upstream that does anything to further connections, from some time on or at random.

    The first response of each transfer may break or fall silent, too.
    """
    upstream = Upstream(
        SMALL,
        rate=r.choice([1, 2, 6]) * MIB,
        total_rate=r.choice([None, None, 3 * MIB]),
        max_connections=r.choice([None, None, 1, 2]),
        burst=r.choice([None, None, 3.0]),
        refill=r.choice([0.0, 0.5]),
        retry_after=r.choice([None, 0.0, 1.0, 60.0]),
        latency=r.choice([0.0, 0.02, 0.5, 2.0]),
        error=BROKEN,
        idle=3.0,
    )
    kinds = r.sample(sorted(ERRORS), r.randint(1, 3))
    share, begins, ends = r.choice([0, 0.1, 0.5, 1]), r.randint(1, 12), r.choice([15, 10**6])
    breaks, silent, slow = r.choice([0, 0.2, 0.7]), r.choice([0, 0.1, 0.4]), r.choice([0, 0.2])
    never = r.random() < 0.1
    rolls: dict[tuple[str, int], float] = {}

    def roll(what: str, number: int) -> float:
        return rolls.setdefault((what, number), r.random())

    def fails(number: int) -> MirrorError | None:
        is_odd = begins <= number < ends and roll("fails", number) < share
        return ERRORS[r.choice(kinds)](r) if is_odd else None

    def breaks_at(number: int) -> int | None:
        return r.randrange(2 * MIB) if roll("breaks", number) < breaks else None

    def is_silent(number: int) -> bool:
        is_dead = never and upstream.sent > 6 * MIB
        return is_dead or (number > 0 and roll("silent", number) < silent and r.random() < 0.3)

    upstream.fails, upstream.breaks, upstream.is_silent = fails, breaks_at, is_silent
    upstream.slow = lambda number: 0.2 if roll("slow", number) < slow else 1.0
    return upstream


@pytest.mark.parametrize("seed", range(60))
def test_random_upstream_readers_and_budgets_end_each_transfer_in_time(seed: int) -> None:
    """The reader never waits longer than for a silent body, and requests are bounded."""
    r = random.Random(seed)
    upstream, sources = odd_upstream(r), r.randint(1, 6)
    pauses = {position: r.uniform(0, 4) for position in r.sample(range(24), r.choice([0, 0, 5]))}
    busy = r.choice([[], [(2.0, 5.0)], [(1.0, 10**6)]])

    async def read() -> Result:
        loop = asyncio.get_running_loop()
        begun = loop.time()

        def count_first(endpoint: str) -> int:
            return 8 if any(a < loop.time() - begun < b for a, b in busy) else 1

        connections = ConnectionBudget(count_first, loop.time)
        async with asyncio.timeout(900):
            result = await transfer(
                upstream,
                Parallel(part=MIB),
                connections=connections,
                memory=MemoryBudget(r.choice([1, 3 * MIB, 48 * MIB])),
                sources=sources,
                pause=lambda position: pauses.pop(position // MIB, 0.0),
                may_fail=True,
            )
        assert connections._further == {}
        return result

    result = run_virtually(read())
    assert result.reader.memory.total == 0
    assert sum(event.change for event in result.happened(ConnectionsChanged)) == 0
    assert upstream.connections == 0
    # A slow connection may take 1.3 s for a chunk, before it falls silent.
    assert result.longest_wait <= upstream.idle + 2.0
    # Each piece may become four at the end, and each may be cut twice or break.
    assert len(upstream.asked) <= 3 * PIECES + 10 * sources
