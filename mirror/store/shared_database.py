"""A SQLite file that several processes write, and that is replaced if it is damaged.

Lives here: the names of such files, the lock under which one is created or moved aside. Must not
know: tables, rows.

Theory of operation. Several processes write into one file. SQLite deletes the log beside a file
(``-wal``) by its name when the last connection is closed. If a damaged file were replaced by one
with the same name, a process that still has the old file open would delete the log of the new one.
So each file has a number, and a damaged one is followed by the next number.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.store.sqlite_connection import connect

_MAX_LOG_BYTES: Final = 4 * 1024 * 1024
"""Bytes of the log at most, before its content goes into the file."""
_PAGE_BYTES: Final = 4096
"""Bytes of a page: SQLite's default."""
_DAMAGE_CODES: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}
)
# Texts of errors that mean a table or a column of another version.
_FOREIGN: Final = ("no such table", "no such column", "has no column", "has no unique")


def is_file_damaged(error: Exception) -> bool:
    """Return whether an error means that the file is damaged, or of another version."""
    if not isinstance(error, sqlite3.Error):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    is_foreign = isinstance(error, sqlite3.OperationalError) and any(
        text in str(error) for text in _FOREIGN
    )
    return is_foreign or (code is not None and code & 0xFF in _DAMAGE_CODES)


@dataclass(frozen=True, slots=True)
class DatabaseForm:
    """The name and the tables of a database."""

    name: str
    """Its files are ``<name>.<number>.db``, and ``<name>.<number>.damaged``."""
    tables: str
    """SQL that creates the tables."""
    version: int
    """Number of the tables' form. A file of another version is moved aside like a damaged one."""

    def find_file(self, directory: Path) -> Path | None:
        """Return the file in use below ``directory``. None: there is none.

        Raises ``OSError``, but not for a missing directory.
        """
        newest = max(self.numbers(directory, "db"), default=None)
        return None if newest is None else self.path(directory, newest)

    def path(self, directory: Path, number: int, suffix: str = "db") -> Path:
        """Return the path of a file.

        Args:
            directory: The directory of the database.
            number: The number of the file.
            suffix: ``db`` or ``damaged``.
        """
        return directory / f"{self.name}.{number}.{suffix}"

    def numbers(self, directory: Path, suffix: str) -> list[int]:
        """Return the numbers of the files. Raises ``OSError``, but not for a missing directory."""
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
        pattern = re.compile(rf"{self.name}\.([0-9]{{1,9}})\.{suffix}")
        return [int(match[1]) for name in names if (match := pattern.fullmatch(name))]


class SharedDatabase:
    """The connection of one process for writing. All methods block, and belong to one thread."""

    def __init__(
        self, directory: Path, form: DatabaseForm, log_bytes: int = _MAX_LOG_BYTES
    ) -> None:
        """Open nothing yet.

        Args:
            directory: It is created once there is something to write.
            form: The name and the tables.
            log_bytes: Bytes of the log at most, before its content goes into the file.
        """
        self._directory = directory
        self._form = form
        self._log_bytes = min(log_bytes, _MAX_LOG_BYTES)
        self._connection: sqlite3.Connection | None = None
        self._path: Path | None = None
        self._number = 0
        """Number of the file that was opened last. 0: none was."""
        self._inode = 0

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction. An exception in the block undoes it.

        Raises:
            sqlite3.Error: The file cannot be used (see :func:`is_file_damaged`).
            OSError: The directory or the file cannot be used.
        """
        connection = self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._is_current():
            return self._connection
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            # A number that this process has used must not be used again for a new file.
            used = max(self._form.numbers(self._directory, "damaged"), default=0)
            newest = max(self._form.numbers(self._directory, "db"), default=None)
            self._number = newest or max(used, self._number) + 1
            self._path = path = self._form.path(self._directory, self._number)
            connection = connect(path, "rwc")
            try:
                _prepare(connection, self._form, self._log_bytes)
            except BaseException:
                connection.close()
                raise
        self._connection, self._inode = connection, path.stat().st_ino
        return connection

    def _is_current(self) -> bool:
        """Return whether the open file is still the one in use."""
        assert self._path is not None
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._directory / "lock", flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def move_aside(self) -> None:
        """Rename the damaged file, unless another process has done so. Keeps the latest one only.

        Raises ``OSError``.
        """
        path = self._path
        self.close()
        if path is None:
            return
        with self._locked():
            if not path.exists():
                return
            for number in self._form.numbers(self._directory, "damaged"):
                self._form.path(self._directory, number, "damaged").unlink(missing_ok=True)
            path.rename(path.with_suffix(".damaged"))
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection. The next transaction opens the file again."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection, self._inode = None, 0


def _prepare(connection: sqlite3.Connection, form: DatabaseForm, log_bytes: int) -> None:
    """Create the tables of a new file. Raises ``sqlite3.DatabaseError`` for another version."""
    # Only a new file takes it: removed rows give their pages back to the disk.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {log_bytes // _PAGE_BYTES}")
    # A crash of the machine may lose the latest rows, but does not damage the file.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {log_bytes}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        connection.executescript(
            f"BEGIN; {form.tables} PRAGMA user_version = {form.version}; COMMIT;"
        )
    elif version != form.version:
        raise sqlite3.OperationalError(f"no such table: the file has version {version}")
