"""Which content clients have pushed here. It is no cache: nothing evicts it.

Lives here: reading the one table that says so (``mirror/hosted/name_tables.py`` has it), for
every process that removes content, whether it hosts repositories itself or not; the copy that a
running backup reads (``mirror/hosted/snapshot.py``), and the names that a running restore has not
committed yet (``mirror/hosted/staged_names.py``). Must not know: repositories, tags.

A push holds its content (:mod:`mirror.store.content_hold`) from before it is in its place until the
row is committed. Whoever removes content asks here while no push holds it. So it either sees the
row, or it has ended before the push puts its file there.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store.disk import is_locked
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import DIGESTS_PER_QUERY, connect


class _HasDigest(Protocol):
    @property
    def digest(self) -> Digest:
        """The digest of some content."""


Listed = TypeVar("Listed", bound=_HasDigest)


class HostedContents:
    """The hosted content of one data directory. All methods block; threads may share it."""

    def __init__(self, layout: Layout) -> None:
        """Open nothing yet. The database need not exist, if there never was one."""
        self.layout = layout
        self._database = layout.hosted_names
        self._local = threading.local()

    def find(self, digests: Sequence[Digest]) -> set[Digest]:
        """Return those of ``digests`` that a hosted repository has, or a backup, or a restore.

        Raises ``StorageUnavailable`` if the database cannot be read: any may be hosted then.
        """
        if not digests:
            return set()
        wanted = {str(digest): digest for digest in digests}
        marks = ",".join("?" * len(wanted))
        query = f"SELECT digest FROM contents WHERE digest IN ({marks})"  # noqa: S608 - question marks
        found: set[str] = set()
        # In this order. A restore commits its names before it releases its lock, and a backup holds
        # its lock before it copies what the database has.
        if is_locked(self.layout.restore_lock):
            found.update(_find_in(self.layout.staged_names, query, list(wanted)))
        if has_hosted_names(self.layout) and len(found) < len(wanted):
            found.update(row[0] for row in self._query(query, list(wanted)))
        if len(found) < len(wanted) and is_locked(self.layout.snapshot_lock):
            found.update(_find_in(self.layout.snapshot, query, list(wanted)))
        return {wanted[text] for text in found}

    def may_have(self, digest: Digest) -> bool:
        """Return whether a hosted repository has content, or may have it. Never raises."""
        try:
            return bool(self.find([digest]))
        except StorageUnavailable:
            return True

    def without(self, contents: Iterable[Listed]) -> Iterator[Listed]:
        """Return ``contents`` without what is hosted. Raises ``StorageUnavailable``."""
        remaining = iter(contents)
        while step := list(islice(remaining, DIGESTS_PER_QUERY)):
            hosted = self.find([content.digest for content in step])
            yield from (content for content in step if content.digest not in hosted)

    def usage(self) -> tuple[int, int]:
        """Return the number and the bytes of all hosted content, also of a running restore.

        Raises ``StorageUnavailable``.
        """
        count = size = 0
        if is_locked(self.layout.restore_lock):
            count, size = _count_staged(self.layout)
        if has_hosted_names(self.layout):
            rows = self._query("SELECT contents, bytes FROM totals", [])
            count, size = count + int(rows[0][0]), size + int(rows[0][1])
        return count, size

    def _query(self, query: str, parameters: list[str]) -> list[tuple[str, ...]]:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        try:
            if connection is None:
                # Closed with its thread: a thread-local value ends with it.
                connection = self._local.connection = connect(self._database, "ro")
            return connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            self._local.connection = None
            message = f"{self._database}: {error}: nothing is removed, because it may be hosted"
            raise StorageUnavailable(message) from error


def _find_in(path: Path, query: str, wanted: list[str]) -> Iterable[str]:
    """Return those of ``wanted`` that a copy of the names has, or may have."""
    try:
        with closing(connect(path, "ro")) as connection:
            return [row[0] for row in connection.execute(query, wanted)]
    except sqlite3.Error:
        return wanted  # It is being made, or has just been removed. All may be in it.


def _count_staged(layout: Layout) -> tuple[int, int]:
    """Return the number and the bytes of what a running restore has brought, and nobody else."""
    query = "SELECT count(*), total(size) FROM contents"
    try:
        with closing(connect(layout.staged_names, "ro")) as connection:
            if layout.hosted_names.exists():
                uri = f"{layout.hosted_names.absolute().as_uri()}?mode=ro"
                connection.execute("ATTACH ? AS names", (uri,))
                query += " WHERE digest NOT IN (SELECT digest FROM names.contents)"
            count, size = connection.execute(query).fetchone()
    except sqlite3.Error:
        return 0, 0  # It is being made, or has just been removed.
    return int(count), int(size)
