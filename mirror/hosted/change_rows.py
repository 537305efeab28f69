"""Changes of hosted repositories that are not known yet to be written down by observers.

Lives here: each query and each change, as a function of a connection. Must not know: observers,
time, threads.

A change is recorded in the transaction that makes it, by whichever process that is. So none can be
lost between its commit and the log, or the queue of notifications.
"""

from __future__ import annotations

from collections.abc import Iterable
from sqlite3 import Connection
from typing import Final

from mirror.hosted.content_row import ContentRow, PushedRow
from mirror.observability.hosted_events import Actor, ChangeAction, HostedChange
from mirror.oci.reference import Digest, Repository, Tag

UNTAKEN: Final = 0.0
"""``taken_at`` of a change that no process tells its observers yet."""
# Processes read the clock before they write: one may have taken a change a moment after our time.
_IS_FREE: Final = "taken_at NOT BETWEEN :now - :timeout AND :now + :timeout"


def change_of(
    action: ChangeAction,
    row: ContentRow,
    tag: Tag | None = None,
    *,
    registry: str,
    actor: Actor,
    at: float,
) -> HostedChange:
    """Return a change, to be recorded in the transaction that makes it.

    Args:
        action: What it does.
        row: The blob or the manifest.
        tag: The tag that is pushed or deleted. None: the change is about the digest.
        registry: Name of the hosted repositories.
        actor: Who makes it.
        at: Seconds since the epoch.
    """
    return HostedChange(
        action=action,
        repository=Repository(registry, row.repository),
        digest=row.digest,
        tag="" if tag is None else str(tag),
        media_type=row.media_type,
        size=row.size,
        image_size=row.image_size if isinstance(row, PushedRow) else None,
        user=actor.user,
        client=actor.client,
        at=at,
    )


def record_change(connection: Connection, change: HostedChange, taken_at: float = UNTAKEN) -> None:
    """Record a change that is made in the same transaction.

    Args:
        connection: The database.
        change: The change.
        taken_at: When this process has decided to tell of it itself, in seconds since the epoch.
    """
    connection.execute(
        "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(change.id, change.action, change.repository.path, str(change.digest), change.tag),
            *(change.media_type, change.size, change.user, change.client, change.at, taken_at),
        ),
    )


def has_changes(connection: Connection, now: float, timeout: float) -> bool:
    """Return whether there are changes that no living process tells.

    Args:
        connection: The database.
        now: Seconds since the epoch.
        timeout: See :func:`take_changes`.
    """
    query = f"SELECT 1 FROM changes WHERE {_IS_FREE} LIMIT 1"  # noqa: S608 - our own text
    return connection.execute(query, {"now": now, "timeout": timeout}).fetchone() is not None


def take_changes(
    connection: Connection, registry: str, now: float, timeout: float, count: int
) -> list[HostedChange]:
    """Take the oldest changes, to tell of them. No other process gets them meanwhile.

    Args:
        connection: The database.
        registry: Name of the hosted repositories.
        now: Seconds since the epoch.
        timeout: Seconds after which a process that has taken a change, and not removed it, has
            died. So has one that has taken it as long after now: the clock was set back.
        count: Changes at most.
    """
    rows = connection.execute(
        "SELECT id, action, repository, digest, tag, media_type, size, user, client, at"  # noqa: S608 - our own text
        f" FROM changes WHERE {_IS_FREE} ORDER BY rowid LIMIT :count",
        {"now": now, "timeout": timeout, "count": count},
    ).fetchall()
    connection.executemany(
        "UPDATE changes SET taken_at = ? WHERE id = ?", [(now, row[0]) for row in rows]
    )
    return [
        HostedChange(
            id=row[0],
            action=row[1],
            repository=Repository(registry, row[2]),
            digest=Digest.parse(row[3]),
            tag=row[4],
            media_type=row[5],
            size=row[6],
            user=row[7],
            client=row[8],
            at=row[9],
        )
        for row in rows
    ]


def forget_changes(connection: Connection, changes: Iterable[HostedChange]) -> None:
    """Remove changes that observers have been told of."""
    connection.executemany("DELETE FROM changes WHERE id = ?", [(one.id,) for one in changes])
