"""The spare space of the names: which writes get it on a full disk, and that it comes back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from sqlite3 import Connection

import pytest

from mirror.hosted.database import Database
from mirror.hosted.spare_space import SPARE_BYTES, SpareSpace
from mirror.oci.errors import StorageUnavailable

MIB = 1 << 20


def refusal(code: int = sqlite3.SQLITE_FULL) -> sqlite3.OperationalError:
    """Return what SQLite raises on a full disk."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = code
    return error


def fails_above(path: Path, size: int, code: int = sqlite3.SQLITE_FULL) -> Callable[..., str]:
    """Return a write that the disk refuses as long as the spare file is larger than ``size``."""

    def write(*_: Connection) -> str:
        if path.stat().st_size > size:
            raise refusal(code)
        return "written"

    return write


@pytest.fixture
def spare(tmp_path: Path) -> SpareSpace:
    space = SpareSpace(tmp_path / "names.db")
    space.fill()
    return space


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "names.spare"


def size_of(file: Path) -> int:
    return file.stat().st_size


def allocated(file: Path) -> int:
    return file.stat().st_blocks * 512


def test_file_has_its_blocks_and_only_its_user_reads_it(spare: SpareSpace, file: Path) -> None:
    assert size_of(file) == SPARE_BYTES <= allocated(file)
    assert file.stat().st_mode & 0o777 == 0o600


def test_file_is_half_of_a_small_disk(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.hosted.spare_space._SpareFile.free_bytes", lambda _: 10 * MIB)
    SpareSpace(tmp_path / "names.db").fill()
    assert size_of(file) == 5 * MIB


@pytest.mark.parametrize(
    "code",
    [
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    ],
)
def test_write_gets_pieces_until_it_fits_and_they_come_back(
    spare: SpareSpace, file: Path, code: int
) -> None:
    sizes: list[int] = []
    result = spare.run(fails_above(file, 8 * MIB, code), lambda: sizes.append(size_of(file)))
    assert result == "written"
    assert sizes == [8 * MIB], "settled once, before the space is taken back"
    assert size_of(file) == SPARE_BYTES <= allocated(file)


def test_write_that_never_fits_fails_and_the_space_comes_back(
    spare: SpareSpace, file: Path
) -> None:
    with pytest.raises(sqlite3.OperationalError, match="full"):
        spare.run(fails_above(file, -1))
    assert size_of(file) == SPARE_BYTES


def test_other_error_gets_no_space(spare: SpareSpace, file: Path) -> None:
    settled: list[int] = []
    with pytest.raises(sqlite3.OperationalError):
        spare.run(fails_above(file, -1, sqlite3.SQLITE_BUSY), lambda: settled.append(1))
    assert not settled


def test_without_a_file_a_write_fails_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def write() -> None:
        calls.append(1)
        raise refusal()

    with pytest.raises(sqlite3.OperationalError):
        SpareSpace(tmp_path / "names.db").run(write)
    assert calls == [1]


async def test_removal_gets_space_and_a_push_of_the_same_commit_does_not(
    tmp_path: Path, file: Path
) -> None:
    names = await Database.open(tmp_path / "names.db")
    await names.fill_spare_space()
    pushes: list[int] = []

    def push(_: Connection) -> None:
        pushes.append(1)
        raise refusal()

    def remove(connection: Connection) -> str:
        connection.execute("DELETE FROM blobs")
        return fails_above(file, 12 * MIB)()

    async with asyncio.timeout(10):
        results = await asyncio.gather(
            names.write(push),
            names.write(remove, may_use_spare_space=True),
            names.write(remove, may_use_spare_space=True),
            names.write(push),
            return_exceptions=True,
        )
    assert results[1:3] == ["written", "written"]
    assert all(isinstance(results[n], StorageUnavailable) for n in (0, 3))
    assert len(pushes) <= 2
    assert size_of(file) == SPARE_BYTES
    await names.close()


async def test_removal_with_spare_space_leaves_no_log(tmp_path: Path, file: Path) -> None:
    names = await Database.open(tmp_path / "names.db")
    await names.fill_spare_space()
    log = tmp_path / "names.db-wal"
    await names.write(lambda c: c.execute("CREATE TABLE more (x)") and None)
    assert size_of(log) > 0
    await names.write(fails_above(file, 12 * MIB), may_use_spare_space=True)
    assert size_of(log) == 0
    await names.close()


async def test_removal_that_its_rule_refuses_is_not_tried_again(tmp_path: Path, file: Path) -> None:
    names = await Database.open(tmp_path / "names.db")
    await names.fill_spare_space()

    def remove(_: Connection) -> None:
        fails_above(file, 12 * MIB)()
        raise KeyError("immutable")

    with pytest.raises(KeyError, match="immutable"):
        await names.write(remove, may_use_spare_space=True)
    await names.close()
