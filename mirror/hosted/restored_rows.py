"""What a restore records.

Lives here: each change, as a function of a connection. Must not know: where content comes from.
"""

from __future__ import annotations

import json
from sqlite3 import Connection

from mirror.config.settings import Hosted
from mirror.hosted import name_rows, upload_rows
from mirror.hosted.pushed_manifest import PushedManifest
from mirror.hosted.snapshot import SavedManifest
from mirror.oci.reference import Digest, Tag


def may_set_tag(connection: Connection, repository: str, tag: Tag, digest: Digest) -> bool:
    """Return whether a tag names this manifest, or none.

    Args:
        connection: The database.
        repository: The repository.
        tag: The tag.
        digest: The manifest.
    """
    current = name_rows.manifest_by_tag(connection, repository, tag)
    return current is None or current.digest == digest


def has_manifest(connection: Connection, repository: str, digest: Digest) -> bool:
    """Return whether a repository has a manifest.

    Args:
        connection: The database.
        repository: The repository.
        digest: The manifest.
    """
    return name_rows.manifest_by_digest(connection, repository, digest) is not None


def restore_blob(
    connection: Connection, repository: str, digest: Digest, size: int, now: float, hosted: Hosted
) -> None:
    """Record that a repository has a blob. Raises ``QuotaExceeded``.

    Args:
        connection: The database.
        repository: The repository.
        digest: The blob. Its content is durable, or it was lost when the row was saved.
        size: Its bytes.
        now: Seconds since the epoch.
        hosted: The quota.
    """
    name_rows.add_blob(connection, repository, digest, size, now)
    upload_rows.check_quota(connection, repository, hosted)


def restore_manifest(
    connection: Connection,
    repository: str,
    manifest: PushedManifest,
    now: float,
    hosted: Hosted,
) -> None:
    """Record a manifest of a layout of another program. An index may lack manifests.

    Args:
        connection: The database.
        repository: The repository.
        manifest: The manifest. Its content is durable.
        now: Seconds since the epoch.
        hosted: The quota.

    Raises:
        PartsUnknown: The repository does not have a blob of it.
        QuotaExceeded: The quota is used up.
    """
    name_rows.check_parts(connection, repository, manifest, may_be_sparse=True)
    name_rows.add_manifest(connection, repository, manifest, [], now, "")
    upload_rows.check_quota(connection, repository, hosted)


def restore_saved_manifest(
    connection: Connection, row: SavedManifest, manifest: PushedManifest, hosted: Hosted
) -> None:
    """Record a manifest as it was when it was saved. Its parts may be missing, as they were.

    One that is here already keeps its later times, and is no orphan if it was none.

    Args:
        connection: The database.
        row: The saved row.
        manifest: The same manifest. Its content is durable.
        hosted: The quota.

    Raises ``QuotaExceeded``.
    """
    connection.execute(
        "INSERT INTO manifests (repository, digest, media_type, artifact_type, subject, size,"
        " annotations, pushed_at, pushed_by, pulled_at, orphaned_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, digest) DO UPDATE SET"
        " media_type = excluded.media_type, artifact_type = excluded.artifact_type,"
        " pushed_at = max(pushed_at, excluded.pushed_at),"
        " pulled_at = max(pulled_at, excluded.pulled_at),"
        " orphaned_at = min(orphaned_at, excluded.orphaned_at)",
        (
            *(row.repository, str(row.digest), manifest.media_type, manifest.artifact_type),
            *("" if manifest.subject is None else str(manifest.subject), manifest.size),
            json.dumps(manifest.annotations, separators=(",", ":")),
            *(row.pushed_at, row.pushed_by, row.pulled_at, row.orphaned_at),
        ),
    )
    name_rows.add_parts(connection, row.repository, manifest)
    upload_rows.check_quota(connection, row.repository, hosted)


def set_tag(
    connection: Connection,
    repository: str,
    tag: Tag,
    digest: Digest,
    pushed_at: float,
    pushed_by: str,
) -> None:
    """Let a tag name a manifest that the repository has.

    Args:
        connection: The database.
        repository: The repository.
        tag: The tag.
        digest: The manifest.
        pushed_at: When the tag was pushed, in seconds since the epoch.
        pushed_by: Who has pushed it.
    """
    connection.execute(
        "INSERT INTO tags VALUES (?, ?, ?, ?, ?) ON CONFLICT (repository, tag) DO UPDATE SET"
        " digest = excluded.digest, pushed_at = excluded.pushed_at, pushed_by = excluded.pushed_by",
        (repository, str(tag), str(digest), pushed_at, pushed_by),
    )
    connection.execute(
        "UPDATE manifests SET orphaned_at = 0"
        " WHERE repository = ? AND digest = ? AND orphaned_at > 0",
        (repository, str(digest)),
    )
