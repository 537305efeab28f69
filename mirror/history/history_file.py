"""The file of the history: where it is, how it is opened, and what is done about a damaged one.

Lives here: the names of the files, their tables, the lock under which a file is created or moved
aside. Must not know: rows.

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
from pathlib import Path
from typing import Final

_FILE_NAME: Final = re.compile(r"history\.([0-9]{1,9})\.(db|damaged)")
_WRITE_TIMEOUT_S: Final = 10.0
"""Seconds to wait for the transaction of another process: each takes some milliseconds."""
_LOG_SHARE: Final = 8
"""The log has an eighth of the bytes of the file at most. Then its content goes into the file."""
_MAX_LOG_BYTES: Final = 4 * 1024 * 1024
"""Bytes of the log at most."""
_PAGE_BYTES: Final = 4096
"""Bytes of a page: SQLite's default."""
_TABLES_VERSION: Final = 2
"""Number of the tables' form. A file of another version is moved aside like a damaged one."""
_DAMAGE_CODES: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}
)
# Texts of errors that mean a table or a column of another version.
_FOREIGN: Final = ("no such table", "no such column", "has no column", "has no unique")
CREATE_TABLES: Final = """
CREATE TABLE pulls (
    id INTEGER PRIMARY KEY, is_hit INTEGER NOT NULL, at REAL NOT NULL, request_id TEXT NOT NULL,
    client TEXT NOT NULL, upstream TEXT NOT NULL, repository TEXT NOT NULL,
    reference TEXT NOT NULL, digest TEXT NOT NULL, outcome TEXT NOT NULL, record TEXT NOT NULL
);
CREATE INDEX pulls_by_repository ON pulls (repository, upstream);
CREATE INDEX pulls_by_request ON pulls (request_id);
CREATE TABLE minutes (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL, upstream TEXT NOT NULL, outcome TEXT NOT NULL,
    requests INTEGER NOT NULL, bytes_sent INTEGER NOT NULL, bytes_fetched INTEGER NOT NULL,
    billable INTEGER NOT NULL, billed INTEGER NOT NULL, UNIQUE (start, upstream, outcome)
);
CREATE TABLE counts (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL, upstream TEXT NOT NULL,
    repository TEXT NOT NULL, network TEXT NOT NULL, outcome TEXT NOT NULL,
    requests INTEGER NOT NULL, bytes_sent INTEGER NOT NULL, bytes_fetched INTEGER NOT NULL,
    billable INTEGER NOT NULL, billed INTEGER NOT NULL,
    UNIQUE (start, upstream, repository, network, outcome)
);
CREATE TABLE tags (
    id INTEGER PRIMARY KEY, upstream TEXT NOT NULL, repository TEXT NOT NULL, tag TEXT NOT NULL,
    digest TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL
);
CREATE INDEX tags_by_name ON tags (upstream, repository, tag);
CREATE TABLE accesses (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, at INTEGER NOT NULL, content INTEGER NOT NULL,
    size INTEGER NOT NULL, is_used INTEGER NOT NULL, requests INTEGER NOT NULL,
    misses INTEGER NOT NULL, UNIQUE (step, content)
);
CREATE TABLE step (
    id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, minute INTEGER NOT NULL,
    bytes REAL NOT NULL
);
CREATE TABLE sampling (id INTEGER PRIMARY KEY CHECK (id = 1), threshold INTEGER NOT NULL);
"""
"""SQL that creates the tables."""


def is_file_damaged(error: Exception) -> bool:
    """Return whether an error means that the file is damaged, or of another version."""
    if not isinstance(error, sqlite3.Error):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    is_foreign = isinstance(error, sqlite3.OperationalError) and any(
        text in str(error) for text in _FOREIGN
    )
    return is_foreign or (code is not None and code & 0xFF in _DAMAGE_CODES)


def find_file(directory: Path) -> Path | None:
    """Return the file in use below ``directory``. None: there is none.

    Raises ``OSError``, but not for a missing directory.
    """
    newest = max(_numbers(directory, "db"), default=None)
    return None if newest is None else _path(directory, newest)


def _path(directory: Path, number: int, suffix: str = "db") -> Path:
    return directory / f"history.{number}.{suffix}"


def _numbers(directory: Path, suffix: str) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = (_FILE_NAME.fullmatch(name) for name in names)
    return [int(match[1]) for match in found if match and match[2] == suffix]


class HistoryFile:
    """The connection of one process for writing. All methods block, and belong to one thread."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Open nothing yet.

        Args:
            directory: It is created once there is something to write.
            max_bytes: Bytes of the file at most. They decide when its log is emptied.
        """
        self._directory = directory
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None
        self._path: Path | None = None
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
        number = 0
        if self._path is not None and (match := _FILE_NAME.fullmatch(self._path.name)):
            number = int(match[1])
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            # A number that this process has used must not be used again for a new file.
            used = max(_numbers(self._directory, "damaged"), default=0)
            newest = max(_numbers(self._directory, "db"), default=None)
            self._path = path = _path(self._directory, newest or max(used, number) + 1)
            connection = sqlite3.connect(
                path, timeout=_WRITE_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection, min(_MAX_LOG_BYTES, self._max_bytes // _LOG_SHARE))
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
            for number in _numbers(self._directory, "damaged"):
                _path(self._directory, number, "damaged").unlink(missing_ok=True)
            path.rename(path.with_suffix(".damaged"))
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection. The next transaction opens the file again."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection, self._inode = None, 0


def _prepare(connection: sqlite3.Connection, log_bytes: int) -> None:
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
            f"BEGIN; {CREATE_TABLES} PRAGMA user_version = {_TABLES_VERSION}; COMMIT;"
        )
    elif version != _TABLES_VERSION:
        raise sqlite3.OperationalError(f"no such table: the file has version {version}")
