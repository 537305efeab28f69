"""A snapshot of the names, for a backup: what it names stays on the disk while it is read.

Lives here: the lock, the copy of the database, what the copy says. Must not know: where a backup is
written to.

Theory of operation: a backup takes the lock, and copies the database in one read transaction. Who
removes content asks the database first, then whether the lock is held, and then the copy
(:mod:`mirror.store.hosted_contents`). So content that the copy names stays, also if its last row
goes meanwhile. The lock ends with its process: a copy without it counts for nothing.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Final

from mirror.hosted.content_row import ContentRow
from mirror.hosted.name_tables import has_schema, wrong_version
from mirror.oci.errors import NamesDamaged, StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect

_SNAPSHOT_TIMEOUT_S: Final = 2.0
"""Seconds to wait for the lock. Who looks whether it is held, holds it for a moment."""
_COLUMNS: Final = (
    "repository, digest, media_type, size, pushed_at, pushed_by, pulled_at, orphaned_at"
)


@dataclass(frozen=True, slots=True)
class SavedManifest(ContentRow):
    """A manifest of a repository, as the database has it. Times are seconds since the epoch."""

    pushed_at: float
    pushed_by: str
    pulled_at: float
    """Zero: never."""
    orphaned_at: float
    """Since when it belongs to nothing. Zero: it does, or it stays until it is deleted."""


@dataclass(frozen=True, slots=True)
class SavedTag(ContentRow):
    """A tag of a repository, and its manifest."""

    tag: Tag
    pushed_at: float
    pushed_by: str


class Snapshot:
    """An open copy of the database. Its methods block, and yield rows one by one."""

    def __init__(self, connection: Connection) -> None:
        """Use an open connection. Call :func:`opened_snapshot` instead."""
        self._connection = connection

    def contents(self) -> Iterator[tuple[Digest, int]]:
        """Return the digests and bytes of all content that a repository has."""
        rows = self._connection.execute("SELECT digest, size FROM contents ORDER BY digest")
        return ((Digest.parse(digest), size) for digest, size in rows)

    def repositories(self) -> Iterator[str]:
        """Return the repositories that have any content, in order."""
        rows = self._connection.execute("SELECT name FROM repositories ORDER BY name")
        return (row[0] for row in rows)

    def blobs(self, repository: str) -> Iterator[tuple[Digest, int]]:
        """Return the blobs of a repository, and their bytes, in order."""
        rows = self._connection.execute(
            "SELECT digest, size FROM blobs WHERE repository = ? ORDER BY digest", (repository,)
        )
        return ((Digest.parse(digest), size) for digest, size in rows)

    def tags(self, repository: str) -> Iterator[SavedTag]:
        """Return the tags of a repository, in order."""
        rows = self._connection.execute(
            "SELECT t.repository, t.digest, m.media_type, m.size, t.tag, t.pushed_at, t.pushed_by"
            " FROM tags t JOIN manifests m ON m.repository = t.repository AND m.digest = t.digest"
            " WHERE t.repository = ? ORDER BY t.tag",
            (repository,),
        )
        return (
            SavedTag(row[0], Digest.parse(row[1]), row[2], row[3], Tag(row[4]), *row[5:])
            for row in rows
        )

    def manifests(self, repository: str) -> Iterator[SavedManifest]:
        """Return the manifests of a repository. Orphans come after all others."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM manifests WHERE repository = ?"  # noqa: S608 - our own text
            " ORDER BY orphaned_at > 0, digest",
            (repository,),
        )
        return (SavedManifest(row[0], Digest.parse(row[1]), *row[2:]) for row in rows)

    def roots(self, repository: str) -> Iterator[SavedManifest]:
        """Return the manifests that neither a tag nor an index names, in order of digest."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM unnamed_manifests WHERE repository = ? ORDER BY digest",  # noqa: S608 - our own text
            (repository,),
        )
        return (SavedManifest(row[0], Digest.parse(row[1]), *row[2:]) for row in rows)


@contextmanager
def opened_snapshot(layout: Layout) -> Iterator[Snapshot]:
    """Copy the database, and keep all content that the copy names while the block runs. Blocks.

    Raises:
        StorageUnavailable: Another backup of the data directory runs, or the disk refuses.
        NamesDamaged: There is no database that this version can read.
    """
    fd = _lock(layout)
    try:
        layout.snapshot.unlink(missing_ok=True)
        try:
            _copy(layout)
            with closing(connect(layout.snapshot, "ro")) as connection:
                yield Snapshot(connection)
        finally:
            layout.snapshot.unlink(missing_ok=True)
    except sqlite3.Error as error:
        raise StorageUnavailable(f"{layout.hosted_names}: {error}") from error
    finally:
        os.close(fd)


def drop_stale_snapshot(layout: Layout) -> None:
    """Remove what a backup that was killed has left. Raises ``OSError``. Blocks."""
    if layout.snapshot.exists() or _draft_of(layout).exists():
        fd = disk.lock_file(layout.snapshot_lock)
        if fd is not None:
            layout.snapshot.unlink(missing_ok=True)
            _draft_of(layout).unlink(missing_ok=True)
            os.close(fd)


def _lock(layout: Layout) -> int:
    deadline = time.monotonic() + _SNAPSHOT_TIMEOUT_S
    while (fd := disk.lock_file(layout.snapshot_lock)) is None:
        if time.monotonic() > deadline:
            raise StorageUnavailable("another backup of this data directory runs: wait for its end")
        time.sleep(0.01)
    return fd


def _copy(layout: Layout) -> None:
    draft = _draft_of(layout)
    draft.unlink(missing_ok=True)
    with closing(connect(layout.hosted_names, "ro")) as connection:
        if not has_schema(connection, layout.hosted_names):
            raise NamesDamaged(wrong_version(layout.hosted_names, 0))
        connection.execute("VACUUM INTO ?", (str(draft),))
    draft.rename(layout.snapshot)


def _draft_of(layout: Layout) -> Path:
    return layout.snapshot.with_suffix(".tmp")
