"""Reading a data directory that a store has written."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.inventory.model import Inventory
from mirror.inventory.read import read_inventory
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Marks
from mirror.store.records import manifest_record
from mirror.store.saved_rows import IndexUnreadable
from mirror.store.store import Store
from tests.unit.inventory.kit import APP, UPSTREAM, config, content, manifest

CONFIG, LAYER = config(), content("layer")
IMAGE = manifest(CONFIG, [LAYER])
DIGEST = Digest.of(IMAGE)


async def fill(root: Path) -> Store:
    """A store with one image, that is still open."""
    store = await Store.open(str(root), Storage(), lambda event: None)
    for body in (CONFIG, LAYER, IMAGE):
        path = store.layout.blob(Digest.of(body))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    record = manifest_record(DIGEST, OCI_MANIFEST, len(IMAGE))
    await store.index.put_access_records(APP, [record])
    await store.index.confirm_tag(APP, Tag("v1"), DIGEST)
    return store


def read(root: Path) -> Inventory:
    return read_inventory(Layout(root), {"docker.io": UPSTREAM}, Marks(), time.time())


async def test_names_are_seen_beside_an_open_store_and_after_it(tmp_path: Path) -> None:
    store = await fill(tmp_path)

    (beside,) = read(tmp_path).images
    await store.close()
    (after,) = read(tmp_path).images

    assert beside.name == after.name == f"{APP}:v1"
    assert beside.is_complete
    assert beside.stale is None
    assert beside.platforms == after.platforms == ("linux/amd64",)


async def test_names_of_a_lost_index_are_those_of_index_json(tmp_path: Path) -> None:
    store = await fill(tmp_path)
    await store.save_image_layout(share=1.0)
    await store.close()
    shutil.rmtree(tmp_path / "index")

    (image,) = read(tmp_path).images

    assert image.name == f"{APP}:v1"
    assert image.checked is None


async def test_index_that_is_not_restored_yet_also_has_the_names_of_index_json(
    tmp_path: Path,
) -> None:
    store = await fill(tmp_path)
    await store.save_image_layout(share=1.0)
    await store.close()
    with closing(sqlite3.connect(tmp_path / "index" / "named" / "cache.db")) as database, database:
        database.execute("DELETE FROM Cache")

    assert [image.name for image in read(tmp_path).images] == [f"{APP}:v1"]


async def test_index_that_cannot_be_read_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    store = await fill(tmp_path)
    await store.close()
    (tmp_path / "index" / "named" / "cache.db").write_bytes(b"damaged" * 10_000)

    with pytest.raises(IndexUnreadable, match="start the server"):
        read(tmp_path)


def test_damaged_index_json_of_a_lost_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{")

    with pytest.raises(IndexUnreadable, match=r"index\.json is damaged"):
        read(tmp_path)


def test_empty_directory_has_no_images(tmp_path: Path) -> None:
    inventory = read(tmp_path)

    assert (inventory.images, inventory.orphans, inventory.contents) == ((), frozenset(), {})


async def test_reading_changes_nothing_in_the_index(tmp_path: Path) -> None:
    store = await fill(tmp_path)
    await store.close()
    database = tmp_path / "index" / "named" / "cache.db"

    def dump() -> list[object]:
        with closing(sqlite3.connect(database)) as connection:
            return connection.execute("SELECT * FROM Cache ORDER BY rowid").fetchall()

    before = dump()
    read(tmp_path)

    assert dump() == before
