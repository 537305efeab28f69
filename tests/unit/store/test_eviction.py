"""Accounting and the order of eviction: usage equals the disk, old content goes, pins stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.config.settings import Storage
from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store import disk
from mirror.store.disk import IngestState, Layout
from mirror.store.eviction import Catalog, StoredBlob, eviction_order
from mirror.store.removal import find_leftovers
from mirror.store.space import Usage, bytes_to_free, has_room
from tests.unit.store.kit import random_bytes

# --- accounting -----------------------------------------------------------------------------------


def prepare(root: Path) -> Layout:
    layout = Layout(root)
    for directory in (*layout.content_directories(), *layout.ingest_directories()):
        directory.mkdir(parents=True)
    return layout


def put(layout: Layout, data: bytes, algorithm: str = "sha256", used: int = 1000) -> Digest:
    digest = Digest.of(data, algorithm)
    layout.blob(digest).write_bytes(data)
    os.utime(layout.blob(digest), (used, used))
    return digest


def by_listing(layout: Layout) -> tuple[int, int]:
    files = [p for d in layout.content_directories() for p in d.iterdir() if p.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(ALGORITHMS), st.integers(0, 5_000)),
        max_size=20,
    )
)
def test_usage_equals_the_number_and_length_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, str, int]]
) -> None:
    layout = prepare(tmp_path_factory.mktemp("data"))
    catalog = Catalog(layout)
    for seed, algorithm, size in changes:
        data = random_bytes(size, seed)
        path = layout.blob(Digest.of(data, algorithm))
        if path.exists():
            path.unlink()
        else:
            put(layout, data, algorithm)
        usage = catalog.refresh()
        assert (usage.count, usage.bytes) == by_listing(layout)
        assert catalog.has_blob(Digest.of(data, algorithm)) == path.exists()
    assert Catalog(layout).refresh() == catalog.refresh()


@pytest.mark.row("D12-odd-files")
def test_foreign_entries_are_neither_counted_nor_followed(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    kept = put(layout, b"content")
    blobs = layout.blob(kept).parent
    (blobs / "README").write_bytes(b"x" * 1000)
    (blobs / kept.hex.upper()).write_bytes(b"x" * 1000)
    os.mkfifo(blobs / Digest.of(b"pipe").hex)
    (blobs / Digest.of(b"directory").hex).mkdir()
    (blobs / Digest.of(b"link").hex).symlink_to(layout.blob(kept))
    (blobs / Digest.of(b"dangling").hex).symlink_to(tmp_path / "nowhere")
    ingest = layout.ingest(kept).parent
    (ingest / Digest.of(b"link").hex).symlink_to(layout.blob(kept))
    (ingest / "README").write_bytes(b"x" * 1000)
    catalog = Catalog(layout)
    assert catalog.refresh() == Usage(1, 7, 0)
    assert [blob.digest for blob in catalog.blobs(2000.0)] == [kept]
    assert find_leftovers(layout) == []


def test_missing_directory_counts_as_empty(tmp_path: Path) -> None:
    assert Catalog(Layout(tmp_path / "nowhere")).refresh() == Usage(0, 0, 0)


# --- ingest files ---------------------------------------------------------------------------------


def test_running_fetch_counts_with_its_announced_size(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    digest = Digest.of(b"growing")
    fd = disk.open_ingest(layout, digest)
    assert disk.try_lock(fd)
    os.pwrite(fd, b"x" * 10_000, 0)
    catalog = Catalog(layout)
    assert catalog.refresh() == Usage(0, 0, 10_000), "nothing was announced"
    disk.write_state(layout, digest, IngestState(1_000_000))
    assert catalog.refresh() == Usage(0, 0, 1_000_000, unwritten=990_000)
    disk.write_state(layout, digest, IngestState(5))
    assert catalog.refresh() == Usage(0, 0, 10_000), "more than was announced"
    disk.write_state(layout, digest, IngestState(None, reserved=30_000))
    assert catalog.refresh() == Usage(0, 0, 30_000, unwritten=20_000)
    assert find_leftovers(layout) == []
    os.close(fd)


@pytest.mark.row("C11-stale-sparse-ingest")
def test_leftover_counts_with_its_blocks_and_not_its_announced_size(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    sparse, full = Digest.of(b"sparse"), Digest.of(b"full")
    for digest, used in ((sparse, 2000), (full, 1000)):
        disk.write_state(layout, digest, IngestState(2**40))
        layout.ingest(digest).write_bytes(b"x" * 8_192 if digest == full else b"")
        os.truncate(layout.ingest(digest), 2**34)
        os.utime(layout.ingest(digest), (used, used))
    catalog = Catalog(layout)
    usage = catalog.refresh()
    assert usage.reserved == usage.unwritten == 0
    assert 8_192 <= usage.leftover < 100_000
    assert usage.total == usage.leftover
    found = [leftover.digest for leftover in find_leftovers(layout)]
    assert found == [full, sparse], "the oldest first"


def test_damaged_content_counts_as_leftover(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    path = layout.quarantine(Digest.of(b"damaged"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 500)
    assert Catalog(layout).refresh() == Usage(0, 0, 0, leftover=500)


# --- recency --------------------------------------------------------------------------------------


def test_touch_sets_the_last_use_in_whole_seconds(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    one, two = put(layout, b"one", used=1000), put(layout, b"four", "sha512", used=2000)
    catalog = Catalog(layout)
    catalog.refresh()
    assert set(catalog.blobs(5000.0)) == {StoredBlob(one, 3, 1000.0), StoredBlob(two, 4, 2000.0)}
    disk.touch(layout, [one, Digest.of(b"missing")], 3000.7)
    assert set(catalog.blobs(5000.0)) == {StoredBlob(one, 3, 3000.0), StoredBlob(two, 4, 2000.0)}


@pytest.mark.row("K3-future-recency")
def test_last_use_in_the_future_is_set_to_now(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    ahead = put(layout, b"used before the clock was set back", used=50_000_000)
    catalog = Catalog(layout)
    catalog.refresh()
    assert [blob.used for blob in catalog.blobs(1_000_000.0)] == [1_000_000.0]
    assert [blob.used for blob in catalog.blobs(2_000_000.0)] == [1_000_000.0]
    assert disk.has_our_mtime(layout.blob(ahead).stat())


def test_touch_keeps_the_time_of_a_file_that_another_program_wrote(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    digest = put(layout, b"content")
    os.utime(layout.blob(digest), ns=(10**9 + 5, 10**9 + 5))
    disk.touch(layout, [digest], 3000.0)
    assert layout.blob(digest).stat().st_mtime_ns == 10**9 + 5


def test_touch_never_follows_a_link(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    target = put(layout, b"target", used=1000)
    link = Digest.of(b"link")
    layout.blob(link).symlink_to(layout.blob(target))
    os.utime(layout.blob(link), (0, 0), follow_symlinks=False)
    disk.touch(layout, [link], 9000.0)
    assert layout.blob(target).stat().st_mtime == 1000


# --- the order of eviction ------------------------------------------------------------------------

DIGESTS = [Digest.of(bytes([n])) for n in range(12)]
BLOBS = st.lists(
    st.builds(
        StoredBlob,
        st.sampled_from(DIGESTS),
        st.integers(0, 1000),
        st.floats(0, 1e9, allow_nan=False),
    ),
    unique_by=lambda blob: blob.digest,
)


@given(BLOBS, st.sets(st.sampled_from(DIGESTS)))
def test_protected_content_stays_and_the_rest_goes_by_age(
    blobs: list[StoredBlob], protected: set[Digest]
) -> None:
    chosen = eviction_order(blobs, protected)
    assert not {blob.digest for blob in chosen} & protected
    assert {blob.digest for blob in blobs} - protected == {blob.digest for blob in chosen}
    assert [blob.used for blob in chosen] == sorted(blob.used for blob in chosen)


SETTINGS = Storage(max_size=1_000_000)
HIGH, LOW = 950_000, 850_000
SIZES = st.integers(0, 1_000_000)


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 10**7))
def test_bytes_to_free_reach_the_low_water_mark_and_the_free_disk(
    size: int, reserved: int, leftover: int, need: int, free: int
) -> None:
    usage = Usage(1, size, reserved, unwritten=reserved, leftover=leftover)
    shortage = bytes_to_free(usage, need, free, SETTINGS)
    capacity = min(1_000_000, size + leftover + free)
    assert (shortage is None) == (max(need, reserved) > min(HIGH, capacity))
    if shortage is None:
        return
    count, reason = shortage
    fits = usage.total <= int(capacity * 0.95) and max(need, reserved) <= free
    assert (count == 0) == (reason == "") == fits
    assert max(need, reserved) <= free + count
    if not fits:
        assert usage.total - count <= int(capacity * 0.85)
        assert reason in ("quota", "disk")
    if usage.total <= 1_000_000 and max(need, reserved) <= free:
        assert has_room(usage, need, free, SETTINGS), "up to the quota, no fetch waits"


@pytest.mark.parametrize(
    ("usage", "need", "free", "shortage"),
    [
        (Usage(1, HIGH, 0), 1, 10**7, (0, "")),
        (Usage(1, HIGH + 1, 0), 0, 10**7, (HIGH + 1 - LOW, "quota")),
        (Usage(1, 0, 0), HIGH, 10**7, (0, "")),
        (Usage(1, 0, 0), HIGH + 1, 10**7, None),
        (Usage(1, 0, HIGH + 1), 0, 10**7, None),
        (Usage(1, HIGH, 1, leftover=100), 1, 10**7, (100_101, "quota")),
        (Usage(1, 0, 0), 500, 499, None),
        (Usage(1, 1000, 0), 500, 499, (1, "disk")),
        (Usage(1, 1000, 500, unwritten=500), 500, 0, (1500 - 850, "disk")),
        (Usage(1, 1000, 1001, unwritten=1001), 500, 0, None),
        (Usage(1, 1000, 500, unwritten=500), 500, -200, (1500 - 680, "disk")),
        (Usage(1, 1000, 0), 0, 10, (1000 - 858, "disk")),
    ],
)
def test_bytes_to_free_is_0_up_to_the_high_water_mark_and_reaches_the_low_one_above_it(
    usage: Usage, need: int, free: int, shortage: tuple[int, str] | None
) -> None:
    assert bytes_to_free(usage, need, free, SETTINGS) == shortage


@given(BLOBS, st.integers(1, 3000))
def test_order_ends_with_the_content_that_reaches_the_bytes_to_evict(
    blobs: list[StoredBlob], enough: int
) -> None:
    order = eviction_order(blobs, set(), enough)
    assert order == eviction_order(blobs, set())[: len(order)]
    held = [blob.size for blob in order]
    assert sum(held) >= enough or len(order) == len(blobs)
    assert sum(held[:-1]) < enough


@pytest.mark.row("G1-cost-of-a-miss")
@pytest.mark.parametrize(
    "step", [0.0, 1.0, -1.0], ids=["same-second", "older-first", "newer-first"]
)
def test_order_holds_about_what_is_evicted_and_takes_linear_time(step: float) -> None:
    count = 50_000
    blobs = (StoredBlob(DIGESTS[0], 10, 1e9 + step * number) for number in range(count))
    begun = time.process_time()
    order = eviction_order(blobs, set(), 1000)
    assert len(order) == 100
    assert time.process_time() - begun < 1.0
