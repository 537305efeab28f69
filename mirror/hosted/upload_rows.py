"""The rows of running uploads, and the bytes that they have reserved of the quota.

Lives here: the quota, over all processes: content that is hosted, its metadata, and what uploads
have reserved. Must not know: threads, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.config.values import format_size
from mirror.hosted.name_tables import ROW_BYTES
from mirror.oci.errors import QuotaExceeded, TooManyRequests
from mirror.oci.text import size_text

_OF_ALL_KEY: Final = "hosted.max_size"
_OF_ONE_KEY: Final = "hosted.max_repository_size"
MAX_UPLOADS: Final = 4096
"""Uploads at a time. Each has a row and a file, for a day if it is abandoned."""
MAX_OWNER_UPLOADS: Final = 512
"""Uploads of one user, or of one address without a login, at a time. A client runs about five."""


@dataclass(frozen=True, slots=True)
class UploadRow:
    """A running upload."""

    id: str
    repository: str
    user: str
    """The user who began it. Empty: anonymous."""
    reserved: int
    """Bytes that it may reach."""
    boot: str
    """Boot id of the machine when it began (:func:`mirror.store.disk.boot_id`)."""
    started_at: float
    """Seconds since the epoch."""
    owner: str
    """The user, or the address of an anonymous one. Each has a limit of uploads."""


@dataclass(frozen=True, slots=True)
class UsedBytes:
    """The bytes of a quota that are used."""

    content: int
    metadata: int
    """See :data:`mirror.hosted.name_tables.ROW_BYTES`."""
    reserved: int
    """Bytes that uploads may reach."""

    @property
    def stored(self) -> int:
        """Bytes of content, with its metadata."""
        return self.content + self.metadata

    @property
    def total(self) -> int:
        """All that counts in the quota."""
        return self.stored + self.reserved

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{size_text(self.stored)} are used ({size_text(self.metadata)} of them by metadata),"
            f" and {size_text(self.reserved)} reserved by uploads"
        )


def begin_upload(
    connection: Connection, row: UploadRow, hosted: Hosted, announced: int = 0
) -> None:
    """Record a new upload. ``announced``: the bytes that it will have, as far as they are known.

    Raises ``QuotaExceeded``: The quota is used up, or has no room for so many bytes.
    """
    connection.execute(
        "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?)",
        (row.id, row.repository, row.user, row.reserved, row.boot, row.started_at, row.owner),
    )
    check_quota(connection, row.repository, hosted, announced)


def owners_to_give_way(connection: Connection, owner: str) -> list[str]:
    """Return whose uploads have to give way before ``owner`` can begin one, in this order.

    Nobody's have to while there are fewer than :data:`MAX_OWNER_UPLOADS` of the owner, and fewer
    than :data:`MAX_UPLOADS` of all.
    """
    counts = dict(connection.execute("SELECT owner, count(*) FROM uploads GROUP BY owner"))
    own = counts.get(owner, 0)
    if own >= MAX_OWNER_UPLOADS:
        return [owner]
    if sum(counts.values()) < MAX_UPLOADS:
        return []
    larger = [other for other in counts if counts[other] > own]
    return [*sorted(larger, key=lambda other: (-counts[other], other)), owner]


def check_count(connection: Connection, row: UploadRow) -> None:
    """Check that there are not too many uploads to begin this one. Raises ``TooManyRequests``."""
    counted = connection.execute(
        "SELECT count(*), (SELECT count(*) FROM uploads WHERE owner = ?) FROM uploads", (row.owner,)
    ).fetchone()
    if counted[1] >= MAX_OWNER_UPLOADS:
        raise TooManyRequests(
            f"{row.user or 'this address'} sends {counted[1]} uploads at the same time: wait until"
            " some have ended"
        )
    if counted[0] >= MAX_UPLOADS:
        raise TooManyRequests("too many uploads are sent at the same time: try again later")


def reserve(
    connection: Connection,
    upload_id: str,
    least: int,
    most: int,
    hosted: Hosted,
    announced: int = 0,
) -> int | None:
    """Let an upload reach ``least`` bytes, and up to ``most`` if these leave as many to others.

    Returns the bytes that it may reach. None if there is no such upload any more. Raises
    ``QuotaExceeded`` if there is no room for ``least``, or for the ``announced`` bytes.
    """
    update = "UPDATE uploads SET reserved = max(reserved, ?) WHERE id = ? RETURNING"
    found = connection.execute(f"{update} repository", (least, upload_id)).fetchone()
    if found is None:
        return None
    ahead = min(most - least, check_quota(connection, found[0], hosted, announced) // 2)
    found = connection.execute(f"{update} reserved", (least + ahead, upload_id)).fetchone()
    return int(found[0])


def set_reservation(connection: Connection, upload_id: str, reserved: int) -> None:
    """Set the bytes that an upload has ``reserved``, without a check of the quota."""
    connection.execute("UPDATE uploads SET reserved = ? WHERE id = ?", (reserved, upload_id))


def check_quota(connection: Connection, repository: str, hosted: Hosted, announced: int = 0) -> int:
    """For uploads: check that what they have reserved fits into the quota, beside what is hosted.

    Args:
        connection: The database.
        repository: The repository of an upload.
        hosted: The quota, of all repositories and of each.
        announced: Bytes that an upload will have. They must fit beside the content, but are not
            reserved at once, so that a slow client does not block others.

    Returns the bytes that are left. Raises :class:`QuotaExceeded`.
    """
    left = hosted.max_size
    for key, used, quota in _quotas(connection, repository, hosted):
        # The upload ends with the row of a blob, which counts as well.
        needed = used.stored + max(used.reserved, announced) + ROW_BYTES
        if needed > quota:
            raise _exceeded(key, used, quota, needed)
        left = min(left, quota - used.total - ROW_BYTES)
    return left


@contextmanager
def within_quota(connection: Connection, repository: str, hosted: Hosted) -> Iterator[None]:
    """For rows: check that the block adds no byte above the quota of a repository, or of all.

    A block that adds no row and no content passes, so a tag can move however full the quota is.

    Args:
        connection: The database.
        repository: The repository that the block changes.
        hosted: The quotas.

    Raises :class:`QuotaExceeded`.
    """
    before = {key: used.total for key, used, _ in _quotas(connection, repository, hosted)}
    yield
    for key, used, quota in _quotas(connection, repository, hosted):
        if used.total > max(quota, before[key]):
            raise _exceeded(key, used, quota, used.total)


def _quotas(
    connection: Connection, repository: str, hosted: Hosted
) -> Iterator[tuple[str, UsedBytes, int]]:
    """Iterate the quotas: key, bytes that are used, bytes at most."""
    yield _OF_ALL_KEY, used_bytes(connection), hosted.max_size
    if hosted.max_repository_size is not None:
        used = used_bytes_of_repository(connection, repository)
        yield _OF_ONE_KEY, used, hosted.max_repository_size


def _exceeded(key: str, used: UsedBytes, quota: int, needed: int) -> QuotaExceeded:
    """Return the error for a quota. ``needed``: bytes with which the push would fit."""
    remedy = (
        "Delete tags and images (by digest), run oci-mirror gc --grace 10m, end uploads (ls"
        f" --uploads), or raise {key}"
    )
    if key == _OF_ALL_KEY:  # Who may push here may not know how much others have.
        error = QuotaExceeded(f"{key} ({format_size(quota)}) has no room for this push. {remedy}")
        error.for_operator = str(used)
        return error
    return QuotaExceeded(
        f"{size_text(needed - quota)} more than {key} ({format_size(quota)}) are needed: {used}."
        f" {remedy}"
    )


def used_bytes(connection: Connection) -> UsedBytes:
    """Return what all hosted repositories, and the uploads to them, use of the quota."""
    used = connection.execute(
        "SELECT bytes, metadata, (SELECT total(reserved) FROM uploads) FROM totals"
    ).fetchone()
    return UsedBytes(*map(int, used))


def used_bytes_of_repository(connection: Connection, repository: str) -> UsedBytes:
    """Return what a repository, and the uploads to it, use of its quota."""
    used = connection.execute(
        "SELECT total(bytes), total(metadata),"
        " (SELECT total(reserved) FROM uploads WHERE repository = ?)"
        " FROM repositories WHERE name = ?",
        (repository, repository),
    ).fetchone()
    return UsedBytes(*map(int, used))


def find_upload(connection: Connection, upload_id: str) -> UploadRow | None:
    """Return an upload. None if there is none."""
    row = connection.execute("SELECT * FROM uploads WHERE id = ?", (upload_id,)).fetchone()
    return None if row is None else UploadRow(*row)


def all_uploads(connection: Connection) -> list[UploadRow]:
    """Return all uploads, the oldest first."""
    rows = connection.execute("SELECT * FROM uploads ORDER BY started_at, id")
    return [UploadRow(*row) for row in rows]


def reservations(connection: Connection) -> dict[str, int]:
    """Return the bytes that each upload has reserved, by its id."""
    return dict(connection.execute("SELECT id, reserved FROM uploads"))


def end_upload(connection: Connection, upload_id: str) -> bool:
    """Delete the row of an upload. False if there is none."""
    return connection.execute("DELETE FROM uploads WHERE id = ?", (upload_id,)).rowcount > 0
