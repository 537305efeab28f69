"""The database: transactions of several writers, durability, damage."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from sqlite3 import Connection

import pytest

from mirror.hosted import database as module
from mirror.hosted.database import Database, open_checked
from mirror.hosted.name_tables import SCHEMA_VERSION
from mirror.oci.errors import NamesDamaged, QuotaExceeded, StorageUnavailable


def add(connection: Connection, digest: str, repository: str = "app", size: int = 10) -> None:
    connection.execute("INSERT INTO blobs VALUES (?, ?, ?, 0)", (repository, digest, size))


def count(connection: Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM blobs").fetchone()[0])


def totals(connection: Connection) -> tuple[int, int]:
    size, contents = connection.execute("SELECT bytes, contents FROM totals").fetchone()
    return size, contents


async def test_write_is_read_by_another_process_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "hosted" / "names.db"
    one, two = await Database.open(path), await Database.open(path)
    await one.write(lambda c: add(c, "a"))
    assert await two.read(count) == 1
    await two.write(lambda c: add(c, "b"), is_durable=False)
    assert await one.read(count) == 2
    await one.close()
    await two.close()
    again = await Database.open(path)
    assert await again.read(count) == 2
    await again.close()


async def test_failed_write_undoes_itself_and_no_other_one_of_its_commit(tmp_path: Path) -> None:
    names = await Database.open(tmp_path / "names.db")

    def fail(connection: Connection) -> None:
        add(connection, "x")
        raise KeyError("no")

    writes = [names.write(partial(add, digest=str(number))) for number in range(5)]
    results = await asyncio.gather(*writes, names.write(fail), return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 5 + [KeyError]
    assert await names.read(count) == 5
    await names.close()


async def test_change_is_told_in_the_end_whether_it_is_committed(tmp_path: Path) -> None:
    database, told = await Database.open(tmp_path / "names.db"), []

    def change(name: str, connection: Connection) -> None:
        database.after_commit(lambda is_committed: told.append((name, is_committed)))
        if name == "refused":
            raise QuotaExceeded("full")

    names = ("one", "refused", "two")
    writes = [database.enqueue_write(partial(change, name)) for name in names]
    await asyncio.gather(*writes, return_exceptions=True)
    assert sorted(told) == [("one", True), ("refused", False), ("two", True)]
    await database.close()


@pytest.mark.parametrize("view", ["unnamed_blobs", "unnamed_manifests", "orphans"])
def test_view_looks_each_row_up_by_an_index_with_all_that_it_compares(
    tmp_path: Path, view: str
) -> None:
    with closing(open_checked(tmp_path / "names.db")) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM {view}")]
    outer, *inner = [step for step in plan if "SUBQUERY" not in step]
    assert outer.startswith("SCAN")
    assert inner
    assert all(step.startswith("SEARCH") for step in inner)
    parts = "parts_by_digest (repository=? AND digest=? AND is_manifest=?)"
    assert [step for step in inner if step.endswith(parts)]


async def test_waiting_writes_share_one_commit(tmp_path: Path) -> None:
    names = await Database.open(tmp_path / "names.db")
    commits: list[str] = []
    names._connection.set_trace_callback(
        lambda statement: commits.append(statement) if statement == "COMMIT" else None
    )
    await asyncio.gather(*(names.write(partial(add, digest=str(n))) for n in range(50)))
    assert len(commits) < 10
    assert await names.read(count) == 50
    await names.close()


async def test_cancelled_caller_does_not_undo_its_write(tmp_path: Path) -> None:
    names = await Database.open(tmp_path / "names.db")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(names.write(lambda c: add(c, "a")))
        await asyncio.sleep(0)
        task.cancel()
    await names.write(lambda c: add(c, "b"))
    assert await names.read(count) == 2
    await names.close()


async def test_durable_write_waits_for_the_disk_and_another_one_does_not(tmp_path: Path) -> None:
    names = await Database.open(tmp_path / "names.db")

    def level(connection: Connection) -> int:
        return int(connection.execute("PRAGMA synchronous").fetchone()[0])

    assert await names.write(level) == 2
    assert await names.write(level, is_durable=False) == 1
    assert await names.write(level) == 2
    await names.close()


async def test_totals_count_shared_content_once_and_each_repository_its_own(
    tmp_path: Path,
) -> None:
    names = await Database.open(tmp_path / "names.db")
    await names.write(lambda c: add(c, "a", "one", 10))
    await names.write(lambda c: add(c, "a", "two", 10))
    await names.write(lambda c: add(c, "b", "two", 5))
    assert await names.read(totals) == (15, 2)

    def by_repository(connection: Connection) -> dict[str, int]:
        return dict(connection.execute("SELECT name, bytes FROM repositories").fetchall())

    assert await names.read(by_repository) == {"one": 10, "two": 15}
    await names.write(lambda c: c.execute("DELETE FROM blobs WHERE repository = 'two'") and None)
    assert await names.read(totals) == (10, 1)
    assert await names.read(by_repository) == {"one": 10}
    await names.close()


def test_damaged_database_is_refused_with_a_remedy_and_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "names.db"
    connection = open_checked(path)
    connection.execute("BEGIN")
    for number in range(2000):
        add(connection, str(number))
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    intact = path.read_bytes()
    for damaged in (b"not a database" * 1000, intact[:5000], intact[:8192] + b"\xff" * 4096):
        path.write_bytes(damaged + intact[len(damaged) :] if len(damaged) > 9000 else damaged)
        kept = path.read_bytes()
        with pytest.raises(NamesDamaged, match=r"names\.db: .*: stop the server, move") as caught:
            open_checked(path)
        assert "\n" not in caught.value.message
        assert path.read_bytes() == kept


def test_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.db"
    open_checked(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(NamesDamaged, match=f"its version is {SCHEMA_VERSION + 1}"):
        open_checked(path)


def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(NamesDamaged, match="its version is 0"):
        open_checked(path)


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosted").write_text("a file")
    with pytest.raises(NamesDamaged, match="hosted"):
        open_checked(tmp_path / "hosted" / "names.db")


async def test_writer_of_another_process_that_does_not_end_is_an_error_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WRITER_TIMEOUT_S", 0.01)
    path = tmp_path / "names.db"
    names = await Database.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="locked"):
        await names.write(lambda c: add(c, "a"))
    other.execute("COMMIT")
    other.close()
    await names.write(lambda c: add(c, "a"))
    assert await names.read(count) == 1
    await names.close()


@pytest.mark.parametrize("is_replaced", [False, True], ids=["removed", "replaced"])
async def test_file_that_is_lost_while_in_use_gets_no_write_and_is_told_once(
    tmp_path: Path, is_replaced: bool
) -> None:
    path, aside = tmp_path / "names.db", tmp_path / "aside.db"
    names = await Database.open(path)
    told: list[str] = []
    names.on_file_lost = told.append
    await names.write(lambda c: add(c, "a"))
    path.rename(aside)
    if is_replaced:
        path.write_bytes(aside.read_bytes())
    for is_durable in (True, False):
        with pytest.raises(StorageUnavailable, match="removed or replaced while in use"):
            await names.write(lambda c: add(c, "b"), is_durable=is_durable)
    aside.rename(path)  # Its log may be gone: only a restart looks at that.
    with pytest.raises(StorageUnavailable, match="start the server again"):
        await names.write(lambda c: add(c, "b"))
    assert len(told) == 1
    assert await names.read(count) == 1, "pulls go on"
    await names.close()


async def test_file_that_is_lost_within_a_write_does_not_acknowledge_it(tmp_path: Path) -> None:
    path = tmp_path / "names.db"
    names = await Database.open(path)

    def lose(connection: Connection) -> None:
        add(connection, "a")
        path.rename(tmp_path / "aside.db")

    with pytest.raises(StorageUnavailable, match="removed or replaced while in use"):
        await names.write(lose)
    await names.close()
    (tmp_path / "aside.db").rename(path)
    again = await Database.open(path)
    assert await again.read(count) == 0
    await again.close()
