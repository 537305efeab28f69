"""Removing listed content: locks, marks, the running total, leftovers of fetches."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store import disk, eviction
from mirror.store.disk import IngestState, Layout
from mirror.store.eviction import StoredBlob
from mirror.store.marks import Lease, Marks, change_marks
from mirror.store.protection import ProtectionUnknown
from mirror.store.removal import (
    BATCH_CONTENTS,
    KeptBecause,
    batches,
    drop_leftover,
    find_leftovers,
    reset_future_uses,
)
from mirror.store.store import Store
from tests.unit.store.kit import keep, opened, random_bytes

NOW = 1_800_000_000.0


def listed(store: Store) -> list[StoredBlob]:
    """All content, as a command lists it."""
    return list(store.catalog.blobs(NOW))


async def filled(store: Store, count: int) -> list[Digest]:
    """Store contents of 1,000 bytes."""
    return [await keep(store, random_bytes(1_000, seed)) for seed in range(count)]


async def test_listed_content_is_removed_and_counted(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digests = await filled(store, 3)
        await store.space.measure()
        removal = await store.evictor.remove([b for b in listed(store) if b.digest != digests[0]])
        assert removal.sizes == dict.fromkeys(digests[1:], 1_000)
        assert not removal.kept
        usage = await store.space.measure()
        assert usage is not None
        assert (usage.count, usage.bytes) == (1, 1_000)


async def test_other_process_counts_a_removal_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as server, opened(tmp_path, [NOW]) as command:
        await filled(server, 3)
        await server.space.measure()
        await command.evictor.remove(listed(command))
        usage = await server.space.measure()
        assert usage is not None
        assert (usage.count, usage.bytes) == (0, 0)


async def test_content_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        (digest,) = await filled(store, 1)
        blobs = listed(store)
        store.layout.blob(digest).unlink()
        removal = await store.evictor.remove(blobs)
        assert (removal.sizes, removal.kept) == ({}, {})


async def test_content_that_another_process_reads_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        digests = await filled(store, 2)
        fd, _ = disk.open_whole(Layout(tmp_path), digests[0]) or (0, None)
        removal = await store.evictor.remove(listed(store))
        os.close(fd)
        assert removal.kept == {digests[0]: KeptBecause.READ}
        assert list(removal.sizes) == [digests[1]]


async def test_content_that_was_used_since_it_was_listed_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        (digest,) = await filled(store, 1)
        blobs = listed(store)
        disk.touch(store.layout, [digest], NOW + 1)
        removal = await store.evictor.remove(blobs)
        assert removal.kept == {digest: KeptBecause.USED}
        assert store.layout.blob(digest).exists()


async def test_last_use_that_a_clock_has_put_into_the_future_is_no_use(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        (digest,) = await filled(store, 1)
        now = NOW - 3600
        blobs = [StoredBlob(digest, 1_000, used=now)]
        assert (await store.evictor.remove(blobs)).kept == {digest: KeptBecause.USED}
        reset_future_uses(store.layout, blobs, now)
        assert list((await store.evictor.remove(blobs)).sizes) == [digest]


async def test_mark_that_is_set_between_two_batches_counts(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        await filled(store, BATCH_CONTENTS + 1)
        blobs = listed(store)

        lease = Lease(blobs[-1].digest, NOW + 60, "test")

        def with_mark() -> Iterator[StoredBlob]:
            yield from blobs[:BATCH_CONTENTS]
            change_marks(store.layout, lambda marks: Marks(leases={lease.digest: lease}))
            yield from blobs[BATCH_CONTENTS:]

        removal = await store.evictor.remove(with_mark())
        assert removal.kept == {blobs[-1].digest: KeptBecause.MARKED}
        assert len(removal.sizes) == BATCH_CONTENTS


async def test_damaged_marks_end_a_removal(tmp_path: Path) -> None:
    async with opened(tmp_path, [NOW]) as store:
        (digest,) = await filled(store, 1)
        (tmp_path / "marks.json").write_text("{")
        with pytest.raises(ProtectionUnknown):
            await store.evictor.remove(listed(store))
        assert store.layout.blob(digest).exists()


async def test_lock_of_a_process_that_frees_nothing_ends_a_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "_REMOVAL_LOCK_TIMEOUT_S", 0.05)
    async with opened(tmp_path, [NOW]) as store:
        (digest,) = await filled(store, 1)
        fd = os.open(store.layout.eviction_lock, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"another process has held .*eviction.lock"):
            await store.evictor.remove(listed(store))
        os.close(fd)
        assert store.layout.blob(digest).exists()


def test_batches_are_bounded_and_complete() -> None:
    blobs = [StoredBlob(Digest.of(b"%d" % n), 1, 0.0) for n in range(2 * BATCH_CONTENTS + 1)]
    parts = list(batches(blobs))
    assert [len(part) for part in parts] == [BATCH_CONTENTS, BATCH_CONTENTS, 1]
    assert [blob for part in parts for blob in part] == blobs


# --- leftovers ------------------------------------------------------------------------------------


def leftover(layout: Layout, data: bytes) -> Digest:
    """Leave the file of a fetch that was killed."""
    digest = Digest.of(data)
    layout.ingest(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.ingest(digest).write_bytes(data)
    disk.write_state(layout, digest, IngestState(len(data) + 1))
    return digest


def test_leftover_is_removed_with_its_state(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest = leftover(layout, bytes(10_000))
    (found,) = find_leftovers(layout)
    assert (found.digest, found.length) == (digest, 10_000)
    assert drop_leftover(layout, digest) == found.bytes >= 10_000
    assert not list((tmp_path / "ingest").glob("*/*"))
    assert drop_leftover(layout, digest) == 0


def test_file_of_a_running_fetch_is_no_leftover(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest = leftover(layout, b"running")
    fd = disk.open_ingest(layout, digest)
    assert disk.try_lock(fd)
    assert find_leftovers(layout) == []
    assert drop_leftover(layout, digest) == 0
    os.close(fd)
    assert layout.ingest(digest).exists()
