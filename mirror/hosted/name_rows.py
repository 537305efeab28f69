"""The rows of the database: which repository has which content, and which tags name it.

Lives here: each query and each change, as a function of a connection. Must not know: threads,
transactions (``database.py``), files.

A repository is its path (``team/app``), without the name of the server, which may change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any, Final

from mirror.hosted.content_row import ContentRow
from mirror.hosted.pushed_manifest import PushedManifest
from mirror.observability.hosted_events import HostedUsage
from mirror.oci.descriptor import referrers_tag
from mirror.oci.errors import PartsUnknown
from mirror.oci.reference import Digest, Reference, Tag
from mirror.store.sqlite_connection import DIGESTS_PER_QUERY

_MAX_SHOWN: Final = 20
"""Missing parts that an error names: it is one line."""
USE_STEP_S: Final = 600.0
"""Seconds between two records of the use of one blob or manifest. Collection waits longer."""


@dataclass(frozen=True, slots=True)
class ManifestRow(ContentRow):
    """A manifest of a repository."""

    pulled_at: float = 0.0
    """Last recorded pull, in seconds since the epoch. Zero: none."""


# --- blobs ----------------------------------------------------------------------------------------


def blob_size(connection: Connection, repository: str, digest: Digest) -> int | None:
    """Return the size of a blob in bytes. None if the repository does not have it."""
    row = connection.execute(
        "SELECT size FROM blobs WHERE repository = ? AND digest = ?", (repository, str(digest))
    ).fetchone()
    return None if row is None else int(row[0])


def add_blob(
    connection: Connection, repository: str, digest: Digest, size: int, now: float
) -> None:
    """Record that a repository has a blob of ``size`` bytes, and that it was used now."""
    connection.execute(
        "INSERT INTO blobs VALUES (?, ?, ?, ?)"
        " ON CONFLICT (repository, digest) DO UPDATE SET used_at = max(used_at, excluded.used_at)",
        (repository, str(digest), size, now),
    )


def mount_blob(
    connection: Connection, source: str, repository: str, digest: Digest, now: float
) -> int | None:
    """Give a repository a blob of another one. Returns its size in bytes. None: there is none."""
    size = blob_size(connection, source, digest)
    if size is not None:
        add_blob(connection, repository, digest, size, now)
    return size


def is_blob_mark_due(connection: Connection, repository: str, digest: Digest, now: float) -> bool:
    """Return whether :func:`mark_blob_used` would record anything: not of a missing blob."""
    row = connection.execute(
        "SELECT 1 FROM blobs WHERE repository = ? AND digest = ? AND used_at < ?",
        (repository, str(digest), now - USE_STEP_S),
    ).fetchone()
    return row is not None


def mark_blob_used(connection: Connection, repository: str, digest: Digest, now: float) -> None:
    """Record that a client has just asked for a blob. It may push a manifest that names it."""
    connection.execute(
        "UPDATE blobs SET used_at = ? WHERE repository = ? AND digest = ? AND used_at < ?",
        (now, repository, str(digest), now - USE_STEP_S),
    )


def is_needed_blob(connection: Connection, repository: str, digest: Digest, since: float) -> bool:
    """Return whether a manifest lists a blob, or it was used after ``since``."""
    row = connection.execute(
        "SELECT 1 FROM unnamed_blobs WHERE repository = ? AND digest = ? AND used_at < ?",
        (repository, str(digest), since),
    ).fetchone()
    return row is None


def delete_blob(connection: Connection, repository: str, digest: Digest) -> int | None:
    """Delete a blob. Returns its size in bytes. None if the repository does not have it."""
    size = blob_size(connection, repository, digest)
    connection.execute(
        "DELETE FROM blobs WHERE repository = ? AND digest = ?", (repository, str(digest))
    )
    return size


# --- manifests and tags ---------------------------------------------------------------------------

# A manifest or a blob, and all manifests above it. CROSS JOIN keeps the order: upwards.
_ABOVE: Final = (
    "WITH RECURSIVE above (digest, is_manifest) AS (VALUES (:digest, :is_manifest)"
    " UNION SELECT p.manifest, 1 FROM above a CROSS JOIN parts p"
    " ON p.repository = :repository AND p.digest = a.digest AND p.is_manifest = a.is_manifest)"
)
IS_TAG_OF_SUBJECT: Final = (
    "(tag >= :subject_tag AND tag < :subject_tag || '/'"
    " AND substr(tag, length(:subject_tag) + 1, 1) <> '-')"
)
"""Condition on tags that belong to a subject: ``:subject_tag``, or that with a point and an ending.

``:subject_tag`` is the ``referrers_tag`` of the subject. Of the characters of tags, only the hyphen
and the point come before the slash, so the first line is a range of the primary key."""
_MANIFEST: Final = (
    "SELECT m.repository, m.digest, m.media_type, m.size, m.pulled_at FROM manifests m"
)


def _manifest_row(row: Any) -> ManifestRow | None:
    return None if row is None else ManifestRow(row[0], Digest.parse(row[1]), *row[2:])


def manifest_by_digest(
    connection: Connection, repository: str, digest: Digest
) -> ManifestRow | None:
    """Return a manifest of a repository. None if the repository does not have it."""
    row = connection.execute(
        f"{_MANIFEST} WHERE m.repository = ? AND m.digest = ?",
        (repository, str(digest)),
    ).fetchone()
    return _manifest_row(row)


def manifest_by_tag(connection: Connection, repository: str, tag: Tag) -> ManifestRow | None:
    """Return the manifest that a tag names. None if the repository has no such tag."""
    row = connection.execute(
        f"{_MANIFEST} JOIN tags t ON t.repository = m.repository AND t.digest = m.digest"
        " WHERE t.repository = ? AND t.tag = ?",
        (repository, str(tag)),
    ).fetchone()
    return _manifest_row(row)


def check_parts(
    connection: Connection, repository: str, manifest: PushedManifest, *, may_be_sparse: bool
) -> None:
    """Check that a repository has all that a manifest refers to.

    Args:
        connection: The database.
        repository: The repository that the manifest is pushed to.
        manifest: The manifest.
        may_be_sparse: Manifests that an index lists may be missing.

    Raises:
        PartsUnknown: Something is missing. The detail names it.
    """
    missing = _missing(connection, "blobs", repository, manifest.required_blobs)
    if not may_be_sparse:
        missing += _missing(connection, "manifests", repository, manifest.children)
    if missing:
        raise parts_unknown(
            f"the repository does not have {len(missing)} of the parts of this manifest", missing
        )


def parts_unknown(why: str, parts: Sequence[str]) -> PartsUnknown:
    """Return the refusal of a manifest because of some of its parts, which the detail names."""
    return PartsUnknown(f"{why}: push them first", detail=", ".join(parts[:_MAX_SHOWN]))


def content_sizes(
    connection: Connection, repository: str, digests: Iterable[Digest]
) -> dict[Digest, int]:
    """Return the bytes of those of ``digests`` that a repository has."""
    query = " UNION ".join(
        f"SELECT t.digest, t.size FROM json_each(:digests) n CROSS JOIN {table} t"  # noqa: S608 - our own table names
        " ON t.repository = :repository AND t.digest = n.value"
        for table in ("blobs", "manifests")
    )
    names = json.dumps([str(digest) for digest in digests])
    rows = connection.execute(query, {"repository": repository, "digests": names})
    return {Digest.parse(row[0]): row[1] for row in rows}


def _missing(
    connection: Connection, table: str, repository: str, digests: Iterable[Digest]
) -> list[str]:
    wanted = list(dict.fromkeys(map(str, digests)))
    missing: list[str] = []
    for start in range(0, len(wanted), DIGESTS_PER_QUERY):
        step = wanted[start : start + DIGESTS_PER_QUERY]
        marks = ",".join("?" * len(step))
        rows = connection.execute(
            f"SELECT digest FROM {table} WHERE repository = ? AND digest IN ({marks})",  # noqa: S608 - our own table names
            (repository, *step),
        )
        found = {row[0] for row in rows}
        missing += [digest for digest in step if digest not in found]
    return missing


def add_manifest(
    connection: Connection,
    repository: str,
    manifest: PushedManifest,
    tags: Sequence[Tag],
    now: float,
    user: str,
) -> None:
    """Record a manifest of a repository, and let ``tags`` name it.

    Args:
        connection: The database.
        repository: The repository.
        manifest: The manifest. Its bytes are durable.
        tags: Tags that name it from now on.
        now: Seconds since the epoch.
        user: The user who pushes it. Empty: anonymous.
    """
    digest = str(manifest.digest)
    added = connection.execute(
        "INSERT INTO manifests (repository, digest, media_type, artifact_type, subject, size,"
        " annotations, pushed_at, pushed_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (repository, digest) DO NOTHING",
        (
            *(repository, digest, manifest.media_type, manifest.artifact_type),
            *("" if manifest.subject is None else str(manifest.subject), manifest.size),
            *(dump_annotations(manifest.annotations), now, user),
        ),
    )
    if not added.rowcount:
        # The same bytes may be pushed again with another type, as which they may have more parts.
        connection.execute(
            "UPDATE manifests SET pushed_by = CASE media_type WHEN :type THEN pushed_by ELSE :user"
            " END, media_type = :type, pushed_at = max(pushed_at, :now)"
            " WHERE repository = :repository AND digest = :digest",
            {
                "type": manifest.media_type,
                "user": user,
                "now": now,
                "repository": repository,
                "digest": digest,
            },
        )
    add_parts(connection, repository, manifest)
    # Its children and referrers are no orphans any more.
    connection.executemany(
        "UPDATE manifests SET orphaned_at = 0"
        " WHERE repository = ? AND digest = ? AND orphaned_at > 0",
        [(repository, str(one)) for one in (digest, *manifest.children)],
    )
    connection.execute(
        "UPDATE manifests SET orphaned_at = 0"
        " WHERE repository = ? AND subject = ? AND subject <> '' AND orphaned_at > 0",
        (repository, digest),
    )
    connection.execute(
        "UPDATE manifests SET orphaned_at = 0 WHERE repository = :repository AND digest IN"  # noqa: S608 - our own text
        f" (SELECT digest FROM tags WHERE repository = :repository AND {IS_TAG_OF_SUBJECT})"
        " AND orphaned_at > 0",
        {"repository": repository, "subject_tag": referrers_tag(manifest.digest)},
    )
    for tag in tags:
        set_tag(connection, repository, tag, manifest.digest, now, user)


def set_tag(
    connection: Connection, repository: str, tag: Tag, digest: Digest, pushed_at: float, user: str
) -> None:
    """Let a tag name a manifest that the repository has. It is no orphan any more.

    Args:
        connection: The database.
        repository: The repository.
        tag: The tag.
        digest: The manifest.
        pushed_at: When the tag was pushed, in seconds since the epoch.
        user: Who has pushed it. Empty: anonymous.
    """
    connection.execute(
        "INSERT INTO tags VALUES (?, ?, ?, ?, ?) ON CONFLICT (repository, tag) DO UPDATE SET"
        " digest = excluded.digest, pushed_at = excluded.pushed_at, pushed_by = excluded.pushed_by",
        (repository, str(tag), str(digest), pushed_at, user),
    )
    connection.execute(
        "UPDATE manifests SET orphaned_at = 0"
        " WHERE repository = ? AND digest = ? AND orphaned_at > 0",
        (repository, str(digest)),
    )


def add_parts(connection: Connection, repository: str, manifest: PushedManifest) -> None:
    """Record what a manifest of a repository refers to, except its subject."""
    connection.executemany(
        "INSERT INTO parts VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [
            (repository, str(manifest.digest), str(part), is_manifest)
            for is_manifest, parts in ((True, manifest.children), (False, manifest.blobs))
            for part in parts
        ],
    )


def dump_annotations(annotations: dict[str, str]) -> str:
    """Return annotations as ``manifests`` has them, and a list of referrers shows them."""
    # Not escaped: an entry of a list of referrers has no more bytes than its manifest.
    return json.dumps(annotations, separators=(",", ":"), ensure_ascii=False)


def tags_above(
    connection: Connection, repository: str, digest: Digest, *, is_manifest: bool
) -> Iterator[str]:
    """Yield the tags whose image has a manifest, or a blob: tags of it, or of one that lists it.

    The nearest come first, and no more rows are read than are asked for.

    Args:
        connection: The database.
        repository: The repository.
        digest: The manifest or the blob.
        is_manifest: Which of both. The same bytes may be both, of different images.
    """
    rows = connection.execute(
        f"{_ABOVE} SELECT t.tag FROM above a CROSS JOIN tags t"  # noqa: S608 - our own text
        " ON t.repository = :repository AND t.digest = a.digest AND a.is_manifest",
        {"repository": repository, "digest": str(digest), "is_manifest": is_manifest},
    )
    return (row[0] for row in rows)


def mark_manifest_used(
    connection: Connection, repository: str, reference: Reference, now: float
) -> None:
    """Record that a client has pulled a manifest, or may be about to push an index of it.

    It is a use of each index that lists the manifest, too: clients that know the digest of a
    platform's manifest do not ask for the index.
    """
    digest = (
        str(reference)
        if isinstance(reference, Digest)
        else connection.execute(
            "SELECT max(digest) FROM tags WHERE repository = ? AND tag = ?",
            (repository, str(reference)),
        ).fetchone()[0]
    )
    connection.execute(
        f"{_ABOVE} UPDATE manifests SET pulled_at = :now WHERE repository = :repository"  # noqa: S608 - our own text
        " AND digest IN (SELECT digest FROM above) AND pulled_at < :since",
        {
            "repository": repository,
            "digest": digest,
            "is_manifest": True,
            "now": now,
            "since": now - USE_STEP_S,
        },
    )


def delete_manifest(connection: Connection, repository: str, digest: Digest) -> ManifestRow | None:
    """Delete a manifest, and the tags that name it. None if the repository does not have it."""
    row = manifest_by_digest(connection, repository, digest)
    connection.execute(
        "DELETE FROM manifests WHERE repository = ? AND digest = ?", (repository, str(digest))
    )
    return row


def delete_tag(connection: Connection, repository: str, tag: Tag) -> ManifestRow | None:
    """Delete a tag. Returns its manifest, which stays; None if the repository has no such tag."""
    row = manifest_by_tag(connection, repository, tag)
    connection.execute("DELETE FROM tags WHERE repository = ? AND tag = ?", (repository, str(tag)))
    return row


# --- lists ----------------------------------------------------------------------------------------


def has_repository(connection: Connection, repository: str) -> bool:
    """Return whether a repository has any content."""
    query = "SELECT 1 FROM repositories WHERE name = ?"
    return connection.execute(query, (repository,)).fetchone() is not None


def tags_page(connection: Connection, repository: str, count: int, last: str) -> list[str]:
    """Return at most ``count`` tags after ``last``, in the order of their bytes."""
    rows = connection.execute(
        "SELECT tag FROM tags WHERE repository = ? AND tag > ? ORDER BY tag LIMIT ?",
        (repository, last, count),
    )
    return [row[0] for row in rows]


def repositories_page(connection: Connection, count: int, last: str) -> list[str]:
    """Return at most ``count`` repositories after ``last`` that have a manifest, in order."""
    rows = connection.execute(
        "SELECT name FROM repositories WHERE name > ? AND manifests > 0 ORDER BY name LIMIT ?",
        (last, count),
    )
    return [row[0] for row in rows]


# --- all repositories -----------------------------------------------------------------------------


def usage(connection: Connection) -> HostedUsage:
    """Return what all hosted repositories, and the uploads to them, take up."""
    row = connection.execute(
        "SELECT contents, bytes, (SELECT count(*) FROM repositories),"
        " (SELECT count(*) FROM uploads), (SELECT coalesce(sum(reserved), 0) FROM uploads),"
        " metadata FROM totals"
    ).fetchone()
    return HostedUsage(*row)
