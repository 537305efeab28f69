"""Rows that nothing needs any more: which they are, and their deletion.

Lives here: each query and each change, as a function of a connection. Must not know: threads, time,
files.

A blob is needed while a manifest of its repository lists it as a blob (``parts``). The same bytes
may be a manifest of the repository, too: that is a row of its own, and belongs to the indexes that
list it as a manifest. A manifest stays until told, also without a tag. It is *orphaned* once a rule
has removed its last tag, or a deletion has removed the index or the subject that it belonged to. An
orphaned manifest is needed again if a tag, an index or its subject is pushed.

The grace time counts from the moment from which nothing needs a row, or from its last use after
that: of a manifest from when it was orphaned, of a blob from the deletion of the last manifest that
listed it (:func:`delete_and_orphan` records a use). What only an orphan lists has waited with it,
and goes in the same collection.

A tag such as ``sha256-<hex>.sig`` names the subject of its manifest
(:func:`mirror.oci.descriptor.parse_referrers_tag`). Such a manifest stays as one with a subject
does: the tag keeps it until it is orphaned, and goes with it. It stays if the tag is immutable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Final, TypeAlias

from mirror.hosted import name_rows
from mirror.hosted.content_row import ContentRow
from mirror.hosted.name_rows import IS_TAG_OF_SUBJECT, USE_STEP_S, ManifestRow
from mirror.oci.descriptor import referrers_tag
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest

IsProtected: TypeAlias = Callable[[Connection, ContentRow], bool]
"""Returns whether a manifest stays, although nothing else needs it: that of an immutable tag."""


@dataclass(frozen=True, slots=True)
class GarbageRow(ContentRow):
    """A blob or a manifest of a repository that nothing needs."""

    is_manifest: bool


MAX_PUSH_S: Final = 86400.0
"""Seconds (one day) for which the layers of a push stay after the grace time while clients push to
the repository: its manifest comes last."""


@dataclass(frozen=True, slots=True)
class Cutoff:
    """Until when a row must have been unused to go now."""

    at: float
    """Seconds since the epoch."""
    pushed_to: frozenset[str] = frozenset()
    """Repositories that clients push to. Their blobs stay for a day longer: a push may send another
    layer for longer than the grace time, and names all of them at its end."""

    @classmethod
    def of(cls, now: float, grace: float) -> Cutoff:
        """Return the cutoff of a collection.

        A use is recorded only once in :data:`USE_STEP_S`, so that is added to ``grace`` (seconds).
        """
        return cls(now - grace - USE_STEP_S)

    def of_blobs(self, repository: str) -> float:
        """Return the time before which the last use of a blob of a repository must have been."""
        return self.at - (MAX_PUSH_S if repository in self.pushed_to else 0.0)


def repositories_with_uses(connection: Connection, since: float) -> set[str]:
    """Return the repositories of which clients have pushed, mounted, asked for or released a blob.

    ``since``: seconds since the epoch.
    """
    query = "SELECT DISTINCT repository FROM blobs WHERE used_at >= ?"
    return {row[0] for row in connection.execute(query, (since,))}


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


def delete_and_orphan(
    connection: Connection, repository: str, digest: Digest, at: float
) -> ManifestRow | None:
    """Delete a manifest as told, with its tags. The grace time of all that it needed begins.

    A collection does not call this: the parts of an orphan have waited with it.

    Args:
        connection: The database.
        repository: The repository.
        digest: The manifest.
        at: Seconds since the epoch.

    Returns:
        What was deleted. None if the repository does not have it.
    """
    orphan_dependents(connection, repository, digest, at)
    # Also of blobs that another manifest lists: that one may have been an orphan for long.
    connection.execute(
        "UPDATE blobs SET used_at = :at WHERE repository = :repository AND used_at < :since"
        " AND digest IN (SELECT digest FROM parts WHERE repository = :repository"
        " AND manifest = :digest AND is_manifest = 0)",
        {"repository": repository, "digest": str(digest), "at": at, "since": at - USE_STEP_S},
    )
    return name_rows.delete_manifest(connection, repository, digest)


# --- collection -----------------------------------------------------------------------------------


def find_garbage_manifests(connection: Connection, cutoff: Cutoff, count: int) -> list[GarbageRow]:
    """Return at most ``count`` orphaned manifests that nothing has used since ``cutoff``."""
    rows = connection.execute(
        "SELECT repository, digest, media_type, size FROM orphans WHERE orphaned_at < :cutoff"
        " AND max(pushed_at, pulled_at) < :cutoff ORDER BY repository, digest LIMIT :count",
        {"cutoff": cutoff.at, "count": count},
    )
    return [
        GarbageRow(row[0], Digest.parse(row[1]), row[2], row[3], is_manifest=True) for row in rows
    ]


def find_garbage_blobs(
    connection: Connection, cutoff: Cutoff, count: int, after: GarbageRow | None
) -> list[GarbageRow]:
    """Return at most ``count`` blobs that no manifest of their repository lists, in order.

    None of them was used since the cutoff. They begin after the blob ``after``.
    """
    rows = connection.execute(
        "SELECT repository, digest, size FROM unnamed_blobs"
        " WHERE (repository, digest) > (:repository, :digest) AND used_at < CASE"
        " WHEN repository IN (SELECT value FROM json_each(:pushed_to)) THEN :earlier"
        " ELSE :cutoff END ORDER BY repository, digest LIMIT :count",
        {
            "repository": "" if after is None else after.repository,
            "digest": "" if after is None else str(after.digest),
            "pushed_to": json.dumps(sorted(cutoff.pushed_to)),
            "earlier": cutoff.at - MAX_PUSH_S,
            "cutoff": cutoff.at,
            "count": count,
        },
    )
    return [
        GarbageRow(row[0], Digest.parse(row[1]), OCTET_STREAM, row[2], is_manifest=False)
        for row in rows
    ]


def delete_garbage(
    connection: Connection, rows: Sequence[GarbageRow], cutoff: Cutoff, is_protected: IsProtected
) -> list[GarbageRow]:
    """Delete rows that are still garbage. Returns them.

    Protected manifests are unmarked as orphans: otherwise each collection would find them again.

    It is decided here, in the transaction that deletes them. A manifest that is pushed at the same
    time has either committed the rows of its parts, or is refused since a part is gone.

    Args:
        connection: The database.
        rows: The rows.
        cutoff: Until when they must have been unused.
        is_protected: See :data:`IsProtected`.
    """
    deleted = []
    for row in rows:
        values: dict[str, object] = {
            "repository": row.repository,
            "digest": str(row.digest),
            "cutoff": cutoff.at,
        }
        if not row.is_manifest:
            values["cutoff"] = cutoff.of_blobs(row.repository)
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
