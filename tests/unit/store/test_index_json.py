"""``index.json``: when the store writes it, and restoring a lost index from it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.oci.reference import Digest, Tag
from mirror.store import image_layout
from mirror.store.disk import Layout
from mirror.store.index import Index
from mirror.store.orphans import ORPHAN_ROW_TTL_S
from mirror.store.records import NamedManifest
from mirror.store.store import Store
from tests.unit.store.kit import REPO, image, index_of, keep, opened, pulled, random_bytes, served

NOW = 1_800_000_000.0
YEAR = 365 * 86400.0
TAG = Tag("1.0")
LAYER = random_bytes(5_000_000, 71)


def names(root: Path) -> list[str]:
    """The names in ``index.json``."""
    return [named.name for named in image_layout.read_index_json(Layout(root))]


@pytest.mark.row("C12-damaged-index")
async def test_lost_index_is_restored_from_index_json_but_not_as_fresh(tmp_path: Path) -> None:
    child = image(LAYER)
    body = index_of(child)
    async with opened(tmp_path) as store:
        await pulled(store, child, None, LAYER, b"{}")
        await pulled(store, body, TAG)
        await store.index.pin([Digest.of(body)])
    shutil.rmtree(tmp_path / "index")
    async with opened(tmp_path) as store:
        tag = await store.index.tag(REPO, TAG)
        assert tag
        assert (tag.digest, tag.confirmed) == (Digest.of(body), 0.0)
        for data, kind in ((body, "manifest"), (child, "manifest"), (LAYER, "blob")):
            record = await store.index.access_record(REPO, Digest.of(data), kind)
            assert record
            assert (record.kind, record.size) == (kind, len(data))
        assert await store.index.pinned() == {Digest.of(body)}
        assert await store.index.access_record(REPO, Digest.of(b"another"), "blob") is None


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
            assert await served(store, LAYER)
            assert await served(store, body)
            assert await store.index.tag(REPO, TAG)
            assert await store.index.access_record(REPO, Digest.of(LAYER), "blob")
        await pulled(store, image(), Tag("another"))
        await store.save_image_layout()
        assert f"{REPO}:{TAG}" in names(tmp_path)
    async with opened(tmp_path, clock) as store:
        assert await served(store, LAYER)
        assert await store.index.tag(REPO, TAG)


async def test_index_json_stays_while_the_index_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        await pulled(store, image(LAYER), TAG, LAYER, b"{}")
        await store.save_image_layout()
        before = (tmp_path / "index.json").read_bytes()
        store.index.changed = True
        with monkeypatch.context() as patch:

            async def silent(self: Index) -> None:
                return None

            patch.setattr(Index, "manifests", silent)
            await store.save_image_layout()
        assert (tmp_path / "index.json").read_bytes() == before
        assert store.index.changed, "it is written once the index answers"


async def test_index_json_is_not_written_before_the_index_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        await pulled(store, body, TAG, LAYER, b"{}")
    shutil.rmtree(tmp_path / "index")
    with monkeypatch.context() as patch:

        async def refused(self: Index, *arguments: object) -> bool:
            return False

        patch.setattr(Index, "put_tags", refused)
        store = await Store.open(str(tmp_path), Storage(), lambda event: None, lambda: NOW)
    await pulled(store, image(), Tag("new"))
    with monkeypatch.context() as patch:
        patch.setattr(Index, "put_tags", refused)
        await store.save_image_layout()
        assert f"{REPO}:new" not in names(tmp_path)
    await store.save_image_layout()
    assert {f"{REPO}:new", f"{REPO}:{TAG}"} <= set(names(tmp_path))
    record = await store.index.tag(REPO, Tag("new"))
    assert record
    assert record.confirmed == NOW, "a newer record is not overwritten"
    await store.close()


async def test_evicted_and_revoked_manifests_leave_index_json(tmp_path: Path) -> None:
    clock, settings = [NOW], Storage(max_size=20_000_000)
    async with opened(tmp_path, clock, settings=settings) as store:
        old, gone = image(b"old"), image(b"gone")
        await pulled(store, old, Tag("old"))
        clock[0] += 1000
        await pulled(store, gone, Tag("gone"))
        await store.save_image_layout()
        assert len(names(tmp_path)) == 4
        await store.index.revoke_access(REPO, Digest.of(gone), "manifest")
        await store.save_image_layout()
        assert names(tmp_path) == [f"{REPO}:old", f"{REPO}@{Digest.of(old)}"]
        clock[0] += 1000
        for seed in range(4):
            await keep(store, random_bytes(5_000_000, seed))
        await store.save_image_layout()
        assert names(tmp_path) == []


@pytest.mark.row("C12-damaged-index")
async def test_the_next_start_adds_names_that_a_crash_kept_out_of_index_json(
    tmp_path: Path,
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        await store.save_image_layout()
        before = (tmp_path / "index.json").read_bytes()
        await pulled(store, body, TAG)
        await store.index.pin([Digest.of(body)])
    (tmp_path / "index.json").write_bytes(before)
    async with opened(tmp_path):
        pass
    named = image_layout.read_index_json(Layout(tmp_path))
    assert {entry.name for entry in named} == {f"{REPO}:{TAG}", f"{REPO}@{Digest.of(body)}"}
    assert all(entry.is_pinned for entry in named)


async def test_name_that_is_put_during_a_write_is_in_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(LAYER)
    async with opened(tmp_path) as store:
        collect = store.index.manifests

        async def meanwhile() -> list[NamedManifest] | None:
            found = await collect()
            await pulled(store, body, TAG)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store.index, "manifests", meanwhile)
            await store.save_image_layout()
        assert names(tmp_path) == []
        await store.save_image_layout()
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
        assert store.index.changed
    await store.close()
    assert f"{REPO}:{TAG}" in names(tmp_path)
