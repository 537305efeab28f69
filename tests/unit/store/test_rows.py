"""Tables of text rows: bounded pages, marks, and databases in every state."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import Event, IndexDamaged, LogMessage
from mirror.store import index_directory
from mirror.store import rows as module
from mirror.store.rows import PAGE_ROWS, Row, Rows, Tables, TextDisk
from tests.unit.store import damages
from tests.unit.store.damages import Damage
from tests.unit.store.kit import opened_rows, text_of
from tests.waiting import until


async def everything(rows: Rows, table: str = "kept") -> list[Row]:
    found: list[Row] = []
    unanswered: list[Row] = []
    after = 0
    while page := await rows.read(partial(Tables.read_page, table=table, after=after), unanswered):
        assert len(page) <= PAGE_ROWS
        found += page
        after = page[-1].id
    return found


async def put_bounded(rows: Rows, key: str, text: str, ttl: float) -> None:
    await rows.write("bounded", lambda t: t.write("bounded", key, text, ttl=ttl), None)


async def test_rows_are_read_after_a_restart(tmp_path: Path) -> None:
    async with opened_rows(tmp_path / "index") as rows:
        assert await rows.put("kept", [("a", "1"), ("b", "2"), ("a", "3")])
        assert await rows.put("kept", [])
    async with opened_rows(tmp_path / "index") as rows:
        assert await text_of(rows, "a") == "3"
        await rows.write("kept", lambda t: t.delete("kept", "a"), None)
        assert await text_of(rows, "a") is None
        assert [row.text for row in await everything(rows)] == ["2"]


async def test_many_rows_are_read_in_bounded_pages(tmp_path: Path) -> None:
    wanted = [(f"key {n}", f"text {n}") for n in range(2 * PAGE_ROWS + 1)]
    async with opened_rows(tmp_path / "index") as rows:
        await rows.put("kept", wanted)
        assert [(row.key, row.text) for row in await everything(rows)] == wanted


async def test_writing_a_row_removes_its_mark(tmp_path: Path) -> None:
    async with opened_rows(tmp_path / "index") as rows:
        await rows.write("kept", lambda t: t.write("kept", "a", "1", mark="missed"), None)
        assert await rows.read(lambda t: t.read("kept", "a"), None) == ("1", "missed")
        assert [row.mark for row in await everything(rows)] == ["missed"]
        await rows.put("kept", [("a", "2")])
        assert await rows.read(lambda t: t.read("kept", "a"), None) == ("2", None)


async def test_put_of_several_rows_writes_all_or_none(tmp_path: Path) -> None:
    events: list[Event] = []
    async with opened_rows(tmp_path / "index", events) as rows:
        broken: list[tuple[str, str]] = [("a", "1"), ("b", 2)]  # type: ignore[list-item] # no text
        assert not await rows.put("kept", broken)
        assert await everything(rows) == []
    assert len(events) == 1


async def test_bounded_table_keeps_the_newest_rows(tmp_path: Path) -> None:
    text = "x" * 20_000
    async with opened_rows(tmp_path / "index") as rows:
        for number in range(200):
            await put_bounded(rows, str(number), text, 1e6)
        kept = [int(row.key) for row in await everything(rows, "bounded")]
        assert len(kept) * len(text) <= 1_000_000
        assert kept
        assert kept == list(range(200 - len(kept), 200))


async def test_expired_rows_are_removed_when_others_are_written(tmp_path: Path) -> None:
    async with opened_rows(tmp_path / "index") as rows:
        for number in range(50):
            await put_bounded(rows, str(number), "x", -1.0)
        await put_bounded(rows, "a", "1", 1e6)
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
    async with opened_rows(tmp_path / "index", events) as rows:
        await rows.put("kept", [(name, name) for name in "abcde"])
    database = sqlite3.connect(tmp_path / "index" / "kept" / "cache.db")
    with database:
        change = "UPDATE Cache SET %s WHERE key = ?"
        database.execute(change % "mode = 4, value = x'80'", ("a",))
        database.execute(change % "mode = 2, value = NULL, filename = '../../precious'", ("b",))
        database.execute(change % "value = 5", ("c",))
        database.execute(change % "raw = 0, key = x'80'", ("d",))
    database.close()
    async with opened_rows(tmp_path / "index", events) as rows:
        assert [row.key for row in await everything(rows)] == ["e"]
        assert [await text_of(rows, key) for key in "abcde"] == [None, None, None, None, "e"]
        assert await rows.put("kept", [("b", "text again")])
        assert await text_of(rows, "b") == "text again"
    assert precious.exists()


# --- damaged and unavailable databases ------------------------------------------------------------


@pytest.mark.row("C12-damaged-index")
@pytest.mark.parametrize(
    "damage",
    [
        *(damages.lose, damages.replace_by_text, damages.overwrite),
        *(damages.cut, damages.make_directories),
    ],
)
async def test_damaged_database_is_moved_aside_and_created_anew(
    tmp_path: Path, damage: Damage
) -> None:
    index, events = tmp_path / "index", list[Event]()
    async with opened_rows(index) as rows:
        await rows.put("kept", [(f"key {n}", "text") for n in range(500)])
    damage(index)
    async with opened_rows(index, events) as rows:
        await rows.check()
        assert await text_of(rows, "key 1") is None
        assert await rows.put("kept", [("a", "1")])
        assert await text_of(rows, "a") == "1"
    is_lost = damage is damages.lose
    assert (tmp_path / "index.damaged").exists() != is_lost
    assert [type(event) for event in events] == ([] if is_lost else [IndexDamaged])


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.row("C12-damaged-index")
@pytest.mark.parametrize("damage", damages.IN_USE)
async def test_database_that_is_damaged_in_use_is_created_anew(
    tmp_path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CACHE_PAGES", 1)
    index, events, prepared = tmp_path / "index", list[Event](), list[Tables]()
    rows = Rows(index, {"kept": None, "other": None}, events.append, prepared.append)
    texts = [(f"key {n}", "text" * 50) for n in range(500)]
    await rows.put("kept", texts)
    damage(index)
    answers = {await text_of(rows, key) for key, _ in texts}
    assert answers <= {None, "text" * 50}, "a row is as it was, or missing"
    assert await rows.put("kept", [("a", "1")])
    assert await text_of(rows, "a") == "1"
    assert await rows.put("other", [("a", "1")])
    await rows.close()
    assert not [event for event in events if isinstance(event, LogMessage)], "nothing failed"
    reopened = Rows(index, {"kept": None, "other": None}, events.append, prepared.append)
    await reopened.check()
    assert await text_of(reopened, "a") == "1" or len(prepared) > 2
    await reopened.close()


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.parametrize("damage", [damages.overwrite, damages.zero_pages, damages.delete_files])
async def test_processes_use_the_same_database_after_one_was_damaged(
    tmp_path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CACHE_PAGES", 1)
    index, events = tmp_path / "index", list[Event]()
    async with opened_rows(index, events) as one, opened_rows(index, events) as two:
        for rows in (one, two):
            await rows.put("kept", [(f"key {n}", "text" * 50) for n in range(500)])
        damage(index)
        await asyncio.gather(
            *(text_of(rows, f"key {n}") for n in range(500) for rows in (one, two))
        )
        await asyncio.gather(
            one.put("kept", [("from one", "1")]), two.put("kept", [("from two", "2")])
        )
        for rows in (one, two):
            assert await text_of(rows, "from one") == "1"
            assert await text_of(rows, "from two") == "2"
    assert len([event for event in events if isinstance(event, IndexDamaged)]) <= 1
    assert not [event for event in events if isinstance(event, LogMessage)]


@pytest.mark.row("G3-index-damage-while-running")
async def test_tables_are_opened_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    real = module._open_table

    def fail_at_second(path: Path, bound: int | None) -> object:
        if path.name == "bounded":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, bound)

    async with opened_rows(tmp_path / "index", events) as rows:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_open_table", fail_at_second)
            assert await text_of(rows, "a") is None
            assert await text_of(rows, "a", "bounded") is None
        monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
        assert await rows.put("bounded", [("a", "1")])
        assert await text_of(rows, "a", "bounded") == "1"


@pytest.mark.row("M10-hostile-index")
async def test_busy_database_is_not_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, events = tmp_path / "index", list[Event]()
    async with opened_rows(index) as rows:
        await rows.put("kept", [("a", "1")])

    def busy(*arguments: object) -> None:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
    async with opened_rows(index, events) as rows:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_open_table", busy)
            assert await text_of(rows, "a") is None
        assert await text_of(rows, "a") == "1"
    assert not (tmp_path / "index.damaged").exists()


@pytest.mark.row("D6-no-descriptors")
async def test_running_out_of_descriptors_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, events = tmp_path / "index", list[Event]()
    async with opened_rows(index) as rows:
        await rows.put("kept", [("a", "1")])
    real = os.open

    def exhausted(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    def unopened(*arguments: object) -> None:
        monkeypatch.setattr(os, "open", exhausted)
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    async with opened_rows(index, events) as rows:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_open_table", unopened)
            assert await text_of(rows, "a") is None
        monkeypatch.setattr(os, "open", real)
        assert await text_of(rows, "a") is None, "it is not opened again at once"
        monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
        assert await text_of(rows, "a") == "1"
    assert not (tmp_path / "index.damaged").exists()


async def test_cancelled_read_does_not_disturb_the_others(tmp_path: Path) -> None:
    async with opened_rows(tmp_path / "index") as rows:
        await rows.put("kept", [("a", "1")])
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(text_of(rows, "a")) for _ in range(20)]
            await asyncio.sleep(0)
            for task in asked[::3]:
                task.cancel()
        assert [t.cancelled() or t.result() == "1" for t in asked] == [True] * 20
        assert sum(task.cancelled() for task in asked) == 7


async def test_write_that_waits_for_a_new_opening_is_not_overtaken(tmp_path: Path) -> None:
    async with opened_rows(tmp_path / "index") as rows:
        await rows.put("kept", [("a", "0")])
        opening, order = threading.Event(), list[str]()
        reopen = rows._reopen

        def slow(*arguments: Any) -> Tables:
            tables = reopen(*arguments)
            opening.wait(20)
            return tables

        def note(name: str) -> Callable[[Tables], None]:
            return lambda tables: order.append(name)

        rows._reopen = slow  # type: ignore[method-assign] # another write comes after the opening
        rows._tables, closed = None, rows._tables
        first = asyncio.ensure_future(rows.write("kept", note("1"), None))  # noqa: TID251 - a test
        await until(lambda: rows._tables is not None)
        opening.set()
        while not rows._writing._work_queue.empty():
            continue  # The loop does not learn yet that the opening has ended.
        await asyncio.gather(rows.write("kept", note("2"), None), first)
        assert order == ["1", "2"]
        assert closed is not None
        for thread in (rows._writing, rows._reading):
            await asyncio.get_running_loop().run_in_executor(thread, closed.close)


@pytest.mark.row("G4-busy-index")
async def test_writes_that_wait_for_another_process_are_bounded_and_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_QUEUED_WRITES", 100)
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_S", 0.1)
    events: list[Event] = []
    async with opened_rows(tmp_path / "index", events) as rows:
        await rows.put("kept", [("a", "0")])
        other = sqlite3.connect(tmp_path / "index" / "kept" / "cache.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        gate = threading.Event()
        rows._writing.submit(gate.wait, 30)  # No write leaves the queue before all are there.
        writes = [
            asyncio.ensure_future(rows.put("kept", [(str(n), "1")]))  # noqa: TID251 - a test
            for n in range(150)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert rows._writing._work_queue.qsize() <= 100
        assert sum(write.done() for write in writes) >= 50, "the others are refused at once"
        begun = time.monotonic()
        gate.set()
        assert not any(await asyncio.gather(*writes))
        assert time.monotonic() - begun < 25, "not 0.5 s each"
        other.execute("ROLLBACK")
        other.close()
        assert await rows.put("kept", [("a", "1")])
    (warning,) = events
    assert isinstance(warning, LogMessage)
