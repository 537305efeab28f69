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
from mirror.oci.text import size_text

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


def begin_upload(
    connection: Connection, row: UploadRow, hosted: Hosted, announced: int = 0
) -> str | None:
    """Record a new upload. ``announced``: the bytes that it will have, as far as they are known.

    Returns:
        The id of the upload that has ended for it, None without one. If there are
        :data:`MAX_UPLOADS`, the owner with the most of them loses one: so whoever has fewer than
        another one can always begin one.

    Raises:
        TooManyRequests: The owner has :data:`MAX_OWNER_UPLOADS` already, or there are
            :data:`MAX_UPLOADS` and no owner has more.
        QuotaExceeded: The quota is used up, or has no room for so many bytes.
    """
    counts = dict(connection.execute("SELECT owner, count(*) FROM uploads GROUP BY owner"))
    own = counts.get(row.owner, 0)
    ended = None
    if own >= MAX_OWNER_UPLOADS:
        who = row.user or "this address"
        raise TooManyRequests(
            f"{who} has {own} uploads in progress: finish or cancel some"
            " (without a byte, they end after an hour)"
        )
    if sum(counts.values()) >= MAX_UPLOADS:
        largest = max(counts, key=lambda owner: counts[owner])
        if counts[largest] <= own:
            raise TooManyRequests("too many uploads at the same time: finish or cancel some")
        ended = _end_least(connection, largest)
    connection.execute(
        "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?)",
        (row.id, row.repository, row.user, row.reserved, row.boot, row.started_at, row.owner),
    )
    check_quota(connection, row.repository, hosted, announced)
    return ended


def _end_least(connection: Connection, owner: str) -> str:
    """End the oldest upload of an owner, of those that have no byte if there are any."""
    upload_id: str = connection.execute(
        "SELECT id FROM uploads WHERE owner = ? ORDER BY reserved > 0, started_at, id LIMIT 1",
        (owner,),
    ).fetchone()[0]
    end_upload(connection, upload_id)
    return upload_id


def reserve(
    connection: Connection, upload_id: str, reserved: int, hosted: Hosted, announced: int = 0
) -> bool:
    """Let an upload reach ``reserved`` bytes. False if there is no such upload any more.

    Raises ``QuotaExceeded``, also if there is no room for the ``announced`` bytes.
    """
    found = connection.execute(
        "UPDATE uploads SET reserved = max(reserved, ?) WHERE id = ? RETURNING repository",
        (reserved, upload_id),
    ).fetchone()
    if found is not None:
        check_quota(connection, found[0], hosted, announced)
    return found is not None


def release_reservation(connection: Connection, upload_id: str, length: int) -> None:
    """Let an upload reserve no more than ``length`` bytes: nobody feeds it."""
    connection.execute(
        "UPDATE uploads SET reserved = min(reserved, ?) WHERE id = ?", (length, upload_id)
    )


def check_quota(
    connection: Connection, repository: str, hosted: Hosted, announced: int = 0
) -> None:
    """Check that all hosted content, and what uploads have reserved, is within the quota.

    Args:
        connection: The database.
        repository: The repository that has grown.
        hosted: The quota, of all repositories and of each.
        announced: Bytes that an upload will have. They must fit beside the content, and are
            reserved as they come: an upload that never ends keeps others out of no more.

    Raises :class:`QuotaExceeded`.
    """
    used, quota = used_bytes(connection), hosted.max_size
    if used[0] + max(used[1], announced) > quota:
        # Who may push here may not know how much others have.
        error = QuotaExceeded(
            f"hosted.max_size ({format_size(quota)}) has no room for this push."
            " Delete images and run oci-mirror gc, or raise hosted.max_size"
        )
        error.for_operator = _usage_text(used)
        raise error
    if hosted.max_repository_size is None:
        return
    used, quota = used_bytes_of_repository(connection, repository), hosted.max_repository_size
    needed = used[0] + max(used[1], announced)
    if needed > quota:
        raise QuotaExceeded(
            f"{size_text(needed - quota)} more than hosted.max_repository_size"
            f" ({format_size(quota)}) are needed: {_usage_text(used)}."
            " Delete images and run oci-mirror gc, or raise hosted.max_repository_size"
        )


def used_bytes(connection: Connection) -> tuple[int, int]:
    """Return the bytes of all hosted content, and those that uploads have reserved."""
    used = connection.execute(
        "SELECT (SELECT bytes FROM totals), (SELECT total(reserved) FROM uploads)"
    ).fetchone()
    return int(used[0]), int(used[1])


def used_bytes_of_repository(connection: Connection, repository: str) -> tuple[int, int]:
    """Return the bytes of the content of a repository, and those that uploads have reserved."""
    used = connection.execute(
        "SELECT (SELECT total(bytes) FROM repositories WHERE name = ?),"
        " (SELECT total(reserved) FROM uploads WHERE repository = ?)",
        (repository, repository),
    ).fetchone()
    return int(used[0]), int(used[1])


def _usage_text(used: tuple[int, int]) -> str:
    """Return text for people. ``used``: bytes of content, and bytes reserved by uploads."""
    return f"{size_text(used[0])} are used, and {size_text(used[1])} reserved by uploads"


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
