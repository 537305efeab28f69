"""The running total of space, and room for fetches: exact, cheap, shared, never behind a lock."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.config.settings import Storage
from mirror.observability.events import Event, Evicted, LogMessage, StorageMeasured, Uncached
from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, eviction, removal, space
from mirror.store.eviction import Catalog, Evictor
from mirror.store.ingest import Ingest
from mirror.store.layout import Layout
from mirror.store.protection import Protection
from mirror.store.removal import Candidate, KeptBecause
from mirror.store.space import Totals, Usage
from mirror.store.store import Store
from tests.unit.store.kit import (
    fill_up,
    image,
    keep,
    opened,
    pin,
    pulled,
    random_bytes,
    read,
    served,
    small_disk,
)
from tests.waiting import until

NOW = 1_800_000_000.0
QUOTA = Storage(max_size=1_000_000, high_water=0.9, low_water=0.5)


def layer(seed: int, size: int = 200_000) -> bytes:
    return random_bytes(size, 700 + seed)


async def usage_of(store: Store) -> Usage:
    usage = await store.space.measure()
    assert usage is not None
    return usage


async def begin(store: Store, data: bytes) -> Ingest:
    """Start a fetch up to its declared size."""
    content = store.start_ingest(Digest.of(data))
    await content.try_lead()
    await content.declare(len(data))
    return content


def end(store: Store, content: Ingest) -> None:
    content.release()
    store.end_ingest(content)


def uncached(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Uncached)]


# --- the running total ----------------------------------------------------------------------------


@pytest.mark.row("G1-cost-of-a-miss")
async def test_fetches_and_hits_list_no_directory_of_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[float] = []
    refresh = Catalog.refresh
    async with opened(tmp_path, settings=Storage(max_size=10**9)) as store:
        await store.measure()
        with monkeypatch.context() as patch:

            def counted(self: Catalog) -> Usage:
                scans.append(time.monotonic())
                return refresh(self)

            patch.setattr(Catalog, "refresh", counted)
            for seed in range(20):
                await keep(store, layer(seed, 1000))
                assert await served(store, layer(seed, 1000))
                await store.measure()
            # Its size is not stated, so it asks for room several times.
            data = layer(50, 30_000_000)
            chunked = store.start_ingest(Digest.of(data))
            await chunked.try_lead()
            await chunked.declare(None)
            for start in range(0, 30_000_000, 1_000_000):
                await chunked.feed(data[start : start + 1_000_000])
            await chunked.finish()
            end(store, chunked)
        assert scans == []
        assert await usage_of(store) == store.catalog.refresh() == Usage(21, 30_020_000, 0)


@pytest.mark.row("G1-cost-of-a-miss")
async def test_total_equals_the_disk_after_publishes_failures_evictions_and_damage(
    tmp_path: Path,
) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        for seed in range(8):
            clock[0] += 100
            await keep(store, layer(seed))
        failed = await begin(store, layer(20))
        await failed.feed(layer(20)[:65_536])
        await failed.fail(UpstreamUnavailable("gone"))
        end(store, failed)
        store.layout.blob(Digest.of(layer(7))).write_bytes(b"x" * 200_000)
        assert await store.blobs.find(Digest.of(layer(7))) is None
        running = await begin(store, layer(21, 100_000))
        await store.evictor.wait_until_idle()
        usage, found = await usage_of(store), store.catalog.refresh()
        assert usage == found
        assert usage.reserved == 100_000
        assert usage.leftover == 200_000 + 65_536
        end(store, running)


@pytest.mark.row("G1-cost-of-a-miss")
async def test_processes_see_each_others_content_and_reservations_at_once(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, settings=QUOTA) as one,
        opened(tmp_path, settings=QUOTA) as two,
    ):
        await keep(one, layer(0))
        await until(lambda: two._totals.usage() == Usage(1, 200_000, 0))
        running = await begin(one, layer(1, 300_000))
        assert (await usage_of(two)).reserved == 300_000
        await keep(two, layer(2, 100_000))
        await until(lambda: one._totals.usage() == one.catalog.refresh())
        end(one, running)
        await until(lambda: two._totals.usage() == Usage(2, 300_000, 0))


@pytest.mark.row("G1-cost-of-a-miss")
async def test_two_processes_at_once_never_exceed_the_quota(tmp_path: Path) -> None:
    events: list[Event] = []
    async with (
        opened(tmp_path, events=events, settings=QUOTA) as one,
        opened(tmp_path, events=events, settings=QUOTA) as two,
    ):
        for start in range(0, 24, 8):
            layers = [layer(seed, 120_000) for seed in range(start, start + 8)]
            stores = [one, two] * 4
            await asyncio.gather(*map(keep, stores, layers))
            assert one.catalog.refresh().total <= QUOTA.max_size
        assert one.catalog.refresh().count >= 2, "content is kept"


@pytest.mark.row("G1-cost-of-a-miss")
async def test_what_a_killed_process_has_stored_counts_and_what_it_reserved_does_not(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        await store.measure()
        killed = Totals(store.layout.totals)
        killed.add(count=1, size=500)
        killed.reserve(4000, 3000)
        killed.flush()
        assert await usage_of(store) == Usage(1, 500, 4000, unwritten=3000)
        assert killed._fd is not None
        os.close(killed._fd)  # The kernel does this.
        assert await usage_of(store) == Usage(1, 500, 0)
        heir = Totals(store.layout.totals)
        assert heir.usage() == Usage(1, 500, 0)
        heir.add(count=1, size=70)
        heir.close()
        assert await usage_of(store) == Usage(2, 570, 0)


@pytest.mark.row("G1-cost-of-a-miss")
@pytest.mark.parametrize("damage", [b"", b"\xff" * 4096, b"text", b"totals 1" + b"\x7f" * 4088])
async def test_damaged_total_is_put_right_by_a_scan(tmp_path: Path, damage: bytes) -> None:
    async with opened(tmp_path) as store:
        await keep(store, layer(0))
    (tmp_path / "totals").write_bytes(damage)
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        assert (await usage_of(store)).reserved == 0
        await store.evictor.wait_until_idle()
        clock[0] += 7200
        await store.space.measure()
        await store.evictor.wait_until_idle()
        assert await usage_of(store) == Usage(1, 200_000, 0)


def test_values_are_changed_while_the_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals, hang, hanging = Totals(tmp_path / "totals"), threading.Event(), threading.Event()
    totals.end_scan(totals.begin_scan(), Usage(0, 0, 0), NOW, 0.0)
    pwrite = os.pwrite

    def hung(fd: int, data: bytes, offset: int) -> int:
        hanging.set()
        hang.wait(30)
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", hung)
        writing = threading.Thread(target=totals.flush)
        writing.start()
        assert hanging.wait(10)
        totals.add(count=1, size=5)
        totals.reserve(7, 7)
        hang.set()
        writing.join()
    assert totals.usage() == Usage(1, 5, 7, unwritten=7)
    totals.close()


async def test_content_of_other_programs_is_counted_by_the_next_scan(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        await keep(store, layer(0))
        store.layout.blob(Digest.of(b"copied")).write_bytes(b"copied")
        assert (await usage_of(store)).count == 1
        clock[0] += 61
        await store.measure()
        await store.evictor.wait_until_idle()
        assert await usage_of(store) == Usage(2, 200_006, 0)


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_process_without_the_shared_file_counts_alone_and_shares_it_later(
    tmp_path: Path,
) -> None:
    clock = [NOW]
    (tmp_path / "totals").mkdir(parents=True)
    async with opened(tmp_path, clock) as store:
        await keep(store, layer(0))
        assert await usage_of(store) == Usage(1, 200_000, 0)
        (tmp_path / "totals").rmdir()
        clock[0] += 61
        await store.measure()
        await store.evictor.wait_until_idle()
        other = Totals(store.layout.totals)
        assert other.usage() == await usage_of(store) == Usage(1, 200_000, 0)
        other.close()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-3, 3), st.integers(-900, 900)), max_size=15)
)
def test_total_is_the_base_and_what_every_process_has_added(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("data") / "totals"
    processes = [Totals(path) for _ in range(3)]
    before = processes[0].begin_scan()
    processes[0].end_scan(before, Usage(1000, 10**6, 0, leftover=10**5), NOW, 0.0)
    for number, count, size in changes:
        processes[number].add(count=count, size=size, leftover=size)
        processes[number].flush()
    count, size = sum(c for _, c, _ in changes), sum(s for _, _, s in changes)
    for process in processes:
        assert process.usage() == Usage(1000 + count, 10**6 + size, 0, leftover=10**5 + size)
        process.close()


def test_look_is_due_after_a_minute_and_after_100_times_its_duration(tmp_path: Path) -> None:
    totals = Totals(tmp_path / "totals")
    assert totals.is_scan_due(NOW), "there was none"
    for duration, interval in ((0.1, 60), (3.0, 300)):
        totals.end_scan(totals.begin_scan(), Usage(0, 0, 0), NOW, duration)
        assert not totals.is_scan_due(NOW + interval - 1)
        assert totals.is_scan_due(NOW + interval + 1)
        assert totals.is_scan_due(NOW - 10), "the clock was set back"
    totals.close()


# --- beside an eviction ---------------------------------------------------------------------------


class SlowEviction:
    """Makes each removal of content wait for ``go``. Counts evictions that have begun."""

    def __init__(self, patch: pytest.MonkeyPatch, pause: float = 30.0) -> None:
        self.go = threading.Event()
        self.begun = 0
        self.is_removing = False
        """Whether the scan at the start of the eviction is over."""
        unlink, make_room = removal._unlink, Evictor._make_room

        def slow(
            layout: Layout,
            content: Candidate,
            protection: Protection,
            failures: dict[Digest, str],
        ) -> int | KeptBecause | None:
            self.is_removing = True
            self.go.wait(pause)
            return unlink(layout, content, protection, failures)

        def counted(evictor: Evictor, need: int) -> None:
            self.begun += 1
            make_room(evictor, need)

        patch.setattr(removal, "_unlink", slow)
        patch.setattr(Evictor, "_make_room", counted)


async def complete(store: Store, content: Ingest, data: bytes) -> None:
    """Write and publish the content of a fetch that :func:`begin` has started."""
    await content.feed(data)
    await content.finish()
    end(store, content)


async def fetched(store: Store, data: bytes) -> None:
    """Fetch content, and wait for no eviction."""
    await complete(store, await begin(store, data), data)


@pytest.mark.row("G2-long-eviction")
async def test_fetch_up_to_the_quota_and_hits_do_not_wait_for_a_long_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = [NOW], list[Event]()
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100
        slow = SlowEviction(monkeypatch)
        async with asyncio.timeout(20):
            first = await begin(store, layer(4, 150_000))
            # Content that is published during the scan of the eviction counts twice.
            await until(lambda: slow.is_removing)
            await complete(store, first, layer(4, 150_000))
            await fetched(store, layer(5, 50_000))
            for seed in range(4):
                assert await served(store, layer(seed))
        assert not slow.go.is_set()
        assert uncached(events) == []
        slow.go.set()
        await store.evictor.wait_until_idle()
        assert store.catalog.refresh().total <= 500_000


@pytest.mark.row("G2-long-eviction")
async def test_fetch_beyond_the_quota_waits_for_room_and_not_for_the_end_of_the_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = [NOW], list[Event]()
    monkeypatch.setattr("mirror.store.removal.BATCH_CONTENTS", 1)
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(9):
            await keep(store, layer(seed, 100_000))
            clock[0] += 100
        SlowEviction(monkeypatch, pause=0.3)
        await fetched(store, layer(20, 150_000))
        assert uncached(events) == []
        assert store._totals.usage() is not None
        assert not [e for e in events if isinstance(e, Evicted)], "the eviction still runs"
        await store.evictor.wait_until_idle()
        assert await served(store, layer(20, 150_000))


@pytest.mark.row("R8-beyond-the-quota")
async def test_fetch_counts_its_need_also_if_another_one_ends_while_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = [NOW], list[Event]()
    usage = Totals.usage
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100

        async def another_ends() -> None:
            store._count()

        def interrupted(totals: Totals) -> Usage | None:
            asyncio.run_coroutine_threadsafe(another_ends(), store._loop).result(10)
            return usage(totals)

        with monkeypatch.context() as patch:
            patch.setattr(Totals, "usage", interrupted)
            content = await begin(store, layer(9, 250_000))
        assert store.catalog.refresh().total <= QUOTA.max_size
        assert uncached(events) == []
        end(store, content)


@pytest.mark.row("G2-long-eviction")
async def test_many_fetches_beyond_the_quota_share_one_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = [NOW], list[Event]()
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(4):
            await keep(store, layer(seed))
            clock[0] += 100
        slow = SlowEviction(monkeypatch, pause=0.05)
        await asyncio.gather(*(fetched(store, layer(seed, 40_000)) for seed in range(10, 20)))
        await store.evictor.wait_until_idle()
        assert uncached(events) == []
        assert slow.begun <= 2
        assert store.catalog.refresh().total <= 900_000


@pytest.mark.row("G2-long-eviction")
async def test_eviction_that_frees_too_little_is_not_repeated_for_each_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    layers = [layer(seed) for seed in range(4)]
    body = image(*layers)
    async with opened(tmp_path, events=events, settings=QUOTA) as store:
        await pulled(store, body, None, *layers)
        pin(store.layout, Digest.of(body))
        slow = SlowEviction(monkeypatch, pause=0.0)
        monkeypatch.setattr("mirror.store.eviction._HOLD_OFF_FACTOR", 10_000.0)
        for seed in range(10, 30):
            await fetched(store, layer(seed))
        assert uncached(events) == ["full"] * 20
        assert slow.begun <= 2


async def test_close_ends_a_long_eviction_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock, settings=QUOTA) as store:
        for seed in range(9):
            await keep(store, layer(seed, 100_000))
        slow = SlowEviction(monkeypatch, pause=0.3)
        await fetched(store, layer(20, 50_000))
        await until(lambda: slow.begun == 1)
    assert store.catalog.refresh().bytes > 500_000, "it stopped above the low water mark"


async def test_unexpected_error_of_an_eviction_is_logged_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = [NOW], list[Event]()
    monkeypatch.setattr("mirror.store.eviction._LOCK_HOLD_OFF_S", 0.0)
    async with opened(tmp_path, clock, events, QUOTA) as store:
        for seed in range(5):
            with monkeypatch.context() as patch:
                if seed == 4:
                    patch.setattr(eviction, "find_leftovers", lambda layout: 1 / 0)
                await keep(store, layer(seed))
                await store.evictor.wait_until_idle()  # The fetch itself need not wait.
        logged = [e for e in events if isinstance(e, LogMessage)]
        assert ["ZeroDivisionError" in str(e.fields) for e in logged] == [True]
        await keep(store, layer(9))
        assert uncached(events) == []


@pytest.mark.row("G1-cost-of-a-miss")
async def test_content_that_is_published_during_a_scan_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        content = await begin(store, layer(0))
        await content.feed(layer(0)[:-1])
        ingest, blob = (of(content.digest) for of in (store.layout.ingest, store.layout.blob))

        def publish_after(
            listing: Callable[[Catalog], Iterator[tuple[Digest, os.stat_result]]],
        ) -> Callable[[Catalog], Iterator[tuple[Digest, os.stat_result]]]:
            def listed(catalog: Catalog) -> Iterator[tuple[Digest, os.stat_result]]:
                yield from listing(catalog)
                if ingest.exists():
                    ingest.write_bytes(layer(0))
                    ingest.rename(blob)

            return listed

        monkeypatch.setattr(Catalog, "_contents", publish_after(Catalog._contents))
        monkeypatch.setattr(Catalog, "_ingests", publish_after(Catalog._ingests))
        assert store.catalog.refresh().total == len(layer(0))
        await content.fail(UpstreamUnavailable("gone"))
        end(store, content)


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.row("G2-long-eviction")
async def test_full_disk_is_evicted_once_down_to_the_low_water_mark(tmp_path: Path) -> None:
    clock, events = [NOW], list[Event]()
    with small_disk(tmp_path / "disk", "12m") as root:
        async with opened(root, clock, events, Storage(max_size=10**9)) as store:
            for seed in range(8):
                await keep(store, layer(seed, 1_000_000))
                clock[0] += 100
            fill_up(root)
            assert os.statvfs(root).f_bavail == 0
            events.clear()
            await keep(store, layer(20, 300_000))
            assert uncached(events) == []
            assert await served(store, layer(20, 300_000))
            await store.measure()
            assert [e.is_writable for e in events if isinstance(e, StorageMeasured)] == [True]
            evicted = [e for e in events if isinstance(e, Evicted)]
            assert [(e.count, e.reason) for e in evicted] == [(2, "disk")]
            for seed in range(30, 33):
                await keep(store, layer(seed, 200_000))
            assert [e for e in events if isinstance(e, Evicted)] == evicted, "there is room now"


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_full_disk_without_anything_to_evict_is_reported_until_there_is_room(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    with small_disk(tmp_path / "disk", "12m") as root:
        async with opened(root, events=events) as store:
            await store.measure()
            fill_up(root)
            content = await begin(store, layer(0))
            follower = content.follow()
            assert follower
            await content.feed(layer(0))
            await content.finish()
            assert await read(follower) == layer(0)
            follower.close()
            end(store, content)
            assert uncached(events) == ["full"]
            assert content.progress.uncached == "full"
            assert store.unwritable_reason == (
                "the disk is full, and no more content can be evicted"
            )
            (root / "filler").unlink()
            await store.measure()
            assert store.unwritable_reason is None
            await keep(store, layer(1))
            assert await served(store, layer(1))
        written = [e.is_writable for e in events if isinstance(e, StorageMeasured)]
        assert written == [True, True]


async def test_small_pushes_ask_the_disk_once_a_second_and_large_ones_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    clock = [100.0]

    def counted(path: Path) -> int:
        asked.append(path)
        return 1000

    monkeypatch.setattr(space, "free_bytes", counted)
    monkeypatch.setattr(space, "monotonic", lambda: clock[0])
    async with opened(tmp_path) as store:
        make_room = store.space.make_room_on_disk
        for need, times in ((10, 1), (10, 1), (480, 1), (1, 2), (600, 3), (10, 4)):
            await make_room(need)
            assert len(asked) == times, need
        clock[0] += 1.0
        await make_room(10)
        assert len(asked) == 5


def test_reserve_of_the_disk_is_not_free(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "10m") as root:
        assert space.free_bytes(root) <= 0.99 * 10 * 2**20
        fill_up(root)
        assert space.free_bytes(root) < 0


# --- scans that fail, or that another process makes -----------------------------------------------


@contextmanager
def no_free_descriptors() -> Iterator[None]:
    """Use up all descriptors that this process may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1])
    )
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.row("D6-no-descriptors")
async def test_look_without_free_descriptors_does_not_count_all_content_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, settings=Storage(max_size=10**9)) as store:
        await keep(store, layer(1))
        before = await usage_of(store)
        monkeypatch.setattr(Totals, "is_scan_due", lambda self, now: True)
        with no_free_descriptors():
            await store.space.measure()
            await store.evictor.wait_until_idle()
        assert await usage_of(store) == before
        assert before.count == 1


@pytest.mark.row("G1-cost-of-a-miss")
async def test_number_of_contents_is_unknown_while_another_process_makes_the_first_scan(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    async with opened(tmp_path, events=events, settings=Storage(max_size=10**9)) as store:
        with store.layout.eviction_lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            await store.measure()
            assert store._contents is None
            assert not any(isinstance(event, StorageMeasured) for event in events)
        await keep(store, layer(1))
        await store.measure()
        assert store._contents == 1


@pytest.mark.row("G2-long-eviction")
async def test_events_of_an_eviction_are_emitted_on_the_event_loop(tmp_path: Path) -> None:
    """A log line that another thread adds may be lost, and may stop all later ones."""
    threads: dict[str, int] = {}

    def emit(event: Event) -> None:
        threads[type(event).__name__] = threading.get_ident()

    store = await Store.open(str(tmp_path), QUOTA, emit)
    try:
        for seed in range(6):
            await keep(store, layer(seed))
        await store.evictor.wait_until_idle()
        assert threads["Evicted"] == threading.get_ident()
    finally:
        await store.close()


@pytest.mark.row("G1-cost-of-a-miss")
async def test_damaged_content_that_two_processes_find_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    verify, both = disk.verify, threading.Barrier(2, timeout=10)

    def verify_together(
        fd: int, size: int, digest: Digest, is_stopping: Callable[[], bool]
    ) -> None:
        both.wait()
        verify(fd, size, digest, is_stopping)

    async with opened(tmp_path, events=events) as one, opened(tmp_path, events=events) as other:
        await one.measure()
        digest = await keep(one, layer(1))
        assert (await usage_of(one)).count == 1
        one.layout.blob(digest).write_bytes(layer(2))
        monkeypatch.setattr(disk, "verify", verify_together)
        found = await asyncio.gather(one.blobs.find(digest), other.blobs.find(digest))
        assert found == [None, None]
        assert sum(event.count for event in events if isinstance(event, Evicted)) == 1
        other._totals.flush()  # A thread does this a moment later.
        usage = await usage_of(one)
        assert (usage.count, usage.bytes) == (0, 0)
