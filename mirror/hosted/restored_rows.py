"""What a restore records.

Lives here: each change, as a function of a connection. Must not know: where content comes from.
"""

from __future__ import annotations

from sqlite3 import Connection

from mirror.config.settings import Hosted
from mirror.hosted import name_rows, upload_rows
from mirror.hosted.pushed_manifest import PushedManifest
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


def has_blob(connection: Connection, repository: str, digest: Digest) -> bool:
    """Return whether a repository has a blob.

    Args:
        connection: The database.
        repository: The repository.
        digest: The blob.
    """
    return name_rows.blob_size(connection, repository, digest) is not None


def restore_blob(
    connection: Connection, repository: str, digest: Digest, size: int, now: float, hosted: Hosted
) -> None:
    """Record that a repository has a blob. Raises ``QuotaExceeded``.

    Args:
        connection: The database.
        repository: The repository.
        digest: The blob. Its content is durable.
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
    pushed_at: float,
    pushed_by: str,
    pulled_at: float,
    hosted: Hosted,
) -> None:
    """Record a manifest. An index may lack manifests: it was accepted when it was pushed.

    Args:
        connection: The database.
        repository: The repository.
        manifest: The manifest. Its content is durable.
        pushed_at: When it was pushed, in seconds since the epoch.
        pushed_by: Who has pushed it.
        pulled_at: When it was last pulled. Zero: never.
        hosted: The quota.

    Raises:
        PartsUnknown: The repository does not have a blob of it.
        QuotaExceeded: The quota is used up.
    """
    name_rows.check_parts(connection, repository, manifest, may_be_sparse=True)
    name_rows.add_manifest(connection, repository, manifest, [], pushed_at, pushed_by)
    name_rows.mark_manifest_used(connection, repository, manifest.digest, pulled_at)
    upload_rows.check_quota(connection, repository, hosted)


def set_tag(
    connection: Connection,
    repository: str,
    tag: Tag,
    manifest: PushedManifest,
    pushed_at: float,
    pushed_by: str,
) -> None:
    """Let a tag name a manifest that the repository has.

    Args:
        connection: The database.
        repository: The repository.
        tag: The tag.
        manifest: The manifest.
        pushed_at: When the tag was pushed, in seconds since the epoch.
        pushed_by: Who has pushed it.
    """
    name_rows.add_manifest(connection, repository, manifest, [tag], pushed_at, pushed_by)
