"""The cache of parsed manifests: a file that may be lost at any time."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mirror.inventory.manifest_cache import ManifestCache


@pytest.fixture
def cache(tmp_path: Path) -> ManifestCache:
    return ManifestCache(tmp_path / "manifests.db")


def test_pages_are_kept_and_replaced_and_deleted(cache: ManifestCache) -> None:
    assert dict(cache.load()) == {}
    assert cache.try_save({0: b"0", 1: b"1"})
    assert cache.try_save({0: b"2"}, gone=[1])

    assert dict(cache.load()) == {0: b"2"}


def test_damaged_file_counts_as_lost_and_is_made_anew(cache: ManifestCache, tmp_path: Path) -> None:
    (tmp_path / "manifests.db").write_bytes(b"no database" * 1000)

    assert dict(cache.load()) == {}
    assert cache.try_save({0: b"0"})
    assert dict(cache.load()) == {0: b"0"}


def test_file_of_an_earlier_format_counts_as_lost(cache: ManifestCache, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "manifests.db")) as database, database:
        database.execute("CREATE TABLE manifests (digest TEXT PRIMARY KEY)")
        database.execute("PRAGMA user_version = 4")

    assert dict(cache.load()) == {}
    assert cache.try_save({0: b"0"})
    assert dict(cache.load()) == {0: b"0"}


@pytest.mark.parametrize("damaged", [b"layer2", b"\xff\xff\xff\xff\xff\xff"])
def test_page_that_was_damaged_on_the_disk_is_empty(
    cache: ManifestCache, tmp_path: Path, damaged: bytes
) -> None:
    cache.try_save({0: b"layer1", 1: b"layer9"})
    file = tmp_path / "manifests.db"
    file.write_bytes(file.read_bytes().replace(b"layer1", damaged))

    assert dict(cache.load()) == {0: b"", 1: b"layer9"}


def test_page_with_the_number_of_another_one_is_empty(cache: ManifestCache, tmp_path: Path) -> None:
    cache.try_save({0: b"layer1", 1: b"layer9"})
    with closing(sqlite3.connect(tmp_path / "manifests.db")) as database, database:
        database.execute("UPDATE pages SET number = 2 WHERE number = 0")

    assert dict(cache.load()) == {1: b"layer9", 2: b""}


def test_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    cache = ManifestCache(tmp_path / "missing" / "manifests.db")

    assert not cache.try_save({0: b"0"})
    assert dict(cache.load()) == {}


def test_pages_are_not_written_while_another_command_writes(
    cache: ManifestCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.inventory.manifest_cache._CACHE_TIMEOUT_S", 0.01)
    cache.try_save({0: b"0"})
    with closing(sqlite3.connect(tmp_path / "manifests.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        assert not cache.try_save({1: b"1"})
        assert dict(cache.load()) == {}

    assert dict(cache.load()) == {0: b"0"}
