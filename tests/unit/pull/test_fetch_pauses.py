"""Pauses after a 429: who waits for them, and which source is tried meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest

from mirror.observability.events import Resumed
from mirror.oci.errors import AllCircuitsOpen, Denied, UpstreamRateLimited, UpstreamUnavailable
from mirror.oci.reference import Repository
from mirror.pull.fetch import Fetch
from mirror.pull.requests import ContentSource
from mirror.upstream.api import ContentStream
from tests.unit.pull.fetch_kit import BROKEN, DATA, DIGEST, FetchEnv, Recording, another, change
from tests.unit.pull.kit import OTHER, MemoryRegistry, a_request


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    "waiting", [AllCircuitsOpen("not asked again yet"), UpstreamRateLimited("a pause")]
)
async def test_waits_for_an_endpoint_do_not_count_as_failed_transfers(
    fetch_env: FetchEnv, waiting: UpstreamUnavailable
) -> None:
    waiting.next_request_in, waiting.is_wait = 0.0, True
    fetch_env.registry.breaks = [(1000, BROKEN), *((1000, waiting) for _ in range(20))]
    assert await fetch_env.body() == DATA
    assert len(fetch_env.happened(Resumed)) == 1
    assert fetch_env.registry.asked[-1]["avoid"] == ("memory",)


@pytest.mark.row("U9-rate-limits")
async def test_pause_that_ends_after_the_stall_limit_is_not_waited_for(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(1000, BROKEN), *[(1000, paused(299.0))] * 9]
    with pytest.raises(UpstreamRateLimited):
        await fetch_env.body()
    assert len(fetch_env.registry.asked) == 6


def paused(seconds: float) -> UpstreamRateLimited:
    """Return the error of a source whose endpoint pauses for ``seconds``."""
    error = UpstreamRateLimited("a pause", retry_after=seconds)
    error.next_request_in, error.is_wait = seconds, True
    return error


@pytest.mark.row("U9-rate-limits")
async def test_suspected_source_takes_the_place_of_one_that_has_to_wait(
    fetch_env: FetchEnv,
) -> None:
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, paused(20.0))]
    theirs = Recording()
    theirs.add_blob(OTHER.path, DATA)
    suspected = ContentSource(theirs, a_request(DIGEST, repository=OTHER), is_suspect=True)
    async with asyncio.timeout(10):
        assert await fetch_env.body(suspected) == DATA
    assert (fetch_env.registry.offsets, theirs.offsets) == ([0, 1000], [1000])


@pytest.mark.row("U9-rate-limits")
async def test_other_source_takes_the_place_of_one_whose_ranges_get_a_429(
    fetch_env: FetchEnv,
) -> None:
    limit = UpstreamRateLimited("429", retry_after=60.0)
    fetch_env.registry.breaks = [(1000, limit), (1000, paused(60.0))]
    theirs = Recording()
    theirs.add_blob(OTHER.path, DATA)
    async with asyncio.timeout(10):
        other = ContentSource(theirs, a_request(DIGEST, repository=OTHER))
        assert await fetch_env.body(other) == DATA
    ruled_out = [set(named["ruled_out"]) for named in fetch_env.registry.asked]
    assert ruled_out == [set(), {"memory"}], "it has no other endpoint"
    assert theirs.offsets == [1000]


@pytest.mark.row("U9-rate-limits")
async def test_source_that_had_to_wait_goes_on_where_it_was_after_another_one_failed(
    fetch_env: FetchEnv,
) -> None:
    """It may still get a 429, because it has responded before."""
    limit = UpstreamRateLimited("429")
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, paused(20.0)), (1000, limit)]
    theirs = Recording(failure=Denied("403"))
    other = ContentSource(theirs, a_request(DIGEST, repository=OTHER))
    async with asyncio.timeout(10):
        assert await fetch_env.body(other) == DATA
    assert fetch_env.registry.offsets == [0, 1000, 1000, 1000]
    assert theirs.offsets == [1000, 0], "a refused request is repeated without a range"
    assert fetch_env.registry.asked[-1]["validator"] == '"tag"'


@asynccontextmanager
async def open_never(*arguments: Any, **named: Any) -> AsyncIterator[ContentStream]:
    """Send no response headers."""
    await asyncio.Event().wait()
    raise AssertionError
    yield


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize("seconds", [0.0, 0.1])
@pytest.mark.parametrize("repository", [OTHER, Repository("other.io", "app")])
async def test_source_takes_its_place_back_from_a_slow_one_after_its_pause(
    fetch_env: FetchEnv, monkeypatch: pytest.MonkeyPatch, seconds: float, repository: Repository
) -> None:
    monkeypatch.setattr("mirror.pull.fetch.PREEMPT_AFTER_S", 0.05)
    monkeypatch.setattr("mirror.pull.attempts.random", SimpleNamespace(uniform=lambda *_: 0.01))
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, paused(seconds))]
    theirs, begun = MemoryRegistry(), asyncio.get_running_loop().time()
    other = ContentSource(theirs, a_request(DIGEST, repository=repository))
    with patch.object(theirs, "open", open_never):
        async with asyncio.timeout(10):
            assert await fetch_env.body(other) == DATA
    assert fetch_env.registry.offsets == [0, 1000, 1000]
    assert asyncio.get_running_loop().time() - begun >= seconds


@pytest.mark.row("U9-rate-limits")
async def test_slow_source_keeps_its_place_while_the_other_one_pauses(
    fetch_env: FetchEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.fetch.PREEMPT_AFTER_S", 0.05)
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, paused(20.0))]
    theirs = Recording()
    repository = Repository("other.io", "app")
    theirs.add_blob(repository.path, DATA)
    before = asyncio.Event()
    theirs.streams = [lambda stream: setattr(stream, "before", before)]
    asyncio.get_running_loop().call_later(0.3, before.set)
    async with asyncio.timeout(10):
        other = ContentSource(theirs, a_request(DIGEST, repository=repository))
        assert await fetch_env.body(other) == DATA
    assert theirs.offsets == [1000], "it was not asked a second time"


@pytest.mark.row("U9-rate-limits")
async def test_two_sources_that_wait_take_turns(
    fetch_env: FetchEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose pause ends first is asked first. Nobody is asked during a pause."""
    monkeypatch.setattr("mirror.pull.attempts.random", SimpleNamespace(uniform=lambda *_: 0.01))
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, paused(20.0))]
    theirs = Recording()
    theirs.add_blob(OTHER.path, DATA)
    theirs.breaks = [(1000, BROKEN), *[(1000, paused(0.05))] * 3]
    async with asyncio.timeout(10):
        assert await fetch_env.body(ContentSource(theirs, a_request(DIGEST, repository=OTHER)))
    assert (len(fetch_env.registry.asked), len(theirs.asked)) == (2, 5)


@asynccontextmanager
async def waiting_fetch(fetch_env: FetchEnv) -> AsyncIterator[Fetch]:
    """Run a fetch that has a client, and yield it once it waits for a pause."""
    fetch = Fetch(fetch_env.ingest, fetch_env.source, Mock(), fetch_env, Mock(), Mock())
    follower = fetch_env.ingest.follow()
    assert follower is not None
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fetch.run())
        await follower.wait(0, 1)
        async with asyncio.timeout(10):
            while not fetch._current.resume_at:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
        yield fetch
        running.cancel()
    follower.close()


@pytest.mark.row("U9-rate-limits")
async def test_new_client_gets_the_429_that_a_fetch_waits_for(fetch_env: FetchEnv) -> None:
    """It may use its next mirror. A client of another repository joins, and its source is tried."""
    limit = paused(20.0)
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, limit)]
    async with waiting_fetch(fetch_env) as fetch:
        assert len(fetch_env.registry.asked) == 2
        other = a_request(DIGEST, repository=OTHER)
        joined = fetch.follow(other)
        assert joined is not None
        joined.close()
        with pytest.raises(UpstreamRateLimited) as caught:
            fetch.follow(fetch_env.source.request)
        assert caught.value is limit
        fetch.offer(ContentSource(Recording(failure=Denied("403")), other))


@pytest.mark.row("U9-rate-limits")
async def test_new_client_joins_a_fetch_that_waits_because_of_our_ranges(
    fetch_env: FetchEnv,
) -> None:
    limit = UpstreamRateLimited("429", retry_after=60.0)
    fetch_env.registry.breaks = [(1000, limit), (1000, paused(60.0))]
    async with waiting_fetch(fetch_env) as fetch:
        joined = fetch.follow(fetch_env.source.request)
        assert joined is not None
        joined.close()


@pytest.mark.row("U9-rate-limits")
async def test_client_without_a_byte_does_not_wait_for_a_pause(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(0, BROKEN), *[(0, paused(20.0))] * 9]
    async with asyncio.timeout(10):
        with pytest.raises(UpstreamRateLimited):
            await fetch_env.body()


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize("is_known", [True, False])
async def test_fetch_that_a_client_reads_waits_for_a_pause_before_its_first_response(
    fetch_env: FetchEnv, is_known: bool
) -> None:
    """Another process was killed, and this one goes on. It may not know of the pause."""
    fetch_env.registry.breaks = [(100_000, BROKEN)] * 6
    # A failure drops what is not written.
    change(fetch_env, {"may_break": lambda: fetch_env.ingest.on_disk == 100_000})
    with pytest.raises(UpstreamUnavailable):
        await fetch_env.body()
    again = another(fetch_env)
    again.ingest.is_confirmed = True
    refused = [paused(0.0), paused(0.0), paused(0.0) if is_known else UpstreamRateLimited("429")]
    open_ = fetch_env.registry.open

    def open_or_refuse(*arguments: Any, **named: Any) -> Any:
        if refused:
            raise refused.pop()
        return open_(*arguments, **named)

    with patch.object(fetch_env.registry, "open", open_or_refuse):
        assert await again.body() == DATA
    assert fetch_env.registry.offsets[-1] == 100_000
