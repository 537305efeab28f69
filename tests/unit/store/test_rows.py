"""Tables of text rows: bounded pages, marks, and databases in every state."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.observability.events import Event, LogMessage
from mirror.store import rows as module
from mirror.store.rows import PAGE_ROWS, Row, Rows, TextDisk
from tests.unit.store.kit import fill_up, make_read_only, small_disk


@asynccontextmanager
async def opened(path: Path, events: list[Event] | None = None) -> AsyncIterator[Rows]:
    warnings = [] if events is None else events
    rows = Rows(path, {"kept": None, "bounded": 1_000_000}, warnings.append)
    try:
        yield rows
    finally:
        await rows.close()
    if events is None:
        assert not warnings


async def everything(rows: Rows, table: str = "kept") -> list[Row]:
    found: list[Row] = []
    while page := await rows.page(table, found[-1].id if found else 0):
        assert len(page) <= PAGE_ROWS
        found += page
    return found


async def test_rows_are_read_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path / "index") as rows:
        assert await rows.put("kept", [("a", "1"), ("b", "2"), ("a", "3")])
        assert await rows.put("kept", [])
    async with opened(tmp_path / "index") as rows:
        assert await rows.get("kept", "a") == "3"
        await rows.drop("kept", "a")
        assert await rows.get("kept", "a") is None
        assert [row.text for row in await everything(rows)] == ["2"]


async def test_many_rows_are_read_in_bounded_pages(tmp_path: Path) -> None:
    wanted = [(f"key {n}", f"text {n}") for n in range(2 * PAGE_ROWS + 1)]
    async with opened(tmp_path / "index") as rows:
        await rows.put("kept", wanted)
        assert [(row.key, row.text) for row in await everything(rows)] == wanted


async def test_writing_a_row_removes_its_mark(tmp_path: Path) -> None:
    async with opened(tmp_path / "index") as rows:
        await rows.run(lambda: rows.write("kept", "a", "1", mark="missed"), None)
        assert await rows.run(lambda: rows.read("kept", "a"), None) == ("1", "missed")
        assert [row.mark for row in await everything(rows)] == ["missed"]
        await rows.put("kept", [("a", "2")])
        assert await rows.run(lambda: rows.read("kept", "a"), None) == ("2", None)


async def test_put_of_several_rows_writes_all_or_none(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened(tmp_path / "index", events) as rows:
        broken: list[tuple[str, str]] = [("a", "1"), ("b", 2)]  # type: ignore[list-item] # no text
        assert not await rows.put("kept", broken)
        assert await everything(rows) == []
    assert len(events) == 1


async def test_bounded_table_keeps_the_newest_rows(tmp_path: Path) -> None:
    text = "x" * 20_000
    async with opened(tmp_path / "index") as rows:
        for number in range(200):
            await rows.put("bounded", [(str(number), text)], 1e6)
        kept = [int(row.key) for row in await everything(rows, "bounded")]
        assert len(kept) * len(text) <= 1_000_000
        assert kept
        assert kept == list(range(200 - len(kept), 200))


async def test_expired_rows_are_removed_when_others_are_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "index") as rows:
        for number in range(50):
            await rows.put("bounded", [(str(number), "x")], -1.0)
        await rows.put("bounded", [("a", "1")], 1e6)
        assert [row.key for row in await everything(rows, "bounded")][-1] == "a"
        assert len(await everything(rows, "bounded")) <= 2


def test_text_disk_refuses_every_type_but_text() -> None:
    disk = TextDisk(".")
    assert disk.fetch(*disk.store("text", False)[1:], False) == "text"
    for wrong in (b"bytes", 5, None, ["list"]):
        with pytest.raises(TypeError):
            disk.put(wrong)
        with pytest.raises(TypeError):
            disk.store(wrong, False)
        with pytest.raises(TypeError):
            disk.get(wrong, True)
    planted = pickle.dumps("text")
    for mode, filename, value in ((4, None, planted), (1, None, planted), (2, "x", None)):
        with pytest.raises(TypeError):
            disk.fetch(mode, filename, value, False)


@pytest.mark.row("M10-hostile-index")
async def test_rows_that_are_not_text_are_passed_over_and_remove_no_file(tmp_path: Path) -> None:
    events: list[Event] = []
    precious = tmp_path / "precious"
    precious.write_text("stays")
    async with opened(tmp_path / "index", events) as rows:
        await rows.put("kept", [(name, name) for name in "abcde"])
    database = sqlite3.connect(tmp_path / "index" / "kept" / "cache.db")
    with database:
        change = "UPDATE Cache SET %s WHERE key = ?"
        database.execute(change % "mode = 4, value = x'80'", ("a",))
        database.execute(change % "mode = 2, value = NULL, filename = '../../precious'", ("b",))
        database.execute(change % "value = 5", ("c",))
        database.execute(change % "raw = 0, key = x'80'", ("d",))
    database.close()
    async with opened(tmp_path / "index", events) as rows:
        assert [row.key for row in await everything(rows)] == ["e"]
        assert [await rows.get("kept", key) for key in "abcde"] == [None, None, None, None, "e"]
        assert await rows.put("kept", [("b", "text again")])
        assert await rows.get("kept", "b") == "text again"
    assert precious.exists()


# --- damaged and unavailable databases ------------------------------------------------------------


def lose(index: Path) -> None:
    shutil.rmtree(index)


def replace_by_text(index: Path) -> None:
    shutil.rmtree(index)
    index.write_text("no directory")


def overwrite(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        database.write_bytes(b"garbage" * 1000)


def cut(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        os.truncate(database, database.stat().st_size // 2)


def make_directories(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        database.unlink()
        database.mkdir()


@pytest.mark.row("C12-damaged-index")
@pytest.mark.parametrize("damage", [lose, replace_by_text, overwrite, cut, make_directories])
async def test_damaged_database_is_moved_aside_and_created_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    index = tmp_path / "index"
    async with opened(index) as rows:
        await rows.put("kept", [(f"key {n}", "text") for n in range(500)])
    damage(index)
    async with opened(index) as rows:
        assert await rows.get("kept", "key 1") is None
        assert await rows.put("kept", [("a", "1")])
        assert await rows.get("kept", "a") == "1"
    assert (tmp_path / "index.damaged").exists() == (damage is not lose)


@pytest.mark.row("C12-damaged-index")
async def test_database_that_is_damaged_in_use_is_created_anew(tmp_path: Path) -> None:
    index = tmp_path / "index"
    async with opened(index) as rows:
        await rows.put("kept", [(f"key {n}", "text" * 50) for n in range(500)])
        for database in index.glob("*/cache.db*"):
            database.write_bytes(b"garbage" * 10_000)
        assert await rows.put("kept", [("a", "1")])
        assert await rows.get("kept", "a") == "1"


@pytest.mark.row("M10-hostile-index")
async def test_busy_database_is_not_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, events = tmp_path / "index", list[Event]()
    async with opened(index) as rows:
        await rows.put("kept", [("a", "1")])

    def busy(*arguments: object) -> None:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    monkeypatch.setattr(module, "_REOPEN_INTERVAL_S", 0.0)
    async with opened(index, events) as rows:
        with monkeypatch.context() as patch:
            patch.setattr(rows, "_open_table", busy)
            assert await rows.get("kept", "a") is None
        assert await rows.get("kept", "a") == "1"
    assert not (tmp_path / "index.damaged").exists()


@pytest.mark.row("D6-no-descriptors")
async def test_running_out_of_descriptors_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, events = tmp_path / "index", list[Event]()
    async with opened(index) as rows:
        await rows.put("kept", [("a", "1")])
    real = os.open

    def exhausted(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    def unopened(*arguments: object) -> None:
        monkeypatch.setattr(os, "open", exhausted)
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    async with opened(index, events) as rows:
        with monkeypatch.context() as patch:
            patch.setattr(rows, "_open_table", unopened)
            assert await rows.get("kept", "a") is None
        monkeypatch.setattr(os, "open", real)
        assert await rows.get("kept", "a") is None, "it is not opened again at once"
        monkeypatch.setattr(module, "_REOPEN_INTERVAL_S", 0.0)
        assert await rows.get("kept", "a") == "1"
    assert not (tmp_path / "index.damaged").exists()


@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.parametrize("refusal", ["read-only", "full"])
async def test_copy_serves_while_the_disk_refuses_writes(tmp_path: Path, refusal: str) -> None:
    events: list[Event] = []
    with small_disk(tmp_path / "disk") as disk:
        async with opened(disk / "index") as rows:
            await rows.put("kept", [("a", "1")])
        if refusal == "full":
            fill_up(disk)
        else:
            make_read_only(disk)
        async with opened(disk / "index", events) as rows:
            assert await rows.get("kept", "a") == "1"
            assert await rows.put("kept", [("b", "2")])
            assert await rows.get("kept", "b") == "2", "until the end of the process"
        assert len(events) == 1
        assert isinstance(events[0], LogMessage)
        assert "a temporary copy is used" in events[0].message
        assert not (disk / "index.damaged").exists()


async def test_cancelled_read_does_not_disturb_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "index") as rows:
        await rows.put("kept", [("a", "1")])
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(rows.get("kept", "a")) for _ in range(20)]
            await asyncio.sleep(0)
            for task in asked[::3]:
                task.cancel()
        assert [t.cancelled() or t.result() == "1" for t in asked] == [True] * 20
        assert sum(task.cancelled() for task in asked) == 7
