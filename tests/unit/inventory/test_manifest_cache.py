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


def test_rows_are_kept_and_replaced_and_deleted(cache: ManifestCache) -> None:
    assert cache.load() == {}
    assert cache.try_save([("a", "1"), ("b", "2")])
    assert cache.try_save([("a", "3")], gone=["b"])

    assert cache.load() == {"a": "3"}


def test_damaged_file_counts_as_lost_and_is_made_anew(cache: ManifestCache, tmp_path: Path) -> None:
    (tmp_path / "manifests.db").write_bytes(b"no database" * 1000)

    assert cache.load() == {}
    assert cache.try_save([("a", "1")])
    assert cache.load() == {"a": "1"}


def test_file_of_another_format_counts_as_lost(cache: ManifestCache, tmp_path: Path) -> None:
    cache.try_save([("a", "1")])
    with closing(sqlite3.connect(tmp_path / "manifests.db")) as database:
        database.execute("PRAGMA user_version = 99")

    assert cache.load() == {}


@pytest.mark.parametrize(("written", "damaged"), [(b"layer1", b"layer2"), (b"manifest1", b"man")])
def test_row_that_was_damaged_on_the_disk_is_left_out(
    cache: ManifestCache, tmp_path: Path, written: bytes, damaged: bytes
) -> None:
    cache.try_save([("manifest1", "layer1"), ("manifest9", "layer9")])
    file = tmp_path / "manifests.db"
    file.write_bytes(file.read_bytes().replace(written, damaged.ljust(len(written), b"\xff")))

    assert "manifest1" not in cache.load()
    assert cache.load()["manifest9"] == "layer9"


def test_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    cache = ManifestCache(tmp_path / "missing" / "manifests.db")

    assert not cache.try_save([("a", "1")])
    assert cache.load() == {}


def test_rows_are_not_written_while_another_command_writes(
    cache: ManifestCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.inventory.manifest_cache._CACHE_TIMEOUT_S", 0.01)
    cache.try_save([("a", "1")])
    with closing(sqlite3.connect(tmp_path / "manifests.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        assert not cache.try_save([("b", "2")])
        assert cache.load() == {}

    assert cache.load() == {"a": "1"}
