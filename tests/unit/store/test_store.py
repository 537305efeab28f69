"""The store over a real directory: opening, recency, reports, a disk that refuses, leftovers."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import (
    Event,
    IngestsMeasured,
    LogMessage,
    Reverified,
    StorageMeasured,
    Uncached,
)
from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store import blobs, disk, orphans
from mirror.store import store as module
from mirror.store.ingest_lock import Role
from mirror.store.layout import Layout
from mirror.store.records import AccessRecord
from mirror.store.store import Store
from tests.unit.store.kit import (
    REPO,
    fill_up,
    image,
    keep,
    keep_private_copies_in,
    make_read_only,
    mark_used,
    no_trace,
    opened,
    pulled,
    random_bytes,
    read,
    remember,
    served,
    small_disk,
)
from tests.waiting import until

NOW = 1_800_000_000.0
YEAR = 365 * 86400.0
TAG = Tag("1.0")
LAYER = random_bytes(5_000_000, 71)
POOLS = ("open", "write", "publish", "hash", "index", "evict")


def threads() -> set[threading.Thread]:
    """The running threads of stores."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(POOLS)}


async def test_stored_content_is_served_after_a_restart(tmp_path: Path) -> None:
    before = threads()
    async with opened(tmp_path) as store:
        for algorithm in ("sha256", "sha512"):
            digest = await keep(store, LAYER, algorithm)
            assert (tmp_path / "blobs" / algorithm / digest.hex).read_bytes() == LAYER
        assert not store.active_ingests
    async with opened(tmp_path) as store:
        assert await served(store, LAYER)
        usage = store.catalog.refresh()
        assert (usage.count, usage.total) == (2, 2 * len(LAYER))
    assert not threads() - before


async def test_ingest_is_active_until_its_fetch_has_ended(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = store.start_ingest(Digest.of(LAYER))
        assert store.active_ingests == {Digest.of(LAYER): first}
        second = store.start_ingest(Digest.of(LAYER))
        store.end_ingest(first)
        assert store.active_ingests == {Digest.of(LAYER): second}, (
            "the second one is registered now"
        )
        for content in (first, second):
            content.release()
            store.end_ingest(content)
        await store.idle()
        await store.wait_until_published()


# --- recency --------------------------------------------------------------------------------------


def used(store: Store, data: bytes) -> float:
    return store.layout.blob(Digest.of(data)).stat().st_mtime


async def test_recency_is_updated_once_a_minute(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, b"content")
        for after, wanted in ((0, 0), (59, 0), (60, 60), (100, 60), (121, 121)):
            clock[0] = NOW + after
            await mark_used(store, digest)
            assert not store.blobs.mark_used([digest]), "it is not due again"
            assert used(store, b"content") == NOW + wanted


@pytest.mark.row("K3-future-recency")
async def test_recency_is_updated_after_the_clock_was_set_back(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, b"content")
        await mark_used(store, digest)
        clock[0] -= YEAR
        await mark_used(store, digest)
        assert used(store, b"content") == NOW - YEAR


async def test_manifest_is_never_more_than_a_minute_ahead_of_its_parts(tmp_path: Path) -> None:
    """A layer that two images share is as recent as the newer of the two."""
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        one, two = b"manifest one", b"manifest two"
        shared = b"shared layer"
        for data in (one, two, shared):
            await keep(store, data)
        digest_of = Digest.of
        await mark_used(store, digest_of(one), digest_of(shared))
        clock[0] += 30
        await mark_used(store, digest_of(two), digest_of(shared))
        assert used(store, two) == used(store, shared) == NOW + 30


async def test_remembered_uses_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_MAX_REMEMBERED", 10)
    async with opened(tmp_path) as store:
        for number in range(50):
            store.blobs.mark_used([Digest.of(str(number).encode())])
        assert len(store.blobs._used_at) <= 11


async def test_records_of_uses_that_a_disk_does_not_take_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs for hours, with content that is used every minute."""
    monkeypatch.setattr(blobs, "_MAX_TOUCHES", 3)
    hanging, touched = threading.Event(), []

    def touch(layout: Layout, digests: tuple[Digest, ...], now: float) -> None:
        hanging.wait(30)
        touched.extend(digests)

    monkeypatch.setattr(disk, "touch", touch)
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = Digest.of(b"content")
        recorded = []
        for _ in range(10):
            clock[0] += 60
            recorded.append(store.blobs.mark_used([digest]))
        assert recorded == [True] * 3 + [False] * 7
        hanging.set()
        await until(lambda: len(touched) == 3)
        assert store.blobs.mark_used([digest]), "the uses that were not recorded are still due"


async def test_recency_marked_at_close_is_written_and_after_close_is_dropped(
    tmp_path: Path,
) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, b"content")
        clock[0] += 60
        store.blobs.mark_used([digest])
    assert used(store, b"content") == NOW + 60
    clock[0] += 60
    store.blobs.mark_used([digest])
    assert used(store, b"content") == NOW + 60


@pytest.mark.row("G5-repeated-verification")
async def test_content_is_verified_again_once_by_all_processes_also_after_a_crash(
    tmp_path: Path,
) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, LAYER)
        first: list[Event] = []
        second: list[Event] = []
        async with (
            opened(tmp_path, clock, events=first) as one,
            opened(tmp_path, clock, events=second) as two,
        ):
            assert await served(two, LAYER), "the second process knows the earlier verification"
            clock[0] += 10 * Storage().reverify
            assert await served(one, LAYER)
            await until(lambda: any(isinstance(event, Reverified) for event in first))
            await one.keep_up_index()
            assert await served(two, LAYER)
            assert not any(isinstance(event, Reverified) for event in second)
            third: list[Event] = []
            async with opened(tmp_path, clock, events=third) as after_a_crash:
                assert await served(after_a_crash, LAYER)
            assert not any(isinstance(event, Reverified) for event in third)
        assert digest == Digest.of(LAYER)


# --- reports, a disk that refuses -----------------------------------------------------------------


async def test_measure_reports_usage_and_running_ingests(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened(tmp_path, events=events, settings=Storage(max_size=10**9)) as store:
        await keep(store, LAYER)
        content = store.start_ingest(Digest.of(b"growing"))
        events.clear()
        await store.measure()
        measured = [e for e in events if isinstance(e, StorageMeasured)]
        assert measured == [StorageMeasured(1, len(LAYER), 10**9, True)]
        ingest = [e for e in events if isinstance(e, IngestsMeasured)]
        assert [event.count for event in ingest] == [1]
        assert ingest[0].oldest_idle >= 0
        content.release()
        store.end_ingest(content)


@pytest.mark.row("D7-unwritable-directories")
async def test_disk_that_refuses_writes_serves_its_content_and_is_reported(
    tmp_path: Path,
) -> None:
    body, events = image(LAYER), list[Event]()
    with small_disk(tmp_path / "disk", "20m") as root:
        async with opened(root) as store:
            await pulled(store, body, TAG, LAYER, b"{}")
            assert store.unwritable_reason is None
        make_read_only(root)
        async with opened(root, events=events) as store:
            assert store.unwritable_reason == f"{root}/blobs/sha256: not writable"
            assert await served(store, LAYER)
            record = await store.index.tag(REPO, TAG)
            assert record
            assert record.digest == Digest.of(body)
            content = store.start_ingest(Digest.of(b"new"))
            follower = content.follow()
            assert follower
            assert await content.try_lead() is Role.LEADER
            await content.declare(3)
            await content.feed(b"new")
            await content.finish()
            content.release()
            assert await read(follower) == b"new", "it is served but not kept"
            follower.close()
            store.end_ingest(content)
            await store.measure()
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["readonly"]
        assert [e.is_writable for e in events if isinstance(e, StorageMeasured)] == [False]
        assert any(
            isinstance(e, LogMessage) and "nothing can be stored" in e.message for e in events
        )


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_store_that_started_on_a_full_disk_is_reported_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_private_copies_in(tmp_path, monkeypatch)
    body, events = image(b"layer"), list[Event]()
    with small_disk(tmp_path / "disk", "20m") as root:
        async with opened(root) as store:
            await pulled(store, body, TAG)
        fill_up(root)
        async with opened(root, events=events) as store:
            assert store.unwritable_reason
            assert await served(store, body)
            await remember(store, body, Tag("while-full"))
            await store.measure()
            (root / "filler").unlink()
            await store.keep_up_index()
            await store.measure()
            assert store.unwritable_reason is None
            await store.save_image_layout(share=1.0)
        measured = [e.is_writable for e in events if isinstance(e, StorageMeasured)]
        assert measured == [False, True]
        async with opened(root) as store:
            assert await store.index.tag(REPO, TAG)
            assert await store.index.tag(REPO, Tag("while-full"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("oci-mirror-index-")]


@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.row("C9-damaged-content")
async def test_damage_on_a_disk_that_refuses_writes_is_never_served(tmp_path: Path) -> None:
    """It can be neither quarantined nor replaced. So it is fetched, and not kept."""
    directory = tmp_path / "blobs"
    with small_disk(directory, "20m"):
        async with opened(tmp_path) as store:
            digest = await keep(store, LAYER)
            path = store.layout.blob(digest)
            path.write_bytes(LAYER[:-1] + b"?")
            no_trace(path)
        make_read_only(directory)
        async with opened(tmp_path, settings=Storage(reverify=0)) as store:
            assert not await _is_found(store, digest)
            content = store.start_ingest(digest)
            follower = content.follow()
            assert follower
            assert await content.try_lead() is Role.LEADER, (
                "the damaged file is not taken for whole content"
            )
            await content.declare(len(LAYER))
            await content.feed(LAYER)
            await content.finish()
            content.release()
            assert await read(follower) == LAYER
            follower.close()
            store.end_ingest(content)


async def _is_found(store: Store, digest: Digest) -> bool:
    reader = await store.blobs.find(digest, 1)
    if reader is not None:
        reader.close()
    return reader is not None


async def test_failed_publish_is_reported_until_content_is_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        with monkeypatch.context() as patch:

            def refuse(*arguments: object) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr(disk, "publish", refuse)
            await keep(store, b"one")
        assert store.unwritable_reason == "content could not be stored (io)"
        await keep(store, b"two")
        assert store.unwritable_reason is None


async def test_leftovers_of_ended_fetches_are_removed_once_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        content = store.start_ingest(Digest.of(LAYER))
        await content.try_lead()
        await content.declare(len(LAYER))
        await content.feed(LAYER[:1_000_000])
        await content.fail(UpstreamUnavailable("gone"))
        content.release()
        store.end_ingest(content)
        clock[0] += YEAR
        await store.measure()
        assert store.layout.ingest(content.digest).exists(), "not at every call"
        monkeypatch.setattr(module, "_LEFTOVERS_INTERVAL_S", -1.0)
        await store.measure()
        assert not list(store.layout.ingest(content.digest).parent.iterdir())


# --- what another process finds -------------------------------------------------------------------


@pytest.mark.row("G5-repeated-verification")
async def test_content_is_recorded_as_verified_before_another_process_can_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, opened_files = disk.publish, list[Path]()
    digest = Digest.of(LAYER)
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        found: list[float | None] = []

        def look_first(*arguments: Any) -> None:
            reading = asyncio.run_coroutine_threadsafe(other.index.verified_at(digest), store._loop)
            found.append(reading.result(10))
            publish(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(disk, "publish", look_first)
            await keep(store, LAYER)
        assert found == [NOW]
        monkeypatch.setattr(disk, "verify", lambda *arguments: opened_files.append(tmp_path))
        assert await served(other, LAYER)
        assert opened_files == [], "nothing is hashed again"


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_file_that_vanishes_before_it_is_published_is_no_failure_of_the_disk(
    tmp_path: Path,
) -> None:
    events: list[Event] = []
    async with opened(tmp_path, events=events) as store:
        content = store.start_ingest(Digest.of(LAYER))
        await content.try_lead()
        await content.declare(len(LAYER))
        await content.feed(LAYER)
        store.layout.ingest(content.digest).unlink()
        await content.finish()
        content.release()
        store.end_ingest(content)
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["removed"]
        assert store.unwritable_reason is None


@pytest.mark.row("G8-start-on-a-full-disk")
@pytest.mark.parametrize("what", ["blobs", "ingest", "index.json", "eviction.lock", "totals"])
async def test_content_is_stored_after_a_part_of_the_directory_was_removed(
    tmp_path: Path, what: str
) -> None:
    events: list[Event] = []
    async with opened(tmp_path, events=events) as store:
        await keep(store, b"before")
        path = tmp_path / what
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        await keep(store, LAYER)
        assert await served(store, LAYER)
        await store.measure()
        assert not [e for e in events if isinstance(e, Uncached | LogMessage)]
        assert store.unwritable_reason is None


@pytest.mark.row("HC9-random-names")
@pytest.mark.parametrize("fetcher", ["same process", "other process", "in memory"])
async def test_access_to_content_that_is_being_fetched_is_not_dropped_as_surplus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetcher: str
) -> None:
    monkeypatch.setattr(orphans, "_MIN_ROWS", 100)
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        digest = Digest.of(LAYER)
        await store.index.put_access_records(REPO, [granted(digest)])
        content = (other if fetcher == "other process" else store).start_ingest(digest)
        if fetcher != "in memory":
            assert await content.try_lead() is Role.LEADER
            await content.declare(len(LAYER))
        gone = [granted(Digest.of(b"%d" % number)) for number in range(500)]
        await store.index.put_access_records(REPO, gone)
        await store.measure()
        for _ in range(5):
            await store.keep_up_index()
        known = [await store.index.access_record(REPO, one.digest, "blob") for one in gone]
        assert len(list(filter(None, known))) <= 100, "the others are deleted"
        assert await store.index.access_record(REPO, digest, "blob")
        await content.fail(UpstreamUnavailable("ends here"))
        content.release()
        (other if fetcher == "other process" else store).end_ingest(content)


def granted(digest: Digest) -> AccessRecord:
    """The record of a blob that an upstream has sent."""
    return AccessRecord(digest, "blob", "", 1, referrer=None, expires_at=None)
