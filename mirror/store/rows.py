"""Rows of text in diskcache, behind one thread: what the index is made of.

Lives here: the only import of diskcache, which blocks; what becomes of a database that is damaged,
busy or cannot be written. Must not know: what a row means.

Nothing here ever fails: what cannot be read is a miss, what cannot be written is dropped and noted.

diskcache unpickles rows (CVE-2025-69872), so its ``Disk`` is replaced by one that knows text only,
when it writes and when it reads. Its own eviction, which drops rows in silence, is off but for a
table with a bound.
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

STEP: Final = 200
"""Rows that are read in one go: other questions wait for them."""
_BUSY: Final = 2.0
"""Seconds to wait for another process's write."""
_NOTE_EVERY: Final = 60.0
_OPEN_EVERY: Final = 5.0
"""Seconds between two attempts to open what could not be opened."""
_RAW: Final = 1
_FAILURES: Final = (sqlite3.Error, diskcache.Timeout, OSError, TypeError, ValueError, EOFError)
_REFUSED: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_UNREADABLE: Final = frozenset(
    {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
)
_PASSING: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM})
_REFUSED_BY_DISK: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
)
_PASSING_OF_DISK: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class TextDisk(diskcache.Disk):  # type: ignore[misc] # diskcache has no types
    """Rows are text. Whatever else is in the database is refused, never interpreted."""

    def put(self, key: object) -> tuple[str, bool]:
        """A key for the database."""
        if not isinstance(key, str):
            raise TypeError("keys of the index are text")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """A key from the database."""
        if not raw or not isinstance(key, str):
            raise TypeError("a key of the index is not text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        """A value for the database."""
        if read or not isinstance(value, str):
            raise TypeError("values of the index are text")
        return len(value), _RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str:
        """A value from the database."""
        if mode != _RAW or read or filename is not None or not isinstance(value, str):
            raise TypeError("a value of the index is not text")
        return value

    def remove(self, file_path: str) -> None:
        """No row of ours has a file: one that names a file does not get it removed."""


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
    """One row as it is in the database."""

    id: int
    key: str
    text: str
    mark: str | None = None
    """What was noted beside it."""


class Rows:
    """Tables of text by key. ``tables``: their names, and the bytes of those that have a bound."""

    def __init__(self, path: Path, tables: Mapping[str, int | None], emit: Observer) -> None:
        self._path = path
        self._bounds = tables
        self._emit = emit
        self._thread = ThreadPoolExecutor(1, "index")
        self._noted = 0.0
        self._dropped = 0
        self._tables: dict[str, Any] = {}
        self._refused = 0.0
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._degraded: Exception | None = None
        """Why a copy is used, until that was noted."""

    async def close(self) -> None:
        """End the thread, and its databases with it."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._close)
        await loop.run_in_executor(None, self._thread.shutdown)

    async def run(self, work: Callable[[], T], otherwise: T) -> T:
        """``work`` in the thread, where it may use what follows; ``otherwise`` if that fails."""
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(self._thread, self._guard, work)
        except _FAILURES as error:
            self._note(error, "the index did not answer")
            return otherwise
        if self._degraded is not None:
            self._note(self._degraded, "the index cannot be written: a copy is used until the end")
            self._degraded = None
        return result

    async def get(self, table: str, key: str) -> str | None:
        """The text of a row."""
        return await self.run(lambda: self.read(table, key)[0], None)

    async def put(
        self, table: str, rows: Sequence[tuple[str, str]], ttl: float | None = None
    ) -> bool:
        """Write rows, all or none; whether they were written."""

        def write() -> bool:
            with self.transaction(table):
                for key, text in rows:
                    self.write(table, key, text, ttl=ttl)
            return True

        return not rows or await self.run(write, False)

    async def drop(self, table: str, key: str) -> None:
        """Forget a row."""
        await self.run(lambda: self.delete(table, key), None)

    async def page(self, table: str, after: int) -> list[Row] | None:
        """The next rows behind row ``after``, at most ``STEP``; None if there is no answer."""
        nothing: list[Row] | None = None
        return await self.run(lambda: self.read_page(table, after), nothing)

    # --- in the thread ----------------------------------------------------------------------------

    def transaction(self, table: str) -> Any:
        """A context: what is read and written in it is not mixed with others' writes."""
        return self._tables[table].transact()

    def read(self, table: str, key: str) -> tuple[str | None, str | None]:
        """(text, mark) of a row."""
        text, mark = self._tables[table].get(key, tag=True)
        return text, mark if isinstance(mark, str) else None

    def write(
        self, table: str, key: str, text: str, mark: str | None = None, ttl: float | None = None
    ) -> None:
        """Write a row. What was noted beside an earlier one is gone."""
        self._tables[table].set(key, text, expire=ttl, tag=mark)

    def delete(self, table: str, key: str) -> None:
        """Forget a row."""
        self._tables[table].delete(key)

    def read_page(self, table: str, after: int) -> list[Row]:
        """The next rows of text; whatever else is in the database is passed over."""
        select = (
            "SELECT rowid, key, value, tag FROM Cache WHERE rowid > ? AND raw = 1 AND mode = ?"
            " AND typeof(key) = 'text' AND typeof(value) = 'text' ORDER BY rowid LIMIT ?"
        )
        found = self._tables[table]._sql(select, (after, _RAW, STEP)).fetchall()
        return [
            Row(number, key, text, mark if isinstance(mark, str) else None)
            for number, key, text, mark in found
        ]

    def _guard(self, work: Callable[[], T]) -> T:
        if not self._tables:
            self._open()
        try:
            return work()
        except sqlite3.OperationalError:
            raise  # busy, or the disk refuses: nothing is wrong with the database
        except sqlite3.DatabaseError:
            # One that is none any more is begun anew, once for each call.
            self._close()
            self._open()
            return work()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._refused and time.monotonic() - self._refused < _OPEN_EVERY:
            raise OSError(errno.EAGAIN, "could not be opened a moment ago")
        self._refused = time.monotonic()
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
        self._refused = 0.0

    def _open_copy(self) -> None:
        """What is known stays known on a disk that takes nothing; what is new ends with us."""
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
            timeout=_BUSY,
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
        """Whether the disk takes nothing, but may be read."""
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
        """Whether it is the database's fault, and not that of a moment (busy, few descriptors)."""
        if isinstance(error, sqlite3.Error):
            if _code(error) == sqlite3.SQLITE_CANTOPEN:
                return not self._lacks_descriptors()
            return _code(error) not in _PASSING
        if isinstance(error, OSError):
            return error.errno not in _PASSING_OF_DISK
        return not isinstance(error, diskcache.Timeout)

    def _lacks_descriptors(self) -> bool:
        try:
            os.close(os.open(self._path.parent, os.O_RDONLY))
        except OSError as error:
            return error.errno in _PASSING_OF_DISK
        return False

    def _close(self) -> None:
        for table in self._tables.values():
            table.close()
        self._tables = {}
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def _note(self, error: Exception, message: str) -> None:
        self._dropped += 1
        if not self._noted or time.monotonic() - self._noted > _NOTE_EVERY:
            self._noted = time.monotonic()
            fields = (("why", f"{type(error).__name__}: {error}"), ("times", self._dropped))
            self._emit(LogMessage("warning", message, fields))


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the error is our own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
