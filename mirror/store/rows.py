"""Tables of text rows in diskcache, behind a thread that reads and a thread that writes.

Lives here: the only import of diskcache, the two threads, what a failed operation returns. Must not
know: the meaning of a row, or how a directory of databases is opened, replaced or copied
(:mod:`mirror.store.index_directory`).

The asynchronous methods never raise for a failing database: a failed read is a miss, a failed write
is dropped, and both are logged. After damage, the directory is opened again, and the operation runs
once more.

Theory of operation: each thread has its own connection to each database. With SQLite's write-ahead
log, reads see the last committed state while any process writes. Writes wait for each other.

diskcache unpickles rows (CVE-2025-69872), so its ``Disk`` is replaced by one of text only. Its own
eviction drops rows without a notice, and is off except for bounded tables.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeVar

import diskcache

from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import error_text
from mirror.store import statements
from mirror.store.index_directory import (
    FAILURES,
    FilesReplaced,
    IndexDirectory,
    is_busy,
    is_damage,
    is_refusal,
)
from mirror.threads import on_running_loop

T = TypeVar("T")

PAGE_ROWS: Final = 50
"""Rows in one page: to read and parse them takes 2 ms, for which other reads wait."""
_STEP_ROWS: Final = 200
"""Rows that are written in one transaction: it takes 2 ms, for which other processes wait."""
_BUSY_TIMEOUT_S: Final = 10.0
"""Seconds that a write waits for writes of other processes. Those take milliseconds, but a process
can be stopped in the middle of one. A client may wait for the write, so it is dropped then."""
_ATTEMPT_TIMEOUT_S: Final = 0.5
"""Seconds of one attempt to begin a transaction. Between attempts, the thread sees a stop."""
_MAX_QUEUED_WRITES: Final = 10_000
"""Writes that wait in memory, of 4 KiB each, while another process writes: 40 MiB."""
_LOG_INTERVAL_S: Final = 60.0
"""Seconds between two log messages of failures: one outage fails every operation."""
_CACHE_PAGES: Final = 2000
"""Pages of 4 KiB that one connection keeps in memory. A process has about six connections."""
_CHECK_STEP: Final = 100_000
"""Instructions of SQLite's virtual machine between two checks for a stop, while all is checked."""
_RAW: Final = 1
"""diskcache's ``MODE_RAW``: a value that is kept in its row as it is. Also in our SQL."""


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

    @property
    def _sql_retry(self) -> Any:
        """Wait for other processes while the table is opened. diskcache itself waits for 60 s."""
        if self._timeout == 0:  # As long as it is being opened.
            self._sql(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000:.0f}")
        return self._sql


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    id: int
    """SQLite's rowid: rows are read in its order."""
    key: str
    text: str
    mark: str | None = None
    """A second text beside it. Writing the row without a mark removes it."""


class Tables:
    """The open tables of one directory, for several threads. One of them writes. Methods block."""

    def __init__(self, path: Path, bounds: Mapping[str, int | None]) -> None:
        """Open all tables, or none.

        Args:
            path: The directory. No other process may open or replace it at the same time.
            bounds: Name of each table -> its bound in bytes. None: no bound.

        Raises:
            Exception: Any kind. A damaged database makes diskcache fail in many ways.
        """
        self.changes: set[tuple[str, str]] | None = None
        """(table, key) of the rows that were written or deleted here. None: they are not noted."""
        self._files = [
            f"{path}/{name}/{file}" for name in bounds for file in ("cache.db", "cache.db-wal")
        ]
        self._tables: dict[str, Any] = {}
        try:
            for name, bound in bounds.items():
                self._tables[name] = _open_table(path / name, bound)
            self._inodes = [os.stat(file).st_ino for file in self._files]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections of this thread."""
        for table in self._tables.values():
            table.close()

    def run(self, work: Callable[[Tables], T]) -> T:
        """Return ``work(self)``. Raises :class:`FilesReplaced` if the files are not there."""
        try:
            inodes = [os.stat(file).st_ino for file in self._files]
        except OSError as error:
            raise FilesReplaced from error
        if inodes != self._inodes:
            raise FilesReplaced
        return work(self)

    def is_current(self) -> bool:
        """Return whether the directory still has the files that were opened."""
        with suppress(FilesReplaced):
            return self.run(lambda tables: True)
        return False

    @contextmanager
    def transaction(self, table: str, *, may_wait: bool = True) -> Iterator[None]:
        """Hold a transaction, in which no other process writes.

        diskcache's own hides SQLite's error code, and stays open when its commit fails.
        ``may_wait``: for another process, and for :data:`_ATTEMPT_TIMEOUT_S`.
        """
        cache = self._tables[table]
        connection = cache._con
        connection.execute(f"PRAGMA busy_timeout = {1000 * _ATTEMPT_TIMEOUT_S * may_wait:.0f}")
        connection.execute("BEGIN IMMEDIATE")
        cache._txn_id = threading.get_ident()  # Its ``set`` and ``delete`` join the transaction.
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            raise
        finally:
            cache._txn_id = None

    def read(self, table: str, key: str) -> tuple[str | None, str | None]:
        """Return (text, mark) of a row. Raises ``TypeError`` if the row is not text."""
        text, mark = self._tables[table].get(key, tag=True)
        return text, mark if isinstance(mark, str) else None

    def read_or_none(self, table: str, key: str) -> tuple[str | None, str | None]:
        """Return (text, mark) of a row that will be replaced. None also if it is not text."""
        try:
            return self.read(table, key)
        except TypeError:
            return None, None

    def write(
        self, table: str, key: str, text: str, mark: str | None = None, ttl: float | None = None
    ) -> None:
        """Write a row, with its mark. The mark of an earlier row under this key is removed.

        Args:
            table: The table. Hold its :meth:`transaction`.
            key: The key of the row.
            text: Its text.
            mark: A second text beside it, or None.
            ttl: Seconds until the row expires. None: it does not.
        """
        self._tables[table].set(key, text, expire=ttl, tag=mark)
        if self.changes is not None:
            self.changes.add((table, key))

    def delete(self, table: str, key: str) -> None:
        """Delete a row. Hold the table's :meth:`transaction`."""
        self._tables[table].delete(key)
        if self.changes is not None:
            self.changes.add((table, key))

    def write_all(
        self, table: str, rows: Iterable[tuple[str, str]], *, is_replacing: bool = True
    ) -> bool:
        """Write (key, text) rows without ``ttl`` or mark, in a table without a bound. Returns True.

        Hold the table's :meth:`transaction`. Each row takes 5 us. ``is_replacing``: False leaves a
        row that exists unchanged.
        """
        now = time.time()
        values = [(key, now, now, len(text), text) for key, text in rows]
        insert = statements.INSERT_OR_REPLACE if is_replacing else statements.INSERT_MISSING
        self._tables[table]._con.executemany(insert, values)
        if self.changes is not None:
            self.changes.update((table, key) for key, *_ in values)
        return True

    def read_page(self, table: str, after: int) -> list[Row]:
        """Return the next rows after row id ``after``, at most :data:`PAGE_ROWS`.

        Rows that are not text are passed over.
        """
        return self._select(table, statements.SELECT_BY_ID, (after, PAGE_ROWS))

    def read_range(self, table: str, after: str, end: str) -> list[Row]:
        """Return the rows whose keys are between two keys, in order, at most :data:`PAGE_ROWS`."""
        return self._select(table, statements.SELECT_BY_KEY, (after, end, PAGE_ROWS))

    def _select(self, table: str, select: str, values: tuple[object, ...]) -> list[Row]:
        return [
            Row(number, key, text, mark if isinstance(mark, str) else None)
            for number, key, text, mark in self._tables[table]._sql(select, values)
        ]

    def count(self, table: str) -> int:
        """Return the number of rows. It takes 5 ms with 100,000 rows."""
        return int(self._tables[table]._sql("SELECT COUNT(*) FROM Cache").fetchone()[0])

    def check(self, is_stopping: Callable[[], bool]) -> None:
        """Read all pages of all databases. Raises ``sqlite3.DatabaseError`` for a damaged one.

        It takes seconds, and ends early once ``is_stopping`` returns True.
        """
        for table in self._tables.values():
            table._con.set_progress_handler(is_stopping, _CHECK_STEP)
            try:
                if table._sql("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise sqlite3.DatabaseError("quick_check")
            except sqlite3.OperationalError:
                if not is_stopping():
                    raise

    def note_changes(self) -> None:
        """Note all :attr:`changes` from now on, for a later :meth:`merge`."""
        self.changes = set()

    def merge(self, other: Tables) -> None:
        """Take over the :attr:`changes` of ``other``. The version that is newer is kept."""
        for table, keys in groupby(sorted(other.changes or ()), itemgetter(0)):
            while step := list(islice(keys, _STEP_ROWS)):
                with self.transaction(table):
                    for _, key in step:
                        self._take_over(table, key, other)

    def _take_over(self, table: str, key: str, other: Tables) -> None:
        select = statements.SELECT_VERSION
        ours, theirs = (t._tables[table]._sql(select, (key,)).fetchone() for t in (self, other))
        if theirs is None:
            self.delete(table, key)
        elif ours is None or ours[0] <= theirs[0]:
            _, text, mark, end = theirs
            self.write(table, key, text, mark, None if end is None else end - time.time())


def _open_table(path: Path, bound: int | None) -> Any:
    return _Table(
        str(path),
        timeout=_ATTEMPT_TIMEOUT_S,
        eviction_policy="none" if bound is None else "least-recently-stored",
        cull_limit=0 if bound is None else 10,
        size_limit=2**62 if bound is None else bound,
        statistics=0,
        tag_index=0,
        sqlite_synchronous=1,
        sqlite_cache_size=_CACHE_PAGES,
        # A file that is cut while it is mapped ends the process with SIGBUS.
        sqlite_mmap_size=0,
    )


class Rows:
    """Tables of text by key, for the event loop."""

    def __init__(
        self,
        path: Path,
        bounds: Mapping[str, int | None],
        emit: Observer,
        prepare: Callable[[Tables], None] = lambda tables: None,
    ) -> None:
        """Start without an open database: the first operation opens it.

        Args:
            path: The directory of the databases.
            bounds: Name of each table -> its bound in bytes. None: no bound.
            emit: Receives warnings, on the event loop.
            prepare: Fills tables that were just opened, before any operation uses them.
        """
        self._emit = emit
        self._reading = ThreadPoolExecutor(1, "index-read")
        self._writing = ThreadPoolExecutor(1, "index-write")
        self._checking = ThreadPoolExecutor(1, "index-check")
        open_at = partial(Tables, bounds=bounds)
        self._directory = IndexDirectory(path, open_at, prepare, on_running_loop(emit))
        self._tables: Tables | None = None
        self._is_closing = False
        self._refusal: str | None = None
        self._logged_at = 0.0
        self._failures = 0

    @property
    def refusal(self) -> str | None:
        """The reason why rows cannot be written to the disk. None: they can be."""
        return self._directory.refusal or self._refusal

    async def close(self) -> None:
        """Close the databases and end the threads."""
        await self.return_to_disk()
        self._is_closing = True
        loop = asyncio.get_running_loop()
        for executor in (self._checking, self._reading, self._writing):
            if self._tables is not None:
                await loop.run_in_executor(executor, self._tables.close)
        await loop.run_in_executor(self._writing, self._directory.close)
        for executor in (self._checking, self._reading, self._writing):
            executor.shutdown()  # Idle: it was just used.

    async def read(self, work: Callable[[Tables], T], otherwise: T) -> T:
        """Run ``work`` in the reading thread. If it fails: log that, and return ``otherwise``."""
        return await self._run(self._reading, work, otherwise)

    async def write(self, table: str, work: Callable[[Tables], T], otherwise: T) -> T:
        """Run ``work`` in a transaction of ``table``, in the writing thread.

        Waits while another process writes. If that takes too long, if too many writes wait, or if
        the disk refuses: logs that, writes nothing, and returns ``otherwise``.
        """
        if self._writing._work_queue.qsize() >= _MAX_QUEUED_WRITES:
            self._failed(sqlite3.OperationalError("too many writes wait for another process"))
            return otherwise
        deadline = time.monotonic() + _BUSY_TIMEOUT_S

        def write(tables: Tables) -> T:
            while True:
                # A late write does not wait: those that are queued behind it are late as well.
                may_wait = time.monotonic() < deadline and not self._is_closing
                try:
                    with tables.transaction(table, may_wait=may_wait):
                        result = work(tables)
                    self._refusal = None
                    return result
                except sqlite3.Error as error:
                    if not may_wait or not is_busy(error):
                        raise

        return await self._run(self._writing, write, otherwise)

    async def put(self, table: str, rows: Sequence[tuple[str, str]]) -> bool:
        """Write (key, text) rows, in steps of one transaction each. True if all were written."""
        for start in range(0, len(rows), _STEP_ROWS):
            write = partial(Tables.write_all, table=table, rows=rows[start : start + _STEP_ROWS])
            if not await self.write(table, write, False):
                return False
        return True

    async def check(self) -> None:
        """Look for damage in all databases, in a thread of its own, and replace damaged ones."""

        def check(tables: Tables) -> None:
            with closing(tables):
                tables.check(lambda: self._is_closing)

        await self._run(self._checking, check, None)

    def after_writes(self, work: Callable[[], None]) -> None:
        """Call ``work`` on the event loop after all writes that were begun. It may be never called.

        A write that is cancelled may still be running in the thread.
        """
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError):  # The threads have ended.
            self._writing.submit(loop.call_soon_threadsafe, work)

    async def return_to_disk(self) -> None:
        """Merge a private copy into the directory, if the disk accepts writes again."""
        await asyncio.get_running_loop().run_in_executor(self._writing, self._return_to_disk)

    def _return_to_disk(self) -> None:
        private = self._tables
        if private is None or self._directory.refusal is None:
            return
        tables = self._directory.leave_copy(lambda tables: tables.merge(private))
        if tables is not None:
            self._tables = tables
            self._discard(private)

    async def _run(self, executor: Executor, work: Callable[[Tables], T], otherwise: T) -> T:
        run = asyncio.get_running_loop().run_in_executor
        try:
            if executor is self._writing:
                return await run(executor, self._write_in_turn, work)
            tables = self._tables
            if tables is None:
                tables = await run(self._writing, self._reopen, None, None)
            try:
                return await run(executor, tables.run, work)
            except (FilesReplaced, sqlite3.Error) as error:
                if not is_damage(error):
                    raise
                tables = await run(self._writing, self._reopen, tables, error)
                return await run(executor, tables.run, work)
        except FAILURES as error:
            self._failed(error)
            return otherwise

    def _write_in_turn(self, work: Callable[[Tables], T]) -> T:
        """Run ``work``. Opens the directory here if needed, so that no later write comes first."""
        tables = self._tables or self._reopen(None, None)
        try:
            return tables.run(work)
        except (FilesReplaced, sqlite3.Error) as error:
            if not is_damage(error):
                raise
            return self._reopen(tables, error).run(work)

    def _reopen(self, failed: Tables | None, damage: Exception | None) -> Tables:
        """Open the directory, or return the tables that another operation has just opened."""
        if self._tables is None or self._tables is failed:
            self._tables = None
            release = partial(self._discard, failed)
            is_at_fault = failed.is_current if failed is not None else lambda: False
            try:
                self._tables = self._directory.open(damage, is_at_fault, release)
            finally:
                release()
        return self._tables

    def _discard(self, tables: Tables | None) -> None:
        """Close tables that no new operation uses, in both threads."""
        if tables is not None:
            tables.close()
            self._reading.submit(tables.close).result()

    def _failed(self, error: Exception) -> None:
        if is_refusal(error):
            self._refusal = f"the index cannot be written: {error}"
        self._failures += 1
        if not self._logged_at or time.monotonic() - self._logged_at > _LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            fields = (("why", error_text(error)), ("times", self._failures))
            self._emit(LogMessage("warning", "an operation of the index failed", fields))
