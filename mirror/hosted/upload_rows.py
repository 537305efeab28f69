"""The rows of running uploads, and the bytes that they have reserved of the quota.

Lives here: the quota, over all processes: content that is hosted, plus what uploads have reserved.
Must not know: threads, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.config.values import format_size
from mirror.oci.errors import QuotaExceeded, TooManyRequests

MAX_UPLOADS: Final = 4096
"""Uploads at a time. Each has a row and a file, for a day if it is abandoned."""


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


def begin_upload(connection: Connection, row: UploadRow, hosted: Hosted) -> None:
    """Record a new upload.

    Raises:
        TooManyRequests: There are :data:`MAX_UPLOADS` already.
        QuotaExceeded: The quota has fewer bytes left than ``row.reserved``, or none.
    """
    count = connection.execute("SELECT count(*) FROM uploads").fetchone()[0]
    if count >= MAX_UPLOADS:
        raise TooManyRequests("too many uploads at the same time: finish or cancel some")
    connection.execute(
        "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?)",
        (row.id, row.repository, row.user, row.reserved, row.boot, row.started_at),
    )
    check_quota(connection, row.repository, hosted)


def reserve(connection: Connection, upload_id: str, reserved: int, hosted: Hosted) -> bool:
    """Let an upload reach ``reserved`` bytes. False if there is no such upload any more.

    Raises ``QuotaExceeded``.
    """
    found = connection.execute(
        "UPDATE uploads SET reserved = max(reserved, ?) WHERE id = ? RETURNING repository",
        (reserved, upload_id),
    ).fetchone()
    if found is not None:
        check_quota(connection, found[0], hosted)
    return found is not None


def release_reservation(connection: Connection, upload_id: str, length: int) -> None:
    """Let an upload reserve no more than ``length`` bytes: nobody feeds it."""
    connection.execute(
        "UPDATE uploads SET reserved = min(reserved, ?) WHERE id = ?", (length, upload_id)
    )


def check_quota(connection: Connection, repository: str, hosted: Hosted) -> None:
    """Check that all hosted content, and what uploads have reserved, is within the quota.

    Raises :class:`QuotaExceeded`.
    """
    used = connection.execute(
        "SELECT (SELECT bytes FROM totals), (SELECT total(reserved) FROM uploads)"
    ).fetchone()
    if used[0] + used[1] > hosted.max_size:
        raise QuotaExceeded(
            "the quota of the hosted repositories is used up:"
            f" max_size is {format_size(hosted.max_size)}"
        )
    if hosted.max_repository_size is None:
        return
    used = connection.execute(
        "SELECT (SELECT total(bytes) FROM repositories WHERE name = ?),"
        " (SELECT total(reserved) FROM uploads WHERE repository = ?)",
        (repository, repository),
    ).fetchone()
    if used[0] + used[1] > hosted.max_repository_size:
        raise QuotaExceeded(
            "the quota of this repository is used up:"
            f" max_repository_size is {format_size(hosted.max_repository_size)}"
        )


def find_upload(connection: Connection, upload_id: str) -> UploadRow | None:
    """Return an upload. None if there is none."""
    row = connection.execute("SELECT * FROM uploads WHERE id = ?", (upload_id,)).fetchone()
    return None if row is None else UploadRow(*row)


def all_uploads(connection: Connection) -> list[UploadRow]:
    """Return all uploads, the oldest first."""
    rows = connection.execute("SELECT * FROM uploads ORDER BY started_at, id")
    return [UploadRow(*row) for row in rows]


def end_upload(connection: Connection, upload_id: str) -> bool:
    """Delete the row of an upload. False if there is none."""
    return connection.execute("DELETE FROM uploads WHERE id = ?", (upload_id,)).rowcount > 0
