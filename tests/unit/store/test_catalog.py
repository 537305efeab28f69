"""The accounting: what is on disk, by looking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store import disk
from mirror.store.catalog import Catalog, Entry, Usage, touch
from mirror.store.disk import IngestState
from mirror.store.layout import Layout
from tests.unit.store.kit import random_bytes


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


def by_du(layout: Layout) -> tuple[int, int]:
    files = [p for d in layout.content_directories() for p in d.iterdir() if p.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(ALGORITHMS), st.integers(0, 5_000)),
        max_size=20,
    )
)
def test_usage_is_what_du_says_after_every_change(
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
        assert (usage.count, usage.bytes) == by_du(layout)
        assert catalog.holds(Digest.of(data, algorithm)) == path.exists()
    assert Catalog(layout).refresh() == catalog.refresh()


@pytest.mark.row("D12-odd-files")
def test_strangers_are_neither_counted_nor_followed(tmp_path: Path) -> None:
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
    assert [entry.digest for entry in catalog.entries(2000.0)] == [kept]
    assert catalog.leftovers() == []


def test_a_directory_that_is_missing_holds_nothing(tmp_path: Path) -> None:
    assert Catalog(Layout(tmp_path / "nowhere")).refresh() == Usage(0, 0, 0)


# --- growing content ------------------------------------------------------------------------------


def test_what_is_being_fetched_counts_as_announced(tmp_path: Path) -> None:
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
    disk.write_state(layout, digest, IngestState(None, room=30_000))
    assert catalog.refresh() == Usage(0, 0, 30_000, unwritten=20_000)
    assert catalog.leftovers() == []
    os.close(fd)


@pytest.mark.row("C11-stale-sparse-ingest")
def test_what_a_fetch_left_counts_as_it_is_and_not_as_it_was_to_be(tmp_path: Path) -> None:
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
    assert 8_192 <= usage.left < 100_000
    assert usage.total == usage.left
    assert catalog.leftovers() == [full, sparse], "the oldest first"


def test_damaged_content_counts_until_it_is_gone(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    path = layout.quarantine(Digest.of(b"damaged"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 500)
    assert Catalog(layout).refresh() == Usage(0, 0, 0, left=500)


# --- recency --------------------------------------------------------------------------------------


def test_recency_is_the_last_use(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    one, two = put(layout, b"one", used=1000), put(layout, b"four", "sha512", used=2000)
    catalog = Catalog(layout)
    catalog.refresh()
    assert set(catalog.entries(5000.0)) == {Entry(one, 3, 1000.0), Entry(two, 4, 2000.0)}
    touch(layout, [one, Digest.of(b"missing")], 3000.7)
    assert set(catalog.entries(5000.0)) == {Entry(one, 3, 3000.0), Entry(two, 4, 2000.0)}


@pytest.mark.row("K3-future-recency")
def test_a_recency_in_the_future_is_now_and_ages_from_here_on(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    ahead = put(layout, b"used before the clock was set back", used=50_000_000)
    catalog = Catalog(layout)
    catalog.refresh()
    assert [entry.used for entry in catalog.entries(1_000_000.0)] == [1_000_000.0]
    assert [entry.used for entry in catalog.entries(2_000_000.0)] == [1_000_000.0]
    assert disk.set_by_us(layout.blob(ahead).stat())


def test_a_file_that_somebody_else_wrote_to_keeps_its_time(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    digest = put(layout, b"content")
    os.utime(layout.blob(digest), ns=(10**9 + 5, 10**9 + 5))
    touch(layout, [digest], 3000.0)
    assert layout.blob(digest).stat().st_mtime_ns == 10**9 + 5


def test_a_touch_never_follows_a_link(tmp_path: Path) -> None:
    layout = prepare(tmp_path)
    target = put(layout, b"target", used=1000)
    link = Digest.of(b"link")
    layout.blob(link).symlink_to(layout.blob(target))
    os.utime(layout.blob(link), (0, 0), follow_symlinks=False)
    touch(layout, [link], 9000.0)
    assert layout.blob(target).stat().st_mtime == 1000
