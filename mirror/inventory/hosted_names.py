"""The names of hosted repositories, and their running uploads, from a data directory.

Lives here: reading ``hosted/names.db`` without opening it for writing, beside a server. Must not
know: who pushes, how a name is removed (:mod:`mirror.hosted` does both).

The queries name their columns, so they also read a database that a later version has extended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from mirror.inventory.image_names import Name
from mirror.inventory.model import DigestText
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Repository, Tag
from mirror.oci.text import time_text
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect_to_read

_TAGS: Final = (
    "SELECT t.repository, t.tag, t.digest, t.pushed_at, t.pushed_by FROM tags t"
    " ORDER BY t.repository, t.tag"
)
_SELECT_TAG: Final = "SELECT digest FROM tags WHERE repository = ? AND tag = ?"
_UNTAGGED: Final = "SELECT repository, '', digest, pushed_at, pushed_by FROM unnamed_manifests"
_SELECT_UPLOADS: Final = "SELECT id, repository, user, reserved, started_at FROM uploads"

_USAGE: Final = (
    "SELECT contents, bytes, (SELECT count(*) FROM repositories), (SELECT count(*) FROM uploads),"
    " (SELECT coalesce(sum(reserved), 0) FROM uploads) FROM totals"
)


@dataclass(frozen=True, slots=True)
class HostedNames:
    """All that hosted repositories have. Empty: there are none."""

    names: list[Name] = field(default_factory=list)
    """Tags, and manifests without one, also of content that is lost."""
    media_types: Mapping[DigestText, str] = field(default_factory=dict)
    """Media types that manifests were pushed with."""
    contents: frozenset[DigestText] = frozenset()
    """Content that a hosted repository has. Nothing but a deletion removes it."""


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


@dataclass(frozen=True, slots=True)
class QuotaUsage:
    """The use of the quota of hosted repositories. All sizes are bytes."""

    contents: int
    """Number of contents. One that several repositories have counts once."""
    bytes: int
    repositories: int
    uploads: int
    """Number of uploads in progress."""
    reserved: int
    """Bytes that uploads have reserved."""


def read_hosted_usage(layout: Layout) -> QuotaUsage:
    """Return what hosted repositories take up. Raises ``StorageUnavailable``."""
    with _reading(layout) as query:
        for row in query(_USAGE):
            return QuotaUsage(*row)
    return QuotaUsage(contents=0, bytes=0, repositories=0, uploads=0, reserved=0)


def read_hosted_names(layout: Layout, name: str | None) -> HostedNames:
    """Read the names. It takes 0.1 s with 10,000 tags and 100,000 contents.

    Args:
        layout: The data directory.
        name: The host of hosted repositories in image references. None: the configuration has no
            hosted repositories, so they have no names, and still keep their content.

    Raises:
        StorageUnavailable: There are such names, and they cannot be read.
    """
    names: list[Name] = []
    media_types: dict[DigestText, str] = {}
    with _reading(layout) as query:
        contents = frozenset(row[0] for row in query("SELECT digest FROM contents"))
        if name is not None and contents:
            repositories: dict[str, Repository] = {}
            for path, tag, text, pushed_at, user in (*query(_TAGS), *query(_UNTAGGED)):
                if path not in repositories:
                    repositories[path] = Repository.parse(name, path)
                names.append(
                    Name(
                        repositories[path],
                        tag=Tag(tag) if tag else None,
                        root=text,
                        current_root=text,
                        first_seen=pushed_at,
                        is_hosted=True,
                        pushed_by=user,
                    )
                )
            media_types.update(query("SELECT digest, media_type FROM manifests"))
    return HostedNames(names=names, media_types=media_types, contents=contents)


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
        for row in query(_SELECT_TAG, repository.path, str(tag)):
            return str(row[0])
    return None


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
def _reading(layout: Layout) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a function that runs a query, all in one state of the database. None: no rows."""
    path = layout.hosted_names
    if not has_hosted_names(layout):
        yield lambda query, *values: ()
        return
    try:
        with closing(connect_to_read(path)) as database:
            database.execute("BEGIN")
            yield lambda query, *values: database.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise StorageUnavailable(
            f"{path} cannot be read ({error}): check its permissions; if it is damaged, oci-mirror"
            " doctor says how to restore it"
        ) from None
