"""The database of the hosted repositories: opening it, its threads.

Lives here: transactions, one commit for all writes that wait, damage. Must not know: its tables
(``name_tables.py``), what the rows mean (``name_rows.py``).

Theory of operation: SQLite with a write-ahead log. One thread of each process writes. It takes all
waiting writes, and commits them together: each is a savepoint, so one that fails undoes nothing of
the others. None is committed into a file that was removed or replaced meanwhile. A durable write
returns after the log is on the disk (``synchronous=FULL``). Several processes may use one database:
a write waits for the lock of another one. Readers never wait. On a full disk, a write that only
removes gets the space that is kept for it (``spare_space.py``).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final, Generic, TypeAlias, TypeVar

from mirror.hosted.name_tables import create_schema, has_schema, upgrade_schema
from mirror.hosted.spare_space import SpareSpace, empty_log, is_without_space
from mirror.oci.errors import MirrorError, NamesDamaged, StorageUnavailable
from mirror.store.content_hold import ContentHold
from mirror.store.hosted_marker import DAMAGED_NAMES_REMEDY, lost_names
from mirror.store.layout import Layout
from mirror.store.private_directory import make_private_directory
from mirror.store.sqlite_connection import connect
from mirror.threads import run_in_thread

T = TypeVar("T")
_FileIdentity: TypeAlias = tuple[int, int] | None

_WRITER_TIMEOUT_S: Final = 5.0
"""Seconds to wait for a write of another process. One commit takes milliseconds.

A write may wait twice: for the commit before it, and for its own."""
_MARK_TIMEOUT_S: Final = 1.0
"""Seconds that a client waits for the record of its use. One commit takes milliseconds."""
_MAX_BATCH: Final = 256
"""Writes of one commit. Each waits for all of them: about 20 ms, and longer if uploads have to end
for them."""
_READERS: Final = 2
"""Threads that read: a read takes less than a millisecond of the processor."""


@dataclass(slots=True, eq=False)
class _Write(Generic[T]):
    """A write that waits for its commit."""

    change: Callable[[Connection], T]
    is_durable: bool
    future: asyncio.Future[T]
    result: T | None = None
    error: Exception | None = None
    may_use_spare_space: bool = False
    on_committed: Callable[[T], None] | None = None


class Database:
    """An open database. All methods run on the event loop. Create it with :meth:`open`."""

    def __init__(self, path: Path, connection: Connection, file: _FileIdentity) -> None:
        """Use an open connection. Call :meth:`open` instead.

        Args:
            path: The file.
            connection: Writes to it.
            file: The device and inode of the file that is open.
        """
        self._path = path
        self._file = file
        self._is_file_lost = False
        """Whether the file was found removed or replaced. It stays so until a restart."""
        self.on_file_lost: Callable[[str], None] | None = None
        """Called once with the reason, on the event loop, if the open file is found lost."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._spare_space = SpareSpace(path)
        self._is_durable = True
        """Whether the writing connection waits for the disk at each commit."""
        self._writing = ThreadPoolExecutor(1, "names")
        self._reading = ThreadPoolExecutor(_READERS, "names-read")
        self._reading_slowly = ThreadPoolExecutor(1, "names-slow")
        self._waiting: deque[_Write[Any]] = deque()
        self._after_commit: list[Callable[[bool], object]] = []
        self._local = threading.local()
        self._readers: list[Connection] = []

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open a database, or create it. Raises ``NamesDamaged`` if it cannot be used."""
        return cls(path, *await run_in_thread(_open_identified, path))

    async def read(self, query: Callable[[Connection], T], *, is_slow: bool = False) -> T:
        """Return ``query(connection)``, called in a thread, in a state that was committed.

        ``is_slow``: it may take seconds. One such read runs at a time, and no other waits for it.

        Raises ``NamesDamaged``, ``StorageUnavailable``, or the exception of ``query``.
        """
        pool = self._reading_slowly if is_slow else self._reading
        return await self._loop.run_in_executor(pool, self._read, query)

    async def write(
        self,
        change: Callable[[Connection], T],
        *,
        is_durable: bool = True,
        may_use_spare_space: bool = False,
        on_committed: Callable[[T], None] | None = None,
        hold: ContentHold | None = None,
    ) -> T:
        """Return ``change(connection)``, called in a thread in a transaction, once it is committed.

        Cancelling the caller does not undo the write.

        Args:
            change: Runs in a savepoint of its own. Its exception undoes it, and no other write. On
                a full disk, it may be undone, and called again.
            is_durable: Return after the commit is on the disk. False: a crash of the machine may
                undo it.
            may_use_spare_space: Also on a full disk. For writes that free space, or lead to one.
            on_committed: Called with the result after the commit, also if the caller was cancelled.
            hold: Kept until the commit, or its failure, also if the caller was cancelled.

        Raises:
            NamesDamaged: The database is damaged.
            StorageUnavailable: The disk is full or read-only, or another process does not end its
                transaction. Nothing was changed.
            Exception: The exception of ``change``.
        """
        future = self._loop.create_future()
        if hold is not None:
            hold.keep_until(future)
        write = _Write(
            change,
            is_durable,
            future,
            may_use_spare_space=may_use_spare_space,
            on_committed=on_committed,
        )
        self._waiting.append(write)
        self._writing.submit(self._commit_waiting)
        await asyncio.wait({write.future})
        result: T = write.future.result()
        return result

    def enqueue_write(
        self, change: Callable[[Connection], T], *, may_use_spare_space: bool = False
    ) -> asyncio.Future[T]:
        """Make a change soon, without waiting. Not durable. The future need not be waited for."""
        future = self._loop.create_future()
        write = _Write(
            change, is_durable=False, future=future, may_use_spare_space=may_use_spare_space
        )
        self._waiting.append(write)
        self._writing.submit(self._commit_waiting)
        return write.future

    def after_commit(self, call: Callable[[bool], object]) -> None:
        """Within a change: have ``call`` called in its thread once it is committed, or undone.

        ``call`` gets whether it is committed, and must not raise.
        """
        self._after_commit.append(call)

    async def write_mark(self, change: Callable[[Connection], object]) -> bool:
        """Record a use. Waits for its commit, but only for a moment (:data:`_MARK_TIMEOUT_S`).

        Returns whether it is committed. False: another process holds the lock, and the change is
        the next write of ours. Raises what :meth:`write` raises.
        """
        future = self.enqueue_write(change)
        await asyncio.wait({future}, timeout=_MARK_TIMEOUT_S)
        if future.done():
            future.result()
        return future.done()

    async def fill_spare_space(self) -> None:
        """Keep space for removals, if the disk has some. The server calls this now and then."""
        await run_in_thread(self._spare_space.fill)

    async def close(self) -> None:
        """Finish the writes that wait, and close all connections."""
        for pool in (self._writing, self._reading, self._reading_slowly):
            await run_in_thread(pool.shutdown)
        for connection in (*self._readers, self._connection):
            connection.close()

    # --- in the threads -------------------------------------------------------------------------

    def _read(self, query: Callable[[Connection], T]) -> T:
        connection: Connection | None = getattr(self._local, "connection", None)
        try:
            if connection is None:
                connection = self._local.connection = connect(self._path, "ro")
                self._readers.append(connection)
            return query(connection)
        except sqlite3.Error as error:
            raise translate(error, self._path) from error

    def _commit_waiting(self) -> None:
        """Commit the writes that wait, all together. Often an earlier call has done that."""
        batch: list[_Write[Any]] = []
        while self._waiting and len(batch) < _MAX_BATCH:
            batch.append(self._waiting.popleft())
        if not batch:
            return
        try:
            self._commit(batch)
        except (sqlite3.Error, StorageUnavailable) as error:
            failure = translate(error, self._path)
            is_disk_full = is_without_space(error)
            for write in batch:
                write.error = (
                    self._retry(write) if write.may_use_spare_space and is_disk_full else failure
                )
        with suppress(RuntimeError):  # The event loop has ended, so nobody waits.
            self._loop.call_soon_threadsafe(_set_results, batch)

    def _retry(self, write: _Write[Any]) -> Exception | None:
        """Commit a write alone, with spare space if the disk is full. Returns its exception."""
        empty = partial(empty_log, self._connection)
        try:
            self._spare_space.run(partial(self._commit, [write]), empty)
        except (sqlite3.Error, StorageUnavailable) as error:
            return translate(error, self._path)
        return write.error

    def _commit(self, batch: list[_Write[Any]]) -> None:
        """Commit writes. Raises ``sqlite3.Error``, ``StorageUnavailable``: nothing is changed."""
        try:
            self._try_commit(batch)
        except (sqlite3.Error, StorageUnavailable):
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            self._end_changes(0, False)
            raise
        self._end_changes(0, True)

    def _end_changes(self, start: int, is_committed: bool) -> None:
        calls, self._after_commit[start:] = self._after_commit[start:], []
        for call in calls:
            call(is_committed)

    def _try_commit(self, batch: list[_Write[Any]]) -> None:
        connection = self._connection
        self._check_file()
        is_durable = any(write.is_durable for write in batch)
        if is_durable is not self._is_durable:
            connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
            self._is_durable = is_durable
        connection.execute("BEGIN IMMEDIATE")
        for write in batch:
            write.error, before = None, len(self._after_commit)
            connection.execute("SAVEPOINT one")
            try:
                write.result = write.change(connection)
            except sqlite3.Error:
                raise
            except Exception as error:
                write.error = error
                connection.execute("ROLLBACK TO one")
                self._end_changes(before, False)
            connection.execute("RELEASE one")
        # Again, so that nothing is acknowledged that a restart would not find.
        self._check_file()
        connection.execute("COMMIT")

    def _check_file(self) -> None:
        """Raise ``StorageUnavailable`` if the open file is no longer the one at its path.

        Its writes would be gone after a restart, or go into the log of another file.
        """
        is_known, why = self._is_file_lost, f"{self._path} was removed or replaced while in use"
        if not is_known and _identity_of(self._path) == self._file:
            return
        self._is_file_lost = True
        if not is_known and self.on_file_lost is not None:
            with suppress(RuntimeError):  # The event loop has ended.
                self._loop.call_soon_threadsafe(self.on_file_lost, why)
        raise StorageUnavailable(f"{why}: put it back, and start the server again")


def _set_results(batch: list[_Write[Any]]) -> None:
    for write in batch:
        if write.error is not None:
            write.future.set_exception(write.error)
            write.future.exception()  # Retrieved: a caller that was cancelled never asks.
        else:
            write.future.set_result(write.result)
            if write.on_committed is not None:
                write.on_committed(write.result)


# --- opening --------------------------------------------------------------------------------------


def _open_identified(path: Path) -> tuple[Connection, _FileIdentity]:
    connection = open_checked(path)
    return connection, _identity_of(path)


def _identity_of(path: Path) -> _FileIdentity:
    """Return the device and the number of a file. None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_checked(path: Path) -> Connection:
    """Open a database for writing, or create it. Blocks; every page is read once.

    Raises ``NamesDamaged`` if it is damaged, of another version, or if its directory refuses.
    """
    try:
        make_private_directory(path.parent)
        is_new = not path.exists()
        # A new log needs some blocks, and a server has to start on a full disk.
        connection = SpareSpace(path).run(partial(_open, path, is_new=is_new))
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise NamesDamaged(f"{path}: {error.strerror or error}") from error
    return connection


def _open(path: Path, *, is_new: bool) -> Connection:
    connection = connect(path, "rwc", _WRITER_TIMEOUT_S)
    try:
        _prepare(connection, path)
        if is_new:
            _sync_directory(path.parent)
            _sync_directory(path.parent.parent)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: Connection, path: Path) -> None:
    _use_log(connection, path)
    connection.execute("BEGIN IMMEDIATE")
    if not has_schema(connection, path):
        layout = Layout(path.parent.parent)
        if layout.hosted_names == path and layout.hosted_marker.exists():
            raise lost_names(layout)  # A restore of lost names was killed at its end.
        create_schema(connection)
    upgrade_schema(connection)
    connection.execute("COMMIT")
    check_pages(connection, path)


def _use_log(connection: Connection, path: Path) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise NamesDamaged(f"{path}: its file system cannot share memory between processes (WAL)")


def check_pages(connection: Connection, path: Path) -> None:
    """Read every page once. Raises ``NamesDamaged``."""
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise NamesDamaged(f"{path}: damaged: {DAMAGED_NAMES_REMEDY}")


def change_with_staged(path: Path, staged: Path, change: Callable[[Connection], T]) -> T:
    """Return ``change(connection)``, called in one transaction, once it is on the disk. Blocks.

    Args:
        path: The database. One that is missing is created in the same transaction.
        staged: Another database with our tables, which ``change`` reads as ``staged``.
        change: Its exception undoes all.

    Raises:
        NamesDamaged: The database is damaged, or of another version.
        StorageUnavailable: The disk is full or read-only, or another process does not end its
            transaction.
        Exception: The exception of ``change``.
    """
    try:
        with closing(connect(path, "rwc")) as connection:
            _use_log(connection, path)
            connection.execute("ATTACH ? AS staged", (f"{staged.absolute().as_uri()}?mode=ro",))
            connection.execute("BEGIN IMMEDIATE")
            if not has_schema(connection, path):
                create_schema(connection)
            upgrade_schema(connection)
            result = change(connection)
            connection.execute("COMMIT")  # Without it, the end of the connection undoes all.
            _sync_directory(path.parent)
            _sync_directory(path.parent.parent)
            return result
    except sqlite3.Error as error:
        raise translate(error, path) from error


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def translate(error: sqlite3.Error | StorageUnavailable, path: Path) -> MirrorError:
    """Return the error of ours for one of SQLite. ``path``: the database."""
    if isinstance(error, StorageUnavailable):
        return error
    if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
        return StorageUnavailable(f"{path}: {error}")
    if isinstance(error, sqlite3.DatabaseError):
        return NamesDamaged(f"{path}: {error}: {DAMAGED_NAMES_REMEDY}")
    return StorageUnavailable(f"{path}: {error}")
