"""What rules of retention look at, and what they change.

Lives here: each query and each change, as a function of a connection. Must not know: the rules.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from sqlite3 import Connection

from mirror.hosted import collection_rows
from mirror.hosted.content_row import ContentRow
from mirror.oci.descriptor import parse_referrers_tag
from mirror.oci.reference import Digest, Tag


@dataclass(frozen=True, slots=True)
class HostedImageRow(ContentRow):
    """A tag, or a manifest that no tag and no index names. Times are seconds since the epoch."""

    pushed_at: float
    pulled_at: float
    """Zero: never."""
    tag: Tag | None = None


def tagged_images(connection: Connection) -> list[HostedImageRow]:
    """Return the tags of all repositories, in order, without those that belong to a subject.

    A signature goes with its subject, and not by a rule.
    """
    rows = connection.execute(
        "SELECT t.repository, m.digest, m.media_type, m.size, t.pushed_at, m.pulled_at, t.tag"
        " FROM tags t JOIN manifests m ON m.repository = t.repository AND m.digest = t.digest"
        " ORDER BY t.repository, t.tag"
    )
    return [
        HostedImageRow(row[0], Digest.parse(row[1]), row[2], row[3], row[4], row[5], Tag(row[6]))
        for row in rows
        if parse_referrers_tag(row[6]) is None
    ]


def untagged_images(connection: Connection) -> list[HostedImageRow]:
    """Return the manifests that nothing names. Those with a subject, and orphans, are none of them.

    Manifests with a subject go with it, and orphans are about to go.
    """
    rows = connection.execute(
        "SELECT repository, digest, media_type, size, pushed_at, pulled_at FROM unnamed_manifests"
        " WHERE subject = '' AND orphaned_at = 0 ORDER BY repository, digest"
    )
    return [HostedImageRow(row[0], Digest.parse(row[1]), *row[2:]) for row in rows]


def owners_of(connection: Connection, children: Collection[Digest]) -> set[tuple[str, Digest]]:
    """Return (repository, index) of all indexes that list one of the manifests ``children``."""
    rows = connection.execute(
        "SELECT DISTINCT repository, manifest FROM parts"
        " WHERE is_manifest = 1 AND digest IN (SELECT value FROM json_each(?))",
        (json.dumps([str(one) for one in children]),),
    )
    return {(row[0], Digest.parse(row[1])) for row in rows}


def remove_unchanged(
    connection: Connection, rows: Iterable[HostedImageRow], now: float
) -> list[HostedImageRow]:
    """Remove images that are as they were when they were chosen. Returns them.

    A tag goes at once. Its manifest becomes an orphan, unless something else names it, and so does
    a manifest without a tag: a collection removes it.

    Args:
        connection: The database.
        rows: The images.
        now: Seconds since the epoch.
    """
    removed = []
    for row in rows:
        digest = str(row.digest)
        pulled = connection.execute(
            "SELECT 1 FROM manifests WHERE repository = ? AND digest = ? AND pulled_at = ?",
            (row.repository, digest, row.pulled_at),
        ).fetchone()
        if pulled is None:
            continue
        if row.tag is None:
            if collection_rows.mark_orphan(connection, row.repository, row.digest, now):
                removed.append(row)
            continue
        deleted = connection.execute(
            "DELETE FROM tags WHERE repository = ? AND tag = ? AND digest = ? AND pushed_at = ?",
            (row.repository, str(row.tag), digest, row.pushed_at),
        )
        if deleted.rowcount:
            collection_rows.mark_orphan(connection, row.repository, row.digest, now)
            removed.append(row)
    return removed
