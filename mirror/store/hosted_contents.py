"""Which content clients have pushed here. It is no cache: nothing evicts it.

Lives here: reading the one table that says so (``mirror/hosted/database.py`` has its schema), for
every process that removes content, whether it hosts repositories itself or not; and the copy that a
running backup reads (``mirror/hosted/snapshot.py``). Must not know: repositories, tags.

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
from typing import Final, Protocol, TypeVar

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store.disk import is_locked
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect

_STEP: Final = 500
"""Digests of one query: SQLite takes at most 32,766 parameters, and more than these save little."""


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
        """Return those of ``digests`` that a hosted repository has, or that a backup reads.

        Raises ``StorageUnavailable`` if the database cannot be read: any may be hosted then.
        """
        if not digests or not has_hosted_names(self.layout):
            return set()
        wanted = {str(digest): digest for digest in digests}
        marks = ",".join("?" * len(wanted))
        query = f"SELECT digest FROM contents WHERE digest IN ({marks})"  # noqa: S608 - question marks
        found = {wanted[row[0]] for row in self._query(query, list(wanted))}
        # In this order: a backup holds the lock before it copies what the database has.
        if len(found) < len(wanted) and is_locked(self.layout.snapshot_lock):
            found |= {wanted[text] for text in self._find_in_snapshot(query, list(wanted))}
        return found

    def _find_in_snapshot(self, query: str, wanted: list[str]) -> Iterable[str]:
        try:
            with closing(connect(self.layout.snapshot, "ro")) as connection:
                return [row[0] for row in connection.execute(query, wanted)]
        except sqlite3.Error:
            return wanted  # It is being made, or has just been removed. All may be in it.

    def may_have(self, digest: Digest) -> bool:
        """Return whether a hosted repository has content, or may have it. Never raises."""
        try:
            return bool(self.find([digest]))
        except StorageUnavailable:
            return True

    def without(self, contents: Iterable[Listed]) -> Iterator[Listed]:
        """Return ``contents`` without what is hosted. Raises ``StorageUnavailable``."""
        remaining = iter(contents)
        while step := list(islice(remaining, _STEP)):
            hosted = self.find([content.digest for content in step])
            yield from (content for content in step if content.digest not in hosted)

    def usage(self) -> tuple[int, int]:
        """Return the number and the bytes of all hosted content. Raises ``StorageUnavailable``."""
        if not has_hosted_names(self.layout):
            return 0, 0
        rows = self._query("SELECT contents, bytes FROM totals", [])
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

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
