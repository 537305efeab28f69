"""Rows that nothing needs any more: which they are, and their deletion.

Lives here: each query and each change, as a function of a connection. Must not know: threads, time,
files.

A blob is needed while a manifest of its repository lists it as a blob (``parts``). The same bytes
may be a manifest of the repository, too: that is a row of its own, and belongs to the indexes that
list it as a manifest. A manifest stays until told, also without a tag. It is *orphaned* once a rule
has removed its last tag, or a deletion has removed the index or the subject that it belonged to. An
orphaned manifest is needed again if a tag, an index or its subject is pushed.

A tag such as ``sha256-<hex>.sig`` names the subject of its manifest
(:func:`mirror.oci.descriptor.parse_referrers_tag`). Such a manifest stays as one with a subject
does: the tag keeps it until it is orphaned, and goes with it. It stays if the tag is immutable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import TypeAlias

from mirror.hosted import name_rows
from mirror.hosted.content_row import ContentRow
from mirror.hosted.name_rows import IS_TAG_OF_SUBJECT, USE_STEP_S
from mirror.oci.descriptor import referrers_tag
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest

IsProtected: TypeAlias = Callable[[Connection, ContentRow], bool]
"""Returns whether a manifest stays, although nothing else needs it: that of an immutable tag."""


@dataclass(frozen=True, slots=True)
class NeedlessRow(ContentRow):
    """A blob or a manifest of a repository that nothing needs."""

    is_manifest: bool


def cutoff_of(now: float, grace: float) -> float:
    """Return the latest ``used_at`` (seconds since the epoch) at which an unused row may go now.

    A use is recorded only once in :data:`USE_STEP_S`, so that is added to ``grace`` (seconds).
    """
    return now - grace - USE_STEP_S


# --- orphans --------------------------------------------------------------------------------------


def orphan_dependents(connection: Connection, repository: str, digest: Digest, at: float) -> None:
    """Call before a manifest is deleted: orphan the manifests that belong to no other one.

    These are the manifests that it lists, its referrers, and those with a tag that says so. Those
    with another tag are not orphaned.

    Args:
        connection: The database.
        repository: The repository.
        digest: The manifest that is deleted.
        at: The time from which they are orphans, in seconds since the epoch.
    """
    connection.execute(
        "UPDATE manifests AS m SET orphaned_at = :at"  # noqa: S608 - our own text
        " WHERE m.repository = :repository AND m.orphaned_at = 0 AND m.digest IN ("
        " SELECT digest FROM parts WHERE repository = :repository AND manifest = :digest"
        " AND is_manifest = 1"
        " UNION SELECT digest FROM manifests WHERE repository = :repository"
        " AND subject = :digest AND subject <> ''"
        f" UNION SELECT digest FROM tags WHERE repository = :repository AND {IS_TAG_OF_SUBJECT})"
        " AND NOT EXISTS"
        " (SELECT 1 FROM tags WHERE repository = m.repository AND digest = m.digest"
        f" AND NOT ({IS_TAG_OF_SUBJECT}))"
        " AND NOT EXISTS (SELECT 1 FROM parts p WHERE p.repository = m.repository"
        " AND p.digest = m.digest AND p.is_manifest = 1 AND p.manifest <> :digest)",
        {
            "repository": repository,
            "digest": str(digest),
            "subject_tag": referrers_tag(digest),
            "at": at,
        },
    )


def mark_orphan(connection: Connection, repository: str, digest: Digest, at: float) -> bool:
    """Orphan a manifest, unless a tag or an index names it. Returns whether it is an orphan now.

    Args:
        connection: The database.
        repository: The repository.
        digest: The manifest.
        at: The time from which it is an orphan, in seconds since the epoch.
    """
    orphaned = connection.execute(
        "UPDATE manifests SET orphaned_at = CASE orphaned_at WHEN 0 THEN :at ELSE orphaned_at END"
        " WHERE repository = :repository AND digest = (SELECT digest FROM unnamed_manifests"
        " WHERE repository = :repository AND digest = :digest)",
        {"repository": repository, "digest": str(digest), "at": at},
    )
    return orphaned.rowcount > 0


# --- collection -----------------------------------------------------------------------------------


def needless_manifests(connection: Connection, cutoff: float, count: int) -> list[NeedlessRow]:
    """Return at most ``count`` orphaned manifests that nothing has used since ``cutoff``."""
    rows = connection.execute(
        "SELECT repository, digest, media_type, size FROM orphans WHERE orphaned_at < :cutoff"
        " AND max(pushed_at, pulled_at) < :cutoff ORDER BY repository, digest LIMIT :count",
        {"cutoff": cutoff, "count": count},
    )
    return [
        NeedlessRow(row[0], Digest.parse(row[1]), row[2], row[3], is_manifest=True) for row in rows
    ]


def needless_blobs(
    connection: Connection, cutoff: float, count: int, after: NeedlessRow | None
) -> list[NeedlessRow]:
    """Return at most ``count`` blobs after ``after`` that no manifest of their repository names."""
    last = ("", "") if after is None else (after.repository, str(after.digest))
    rows = connection.execute(
        "SELECT repository, digest, size FROM unnamed_blobs"
        " WHERE (repository, digest) > (?, ?) AND used_at < ? ORDER BY repository, digest LIMIT ?",
        (*last, cutoff, count),
    )
    return [
        NeedlessRow(row[0], Digest.parse(row[1]), OCTET_STREAM, row[2], is_manifest=False)
        for row in rows
    ]


def delete_needless(
    connection: Connection, rows: Sequence[NeedlessRow], cutoff: float, is_protected: IsProtected
) -> list[NeedlessRow]:
    """Delete rows that are still needless. Returns them. Protected manifests are no orphans then.

    It is decided here, in the transaction that deletes them. A manifest that is pushed at the same
    time has either committed the rows of its parts, or is refused since a part is gone.

    Args:
        connection: The database.
        rows: The rows.
        cutoff: See :func:`cutoff_of`.
        is_protected: See :data:`IsProtected`.
    """
    deleted = []
    for row in rows:
        values = {"repository": row.repository, "digest": str(row.digest), "cutoff": cutoff}
        if not row.is_manifest:
            found = connection.execute(
                "DELETE FROM blobs WHERE repository = :repository AND digest ="
                " (SELECT digest FROM unnamed_blobs WHERE repository = :repository"
                " AND digest = :digest AND used_at < :cutoff)",
                values,
            )
            if found.rowcount:
                deleted.append(row)
            continue
        if is_protected(connection, row):
            # Otherwise each collection would find it again.
            connection.execute(
                "UPDATE manifests SET orphaned_at = 0"
                " WHERE repository = :repository AND digest = :digest",
                {"repository": row.repository, "digest": str(row.digest)},
            )
            continue
        orphaned = connection.execute(
            "SELECT orphaned_at FROM orphans WHERE repository = :repository AND digest = :digest"
            " AND orphaned_at < :cutoff AND max(pushed_at, pulled_at) < :cutoff",
            values,
        ).fetchone()
        if orphaned is not None:
            # What belonged to it has been without a name for as long.
            orphan_dependents(connection, row.repository, row.digest, orphaned[0])
            name_rows.delete_manifest(connection, row.repository, row.digest)
            deleted.append(row)
    return deleted


# --- files of content that no repository has any more ---------------------------------------------


def released_digests(connection: Connection, count: int) -> list[Digest]:
    """Return at most ``count`` contents that no repository has any more."""
    rows = connection.execute("SELECT digest FROM released LIMIT ?", (count,))
    return [Digest.parse(row[0]) for row in rows]


def forget_released(connection: Connection, digests: Sequence[Digest]) -> None:
    """Forget contents of :func:`released_digests`: their files are gone, or are cache now."""
    connection.executemany(
        "DELETE FROM released WHERE digest = ?", [(str(digest),) for digest in digests]
    )
