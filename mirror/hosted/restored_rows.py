"""What a restore asks of the names that are there, and what it records in those that it stages.

Lives here: each query and each change, as a function of a connection. Must not know: where content
comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from sqlite3 import Connection
from typing import Final, TypeVar

from mirror.hosted import name_rows
from mirror.hosted.name_tables import metadata_bytes
from mirror.hosted.pushed_manifest import PushedManifest
from mirror.hosted.snapshot import SavedManifest
from mirror.oci.reference import Digest, Tag

K = TypeVar("K", Digest, Tag)

set_tag: Final = name_rows.set_tag
"""Lets a tag name a manifest that the repository has."""


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


def known_blobs(connection: Connection, repository: str, blobs: Iterable[Digest]) -> set[Digest]:
    """Return those blobs that a repository has.

    Args:
        connection: The names that are there.
        repository: The repository.
        blobs: Blobs, each once.
    """
    wanted = set(blobs)
    return wanted - {*_without_known(connection, "blobs", "digest", repository, wanted)}


def bytes_to_add(
    connection: Connection,
    repository: str,
    blobs: Mapping[Digest, int],
    manifests: Mapping[Digest, int],
    tags: Iterable[Tag],
) -> tuple[int, int]:
    """Return by how many bytes of content, and of metadata, a repository grows.

    Args:
        connection: The names that are there.
        repository: The repository.
        blobs: Blob -> its bytes.
        manifests: Manifest -> its bytes.
        tags: Tags, each once.
    """
    new_blobs = _without_known(connection, "blobs", "digest", repository, blobs)
    new_manifests = _without_known(connection, "manifests", "digest", repository, manifests)
    new_tags = _without_known(connection, "tags", "tag", repository, tags)
    manifest_bytes = sum(manifests[one] for one in new_manifests)
    return (
        manifest_bytes + sum(blobs[one] for one in new_blobs),
        metadata_bytes(len(new_blobs) + len(new_manifests) + len(new_tags), manifest_bytes),
    )


def _without_known(
    connection: Connection, table: str, column: str, repository: str, names: Iterable[K]
) -> list[K]:
    query = f"SELECT 1 FROM {table} WHERE repository = ? AND {column} = ?"  # noqa: S608 - our own names
    return [
        one for one in names if connection.execute(query, (repository, str(one))).fetchone() is None
    ]


def is_hosted(connection: Connection, digest: Digest) -> bool:
    """Return whether any repository has content."""
    query = "SELECT 1 FROM contents WHERE digest = ?"
    return connection.execute(query, (str(digest),)).fetchone() is not None


def restore_blobs(
    connection: Connection, repository: str, blobs: Mapping[Digest, int], now: float
) -> None:
    """Record that a repository has blobs.

    Args:
        connection: The database.
        repository: The repository.
        blobs: Blob -> its size in bytes. Its content is durable, or was lost when it was saved.
        now: Seconds since the epoch.
    """
    for digest, size in blobs.items():
        name_rows.add_blob(connection, repository, digest, size, now)


def restore_manifest(
    connection: Connection,
    repository: str,
    manifest: PushedManifest,
    now: float,
) -> None:
    """Record a manifest of a layout of another program. An index may lack manifests.

    Args:
        connection: The database.
        repository: The repository.
        manifest: The manifest. Its content is durable.
        now: Seconds since the epoch.

    Raises ``PartsUnknown`` if the repository does not have a blob of it.
    """
    name_rows.check_parts(connection, repository, manifest, may_be_sparse=True)
    name_rows.add_manifest(connection, repository, manifest, [], now, "")


def restore_saved_manifest(
    connection: Connection, row: SavedManifest, manifest: PushedManifest
) -> None:
    """Record a manifest as it was when it was saved. Its parts may be missing, as they were.

    Args:
        connection: The database.
        row: The saved row.
        manifest: The same manifest. Its content is durable.
    """
    connection.execute(
        "INSERT INTO manifests (repository, digest, media_type, artifact_type, subject, size,"
        " annotations, pushed_at, pushed_by, pulled_at, orphaned_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (repository, digest) DO NOTHING",
        (
            *(row.repository, str(row.digest), manifest.media_type, manifest.artifact_type),
            *("" if manifest.subject is None else str(manifest.subject), manifest.size),
            name_rows.dump_annotations(manifest.annotations),
            *(row.pushed_at, row.pushed_by, row.pulled_at, row.orphaned_at),
        ),
    )
    name_rows.add_parts(connection, row.repository, manifest)
