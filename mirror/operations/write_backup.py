"""Backup of the hosted repositories: all images, and who has pushed them when.

Lives here: what a backup has, from one moment. Must not know: how its files are written
(``backup_files.py``).

It has all rows, and all content that they name. Uploads are not in it. The names of users are: an
issuer must not give the name of a removed user after a restore, either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirror.access.known_names import known_names_text, read_known_names
from mirror.hosted.snapshot import Snapshot, opened_snapshot
from mirror.hosted.upload_files import lease_content
from mirror.oci.errors import DigestMismatch, StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.operations.backup_files import BackupTarget, opened_target
from mirror.operations.backup_rows import write_rows
from mirror.store.image_layout import FIRST_LINE, LAST_LINE, index_line
from mirror.store.layout import Layout
from mirror.store.records import NamedManifest


@dataclass(slots=True)
class BackupReport:
    """The result of a backup."""

    images: int = 0
    """Tags, and manifests that only their digest names."""
    contents: int = 0
    bytes: int = 0
    """Bytes of all contents."""
    added: int = 0
    """Contents that the backup did not have."""
    added_bytes: int = 0
    missing: list[Digest] = field(default_factory=list)
    """Contents that are lost or damaged on the disk, so the backup does not have them."""

    def row(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "images": self.images,
            "contents": self.contents,
            "bytes": self.bytes,
            "added": self.added,
            "added_bytes": self.added_bytes,
            "missing": [str(digest) for digest in self.missing],
        }


def write_backup(layout: Layout, name: str, path: Path) -> BackupReport:
    """Write all images to a directory or a tar file. Blocks, and holds up no push.

    Args:
        layout: The data directory.
        name: The name of the registry.
        path: The directory, or the tar file.

    Raises:
        StorageUnavailable: The data directory or the target is in use, or cannot be used.
        NamesDamaged: There are no names that this version can read.
        OSError: A disk refuses.
    """
    report = BackupReport()
    users = _users_of(layout)
    with opened_snapshot(layout) as snapshot, opened_target(path) as target:
        for digest, size in snapshot.contents():
            _add_content(layout, target, digest, size, report)
        target.publish(_index(snapshot, name, report), write_rows(snapshot, name), users)
    return report


def _users_of(layout: Layout) -> str:
    """Return the names of users, also of removed ones, whom rules may still name."""
    try:
        return known_names_text(read_known_names(layout.user_names))
    except ValueError as error:
        raise StorageUnavailable(f"{layout.user_names}: {error}: repair it, or delete it") from None


def _add_content(
    layout: Layout, target: BackupTarget, digest: Digest, size: int, report: BackupReport
) -> None:
    if not target.keep(digest, size):
        if not _has_added(layout, target, digest, size):
            report.missing.append(digest)
            return
        report.added += 1
        report.added_bytes += size
    report.contents += 1
    report.bytes += size


def _has_added(layout: Layout, target: BackupTarget, digest: Digest, size: int) -> bool:
    """Add content to a backup. Returns False if it is lost or damaged here."""
    # A removal may look at it at this moment, and leave it: the backup has its name.
    fd = lease_content(layout, digest)
    if fd is None:
        return False
    try:
        if os.fstat(fd).st_size != size:
            return False
        target.add(digest, fd, os.fspath(layout.blob(digest)), size)
    except DigestMismatch:
        return False
    finally:
        os.close(fd)
    return True


def _index(snapshot: Snapshot, name: str, report: BackupReport) -> Iterator[str]:
    """Return the text of ``index.json``: a line for each tag, and for what has no other name."""
    separator = f"{FIRST_LINE}\n"
    for named in _named_manifests(snapshot, name):
        yield separator + index_line(named)
        separator = ",\n"
        report.images += 1
    yield separator if separator.startswith("{") else "\n"
    yield f"{LAST_LINE}\n"


def _named_manifests(snapshot: Snapshot, name: str) -> Iterator[NamedManifest]:
    for path in snapshot.repositories():
        repository = Repository(name, path)
        for tag in snapshot.tags(path):
            yield NamedManifest(
                repository,
                tag=tag.tag,
                digest=tag.digest,
                media_type=tag.media_type,
                size=tag.size,
            )
        for row in snapshot.roots(path):
            yield NamedManifest(
                repository,
                tag=None,
                digest=row.digest,
                media_type=row.media_type,
                size=row.size,
            )
