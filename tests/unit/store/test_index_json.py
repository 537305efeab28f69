"""``index.json``: when the store writes it, and restoring a lost index from it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import Event, IndexRestored
from mirror.oci.descriptor import OCI_MANIFEST, parse_manifest
from mirror.oci.reference import Digest, Tag
from mirror.store import image_layout, index_directory, rows
from mirror.store import index as index_module
from mirror.store import names as index_names
from mirror.store import store as store_module
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.names import NamesPage
from mirror.store.orphans import ORPHAN_ROW_TTL_S
from mirror.store.records import AccessRecord, NamedManifest
from mirror.store.rows import Tables
from mirror.store.store import Store
from tests.unit.store import damages
from tests.unit.store.damages import Damage
from tests.unit.store.kit import (
    MOST_CHANGES,
    REPO,
    counted_transactions,
    image,
    index_of,
    keep,
    manifests,
    opened,
    pulled,
    random_bytes,
    remember,
    served,
)
from tests.waiting import until

NOW = 1_800_000_000.0
YEAR = 365 * 86400.0
TAG = Tag("1.0")
LAYER = random_bytes(5_000_000, 71)


def names(root: Path) -> list[str]:
    """The names in ``index.json``, sorted."""
    return sorted(named.name for named in image_layout.read_index_json(Layout(root)))


@pytest.mark.row("C12-damaged-index")
async def test_lost_index_is_restored_from_index_json_but_not_as_fresh(tmp_path: Path) -> None:
    child = image(LAYER)
    body = index_of(child)
    async with opened(tmp_path) as store:
        await pulled(store, child, None, LAYER, b"{}")
        await pulled(store, body, TAG)
    shutil.rmtree(tmp_path / "index")
    async with opened(tmp_path) as store:
        tag = await store.index.tag(REPO, TAG)
        assert tag
        assert (tag.digest, tag.confirmed) == (Digest.of(body), 0.0)
        for data, kind in ((body, "manifest"), (child, "manifest"), (LAYER, "blob")):
            record = await store.index.access_record(REPO, Digest.of(data), kind)
            assert record
            assert (record.kind, record.size) == (kind, len(data))
        assert await store.index.access_record(REPO, Digest.of(b"another"), "blob") is None


@pytest.mark.row("G4-busy-index")
async def test_restore_of_many_names_is_not_one_transaction(tmp_path: Path) -> None:
    bodies = [image(b"%d" % number) for number in range(1500)]
    digests = {Digest.of(body) for body in bodies}
    async with opened(tmp_path) as store:
        for body in bodies:
            store.layout.blob(Digest.of(body)).write_bytes(body)
        records = [
            AccessRecord(
                digest=Digest.of(body),
                kind="manifest",
                media_type=OCI_MANIFEST,
                size=len(body),
                referrer=None,
                expires_at=None,
            )
            for body in bodies
        ]
        assert await store.index.put_access_records(REPO, records)
    shutil.rmtree(tmp_path / "index")
    with counted_transactions() as sizes:
        async with opened(tmp_path) as store:
            assert {named.digest for named in await manifests(store.index)} == digests
    # 1,000 names, with a tag each, in tables whose triggers count.
    assert max(sizes) <= 6 * MOST_CHANGES
    assert sum(sizes) >= len(bodies)


@pytest.mark.row("K1-wrong-clock")
@pytest.mark.row("K2-jumping-clock")
@pytest.mark.parametrize("jump", [YEAR, -YEAR, ORPHAN_ROW_TTL_S + 1])
async def test_clock_that_jumps_removes_no_content_and_no_record(
    tmp_path: Path, jump: float
) -> None:
    body, clock = image(LAYER), [NOW]
    async with opened(tmp_path, clock) as store:
        await pulled(store, body, TAG, LAYER, b"{}")
        for _ in range(2):
            clock[0] += jump
            for _ in range(6):
                await store.measure()
                await store.keep_up_index()
            assert await served(store, LAYER)
            assert await served(store, body)
            assert await store.index.tag(REPO, TAG)
            assert await store.index.access_record(REPO, Digest.of(LAYER), "blob")
        await pulled(store, image(), Tag("another"))
        await store.save_image_layout(share=1.0)
        assert f"{REPO}:{TAG}" in names(tmp_path)
    async with opened(tmp_path, clock) as store:
        assert await served(store, LAYER)
        assert await store.index.tag(REPO, TAG)


async def test_index_json_stays_while_the_index_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await pulled(store, image(LAYER), TAG, LAYER, b"{}")
        await store.save_image_layout(share=1.0)
        before = (tmp_path / "index.json").read_bytes()
        store.index.has_changed = True
        with monkeypatch.context() as patch:

            async def silent(self: Index, after: int) -> None:
                return None

            patch.setattr(Index, "names", silent)
            await store.save_image_layout(share=1.0)
        assert (tmp_path / "index.json").read_bytes() == before
        assert store.index.has_changed, "it is written once the index answers"


async def test_index_json_is_not_written_before_the_index_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        await pulled(store, body, TAG, LAYER, b"{}")
    shutil.rmtree(tmp_path / "index")
    before = (tmp_path / "index.json").read_bytes()

    def refuse(*arguments: object, **named: object) -> None:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "write_all", refuse)
        store = await Store.open(str(tmp_path), Storage(), lambda event: None, lambda: NOW)
        await pulled(store, image(), Tag("new"))
        await store.save_image_layout(share=1.0)
        assert (tmp_path / "index.json").read_bytes() == before
    monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
    await remember(store, image(), Tag("new"))
    await store.save_image_layout(share=1.0)
    assert {f"{REPO}:new", f"{REPO}:{TAG}"} <= set(names(tmp_path))
    record = await store.index.tag(REPO, Tag("new"))
    assert record
    assert record.confirmed == NOW, "a newer record is not overwritten"
    await store.close()


@pytest.mark.row("G3-index-damage-while-running")
async def test_interrupted_restore_is_completed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await pulled(store, image(LAYER), TAG, LAYER, b"{}")
    shutil.rmtree(tmp_path / "index")

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_names, "_restore_access", crash)
        with (
            closing(Tables(tmp_path / "index", index_module._TABLES)) as tables,
            pytest.raises(KeyboardInterrupt),
        ):
            index_names.restore(tables, image_layout.read_index_json(Layout(tmp_path)))
    async with opened(tmp_path) as store:
        assert await store.index.access_record(REPO, Digest.of(image(LAYER)), "manifest")
        assert await store.index.access_record(REPO, Digest.of(LAYER), "blob")


@pytest.mark.row("G4-busy-index")
async def test_start_restores_once_and_reads_index_json_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await pulled(store, image(LAYER), None, LAYER, b"{}")
    shutil.rmtree(tmp_path / "index")
    reads: list[Layout] = []
    real = image_layout.read_index_json

    def count(layout: Layout) -> object:
        reads.append(layout)
        return real(layout)

    monkeypatch.setattr(image_layout, "read_index_json", count)
    for _ in range(3):
        async with opened(tmp_path) as store:
            assert store.index.unrestored_after is None
            await store.index.revoke_access(REPO, Digest.of(LAYER), "blob")
    assert len(reads) == 1
    async with opened(tmp_path) as store:
        assert await store.index.access_record(REPO, Digest.of(LAYER), "blob") is None


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.parametrize("damage", damages.IN_USE)
async def test_index_that_is_damaged_in_use_loses_no_name_or_tag(
    tmp_path: Path,
    damage: Damage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "_CACHE_PAGES", 1)
    events: list[Event] = []
    bodies = {Tag(f"{number}.0"): image(b"%d" % number) for number in range(40)}

    async def assert_complete(store: Store) -> None:
        for tag, body in bodies.items():
            record = await store.index.tag(REPO, tag)
            assert record
            assert record.digest == Digest.of(body)
            assert await store.index.access_record(REPO, record.digest, "manifest")

    async with opened(tmp_path, events=events) as store:
        for tag, body in bodies.items():
            await pulled(store, body, tag)
        await store.save_image_layout(share=1.0)
        before = names(tmp_path)
        assert len(before) == 80
        damage(tmp_path / "index")
        await assert_complete(store)
        await pulled(store, image(b"new"), Tag("new"))
        await store.save_image_layout(share=1.0)
        assert set(names(tmp_path)) > set(before)
        await store.measure()
        await store.keep_up_index()
        layer = parse_manifest(bodies[Tag("7.0")], OCI_MANIFEST).blobs[0]
        assert await store.index.access_record(REPO, layer.digest, "blob"), "of its parts, too"
    async with opened(tmp_path, events=events) as store:
        await store.keep_up_index()
        await assert_complete(store)
        assert await store.index.tag(REPO, Tag("new"))
    assert set(names(tmp_path)) > set(before)
    assert [event.names for event in events if isinstance(event, IndexRestored)][:1] == [80]


@pytest.mark.row("G4-busy-index")
async def test_index_json_is_written_only_if_a_digest_has_changed(tmp_path: Path) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        await pulled(store, body, TAG)
        await store.save_image_layout(share=1.0)
        inode = (tmp_path / "index.json").stat().st_ino
        await store.index.confirm_tag(REPO, TAG, Digest.of(body))
        await remember(store, body, None)
        await store.save_image_layout(share=1.0)
        assert (tmp_path / "index.json").stat().st_ino == inode
        await store.index.confirm_tag(REPO, TAG, Digest.of(image()))
        await store.save_image_layout(share=1.0)
        assert (tmp_path / "index.json").stat().st_ino != inode


async def test_evicted_and_revoked_manifests_leave_index_json(tmp_path: Path) -> None:
    clock, settings = [NOW], Storage(max_size=20_000_000)
    async with opened(tmp_path, clock, settings=settings) as store:
        old, gone = image(b"old"), image(b"gone")
        await pulled(store, old, Tag("old"))
        clock[0] += 1000
        await pulled(store, gone, Tag("gone"))
        await store.save_image_layout(share=1.0)
        assert len(names(tmp_path)) == 4
        await store.index.revoke_access(REPO, Digest.of(gone), "manifest")
        await store.save_image_layout(share=1.0)
        assert names(tmp_path) == [f"{REPO}:old", f"{REPO}@{Digest.of(old)}"]
        clock[0] += 1000
        for seed in range(4):
            await keep(store, random_bytes(5_000_000, seed))
        await store.save_image_layout(share=1.0)
        assert names(tmp_path) == []


@pytest.mark.row("C12-damaged-index")
async def test_the_next_start_adds_names_that_a_crash_kept_out_of_index_json(
    tmp_path: Path,
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        await store.save_image_layout(share=1.0)
        before = (tmp_path / "index.json").read_bytes()
        await pulled(store, body, TAG)
    (tmp_path / "index.json").write_bytes(before)
    async with opened(tmp_path):
        pass
    named = list(image_layout.read_index_json(Layout(tmp_path)))
    assert {entry.name for entry in named} == {f"{REPO}:{TAG}", f"{REPO}@{Digest.of(body)}"}


async def test_name_that_is_put_during_a_write_is_in_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        collect = store.index.names

        async def meanwhile(after: int) -> NamesPage | None:
            found = await collect(after)
            if found is not None and found.after is None:
                await pulled(store, body, TAG)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store.index, "names", meanwhile)
            await store.save_image_layout(share=1.0)
        assert names(tmp_path) == []
        await store.save_image_layout(share=1.0)
        assert f"{REPO}:{TAG}" in names(tmp_path)


@pytest.mark.row("C12-damaged-index")
async def test_cancelled_save_is_made_up_for_at_close(tmp_path: Path) -> None:
    body = image(LAYER)
    store = await Store.open(str(tmp_path), Storage(), lambda event: None)
    await pulled(store, body, TAG, LAYER, b"{}")
    for number in range(100):
        save = asyncio.ensure_future(store.save_image_layout())  # noqa: TID251 - a test
        for _ in range(number):
            await asyncio.sleep(0)
        if save.done():
            break
        save.cancel()
        with pytest.raises(asyncio.CancelledError):
            await save
        assert store.index.has_changed
    await store.close()
    assert f"{REPO}:{TAG}" in names(tmp_path)


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_older_write_never_replaces_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """Its thread goes on after a stop has cancelled it. Other workers write the file as well."""
    monkeypatch.setattr(store_module, "_SAVE_LOCK_TIMEOUT_S", 0.1)
    body, is_syncing, may_end = image(LAYER), threading.Event(), threading.Event()
    sync = os.fsync

    def slow_sync(fd: int) -> None:
        if not is_syncing.is_set() and os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp"):
            is_syncing.set()
            assert may_end.wait(60)
        sync(fd)

    monkeypatch.setattr(os, "fsync", slow_sync)
    async with opened(tmp_path) as older, opened(tmp_path) as newer:
        save = asyncio.ensure_future(older.save_image_layout())  # noqa: TID251 - a test
        await until(is_syncing.is_set)
        if is_cancelled:
            save.cancel()
        await pulled(newer, body, TAG, LAYER, b"{}")
        await newer.save_image_layout(share=1.0)
        may_end.set()
        await asyncio.wait({save})
        await until(lambda: not list(tmp_path.glob("index.json.*.tmp")))
        async with asyncio.timeout(30):
            while newer.index.has_changed:
                await newer.save_image_layout(share=1.0)
        assert f"{REPO}:{TAG}" in names(tmp_path)


@pytest.mark.row("G3-index-damage-while-running")
async def test_index_that_is_replaced_while_its_names_are_saved_costs_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages that follow come from new databases, in which the rows have another order."""
    manifests = [image(str(number).encode()) for number in range(80)]
    async with opened(tmp_path) as store:
        for number, body in enumerate(manifests):
            await pulled(store, body, Tag(f"v{number}"))
        await store.save_image_layout(share=1.0)
        before = names(tmp_path)
        add = image_layout.Draft.add

        def add_and_delete(draft: image_layout.Draft, page: list[list[NamedManifest]]) -> None:
            add(draft, page)
            monkeypatch.setattr(image_layout.Draft, "add", add)
            shutil.rmtree(tmp_path / "index")

        monkeypatch.setattr(image_layout.Draft, "add", add_and_delete)
        store.index.has_changed = True
        await store.save_image_layout(share=1.0)
        assert not (tmp_path / "index.json.damaged").exists()
        assert names(tmp_path) == before
        await store.save_image_layout(share=1.0)
        assert not store.index.has_changed
        assert names(tmp_path) == before
