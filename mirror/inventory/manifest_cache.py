"""The cache of parsed manifests, so that a listing need not open each one.

Lives here: its database, ``manifests.db`` in the data directory. Must not know: what its rows mean.

A manifest never changes, so a row is valid as long as there is a manifest of its digest. The file
may be lost at any time: it is filled again by the next listing. So no failure of it is an error.
Rows of manifests that have left the disk are deleted once they are many.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

_FORMAT: Final = 4
"""``user_version`` of the database. A file of another format is made anew."""
_CACHE_TIMEOUT_S: Final = 1.0
"""Seconds to wait for another command that writes. Then the rows are not written."""
_CREATE: Final = (
    "CREATE TABLE manifests (digest TEXT PRIMARY KEY, facts TEXT NOT NULL, sum INTEGER NOT NULL)"
)


def _sum(digest: bytes, text: bytes) -> int:
    """Return the checksum of a row: SQLite has none."""
    return zlib.crc32(text, zlib.crc32(digest))


class ManifestCache:
    """Text rows by digest. The methods block, and never raise for a failing file."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet. ``path``: the file, which may be missing."""
        self._path = path

    def load(self) -> dict[str, str]:
        """Return all rows, by digest. There are none if the file cannot be read.

        A row that is not as it was written is left out: commands remove content by what it says.
        """
        if not self._path.exists():
            return {}
        try:
            with self._open() as database:
                database.text_factory = bytes
                rows = database.execute("SELECT digest, facts, sum FROM manifests").fetchall()
                return {
                    key.decode(): text.decode()
                    for key, text, found in rows
                    if _sum(key, text) == found
                }
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):
                self._delete()
            return {}

    def try_save(self, rows: Iterable[tuple[str, str]], gone: Iterable[str] = ()) -> bool:
        """Write (digest, text) rows, and delete those of ``gone``. Returns whether it was done."""
        try:
            with self._open() as database, database:
                database.executemany(
                    "INSERT OR REPLACE INTO manifests VALUES (?, ?, ?)",
                    ((key, text, _sum(key.encode(), text.encode())) for key, text in rows),
                )
                database.executemany(
                    "DELETE FROM manifests WHERE digest = ?", ((digest,) for digest in gone)
                )
        except sqlite3.Error:
            return False  # A read-only or full disk, or another command writes.
        return True

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_CACHE_TIMEOUT_S)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (_FORMAT,):
                with database:
                    database.execute("DROP TABLE IF EXISTS manifests")
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
