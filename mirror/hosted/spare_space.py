"""Space on the disk for deletions, so that images can be deleted once the disk is full.

Lives here: the spare file beside the database, whose blocks go to a write that the disk has
refused. Must not know: what is written.

Theory of operation: to delete rows, SQLite writes to its log first. So the blocks of a spare file
are allocated while the disk has room. A deletion that fails for lack of space makes that file a
piece smaller, and is tried again. Then the log goes into the database, and the spare file takes
back what is free, so it lasts for any number of deletions. It is used up by other writers only: who
writes in these few milliseconds may take a piece. The file is filled again when there is room.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from sqlite3 import Connection
from typing import Final, TypeVar

T = TypeVar("T")

SPARE_BYTES: Final = 16 * 1024 * 1024
"""Bytes of the file. The log has 4 MiB before it goes into the database, and the largest deletion
writes about 8 MiB (of 100 images; 6.4 MiB if there are 30,000)."""
_GIVEN_UP_BYTES: Final = 4 * 1024 * 1024
"""Bytes that are given up at a time. Other writers take a piece at most, in each try."""
_ALLOCATED_BYTES: Final = 4096
"""The size of the file is a multiple of this."""
_READERS_TIMEOUT_MS: Final = 100
"""Milliseconds to wait until no reader needs the log. A read takes less than one."""
_WITHOUT_SPACE: Final = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,  # The log cannot be created: its directory needs a block, too.
        sqlite3.SQLITE_IOERR_WRITE,  # The quota of a user is used up.
        sqlite3.SQLITE_IOERR_SHMSIZE,  # The file that readers and writers share cannot grow.
    }
)
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_without_space(error: Exception) -> bool:
    """Return whether the disk, or a quota of it, may be full."""
    return getattr(error, "sqlite_errorcode", None) in _WITHOUT_SPACE


class SpareSpace:
    """The spare file of a database. All methods block; processes and threads may share it."""

    def __init__(self, database: Path) -> None:
        """Create nothing yet. The file is ``NAME.spare``, beside the database."""
        self._path = database.with_suffix(".spare")

    def fill(self) -> None:
        """Allocate the file, if as much stays free then. Call it now and then. Never raises."""
        with suppress(OSError), closing(_open(self._path, os.O_CREAT)) as file:
            file.allocate(min(SPARE_BYTES, (file.size + file.free_bytes()) // 2))

    def run(self, write: Callable[[], T], before_refill: Callable[[], object] = lambda: None) -> T:
        """Return ``write()``. On a full disk, try again with more space, until none is left.

        Args:
            write: Writes with SQLite. If it fails, it has changed nothing.
            before_refill: Frees what the write needs no longer. Called if it has got space.

        Raises what ``write`` raises.
        """
        is_smaller = False
        try:
            while True:
                try:
                    return write()
                except sqlite3.Error as error:
                    if not is_without_space(error) or not self._free_piece():
                        raise
                    is_smaller = True
        finally:
            if is_smaller:
                before_refill()
                self._take_back()

    def _free_piece(self) -> int:
        """Free a piece of the file. Returns its size in bytes. Zero: none is left."""
        with suppress(OSError), closing(_open(self._path)) as file:
            file.truncate(max(0, file.size - _GIVEN_UP_BYTES))
            return min(file.size, _GIVEN_UP_BYTES)
        return 0

    def _take_back(self) -> None:
        with suppress(OSError), closing(_open(self._path)) as file:
            file.allocate(min(SPARE_BYTES, file.size + file.free_bytes()))


class _SpareFile:
    """The open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        """Bytes when it was opened."""

    def free_bytes(self) -> int:
        """Return the bytes of its disk that are free for this user."""
        disk = os.fstatvfs(self._fd)
        return disk.f_bavail * disk.f_frsize

    def allocate(self, size: int) -> None:
        """Make it ``size`` bytes, or leave it. Raises ``OSError`` if the disk refuses."""
        size -= size % _ALLOCATED_BYTES
        if size <= self.size:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError:
            os.ftruncate(self._fd, self.size)  # It may have got some of the blocks.
            raise

    def truncate(self, size: int) -> None:
        """Make it smaller. Raises ``OSError``."""
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def _open(path: Path, more_flags: int = 0) -> _SpareFile:
    """Open the file. Raises ``OSError``."""
    return _SpareFile(os.open(path, _FLAGS | more_flags, 0o600))


def empty_log(connection: Connection) -> None:
    """Move the log into the database, and free its blocks, unless a reader needs it. Blocks."""
    timeout = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.execute(f"PRAGMA busy_timeout = {_READERS_TIMEOUT_MS}")
    try:
        with suppress(sqlite3.Error):  # The disk is still full: a part of it is moved.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.execute(f"PRAGMA busy_timeout = {timeout}")
