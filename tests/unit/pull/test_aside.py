"""Aside requests: which parts are requested by themselves, and readers that wait for both.

The registry is in memory. Its ``gate`` holds the fetch of the whole content after 64 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config.settings import Parallel, Storage
from mirror.observability.events import AsideEnded, Outcome, Published, RequestRecord
from mirror.oci.errors import (
    BlobUnknown,
    ContentLost,
    Denied,
    MirrorError,
    Unauthorized,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.headers import Span, bounded_spans
from mirror.oci.reference import Digest, Repository
from mirror.pull.aside import (
    MAX_ASIDE_BYTES,
    MAX_AT_ONCE,
    MAX_GAP_BYTES,
    MAX_REQUESTS,
    MIN_LEAD_S,
    FrontRate,
    choose_spans,
    pause_after,
    result_of,
)
from mirror.pull.range_readers import AsideReader, RangesReader
from mirror.store.follower import Follower
from mirror.store.reader import Reader
from tests.unit.pull.kit import OTHER, REPO, MemoryRegistry, PullKit, a_pull, blob, pull_kit
from tests.unit.store.kit import random_bytes, read
from tests.waiting import until

SIZE = 3_000_000
DATA = random_bytes(SIZE, 71)
TAIL = Span(SIZE - 51, SIZE)
MIB = 1 << 20


# --- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "rate", "chosen"),
    [
        pytest.param([], 1.0, (), id="nothing"),
        pytest.param([Span(1000, 1001)], 0.0, (Span(1000, 1001),), id="stalled-fetch"),
        pytest.param([Span(100, 200)], 0.0, (), id="next-byte-of-the-fetch"),
        pytest.param([Span(0, 200)], 0.0, (), id="begins-before-the-front"),
        pytest.param([Span(1100, 1200)], 1000.0, (), id="reached-within-a-second"),
        pytest.param([Span(1101, 1200)], 1000.0, (Span(1101, 1200),), id="more-than-a-second"),
        pytest.param([Span(5 * MIB, 9 * MIB)], 9.0, (Span(5 * MIB, 9 * MIB),), id="largest"),
        pytest.param([Span(5 * MIB, 9 * MIB + 1)], 9.0, (), id="too-large"),
        pytest.param(
            [Span(50, 60), Span(9000, 9010)], 9.0, (Span(9000, 9010),), id="only-the-far-ones"
        ),
        pytest.param(
            [Span(1000, 2000), Span(50_000, 60_000)], 9.0, (Span(1000, 60_000),), id="joined"
        ),
        pytest.param(
            [Span(1000, 2000), Span(2000 + MAX_GAP_BYTES + 1, 9 * MIB // 10)],
            9.0,
            (Span(1000, 2000), Span(2000 + MAX_GAP_BYTES + 1, 9 * MIB // 10)),
            id="too-far-apart-to-join",
        ),
        pytest.param(
            [Span(n * MIB, n * MIB + 50_000) for n in range(1, MAX_REQUESTS + 1)],
            9.0,
            tuple(Span(n * MIB, n * MIB + 50_000) for n in range(1, MAX_REQUESTS + 1)),
            id="most-requests",
        ),
        pytest.param(
            [Span(n * MIB, n * MIB + 9) for n in range(1, MAX_REQUESTS + 2)],
            9.0,
            (),
            id="too-many-requests",
        ),
    ],
)
def test_ranges_more_than_a_second_ahead_are_requested_aside(
    spans: Sequence[Span], rate: float, chosen: tuple[Span, ...]
) -> None:
    assert choose_spans(spans, 100, rate) == chosen


@given(
    cuts=st.lists(st.integers(0, 12 * MIB), min_size=2, max_size=60, unique=True),
    front=st.integers(0, 12 * MIB),
    rate=st.floats(0, 20 * MIB),
)
def test_each_set_of_ranges_is_covered_as_a_whole_or_not_at_all(
    cuts: list[int], front: int, rate: float
) -> None:
    ends = sorted(cuts)
    spans = [Span(*pair) for pair in zip(ends[::2], ends[1::2], strict=False)]
    chosen = choose_spans(spans, front, rate)
    far = [span for span in spans if span.start > front + rate * MIN_LEAD_S]
    assert sum(span.length for span in chosen) <= MAX_ASIDE_BYTES
    assert len(chosen) <= MAX_REQUESTS
    assert list(chosen) == sorted(chosen)
    if chosen:
        assert all(
            any(one.start <= span.start and span.stop <= one.stop for one in chosen) for span in far
        )
        assert {one.start for one in chosen} <= {span.start for span in far}
        wanted = sum(span.length for span in far)
        assert sum(one.length for one in chosen) <= wanted + len(far) * MAX_GAP_BYTES


@given(
    specs=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 99), st.integers(0, 200)),
            st.tuples(st.none(), st.integers(0, 200)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_each_header_of_closed_ranges_selects_its_own_bytes(
    specs: list[tuple[int | None, int]],
) -> None:
    header = "bytes=" + ",".join(f"{'' if a is None else a}-{b}" for a, b in specs)
    content = bytes(range(100))
    wanted = set()
    for first, last in specs:
        wanted |= set(content[-last:] if first is None and last else b"")
        wanted |= set(content[first : last + 1]) if first is not None else set()
    selected = {n for span in bounded_spans(header, 100) for n in content[span.start : span.stop]}
    assert selected in (wanted, set())


def test_rate_is_known_a_moment_after_the_first_look_at_the_front() -> None:
    speed = FrontRate()
    assert speed.measure(100.0, 5_000) is None
    assert speed.measure(100.01, 6_000) is None
    assert speed.measure(100.1, 6_000) == pytest.approx(10_000)
    assert speed.measure(100.11, 9_000) == pytest.approx(10_000), "too little time has passed"
    assert speed.measure(101.1, 9_000) == pytest.approx(3_000)
    assert speed.measure(102.1, 9_000) == 0.0
    assert speed.measure(104.2, 9_000) is None, "an old sample says nothing of the current rate"
    assert speed.measure(104.3, 9_000) == 0.0


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (UpstreamProtocolError("the upstream ignores Range"), 600.0),
        (UpstreamRateLimited("429"), 600.0),
        (UpstreamRateLimited("429", retry_after=5.0), 600.0),
        (UpstreamUnavailable("503"), 30.0),
        (BlobUnknown("404"), 30.0),
    ],
)
def test_429_and_wrong_range_pause_aside_requests_longer_than_a_failure(
    error: MirrorError, seconds: float
) -> None:
    assert pause_after(result_of(error)) == seconds


# --- requests -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_connection_for_each_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other connection bring the content while its fetch is held."""
    monkeypatch.setattr("mirror.pull.connection_budget.MAX_PER_ENDPOINT", 0)


@dataclass
class LazyPull:
    """A pull of parts."""

    kit: PullKit
    registry: MemoryRegistry
    gate: asyncio.Event
    """Set: the fetch of the whole content continues."""
    digest: Digest

    async def open(
        self, header: str, repository: Repository = REPO
    ) -> tuple[Reader, RequestRecord]:
        pull = a_pull()
        result = await self.kit.service.blob(
            repository,
            self.digest,
            pull,
            is_head=False,
            select_spans=partial(bounded_spans, header),
        )
        assert result.content is not None
        assert not isinstance(result.content, bytes)
        return result.content, pull

    async def read(self, header: str, repository: Repository = REPO) -> tuple[bytes, RequestRecord]:
        """Return the bytes of all spans of ``header``."""
        reader, pull = await self.open(header, repository)
        try:
            spans = bounded_spans(header, SIZE)
            parts = [await read(reader, span.start, span.stop) for span in spans]
            return b"".join(parts), pull
        finally:
            reader.close()

    @property
    def ended(self) -> list[tuple[str, int]]:
        """(result, bytes) of the aside requests."""
        events = [event for event in self.kit.events if isinstance(event, AsideEnded)]
        return [(event.result, event.bytes) for event in events]


@asynccontextmanager
async def lazy_pull(root: Path, storage: Storage | None = None) -> AsyncIterator[LazyPull]:
    registry = MemoryRegistry(gate=asyncio.Event())
    digest = registry.add_blob(REPO.path, DATA)
    registry.blobs[OTHER.path, digest] = DATA
    assert registry.gate is not None
    async with pull_kit(root, registry=registry, storage=storage) as kit:
        lazy = LazyPull(kit, registry, registry.gate, digest)
        try:
            yield lazy
        finally:
            registry.gate.set()


def range_of(span: Span) -> str:
    return f"bytes={span.start}-{span.stop - 1}"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (range_of(TAIL), DATA[-51:]),
        ("bytes=-51", DATA[-51:]),
        ("bytes=1000000-1049999", DATA[1_000_000:1_050_000]),
        (
            "bytes=100-199,1000000-1049999,1100000-1149999,2500000-2999999",
            DATA[100:200]
            + DATA[1_000_000:1_050_000]
            + DATA[1_100_000:1_150_000]
            + DATA[2_500_000:],
        ),
    ],
)
async def test_range_far_ahead_is_served_while_the_fetch_stands_still(
    tmp_path: Path, header: str, expected: bytes
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        data, pull = await lazy.read(header)
        assert data == expected
        assert pull.outcome is Outcome.ASIDE
        assert pull.is_unverified
        near = 100 if "100-199" in header else 0
        assert pull.aside_bytes == len(expected) - near
        assert all(result == "ok" for result, _ in lazy.ended)
        assert not any(isinstance(event, Published) for event in lazy.kit.events)
        lazy.gate.set()
        assert (await blob(lazy.kit, lazy.digest))[0] == DATA
        await until(lambda: any(isinstance(event, Published) for event in lazy.kit.events))
        data, pull = await lazy.read(header)
        assert (data, pull.outcome, pull.is_unverified) == (expected, Outcome.HIT, False)
        assert lazy.registry.calls["get_blob"] == 1 + lazy.registry.calls["get_part"]


@pytest.mark.parametrize("header", ["bytes=0-1", "bytes=0-0", "bytes=0-65535", "bytes=1000000-"])
async def test_probe_and_open_ended_range_are_not_requested_aside(
    tmp_path: Path, header: str
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        reader, pull = await lazy.open(header)
        reader.close()
        assert not isinstance(reader, AsideReader)
        assert not pull.is_unverified
        assert lazy.registry.calls["get_blob"] == 1


@pytest.mark.parametrize(
    "error",
    [
        UpstreamProtocolError("the upstream ignores Range"),
        UpstreamUnavailable("503"),
        UpstreamRateLimited("429"),
        BlobUnknown("404"),
        Unauthorized("401"),
        Denied("403"),
    ],
)
async def test_failed_range_is_served_from_the_fetch_and_not_tried_again_at_once(
    tmp_path: Path, error: MirrorError
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_failure = error
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(lazy.read(range_of(TAIL)))
            await until(lambda: len(lazy.ended) == 1)
            lazy.gate.set()
        data, pull = reading.result()
        assert data == DATA[-51:]
        assert (pull.outcome, pull.aside_bytes) == (Outcome.MISS, 0)
        assert lazy.ended[0][0] in ("no_range", "rate_limited", "failed")
        lazy.gate.clear()


async def test_repository_whose_upstream_ignores_range_gets_no_aside_request_for_a_while(
    tmp_path: Path,
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_failure = UpstreamProtocolError("the upstream ignores Range")
        first, _ = await lazy.open(range_of(TAIL))
        await until(lambda: lazy.ended == [("no_range", 0)])
        second, pull = await lazy.open(range_of(TAIL))
        assert not isinstance(second, AsideReader)
        assert not pull.is_unverified
        assert lazy.registry.calls["get_part"] == 1
        lazy.registry.part_failure = None
        other, _ = await lazy.open(range_of(TAIL), OTHER)
        assert isinstance(other, AsideReader), "a refusal counts for what met it"
        for reader in (first, second, other):
            reader.close()


async def test_range_that_arrives_while_the_rate_is_measured_is_not_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.aside._SAMPLE_S", 60.0)
    async with lazy_pull(tmp_path) as lazy:
        async with asyncio.TaskGroup() as group:
            opening = group.create_task(lazy.open("bytes=2000000-2000099"))
            await until(lambda: lazy.registry.calls["get_blob"] == 1)
            lazy.gate.set()
        reader, pull = opening.result()
        assert await read(reader, 2_000_000, 2_000_100) == DATA[2_000_000:2_000_100]
        reader.close()
        assert (pull.is_unverified, lazy.registry.calls["get_part"]) == (False, 0)


async def test_range_behind_a_burst_of_the_upstream_is_requested(tmp_path: Path) -> None:
    """The burst looks like a fast fetch while the rate is measured."""
    async with lazy_pull(tmp_path) as lazy:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(lazy.read(range_of(TAIL)))
            await asyncio.sleep(0.05)
            for _ in range(20):
                lazy.gate.set()
                await asyncio.sleep(0)
                lazy.gate.clear()
        assert reading.result()[0] == DATA[-51:]
        assert reading.result()[1].outcome is Outcome.ASIDE


async def test_bytes_of_the_fetch_are_taken_if_they_come_first(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(lazy.read(range_of(TAIL)))
            await until(lambda: lazy.registry.calls["get_part"] == 1)
            lazy.gate.set()
        data, pull = reading.result()
        assert (data, pull.outcome, pull.aside_bytes) == (DATA[-51:], Outcome.MISS, 0)
        await until(lambda: lazy.ended == [("dropped", 0)])


async def test_clients_of_one_repository_share_a_request_and_others_do_not(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            same = [group.create_task(lazy.read(range_of(TAIL))) for _ in range(5)]
            await until(lambda: lazy.registry.calls["get_part"] == 1)
            other = group.create_task(lazy.read(range_of(TAIL), OTHER))
            await until(lambda: lazy.registry.calls["get_part"] == 2)
            lazy.registry.part_gate.set()
        assert {task.result()[0] for task in (*same, other)} == {DATA[-51:]}
        assert lazy.ended == [("ok", 51)] * 2


async def test_last_client_that_leaves_ends_the_request(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        readers = [(await lazy.open(range_of(TAIL)))[0] for _ in range(2)]
        await until(lambda: lazy.registry.calls["get_part"] == 1)
        readers[0].close()
        readers[0].close()
        await asyncio.sleep(0)
        assert not lazy.ended
        readers[1].close()
        await until(lambda: lazy.ended == [("dropped", 0)])
        # A client that comes now gets a request of its own.
        lazy.registry.part_gate.set()
        assert (await lazy.read(range_of(TAIL)))[0] == DATA[-51:]


async def test_few_requests_run_at_once_for_one_content(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        spans = [Span(n * 100_000, n * 100_000 + 50_000) for n in range(10, 18)]
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(lazy.read(range_of(span))) for span in spans]
            await until(lambda: lazy.registry.calls["get_part"] == MAX_AT_ONCE)
            await asyncio.sleep(0.05)
            assert lazy.registry.calls["get_part"] == MAX_AT_ONCE
            lazy.registry.part_gate.set()
        for task, span in zip(reading, spans, strict=True):
            assert task.result()[0] == DATA[span.start : span.stop]


async def test_memory_of_ranges_is_bounded_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.aside.MAX_HELD_BYTES", 100)
    async with lazy_pull(tmp_path) as lazy:
        memory = lazy.kit.store.memory
        memory.hold_ahead("others", 48 * MIB - 50)
        first, pull = await lazy.open(range_of(TAIL))
        assert not isinstance(first, AsideReader), "no memory is free"
        assert not pull.is_unverified
        memory.hold_ahead("others", 47 * MIB)
        second, _ = await lazy.open(range_of(TAIL))
        third, _ = await lazy.open("bytes=1000000-1000049")
        assert isinstance(second, AsideReader)
        assert not isinstance(third, AsideReader), "slow clients hold all that they may"
        total = memory.total
        for reader in (first, second, third):
            reader.close()
        assert memory.total == total - 51


async def test_endpoint_without_a_free_connection_still_gets_a_few_requests(
    tmp_path: Path,
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        # Each for another content: two for the same would need no further limit.
        digests = [lazy.registry.add_blob(REPO.path, DATA[n:] + DATA[:n]) for n in range(5)]
        async with asyncio.TaskGroup() as group:
            for digest in digests:
                lazy.digest = digest
                group.create_task(lazy.read("bytes=-51"))
                await asyncio.sleep(0)
            await until(lambda: lazy.registry.calls["get_part"] == MAX_AT_ONCE)
            await asyncio.sleep(0.05)
            assert lazy.registry.calls["get_part"] == MAX_AT_ONCE
            lazy.registry.part_gate.set()
        assert lazy.ended == [("ok", 51)] * len(digests)


async def test_upstream_with_one_connection_gets_no_request_for_a_range(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.parallel = Parallel(connections=1)
        reader, pull = await lazy.open(range_of(TAIL))
        reader.close()
        assert not pull.is_unverified


async def test_no_range_is_requested_after_wrong_bytes_of_the_content(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.kit.content.fetches.suspects.add(lazy.digest, {"memory": "docker.io"})
        reader, pull = await lazy.open(range_of(TAIL))
        reader.close()
        assert not pull.is_unverified


async def test_repository_without_the_content_gets_no_range(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        first, _ = await lazy.open(range_of(TAIL))
        with pytest.raises(BlobUnknown):
            await lazy.open(range_of(TAIL), Repository("docker.io", "library/stranger"))
        first.close()


async def test_draining_ends_the_requests_and_their_readers(tmp_path: Path) -> None:
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        reader, _ = await lazy.open(range_of(TAIL))
        await until(lambda: lazy.registry.calls["get_part"] == 1)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(swallow(reader))
            await asyncio.sleep(0)
            await lazy.kit.single_flight.drain(0.0)
        assert isinstance(reading.result(), MirrorError)
        reader.close()
        assert lazy.ended == [("dropped", 0)]


# --- content that the disk does not take ----------------------------------------------------------

FULL = Storage(max_size=100_000)
"""The disk takes no content of the tests."""


@asynccontextmanager
async def unstored_pull(root: Path) -> AsyncIterator[LazyPull]:
    """Begin with a pull of a part whose fetch has ended, because the disk did not take it."""
    async with lazy_pull(root, FULL) as lazy:
        assert (await lazy.read("bytes=0-1"))[0] == DATA[:2]
        await until(lambda: not lazy.kit.store.active_ingests)
        yield lazy


async def test_ranges_of_content_that_is_not_stored_are_requested_without_a_fetch(
    tmp_path: Path,
) -> None:
    async with unstored_pull(tmp_path) as lazy:
        headers = ["bytes=0-1", "bytes=-51", "bytes=0-0,1000000-1049999,2500000-2999999"]
        headers += [f"bytes={first}-{first + 49_999}" for first in range(0, SIZE, 500_000)]
        for header in headers:
            data, pull = await lazy.read(header)
            expected = [DATA[span.start : span.stop] for span in bounded_spans(header, SIZE)]
            assert data == b"".join(expected)
            assert (pull.outcome, pull.is_unverified) == (Outcome.ASIDE, True)
            assert pull.aside_bytes == len(data)
        assert lazy.registry.calls["get_blob"] - lazy.registry.calls["get_part"] == 1
        assert lazy.kit.store.memory.total == 0


async def test_range_that_has_left_the_memory_of_a_fetch_starts_no_second_one(
    tmp_path: Path,
) -> None:
    async with lazy_pull(tmp_path, FULL) as lazy:
        async with asyncio.TaskGroup() as group:
            whole = await lazy.kit.service.blob(REPO, lazy.digest, a_pull(), is_head=False)
            assert isinstance(whole.content, Follower)
            await whole.content.wait(0, 1)
            position = whole.content.arrived
            reading = group.create_task(read(whole.content, position, SIZE))
            await asyncio.sleep(0)
            data, pull = await lazy.read("bytes=10-19")
            assert (data, pull.outcome) == (DATA[10:20], Outcome.ASIDE)
            lazy.gate.set()
        assert reading.result() == DATA[position:]
        whole.content.close()
        assert lazy.registry.calls["get_blob"] - lazy.registry.calls["get_part"] == 1


@pytest.mark.parametrize(
    "error", [UpstreamProtocolError("the upstream ignores Range"), UpstreamUnavailable("503")]
)
async def test_failed_range_of_content_that_is_not_stored_comes_from_a_fetch(
    tmp_path: Path, error: MirrorError
) -> None:
    async with unstored_pull(tmp_path) as lazy:
        lazy.gate.set()
        lazy.registry.part_failure = error
        data, pull = await lazy.read(range_of(TAIL))
        assert (data, pull.outcome, pull.is_unverified) == (DATA[-51:], Outcome.MISS, False)
        assert lazy.kit.store.memory.total == 0


async def test_whole_content_that_is_not_stored_is_never_sent_unverified(tmp_path: Path) -> None:
    async with unstored_pull(tmp_path) as lazy:
        lazy.gate.set()
        data, pull = await lazy.read(f"bytes=0-{SIZE - 1}")
        assert (data, pull.outcome, pull.is_unverified) == (DATA, Outcome.MISS, False)


async def test_repository_without_the_content_gets_no_range_of_it_without_a_fetch(
    tmp_path: Path,
) -> None:
    async with unstored_pull(tmp_path) as lazy:
        with pytest.raises(BlobUnknown):
            await lazy.open(range_of(TAIL), Repository("docker.io", "library/stranger"))
        assert (await lazy.read(range_of(TAIL), OTHER))[0] == DATA[-51:]


async def test_content_is_fetched_again_once_the_disk_may_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.aside._UNSTORED_TTL_S", 0.0)
    async with lazy_pull(tmp_path, FULL) as lazy:
        for number in (1, 2):
            assert (await lazy.read("bytes=0-1"))[0] == DATA[:2]
            await until(lambda: not lazy.kit.store.active_ingests)
            assert lazy.registry.calls["get_blob"] == number


async def test_client_that_leaves_before_a_range_without_a_fetch_gives_its_memory_back(
    tmp_path: Path,
) -> None:
    async with unstored_pull(tmp_path) as lazy:
        lazy.registry.part_gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(lazy.open(range_of(TAIL)))
            await until(lambda: lazy.registry.calls["get_part"] == 1)
            assert lazy.kit.store.memory.total == TAIL.length
            leaving.cancel()
        await until(lambda: lazy.ended == [("dropped", 0)])
        assert lazy.kit.store.memory.total == 0


async def test_read_outside_of_the_ranges_of_content_that_is_not_stored_is_an_error(
    tmp_path: Path,
) -> None:
    async with unstored_pull(tmp_path) as lazy:
        reader, _ = await lazy.open(range_of(TAIL))
        assert isinstance(reader, RangesReader)
        assert (reader.digest, await reader.wait_for_size()) == (lazy.digest, SIZE)
        with pytest.raises(ContentLost):
            await reader.wait(0, 1)
        assert await reader.wait(SIZE, SIZE) is None
        reader.close()
        with pytest.raises(ContentLost):
            await reader.wait(TAIL.start, TAIL.stop)


async def swallow(reader: Reader) -> bytes | MirrorError:
    try:
        return await read(reader, TAIL.start, TAIL.stop)
    except MirrorError as error:
        return error
