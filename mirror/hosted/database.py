"""The database of the hosted repositories: opening it, its schema, its threads.

Lives here: transactions, one commit for all writes that wait, damage. Must not know: what the rows
mean (``name_rows.py``).

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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final, Generic, TypeAlias, TypeVar

from mirror.hosted.spare_space import SpareSpace, empty_log, is_without_space
from mirror.oci.errors import MirrorError, NamesDamaged, StorageUnavailable
from mirror.store.content_hold import ContentHold
from mirror.store.hosted_marker import DAMAGED_NAMES_REMEDY
from mirror.store.private_directory import make_private_directory
from mirror.store.sqlite_connection import connect
from mirror.threads import run_in_thread

T = TypeVar("T")
_FileIdentity: TypeAlias = tuple[int, int] | None

SCHEMA_VERSION: Final = 1
"""``user_version`` of a database that this version writes."""
_WRITER_TIMEOUT_S: Final = 5.0
"""Seconds to wait for a write of another process. One commit takes milliseconds.

A write may wait twice: for the commit before it, and for its own."""
_SOON_S: Final = 1.0
"""Seconds that a client waits for the record of its use. One commit takes milliseconds."""
_MAX_BATCH: Final = 256
"""Writes of one commit. Each waits for all of them, which takes about 20 ms."""
_READERS: Final = 2
"""Threads that read: a read takes less than a millisecond of the processor."""

_SCHEMA: Final = """
CREATE TABLE manifests (
    repository TEXT NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL,
    artifact_type TEXT NOT NULL, subject TEXT NOT NULL, size INTEGER NOT NULL,
    annotations TEXT NOT NULL, pushed_at REAL NOT NULL, pushed_by TEXT NOT NULL,
    pulled_at REAL NOT NULL DEFAULT 0, orphaned_at REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (repository, digest)) WITHOUT ROWID;
CREATE INDEX orphaned_manifests ON manifests (repository, digest) WHERE orphaned_at > 0;
CREATE INDEX manifests_by_subject ON manifests (repository, subject, digest) WHERE subject <> '';
-- is_manifest: the part is listed as a manifest, not as a blob. The same bytes may be both.
CREATE TABLE parts (
    repository TEXT NOT NULL, manifest TEXT NOT NULL, digest TEXT NOT NULL,
    is_manifest INTEGER NOT NULL,
    PRIMARY KEY (repository, manifest, digest, is_manifest)) WITHOUT ROWID;
CREATE INDEX parts_by_digest ON parts (repository, digest, is_manifest);
CREATE TABLE tags (
    repository TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL,
    pushed_at REAL NOT NULL, pushed_by TEXT NOT NULL,
    PRIMARY KEY (repository, tag)) WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (repository, digest);
CREATE TABLE blobs (
    repository TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, used_at REAL NOT NULL,
    PRIMARY KEY (repository, digest)) WITHOUT ROWID;
CREATE TABLE uploads (
    id TEXT PRIMARY KEY, repository TEXT NOT NULL, user TEXT NOT NULL, reserved INTEGER NOT NULL,
    boot TEXT NOT NULL, started_at REAL NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE contents (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, names INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE released (digest TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE repositories (
    name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, contents INTEGER NOT NULL,
    manifests INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE changes (
    id TEXT PRIMARY KEY, action TEXT NOT NULL, repository TEXT NOT NULL, digest TEXT NOT NULL,
    tag TEXT NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL, user TEXT NOT NULL,
    client TEXT NOT NULL, at REAL NOT NULL, taken_at REAL NOT NULL);
CREATE TABLE totals (
    one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL, contents INTEGER NOT NULL);
INSERT INTO totals VALUES (1, 0, 0);

CREATE VIEW unnamed_blobs AS SELECT * FROM blobs b WHERE NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = b.repository AND p.digest = b.digest
        AND p.is_manifest = 0);
CREATE VIEW unnamed_manifests AS SELECT * FROM manifests m WHERE NOT EXISTS
    (SELECT 1 FROM tags t WHERE t.repository = m.repository AND t.digest = m.digest)
    AND NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = m.repository AND p.digest = m.digest
        AND p.is_manifest = 1);
CREATE VIEW orphans AS SELECT * FROM manifests m WHERE m.orphaned_at > 0 AND NOT EXISTS
    (SELECT 1 FROM tags t WHERE t.repository = m.repository AND t.digest = m.digest
        AND (t.tag NOT GLOB 'sha[25][51][62]-[0-9a-f]*' OR EXISTS
            (SELECT 1 FROM manifests s WHERE s.repository = m.repository
            AND s.digest >= substr(t.tag, 1, 6) || ':' || substr(t.tag, 8, 64)
            AND s.digest < substr(t.tag, 1, 6) || ':' || substr(t.tag, 8, 64) || 'g')))
    AND NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = m.repository AND p.digest = m.digest
        AND p.is_manifest = 1)
    AND NOT EXISTS
    (SELECT 1 FROM manifests s WHERE s.repository = m.repository AND s.digest = m.subject);

CREATE TRIGGER contents_added AFTER INSERT ON contents BEGIN
    UPDATE totals SET bytes = bytes + new.size, contents = contents + 1;
    DELETE FROM released WHERE digest = new.digest; END;
CREATE TRIGGER contents_removed AFTER DELETE ON contents BEGIN
    UPDATE totals SET bytes = bytes - old.size, contents = contents - 1;
    INSERT OR IGNORE INTO released VALUES (old.digest); END;
CREATE TRIGGER blobs_added AFTER INSERT ON blobs BEGIN
    INSERT INTO contents VALUES (new.digest, new.size, 1)
        ON CONFLICT (digest) DO UPDATE SET names = names + 1;
    INSERT INTO repositories VALUES (new.repository, new.size, 1, 0)
        ON CONFLICT (name) DO UPDATE SET bytes = bytes + new.size, contents = contents + 1; END;
CREATE TRIGGER blobs_removed AFTER DELETE ON blobs BEGIN
    UPDATE contents SET names = names - 1 WHERE digest = old.digest;
    DELETE FROM contents WHERE digest = old.digest AND names = 0;
    UPDATE repositories SET bytes = bytes - old.size, contents = contents - 1
        WHERE name = old.repository;
    DELETE FROM repositories WHERE name = old.repository AND contents = 0; END;
CREATE TRIGGER manifests_added AFTER INSERT ON manifests BEGIN
    INSERT INTO contents VALUES (new.digest, new.size, 1)
        ON CONFLICT (digest) DO UPDATE SET names = names + 1;
    INSERT INTO repositories VALUES (new.repository, new.size, 1, 1)
        ON CONFLICT (name) DO UPDATE SET bytes = bytes + new.size, contents = contents + 1,
            manifests = manifests + 1; END;
CREATE TRIGGER manifests_removed AFTER DELETE ON manifests BEGIN
    DELETE FROM parts WHERE repository = old.repository AND manifest = old.digest;
    DELETE FROM tags WHERE repository = old.repository AND digest = old.digest;
    UPDATE contents SET names = names - 1 WHERE digest = old.digest;
    DELETE FROM contents WHERE digest = old.digest AND names = 0;
    UPDATE repositories SET bytes = bytes - old.size, contents = contents - 1,
        manifests = manifests - 1 WHERE name = old.repository;
    DELETE FROM repositories WHERE name = old.repository AND contents = 0; END;
"""


@dataclass(slots=True, eq=False)
class _Write(Generic[T]):
    """A write that waits for its commit."""

    change: Callable[[Connection], T]
    is_durable: bool
    future: asyncio.Future[T]
    result: T | None = None
    error: Exception | None = None
    is_removal: bool = False
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
        self._is_full = True
        """Whether the writing connection waits for the disk at each commit."""
        self._writing = ThreadPoolExecutor(1, "names")
        self._reading = ThreadPoolExecutor(_READERS, "names-read")
        self._waiting: deque[_Write[Any]] = deque()
        self._local = threading.local()
        self._readers: list[Connection] = []

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open a database, or create it. Raises ``NamesDamaged`` if it cannot be used."""
        return cls(path, *await run_in_thread(_open_identified, path))

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Return ``query(connection)``, called in a thread, in a state that was committed.

        Raises ``NamesDamaged``, ``StorageUnavailable``, or the exception of ``query``.
        """
        return await self._loop.run_in_executor(self._reading, self._read, query)

    async def write(
        self,
        change: Callable[[Connection], T],
        *,
        is_durable: bool = True,
        is_removal: bool = False,
        on_committed: Callable[[T], None] | None = None,
        hold: ContentHold | None = None,
    ) -> T:
        """Return ``change(connection)``, called in a thread in a transaction, once it is committed.

        Cancelling the caller does not undo the write.

        Args:
            change: Runs in a savepoint of its own. Its exception undoes it, and no other write. On
                a full disk, a removal is undone, and called again.
            is_durable: Return after the commit is on the disk. False: a crash of the machine may
                undo it.
            is_removal: It frees space in the end, so it may use the spare space of a full disk.
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
        write = _Write(change, is_durable, future, is_removal=is_removal, on_committed=on_committed)
        self._waiting.append(write)
        self._writing.submit(self._commit_waiting)
        await asyncio.wait({write.future})
        result: T = write.future.result()
        return result

    def write_later(self, change: Callable[[Connection], T]) -> asyncio.Future[T]:
        """Make a change soon, without waiting. Not durable. The future need not be waited for."""
        write = _Write(change, is_durable=False, future=self._loop.create_future())
        self._waiting.append(write)
        self._writing.submit(self._commit_waiting)
        return write.future

    async def write_soon(self, change: Callable[[Connection], T]) -> asyncio.Future[T]:
        """Make a change as :meth:`write_later`, and wait for it, but only for a moment.

        Returns its future. If it is not done after :data:`_SOON_S`, another process holds the lock,
        and the change is the next write of ours. Raises what :meth:`write` raises.
        """
        future = self.write_later(change)
        await asyncio.wait({future}, timeout=_SOON_S)
        if future.done():
            future.result()
        return future

    async def fill_spare_space(self) -> None:
        """Keep space for removals, if the disk has some. The server calls this now and then."""
        await run_in_thread(self._spare_space.fill)

    async def close(self) -> None:
        """Finish the writes that wait, and close all connections."""
        for pool in (self._writing, self._reading):
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
            raise _translate(error, self._path) from error

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
            failure = _translate(error, self._path)
            is_full = is_without_space(error)
            for write in batch:
                write.error = self._remove(write) if write.is_removal and is_full else failure
        with suppress(RuntimeError):  # The event loop has ended, so nobody waits.
            self._loop.call_soon_threadsafe(_set_results, batch)

    def _remove(self, write: _Write[Any]) -> Exception | None:
        """Commit a removal alone, with spare space if the disk is full. Returns its exception."""
        empty = partial(empty_log, self._connection)
        try:
            self._spare_space.run(partial(self._commit, [write]), empty)
        except (sqlite3.Error, StorageUnavailable) as error:
            return _translate(error, self._path)
        return write.error

    def _commit(self, batch: list[_Write[Any]]) -> None:
        """Commit writes. Raises ``sqlite3.Error``, ``StorageUnavailable``: nothing is changed."""
        try:
            self._try_commit(batch)
        except (sqlite3.Error, StorageUnavailable):
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def _try_commit(self, batch: list[_Write[Any]]) -> None:
        connection = self._connection
        self._check_file()
        is_full = any(write.is_durable for write in batch)
        if is_full is not self._is_full:
            connection.execute(f"PRAGMA synchronous = {'FULL' if is_full else 'NORMAL'}")
            self._is_full = is_full
        connection.execute("BEGIN IMMEDIATE")
        for write in batch:
            write.error = None
            connection.execute("SAVEPOINT one")
            try:
                write.result = write.change(connection)
            except sqlite3.Error:
                raise
            except Exception as error:
                write.error = error
                connection.execute("ROLLBACK TO one")
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
        raise _translate(error, path) from error
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
    connection.execute("PRAGMA synchronous = FULL")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise NamesDamaged(f"{path}: its file system cannot share memory between processes (WAL)")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if version == 0 and tables == 0:
        for statement in _statements(_SCHEMA):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version != SCHEMA_VERSION:
        raise NamesDamaged(wrong_version(path, version))
    connection.execute("COMMIT")
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise NamesDamaged(f"{path}: damaged: {DAMAGED_NAMES_REMEDY}")


def wrong_version(path: Path, version: int) -> str:
    """Return what to do about a database that another version of this program has written."""
    return (
        f"{path}: its version is {version}, and this program reads {SCHEMA_VERSION}: use the"
        " program that has written it"
    )


def _statements(script: str) -> list[str]:
    """Split a script. ``executescript`` would commit before it, outside of our transaction."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _translate(error: sqlite3.Error | StorageUnavailable, path: Path) -> MirrorError:
    if isinstance(error, StorageUnavailable):
        return error
    if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
        return StorageUnavailable(f"{path}: {error}")
    if isinstance(error, sqlite3.DatabaseError):
        return NamesDamaged(f"{path}: {error}: {DAMAGED_NAMES_REMEDY}")
    return StorageUnavailable(f"{path}: {error}")
