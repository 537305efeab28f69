"""The store: what it composes, over a real directory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import (
    Event,
    IngestsMeasured,
    LogMessage,
    StorageMeasured,
    Uncached,
)
from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store import disk
from mirror.store import store as module
from mirror.store.ingest_lock import Role
from mirror.store.store import Store
from tests.unit.store.kit import (
    REPO,
    image,
    keep,
    make_read_only,
    no_trace,
    opened,
    pulled,
    random_bytes,
    read,
    served,
    small_disk,
)

NOW = 1_800_000_000.0
YEAR = 365 * 86400.0
TAG = Tag("1.0")
LAYER = random_bytes(5_000_000, 71)
POOLS = ("open", "write", "publish", "hash", "index")


def threads() -> list[str]:
    """The threads of a store that have not ended."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(POOLS)]


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
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
    assert threads() == before


async def test_content_is_known_to_grow_until_its_fetch_is_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = store.start_ingest(Digest.of(LAYER))
        assert store.active_ingests == {Digest.of(LAYER): first}
        second = store.start_ingest(Digest.of(LAYER))
        store.end_ingest(first)
        assert store.active_ingests == {Digest.of(LAYER): second}, "it is the other's by now"
        for content in (first, second):
            content.release()
            store.end_ingest(content)
        await store.idle()
        await store.settled()


# --- recency --------------------------------------------------------------------------------------


def used(store: Store, data: bytes) -> float:
    return store.layout.blob(Digest.of(data)).stat().st_mtime


async def test_recency_is_refreshed_once_a_minute(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, b"content")
        for after, wanted in ((0, 0), (59, 0), (60, 60), (100, 60), (121, 121)):
            clock[0] = NOW + after
            await store.touch([digest])
            assert used(store, b"content") == NOW + wanted


@pytest.mark.row("K3-future-recency")
async def test_a_clock_that_was_set_back_stops_no_recency(tmp_path: Path) -> None:
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        digest = await keep(store, b"content")
        await store.touch([digest])
        clock[0] -= YEAR
        await store.touch([digest])
        assert used(store, b"content") == NOW - YEAR


async def test_a_manifest_is_never_far_ahead_of_what_it_refers_to(tmp_path: Path) -> None:
    """A layer that two images share is as recent as either, whichever was used first."""
    clock = [NOW]
    async with opened(tmp_path, clock) as store:
        one, two = b"manifest one", b"manifest two"
        shared = b"shared layer"
        for data in (one, two, shared):
            await keep(store, data)
        digest_of = Digest.of
        await store.touch([digest_of(one), digest_of(shared)])
        clock[0] += 30
        await store.touch([digest_of(two), digest_of(shared)])
        assert used(store, two) == used(store, shared) == NOW + 30


async def test_what_is_remembered_of_recency_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOUCHED_LIMIT", 10)
    async with opened(tmp_path) as store:
        for number in range(50):
            await store.touch([Digest.of(str(number).encode())])
        assert len(store._touched) <= 11


# --- what is said of it ---------------------------------------------------------------------------


async def test_it_reports_what_is_on_disk_and_what_grows(tmp_path: Path) -> None:
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
async def test_a_disk_that_takes_nothing_serves_what_it_has_and_says_so(tmp_path: Path) -> None:
    body, events = image(LAYER), list[Event]()
    with small_disk(tmp_path / "disk", "20m") as root:
        async with opened(root) as store:
            await pulled(store, body, TAG, LAYER, b"{}")
            assert store.unwritable is None
        make_read_only(root)
        async with opened(root, events=events) as store:
            assert store.unwritable == f"{root}/blobs/sha256: not writable"
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
            assert await read(follower) == b"new", "served, and not kept"
            follower.close()
            store.end_ingest(content)
            await store.measure()
        assert [e.reason for e in events if isinstance(e, Uncached)] == ["readonly"]
        assert [e.writable for e in events if isinstance(e, StorageMeasured)] == [False]
        assert any(
            isinstance(e, LogMessage) and "nothing can be stored" in e.message for e in events
        )


@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.row("C9-damaged-content")
async def test_damage_on_a_disk_that_takes_nothing_is_never_served(tmp_path: Path) -> None:
    """It can be put aside no more than it can be mended: it is fetched, and not kept."""
    blobs = tmp_path / "blobs"
    with small_disk(blobs, "20m"):
        async with opened(tmp_path) as store:
            digest = await keep(store, LAYER)
            path = store.layout.blob(digest)
            path.write_bytes(LAYER[:-1] + b"?")
            no_trace(path)
        make_read_only(blobs)
        async with opened(tmp_path, settings=Storage(reverify=0)) as store:
            assert not await _is_handed_out(store, digest)
            content = store.start_ingest(digest)
            follower = content.follow()
            assert follower
            assert await content.try_lead() is Role.LEADER, "what is there is not taken for whole"
            await content.declare(len(LAYER))
            await content.feed(LAYER)
            await content.finish()
            content.release()
            assert await read(follower) == LAYER
            follower.close()
            store.end_ingest(content)


async def _is_handed_out(store: Store, digest: Digest) -> bool:
    reader = await store.blobs.find(digest, 1)
    if reader is not None:
        reader.close()
    return reader is not None


async def test_readiness_tells_of_a_disk_that_refuses_until_it_takes_content_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        with monkeypatch.context() as patch:

            def refuse(*arguments: object) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr(disk, "publish", refuse)
            await keep(store, b"one")
        assert store.unwritable == "content could not be stored (io)"
        await keep(store, b"two")
        assert store.unwritable is None


async def test_what_ended_fetches_left_behind_is_looked_for_now_and_then(
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
        assert store.layout.ingest(content.digest).exists(), "not at every look"
        monkeypatch.setattr(module, "_SWEEP_EVERY", -1.0)
        await store.measure()
        assert not list(store.layout.ingest(content.digest).parent.iterdir())
