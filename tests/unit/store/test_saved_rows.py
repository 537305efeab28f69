"""The names in the index, read by a command."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mirror.store import names, saved_rows
from mirror.store.layout import Layout
from mirror.store.names import NAMED
from mirror.store.rows import Tables
from mirror.store.saved_rows import IndexUnreadable, read_names


def write(root: Path, rows: list[tuple[str, str]]) -> None:
    with closing(Tables(root / "index", {NAMED: None})) as tables, tables.transaction(NAMED):
        tables.write_all(NAMED, rows)


def test_table_and_key_are_those_of_the_names() -> None:
    assert (saved_rows._NAMED, saved_rows._RESTORED) == (NAMED, names._RESTORED)


def test_all_rows_are_returned(tmp_path: Path) -> None:
    rows = [(f"key {number}", f"text {number}") for number in range(120)]
    root = tmp_path / "a directory with ? and #"
    write(root, rows)

    assert read_names(Layout(root)) == (rows, False)


def test_rows_of_a_transaction_that_has_not_ended_are_not_returned(tmp_path: Path) -> None:
    write(tmp_path, [("a", "1")])
    with closing(Tables(tmp_path / "index", {NAMED: None})) as tables, tables.transaction(NAMED):
        tables.write(NAMED, "b", "2")

        assert read_names(Layout(tmp_path))[0] == [("a", "1")]


def test_missing_index_has_not_all_names(tmp_path: Path) -> None:
    assert read_names(Layout(tmp_path)) == ([], False)


def test_restored_index_has_all_names(tmp_path: Path) -> None:
    write(tmp_path, [("restored", "all")])

    assert read_names(Layout(tmp_path)) == ([("restored", "all")], True)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_damaged_database_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "index" / NAMED / "cache.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * size)

    with pytest.raises(IndexUnreadable, match="the index cannot be read"):
        read_names(Layout(tmp_path))


def test_database_on_a_disk_that_refuses_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [("a", "1")])
    path = tmp_path / "index" / NAMED / "cache.db"
    for suffix in ("-wal", "-shm"):
        path.with_name(f"cache.db{suffix}").unlink(missing_ok=True)
    path.with_name("cache.db-wal").touch()  # What a failed attempt to open it leaves.
    connect = sqlite3.connect

    def refusing(name: str, **options: Any) -> sqlite3.Connection:
        if "immutable" not in name:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(name, **options)

    monkeypatch.setattr(sqlite3, "connect", refusing)

    assert read_names(Layout(tmp_path))[0] == [("a", "1")]
    assert not os.path.exists(f"{path}-shm")
