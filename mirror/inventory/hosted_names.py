"""The names of hosted repositories, and their running uploads, from a data directory.

Lives here: reading ``hosted/names.db`` without opening it for writing, beside a server. Must not
know: who pushes, how a name is removed (:mod:`mirror.hosted` does both).

The queries name their columns, so they also read a database that a later version has extended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from typing import Any, Final, TypeAlias

from mirror.inventory.model import DigestText
from mirror.inventory.name import Name
from mirror.observability.hosted_events import HostedUsage
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Repository, Tag
from mirror.oci.text import time_text
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect_to_read

Query: TypeAlias = Callable[..., Iterable[Any]]
"""Runs a query with its values, and returns its rows, which it may read meanwhile."""

_UNTAGGED: Final = (
    "SELECT repository, '', digest, pushed_at, pushed_by FROM unnamed_manifests"
    " ORDER BY repository, digest"
)
_TAGS: Final = (
    "SELECT t.repository, t.tag, t.digest, t.pushed_at, t.pushed_by FROM tags t"
    " ORDER BY t.repository, t.tag"
)
_SELECT_MANIFESTS: Final = "SELECT digest FROM manifests"
_MEDIA_TYPES: Final = "SELECT digest, media_type FROM manifests"
_SELECT_TAG: Final = "SELECT digest FROM tags WHERE repository = ? AND tag = ?"
# From a content up to the manifests that list it: some of those of a base layer.
_SELECT_TAGS_ABOVE: Final = (
    "WITH RECURSIVE above (digest, is_manifest) AS (VALUES (:digest, 0), (:digest, 1)"
    " UNION SELECT p.manifest, 1 FROM above a JOIN parts p ON p.repository = :repository"
    " AND p.digest = a.digest AND p.is_manifest = a.is_manifest LIMIT 1000)"
    " SELECT DISTINCT t.tag FROM above a JOIN tags t"
    " ON t.repository = :repository AND t.digest = a.digest AND a.is_manifest"
    " ORDER BY t.tag LIMIT :limit"
)
_SELECT_BEGINNING: Final = (
    "SELECT digest FROM manifests WHERE repository = ? AND digest >= ? AND digest < ?"
)
_HAS_CONTENT: Final = (
    "SELECT 1 FROM manifests WHERE repository = :repository AND digest = :digest"
    " UNION ALL SELECT 1 FROM blobs WHERE repository = :repository AND digest = :digest"
)
_SELECT_UPLOADS: Final = "SELECT id, repository, user, reserved, started_at FROM uploads"

_USAGE: Final = (
    "SELECT contents, bytes, (SELECT count(*) FROM repositories), (SELECT count(*) FROM uploads),"
    " (SELECT coalesce(sum(reserved), 0) FROM uploads), {metadata} FROM totals"
)


class HostedNames:
    """All that hosted repositories have, in one state of their database, which is open.

    Each call reads it again: 100,000 tags need not be in memory together.
    """

    def __init__(self, query: Query, host: str | None) -> None:
        """Read nothing yet.

        Args:
            query: Runs a query.
            host: The host of hosted repositories in image references. None: the configuration has
                no hosted repositories, so they have no names, and still keep their content.
        """
        self._query = query
        self._host = host

    def names(self) -> Iterator[Name]:
        """Yield tags, and manifests without one, also of content that is lost.

        By repository, then by tag and digest. It takes 0.2 s for 100,000.
        """
        host, path, repository = self._host, None, None
        rows = () if host is None else merge(self._query(_UNTAGGED), self._query(_TAGS))
        for found, tag, text, pushed_at, user in rows:
            if repository is None or found != path:
                path, repository = found, Repository.parse(str(host), found)
            yield Name(
                repository,
                tag=Tag(tag) if tag else None,
                root=text,
                current_root=text,
                first_seen=pushed_at,
                is_hosted=True,
                pushed_by=user,
            )

    def roots(self) -> Iterator[DigestText]:
        """Yield all manifests, also those without a name of their own. Some come again."""
        yield from () if self._host is None else (row[0] for row in self._query(_SELECT_MANIFESTS))

    @cached_property
    def media_types(self) -> Mapping[DigestText, str]:
        """Media types that manifests were pushed with."""
        return {} if self._host is None else dict(self._query(_MEDIA_TYPES))

    @cached_property
    def contents(self) -> frozenset[DigestText]:
        """Content that a hosted repository has. Nothing but a deletion removes it."""
        return frozenset(row[0] for row in self._query("SELECT digest FROM contents"))


@dataclass(frozen=True, slots=True)
class HostedUpload:
    """An upload in progress. Times are seconds since the epoch."""

    id: str
    repository: Repository
    user: str
    """The user who began it. Empty: anonymous."""
    size: int
    """Bytes that have come."""
    reserved: int
    """Bytes that it may reach without another look at the quota."""
    started_at: float
    fed_at: float
    """When the last byte came."""

    def row(self, now: float) -> dict[str, Any]:
        """Return the upload as JSON values. ``now``: seconds since the epoch."""
        return {
            "kind": "upload",
            "id": self.id,
            "repository": str(self.repository),
            "user": self.user or None,
            "size": self.size,
            "reserved": self.reserved,
            "started": time_text(self.started_at),
            "last_byte": time_text(self.fed_at),
            "age": max(0, round(now - self.started_at)),
            "idle": max(0, round(now - self.fed_at)),
        }


def read_hosted_usage(layout: Layout) -> HostedUsage:
    """Return what hosted repositories take up. Raises ``StorageUnavailable``."""
    with _reading(layout) as query:
        for (version,) in query("PRAGMA user_version"):
            # Version 1 has no such sum: the server adds it when it starts.
            for row in query(_USAGE.format(metadata="metadata" if version > 1 else "0")):
                return HostedUsage(*row)
    return HostedUsage(contents=0, bytes=0, repositories=0, uploads=0, reserved=0, metadata=0)


@contextmanager
def open_hosted_names(layout: Layout, host: str | None) -> Iterator[HostedNames]:
    """Open the names, for the block. See :class:`HostedNames`.

    Raises:
        StorageUnavailable: There are such names, and they cannot be read. Also in the block.
    """
    with _reading(layout) as query:
        yield HostedNames(query, host)


def read_hosted_tag(layout: Layout, repository: Repository, tag: Tag) -> DigestText | None:
    """Return the manifest that a tag of a hosted repository names. None: there is no such tag.

    Args:
        layout: The data directory.
        repository: The repository. Its host is not looked at.
        tag: The tag.

    Raises:
        StorageUnavailable: There are hosted names, and they cannot be read.
    """
    with _reading(layout) as query:
        for row in query(_SELECT_TAG, (repository.path, str(tag))):
            return str(row[0])
    return None


def read_manifests_beginning(
    layout: Layout, repository: Repository, beginning: str
) -> list[DigestText]:
    """Return the manifests of a hosted repository whose digest begins so, by an index.

    Args:
        layout: The data directory.
        repository: The repository. Its host is not looked at.
        beginning: The algorithm, a colon, and some digits.

    Raises ``StorageUnavailable``: there are hosted names, and they cannot be read.
    """
    with _reading(layout) as query:
        values = repository.path, beginning, f"{beginning}\x7f"
        return [row[0] for row in query(_SELECT_BEGINNING, values)]


def read_tags_above(
    layout: Layout, repository: Repository, digest: DigestText, limit: int
) -> list[str] | None:
    """Return tags of a hosted repository that need a content. It takes a few queries on indexes.

    Args:
        layout: The data directory.
        repository: The repository. Its host is not looked at.
        digest: A manifest, a platform of an index, or a blob.
        limit: Tags at most.

    Returns the tags, or None if the repository does not have the content.

    Raises:
        StorageUnavailable: There are hosted names, and they cannot be read.
    """
    given = {"repository": repository.path, "digest": digest, "limit": limit}
    with _reading(layout) as query:
        if not list(query(_HAS_CONTENT, given)):
            return None
        return [row[0] for row in query(_SELECT_TAGS_ABOVE, given)]


def read_uploads(layout: Layout, name: str) -> list[HostedUpload]:
    """Return the uploads in progress, the oldest first.

    Args:
        layout: The data directory.
        name: The host of hosted repositories in image references.

    Raises:
        StorageUnavailable: The names cannot be read.
    """
    with _reading(layout) as query:
        rows = list(query(_SELECT_UPLOADS))
    return sorted(_uploads(layout, name, rows), key=lambda upload: (upload.started_at, upload.id))


def _uploads(layout: Layout, name: str, rows: list[Any]) -> Iterator[HostedUpload]:
    for upload_id, path, user, reserved, started_at in rows:
        file = layout.uploads / upload_id
        try:
            status = file.lstat()
        except OSError:  # It ends, or it begins, at this moment.
            continue
        yield HostedUpload(
            id=upload_id,
            repository=Repository.parse(name, path),
            user=user,
            size=status.st_size,
            reserved=reserved,
            started_at=started_at,
            fed_at=status.st_mtime,
        )


@contextmanager
def _reading(layout: Layout) -> Iterator[Query]:
    """Yield a function that runs a query. All are in one state of the database."""
    path = layout.hosted_names
    if not has_hosted_names(layout):
        yield lambda query, values=(): ()
        return
    try:
        with closing(connect_to_read(path)) as database:
            database.execute("BEGIN")
            yield database.execute
    except sqlite3.Error as error:
        raise StorageUnavailable(
            f"{path} cannot be read ({error}): check its permissions; if it is damaged, oci-mirror"
            " doctor says how to restore it"
        ) from None
