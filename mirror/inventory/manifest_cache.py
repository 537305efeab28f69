"""The cache of parsed manifests, so that a listing need not open each one.

Lives here: its database, ``manifests.db`` in the data directory. Must not know: what its pages
mean (:mod:`mirror.inventory.manifest_pages`), which manifests they have.

The file may be lost at any time: it is filled again by the next listing. So no failure of it is an
error.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from mirror.store.sqlite_connection import connect

_FORMAT: Final = 5
"""``user_version`` of the database. A file of another format is made anew."""
_CACHE_TIMEOUT_S: Final = 1.0
"""Seconds to wait for another command that writes. Then the pages are not written."""
_PAGE_SIZE_BYTES: Final = 65536
"""Bytes of one read of the file: 4,096, as usual, would be 2,000 reads of 20,000 manifests."""
_CREATE: Final = (
    "CREATE TABLE pages (number INTEGER PRIMARY KEY, page BLOB NOT NULL, sum INTEGER NOT NULL)"
)


def _sum(number: int, page: bytes) -> int:
    """Return the checksum of a page: SQLite has none."""
    return zlib.crc32(page, number)


class ManifestCache:
    """Numbered pages of bytes. The methods block, and never raise for a failing file."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet. ``path``: the file, which may be missing."""
        self._path = path

    def load(self) -> Iterator[tuple[int, bytes]]:
        """Yield all pages with their numbers. There are none if the file cannot be read.

        A page that is not as it was written is empty: commands remove content by what it says.
        """
        if not self._path.exists():
            return
        try:
            with self._open() as database:
                rows = database.execute("SELECT number, page, sum FROM pages ORDER BY number")
                for number, page, found in rows:
                    yield number, page if _sum(number, page) == found else b""
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):
                self._delete()

    def try_save(self, pages: Mapping[int, bytes], gone: Collection[int] = ()) -> bool:
        """Write pages, and delete those with the numbers ``gone``. Returns whether it was done."""
        rows = [(number, page, _sum(number, page)) for number, page in pages.items()]
        try:
            with self._open() as database, database:
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT OR REPLACE INTO pages VALUES (?, ?, ?)", rows)
                database.executemany(
                    "DELETE FROM pages WHERE number = ?", ((number,) for number in gone)
                )
        except sqlite3.Error:
            return False  # A read-only or full disk, or another command writes.
        return True

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(connect(self._path, "rwc", _CACHE_TIMEOUT_S)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (_FORMAT,):
                database.execute(f"PRAGMA page_size = {_PAGE_SIZE_BYTES}")
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    database.execute("DROP TABLE IF EXISTS manifests")  # Of the formats before.
                    database.execute("DROP TABLE IF EXISTS pages")
                    database.execute(_CREATE)
                    database.execute(f"PRAGMA user_version = {_FORMAT}")
                self._give_to_owner()
            yield database

    def _give_to_owner(self) -> None:
        """Let the server's user write the file, also if root has listed first."""
        with suppress(OSError):
            owner = self._path.parent.stat()
            if os.geteuid() == 0:
                os.chown(self._path, owner.st_uid, owner.st_gid)

    def _delete(self) -> None:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(f"{self._path}{suffix}")
