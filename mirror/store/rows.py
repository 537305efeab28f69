"""Tables of text rows in diskcache, behind one thread. The index is built on them.

Lives here: the only import of diskcache, and the handling of a database that is damaged, busy or
not writable. Must not know: the meaning of a row.

The asynchronous methods never raise: a failed read is a miss, a failed write is dropped, and both
are logged. A damaged database is moved aside and created anew. On a disk that refuses writes, a
copy in the temporary directory serves until the process ends.

diskcache unpickles rows (CVE-2025-69872). So its ``Disk`` is replaced by one that reads and writes
text only. Its own eviction drops rows without a notice, and is off except for bounded tables.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import diskcache

from mirror.observability.events import LogMessage, Observer

T = TypeVar("T")

PAGE_ROWS: Final = 200
"""Rows in one page: reading them takes 1 ms, for which other operations wait."""
_BUSY_TIMEOUT_S: Final = 2.0
"""Seconds to wait for a write by another process. Those take milliseconds on a healthy disk."""
_LOG_INTERVAL_S: Final = 60.0
"""Seconds between two log messages of failures: one outage fails every operation."""
_REOPEN_INTERVAL_S: Final = 5.0
"""Seconds between two attempts to open a database that could not be opened: an attempt is slow."""
_RAW: Final = 1
"""diskcache's ``MODE_RAW``: a value that is kept in its row as it is."""
_FAILURES: Final = (sqlite3.Error, diskcache.Timeout, OSError, TypeError, ValueError, EOFError)
# SQLite's and the system's codes for a disk that can be read but refuses writes.
_REFUSED: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_REFUSED_BY_DISK: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
)
# An I/O error with one of these codes comes from reading: the database is damaged.
_UNREADABLE: Final = frozenset(
    {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
)
# Codes of temporary failures: the database is not at fault.
_TEMPORARY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM})
_TEMPORARY_OF_DISK: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class TextDisk(diskcache.Disk):  # type: ignore[misc] # diskcache has no types
    """Keys and values are text. Any other type in the database is refused, never interpreted."""

    def put(self, key: object) -> tuple[str, bool]:
        """Encode a key for the database."""
        if not isinstance(key, str):
            raise TypeError("keys of the index are text")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Decode a key from the database."""
        if not raw or not isinstance(key, str):
            raise TypeError("a key of the index is not text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        """Encode a value for the database."""
        if read or not isinstance(value, str):
            raise TypeError("values of the index are text")
        return len(value), _RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str:
        """Decode a value from the database."""
        if mode != _RAW or read or filename is not None or not isinstance(value, str):
            raise TypeError("a value of the index is not text")
        return value

    def remove(self, file_path: str) -> None:
        """Do nothing. Our rows have no files, and a planted row must not remove one."""


class _Table(diskcache.Cache):  # type: ignore[misc] # diskcache has no types
    """A table. If it cannot be opened, its connection is closed at once."""

    def __init__(self, directory: str, **settings: object) -> None:
        try:
            super().__init__(directory, disk=TextDisk, **settings)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    id: int
    """SQLite's rowid: rows are read in its order."""
    key: str
    text: str
    mark: str | None = None
    """A second text beside it. Writing the row without a mark removes it."""


class Rows:
    """Tables of text by key.

    All access runs in one thread, which the object owns: a transaction is never interleaved with
    another operation of this process.
    """

    def __init__(self, path: Path, tables: Mapping[str, int | None], emit: Observer) -> None:
        """Start without an open database: the first operation opens it.

        Args:
            path: The directory of the databases.
            tables: Name -> its bound in bytes. None: no bound.
            emit: Receives warnings.
        """
        self._path = path
        self._bounds = tables
        self._emit = emit
        self._thread = ThreadPoolExecutor(1, "index")
        self._logged_at = 0.0
        self._failures = 0
        self._tables: dict[str, Any] = {}
        self._open_failed_at = 0.0
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._degraded: Exception | None = None
        """Why a copy is used, until that is logged."""

    async def close(self) -> None:
        """Close the databases and end the thread."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._close)
        await loop.run_in_executor(None, self._thread.shutdown)

    async def run(self, work: Callable[[], T], otherwise: T) -> T:
        """Run ``work`` in the thread, where it may call the blocking methods below.

        Returns its result. If it fails, that is logged, and ``otherwise`` is returned.
        """
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(self._thread, self._guard, work)
        except _FAILURES as error:
            self._warn(error, "the index did not answer")
            return otherwise
        if self._degraded is not None:
            message = (
                "the index cannot be written: a temporary copy is used until this process ends"
            )
            self._warn(self._degraded, message)
            self._degraded = None
        return result

    async def get(self, table: str, key: str) -> str | None:
        """Return the text of a row. None if it is missing, or if the database fails."""
        return await self.run(lambda: self.read(table, key)[0], None)

    async def put(
        self, table: str, rows: Sequence[tuple[str, str]], ttl: float | None = None
    ) -> bool:
        """Write rows, all or none. True if they were written.

        Args:
            table: The table.
            rows: (key, text) of each.
            ttl: Seconds until they expire. None: they do not.
        """

        def write() -> bool:
            with self.transaction(table):
                for key, text in rows:
                    self.write(table, key, text, ttl=ttl)
            return True

        return not rows or await self.run(write, False)

    async def drop(self, table: str, key: str) -> None:
        """Delete a row."""
        await self.run(lambda: self.delete(table, key), None)

    async def page(self, table: str, after: int) -> list[Row] | None:
        """Run :meth:`read_page` in the thread. None if the database fails."""
        unanswered: list[Row] | None = None
        return await self.run(lambda: self.read_page(table, after), unanswered)

    # --- blocking methods, for ``work`` in the thread ---------------------------------------------

    def transaction(self, table: str) -> Any:
        """Return a context in which no other process writes: reads and writes in it are atomic."""
        return self._tables[table].transact()

    def read(self, table: str, key: str) -> tuple[str | None, str | None]:
        """Return (text, mark) of a row. Raises ``TypeError`` if the row is not text."""
        text, mark = self._tables[table].get(key, tag=True)
        return text, mark if isinstance(mark, str) else None

    def write(
        self, table: str, key: str, text: str, mark: str | None = None, ttl: float | None = None
    ) -> None:
        """Write a row, with its mark. The mark of an earlier row under this key is removed.

        Args:
            table: The table.
            key: The key of the row.
            text: Its text.
            mark: A second text beside it, or None.
            ttl: Seconds until the row expires. None: it does not.
        """
        self._tables[table].set(key, text, expire=ttl, tag=mark)

    def delete(self, table: str, key: str) -> None:
        """Delete a row."""
        self._tables[table].delete(key)

    def read_page(self, table: str, after: int) -> list[Row]:
        """Return the next rows after row id ``after``, at most :data:`PAGE_ROWS`.

        Rows that are not text are passed over.
        """
        select = (
            "SELECT rowid, key, value, tag FROM Cache WHERE rowid > ? AND raw = 1 AND mode = ?"
            " AND typeof(key) = 'text' AND typeof(value) = 'text' ORDER BY rowid LIMIT ?"
        )
        rows = self._tables[table]._sql(select, (after, _RAW, PAGE_ROWS)).fetchall()
        return [
            Row(number, key, text, mark if isinstance(mark, str) else None)
            for number, key, text, mark in rows
        ]

    def _guard(self, work: Callable[[], T]) -> T:
        if not self._tables:
            self._open()
        try:
            return work()
        except sqlite3.OperationalError:
            raise  # Busy, or the disk refuses: the database is not damaged.
        except sqlite3.DatabaseError:
            # The database is damaged: create it anew, once for each call.
            self._close()
            self._open()
            return work()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        elapsed = time.monotonic() - self._open_failed_at
        if self._open_failed_at and elapsed < _REOPEN_INTERVAL_S:
            raise OSError(errno.EAGAIN, "the database could not be opened a moment ago")
        self._open_failed_at = time.monotonic()
        try:
            self._open_tables(self._path)
        except _FAILURES as error:
            self._close()
            if self._is_refused(error):
                self._open_copy()
                self._degraded = error.with_traceback(None)
            elif self._is_damaged(error):
                aside = self._path.with_name(f"{self._path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                aside.unlink(missing_ok=True)
                self._path.rename(aside)
                self._open_tables(self._path)
            else:
                raise
        self._open_failed_at = 0.0

    def _open_copy(self) -> None:
        """Use a copy, because the disk refuses writes. New rows are lost when the process ends."""
        self._copy = tempfile.TemporaryDirectory(prefix="oci-mirror-index-")
        try:
            if self._path.is_dir():
                shutil.copytree(self._path, self._copy.name, dirs_exist_ok=True)
            self._open_tables(Path(self._copy.name))
        except BaseException:
            self._close()
            raise

    def _open_tables(self, path: Path) -> None:
        for name in self._bounds:
            self._tables[name] = self._open_table(path, name)

    def _open_table(self, path: Path, name: str) -> Any:
        bound = self._bounds[name]
        table = _Table(
            str(path / name),
            timeout=_BUSY_TIMEOUT_S,
            eviction_policy="none" if bound is None else "least-recently-stored",
            cull_limit=0 if bound is None else 10,
            size_limit=2**62 if bound is None else bound,
            statistics=0,
            tag_index=0,
            sqlite_synchronous=1,
        )
        if table._sql("PRAGMA quick_check(1)").fetchone() != ("ok",):
            table.close()
            raise sqlite3.DatabaseError("quick_check")
        return table

    def _is_refused(self, error: Exception) -> bool:
        """Return whether the disk refuses writes, but can be read."""
        if isinstance(error, sqlite3.Error):
            match _code(error):
                case sqlite3.SQLITE_CANTOPEN:
                    return not self._is_writable()
                case sqlite3.SQLITE_IOERR:
                    return error.sqlite_errorcode not in _UNREADABLE
                case code:
                    return code in _REFUSED
        return isinstance(error, OSError) and error.errno in _REFUSED_BY_DISK

    def _is_writable(self) -> bool:
        path = self._path if self._path.exists() else self._path.parent
        return os.access(path, os.W_OK)

    def _is_damaged(self, error: Exception) -> bool:
        """Return whether the database is damaged: False if it is busy, or descriptors are few."""
        if isinstance(error, sqlite3.Error):
            if _code(error) == sqlite3.SQLITE_CANTOPEN:
                return not self._is_out_of_descriptors()
            return _code(error) not in _TEMPORARY
        if isinstance(error, OSError):
            return error.errno not in _TEMPORARY_OF_DISK
        return not isinstance(error, diskcache.Timeout)

    def _is_out_of_descriptors(self) -> bool:
        try:
            os.close(os.open(self._path.parent, os.O_RDONLY))
        except OSError as error:
            return error.errno in _TEMPORARY_OF_DISK
        return False

    def _close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables = {}
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def _warn(self, error: Exception, message: str) -> None:
        self._failures += 1
        if not self._logged_at or time.monotonic() - self._logged_at > _LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            fields = (("why", f"{type(error).__name__}: {error}"), ("times", self._failures))
            self._emit(LogMessage("warning", message, fields))


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code. Zero for an error that we raised ourselves."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
