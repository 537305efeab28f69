"""Damage to the databases of an index, also while they are open."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

Damage: TypeAlias = Callable[[Path], None]
"""Damages the databases in a directory."""


def lose(index: Path) -> None:
    shutil.rmtree(index)


def lose_one(index: Path) -> None:
    """Delete the second database: that of access records in an index."""
    shutil.rmtree(sorted(index.iterdir())[1])


def replace_by_text(index: Path) -> None:
    shutil.rmtree(index)
    index.write_text("no directory")


def overwrite(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        # After the first one was damaged, the directory may be replaced at any moment.
        with suppress(FileNotFoundError):
            _checkpoint(database)
            database.write_bytes(b"garbage" * 1000)


def cut(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        # After the first one was damaged, the directory may be replaced at any moment.
        with suppress(FileNotFoundError):
            _checkpoint(database)
            os.truncate(database, database.stat().st_size // 2)


def empty(index: Path) -> None:
    for file in (*index.glob("*/cache.db"), *index.glob("*/cache.db-wal")):
        os.truncate(file, 0)


def zero_pages(index: Path) -> None:
    """Overwrite all pages but the first one: the file still looks like a database."""
    for database in index.glob("*/cache.db"):
        # After the first one was damaged, the directory may be replaced at any moment.
        with suppress(FileNotFoundError):
            _checkpoint(database)
            size = database.stat().st_size
            with database.open("r+b") as file:
                file.seek(4096)
                file.write(bytes(size - 4096))


def make_directories(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        database.unlink()
        database.mkdir()


def cut_log(index: Path) -> None:
    for log in index.glob("*/cache.db-wal"):
        os.truncate(log, 0)


def overwrite_log(index: Path) -> None:
    for log in index.glob("*/cache.db-wal"):
        log.write_bytes(os.urandom(log.stat().st_size))


def delete_files(index: Path) -> None:
    for file in index.glob("*/cache.db*"):
        file.unlink()


def put_other_databases(index: Path) -> None:
    for database in index.glob("*/cache.db"):
        database.unlink()
        other = sqlite3.connect(database)
        other.execute("CREATE TABLE other (key TEXT)")
        other.close()


IN_USE: Final[tuple[Damage, ...]] = (
    *(lose, lose_one, replace_by_text, overwrite, cut, empty, zero_pages),
    *(cut_log, overwrite_log, delete_files, put_other_databases),
)
"""Damage that open databases can meet."""


def _checkpoint(database: Path) -> None:
    """Move the rows from the write-ahead log into the database."""
    connection = sqlite3.connect(database)
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()
