"""Hosted content and the cache: nothing evicts it, and it does not count against the cache."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import Event
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk, eviction, space
from mirror.store.blobs import SMALL_BYTES
from mirror.store.eviction import StoredBlob
from mirror.store.hosted_contents import HostedContents
from mirror.store.layout import Layout
from mirror.store.quarantine import quarantine, quarantined_digests, trim_quarantine
from mirror.store.removal import KeptBecause
from mirror.store.scrub import scrub
from mirror.store.store import Store
from tests.unit.hosted.kit import ANYBODY, HostedKit, hosted_kit
from tests.unit.store.kit import random_bytes
from tests.waiting import until

SIZE = 100_000
QUOTA = Storage(max_size=10 * SIZE, high_water=0.9, low_water=0.5)


def content(seed: int) -> bytes:
    return random_bytes(SIZE, seed)


async def cache(kit: HostedKit, seed: int) -> Digest:
    """Store content as a fetch does."""
    data = content(seed)
    ingest = kit.store.start_ingest(Digest.of(data))
    await ingest.try_lead()
    await ingest.declare(len(data))
    await ingest.feed(data)
    await ingest.finish()
    ingest.release()
    kit.store.end_ingest(ingest)
    return Digest.of(data)


async def test_pushed_content_is_never_evicted_however_old(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, storage=QUOTA) as kit:
        hosted = [await kit.push_blob(content(seed)) for seed in range(20)]
        for seed in range(100, 130):
            kit.clock[0] += 100
            await cache(kit, seed)
            await kit.store.evictor.wait_until_idle()
        assert all(kit.store.catalog.has_blob(digest) for digest in hosted)
        usage = await kit.store.space.measure()
        assert usage is not None
        assert 0 < usage.bytes <= 10 * SIZE, "the cache has its whole quota beside them"
        assert usage.count * SIZE == usage.bytes


@pytest.mark.parametrize("size", [SIZE, SMALL_BYTES + 1])
async def test_read_error_of_hosted_content_is_503_and_the_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """No upstream has it, and the error may pass. Only wrong bytes prove damage."""
    async with hosted_kit(tmp_path, storage=Storage(reverify=0)) as kit:
        data = content(1) * (size // SIZE) + content(2)[: size % SIZE]
        digest = await kit.push_blob(data)

        def broken(*arguments: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", broken)
            with pytest.raises((StorageUnavailable, OSError), match="Input/output error"):
                await kit.read_blob(digest)
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await kit.service.blobs.read(digest, 2 * size)
            patch.setattr(disk, "open_whole", broken)
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await kit.service.blobs.read(digest, 2 * size)
            patch.setattr(Path, "lstat", broken)
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await kit.service.blobs.size("app", digest)
        monkeypatch.setattr(os, "preadv", broken)
        assert scrub(kit.store.layout, digest).is_moved is False
        assert await kit.read_blob(digest) == data


async def test_read_error_of_an_image_that_is_cached_too_is_mended_by_its_upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path, storage=Storage(reverify=0)) as kit:
        digest = await kit.push_blob(content(1))
        inode = kit.store.layout.blob(digest).stat().st_ino
        read = os.pread

        def broken(fd: int, *arguments: int) -> bytes:
            if os.fstat(fd).st_ino == inode:
                raise OSError(errno.EIO, "Input/output error")
            return read(fd, *arguments)

        monkeypatch.setattr(os, "pread", broken)
        assert await cache(kit, 1) == digest
        assert await kit.read_blob(digest) == content(1)


async def test_damaged_hosted_content_stays_in_quarantine_until_it_is_pushed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path, storage=Storage(reverify=0)) as kit:
        layout, damaged = kit.store.layout, []
        for seed in range(4):
            digest = await kit.push_blob(content(seed)) if seed < 2 else await cache(kit, seed)
            layout.blob(digest).write_bytes(b"x")
            assert await kit.store.blobs.find(digest) is None
            damaged.append(digest)
        assert quarantined_digests(layout) == set(damaged)

        def refuse(*_: object) -> None:
            raise StorageUnavailable("the database is locked")

        with monkeypatch.context() as patch:
            patch.setattr(HostedContents, "find", refuse)
            trim_quarantine(layout, 0)
        assert quarantined_digests(layout) == set(damaged), "what may be hosted stays"
        trim_quarantine(layout, 0)
        assert quarantined_digests(layout) == set(damaged[:2])
        await kit.push_blob(content(0))
        await kit.service.blobs.delete("app", damaged[1], actor=ANYBODY)
        trim_quarantine(layout, 0)
        assert quarantined_digests(layout) == set()
        assert await kit.read_blob(damaged[0]) == content(0)


async def test_push_that_replaces_damaged_content_is_not_quarantined_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path) as kit:
        layout = kit.store.layout
        digest = await kit.push_blob(content(1))
        damaged = os.open(layout.blob(digest), os.O_RDONLY)
        rename = Path.rename

        def replace_before(path: Path, target: Path) -> Path:
            monkeypatch.undo()
            new = tmp_path / "new"
            new.write_bytes(content(1))
            rename(new, path)
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", replace_before)
        assert not quarantine(layout, digest, damaged)
        os.close(damaged)
        assert await kit.read_blob(digest) == content(1)


async def test_content_is_cache_again_once_no_repository_has_it(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, storage=QUOTA) as kit:
        kept, deleted = [await kit.push_blob(content(seed)) for seed in range(2)]
        await kit.service.blobs.delete("app", deleted, actor=ANYBODY)
        for seed in range(100, 115):
            kit.clock[0] += 100
            await cache(kit, seed)
            await kit.store.evictor.wait_until_idle()
        assert kit.store.catalog.has_blob(kept)
        assert not kit.store.catalog.has_blob(deleted)


async def test_cached_content_is_kept_from_the_moment_it_is_pushed(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, storage=QUOTA) as kit:
        digest = await cache(kit, 1)
        await kit.push_blob(content(1))
        listed = [StoredBlob(digest, SIZE, kit.clock[0])]
        assert (await kit.store.evictor.remove(listed)).kept == {digest: KeptBecause.HOSTED}
        await kit.service.blobs.delete("app", digest, actor=ANYBODY)
        assert (await kit.store.evictor.remove(listed)).sizes == {digest: SIZE}


async def test_section_that_was_removed_does_not_give_its_content_to_eviction(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, storage=QUOTA) as kit:
        digest = await kit.push_blob(content(1))
    hosted = HostedContents(Layout(tmp_path))
    assert hosted.find([digest, Digest.of(b"x")]) == {digest}
    assert hosted.usage() == (1, SIZE)


async def test_database_that_cannot_be_read_stops_eviction_and_says_so(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, storage=QUOTA) as kit:
        digest = await kit.push_blob(content(1))
    kit.store.layout.hosted_names.write_bytes(b"not a database" * 100)
    events: list[Event] = []
    store = await Store.open(str(tmp_path), QUOTA, events.append)
    store.evictor.start(8 * SIZE)
    await until(lambda: any("may be hosted" in str(event) for event in events))
    assert store.catalog.has_blob(digest)
    await store.close()


def test_without_a_database_nothing_is_hosted(tmp_path: Path) -> None:
    hosted = HostedContents(Layout(tmp_path))
    assert hosted.find([Digest.of(b"x")]) == set()
    assert hosted.usage() == (0, 0)


def test_many_contents_are_looked_up_in_steps(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.hosted_names.parent.mkdir()
    connection = sqlite3.connect(layout.hosted_names)
    connection.execute("CREATE TABLE contents (digest TEXT PRIMARY KEY)")
    blobs = [StoredBlob(Digest.of(str(n).encode()), n, 0.0) for n in range(1234)]
    rows = [(str(blob.digest),) for blob in blobs[::3]]
    connection.executemany("INSERT INTO contents VALUES (?)", rows)
    connection.commit()
    connection.close()
    left = list(HostedContents(layout).without(iter(blobs)))
    assert left == [blob for n, blob in enumerate(blobs) if n % 3]


def test_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.hosted_names.parent.mkdir()
    layout.hosted_names.write_bytes(b"x" * 1000)
    with pytest.raises(StorageUnavailable, match="it may be hosted"):
        HostedContents(layout).find([Digest.of(b"x")])


async def test_push_evicts_cached_content_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path, storage=Storage(max_size=100 * SIZE)) as kit:
        cached = [await cache(kit, seed) for seed in range(100, 110)]
        await kit.store.space.measure()

        def free_bytes(path: Path) -> int:
            taken = sum(one.stat().st_size for one in (path / "blobs").rglob("*") if one.is_file())
            return 11 * SIZE - taken

        monkeypatch.setattr(space, "free_bytes", free_bytes)
        monkeypatch.setattr(eviction, "free_bytes", free_bytes)
        data = random_bytes(5 * SIZE, 7)
        digest = await kit.push_blob(data)
        assert await kit.read_blob(digest) == data
        assert sum(map(kit.store.catalog.has_blob, cached)) <= 6


async def test_while_a_backup_copies_the_names_all_content_counts_as_hosted(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        layout, digests = kit.store.layout, [Digest.of(b"cached")]
        await kit.push_blob(b"hosted")
        hosted = HostedContents(layout)
        assert hosted.find(digests) == set()
        fd = disk.lock_file(layout.snapshot_lock)
        assert fd is not None
        assert hosted.find(digests) == set(digests)
        os.close(fd)
        assert hosted.find(digests) == set()
