"""The names that a restore brings: first beside those that are there, then all of them in one step.

Lives here: the lock, the database of the restore, its merge. Must not know: backups.

Theory of operation: a restore takes the lock, and records what it brings in a database of its own,
``restore.db``, which has the tables of ``names.db``. No client reads it. Content that it names is
hosted already for whoever removes content (:mod:`mirror.store.hosted_contents`). At the end, one
transaction of ``names.db`` takes all rows. So a restore that ends before leaves the names as they
were. The lock ends with its process, and the next restore begins with an empty database.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.hosted import upload_rows
from mirror.hosted.database import Database, change_with_staged, check_pages, translate
from mirror.hosted.name_tables import create_schema, has_schema, upgrade_schema
from mirror.oci.errors import StorageUnavailable
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.private_directory import make_private_directory
from mirror.store.sqlite_connection import connect
from mirror.threads import run_in_thread

_MERGE: Final = """
INSERT INTO blobs SELECT * FROM staged.blobs WHERE true
    ON CONFLICT (repository, digest) DO UPDATE SET used_at = max(used_at, excluded.used_at);
INSERT INTO manifests SELECT * FROM staged.manifests WHERE true
    ON CONFLICT (repository, digest) DO UPDATE SET
    media_type = excluded.media_type, artifact_type = excluded.artifact_type,
    pushed_at = max(pushed_at, excluded.pushed_at), pulled_at = max(pulled_at, excluded.pulled_at),
    orphaned_at = min(orphaned_at, excluded.orphaned_at);
INSERT INTO parts SELECT * FROM staged.parts WHERE true ON CONFLICT DO NOTHING;
INSERT INTO tags SELECT * FROM staged.tags WHERE (repository, tag) NOT IN temp.kept_tags
    ON CONFLICT (repository, tag) DO UPDATE SET
    digest = excluded.digest, pushed_at = excluded.pushed_at, pushed_by = excluded.pushed_by;
INSERT INTO changes SELECT * FROM staged.changes
    WHERE (repository, tag) NOT IN temp.kept_tags ORDER BY rowid;
UPDATE manifests SET orphaned_at = 0 WHERE orphaned_at > 0 AND NOT EXISTS
    (SELECT 1 FROM staged.manifests s
        WHERE s.repository = manifests.repository AND s.digest = manifests.digest)
    AND (EXISTS
    (SELECT 1 FROM staged.manifests s WHERE s.repository = manifests.repository
        AND s.digest = manifests.subject AND s.orphaned_at = 0)
    OR EXISTS
    (SELECT 1 FROM staged.parts p JOIN staged.manifests s
        ON s.repository = p.repository AND s.digest = p.manifest
        WHERE p.repository = manifests.repository AND p.digest = manifests.digest
        AND p.is_manifest = 1 AND s.orphaned_at = 0))
"""
"""A manifest that is here already keeps its later times, and is no orphan if it was none. Nor is
one that the restore has no row of, and that belongs to an image of it."""
_CREATE_KEPT_TAGS: Final = (
    "CREATE TEMP TABLE kept_tags AS SELECT s.repository, s.tag FROM staged.tags s JOIN tags t"
    " ON t.repository = s.repository AND t.tag = s.tag WHERE t.digest <> s.digest AND NOT ?"
)
"""The tags that keep their other manifest. The parameter: whether they are replaced instead."""


class StagedNames:
    """The names of one restore. Create it with :meth:`open`."""

    def __init__(self, layout: Layout, lock: int, database: Database) -> None:
        """Use an open database. Call :meth:`open` instead.

        Args:
            layout: The data directory.
            lock: The descriptor of the locked file.
            database: The database of the restore.
        """
        self._layout = layout
        self._lock = lock
        self._is_open = True
        self.database = database
        """The rows of the restore. They need not be durable: :meth:`merge` makes them so."""

    @classmethod
    async def open(cls, layout: Layout) -> StagedNames:
        """Take the lock, and begin with no names.

        Raises:
            StorageUnavailable: Another restore runs, or the disk refuses.
            NamesDamaged: The database cannot be created.
        """
        lock = await run_in_thread(_lock, layout)
        try:
            return cls(layout, lock, await Database.open(layout.staged_names))
        except BaseException:
            os.close(lock)
            raise

    async def merge(self, hosted: Hosted, *, may_replace: bool) -> list[str]:
        """Add all names to those that are there, in one transaction, once it is on the disk.

        Args:
            hosted: The quota.
            may_replace: Whether tags that name another manifest are replaced.

        Returns:
            The tags that keep their other manifest, as ``team/app:v1``.

        Raises:
            QuotaExceeded: The quota would be exceeded. Nothing was added.
            NamesDamaged: The names cannot be used.
            StorageUnavailable: The disk refuses. Nothing was added.
        """
        await self._close_database()
        change = partial(_merge, hosted=hosted, may_replace=may_replace)
        layout = self._layout
        return await run_in_thread(
            change_with_staged, layout.hosted_names, layout.staged_names, change
        )

    async def close(self) -> None:
        """Remove the names of the restore, and release the lock."""
        await self._close_database()
        try:
            await run_in_thread(_remove, self._layout.staged_names)
        finally:
            os.close(self._lock)

    async def _close_database(self) -> None:
        if self._is_open:
            self._is_open = False
            await self.database.close()


def _lock(layout: Layout) -> int:
    make_private_directory(layout.restore_lock.parent)
    fd = disk.lock_file(layout.restore_lock)
    if fd is None:
        raise StorageUnavailable("another restore into this data directory runs: wait for its end")
    try:
        _remove(layout.staged_names)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)


def _merge(connection: Connection, hosted: Hosted, *, may_replace: bool) -> list[str]:
    connection.execute(_CREATE_KEPT_TAGS, (may_replace,))
    with ExitStack() as quotas:
        for (repository,) in connection.execute("SELECT name FROM staged.repositories").fetchall():
            quotas.enter_context(upload_rows.within_quota(connection, repository, hosted))
        for statement in _MERGE.split(";"):
            connection.execute(statement)
    kept = connection.execute("SELECT repository, tag FROM temp.kept_tags ORDER BY 1, 2")
    return [f"{repository}:{tag}" for repository, tag in kept]


@contextmanager
def opened_names(layout: Layout) -> Iterator[Connection]:
    """Read the names that are there, as this version has them. Without any, the database is empty.

    Blocks.

    Raises:
        NamesDamaged: They cannot be used.
        StorageUnavailable: The disk refuses.
    """
    path = layout.hosted_names
    try:
        with closing(
            connect(path, "rw") if path.exists() else sqlite3.connect(":memory:")
        ) as names:
            if has_schema(names, path):
                check_pages(names, path)
                names.execute("BEGIN IMMEDIATE")
                upgrade_schema(names)
                names.execute("COMMIT")
                yield names
                return
        with closing(sqlite3.connect(":memory:")) as names:
            create_schema(names)
            yield names
    except sqlite3.Error as error:
        raise translate(error, path) from error
