"""The queue of notifications: its tables, and what is done with its rows.

Lives here: the order, the bounds, and the pauses of targets. All functions work inside of a
transaction of the caller. Must not know: how a notification is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import EventTarget
from mirror.store.shared_database import DatabaseForm

_ROWS_AT_ONCE: Final = 32
"""Notifications that are read at once: some seconds of a target that responds slowly."""

# AUTOINCREMENT: the number of a deleted row is never that of another one. A row that is deleted
# while it is sent must not be taken for a new one.
_QUEUE_TABLES: Final = """
CREATE TABLE notifications (
    number INTEGER PRIMARY KEY AUTOINCREMENT, target TEXT NOT NULL, id TEXT NOT NULL,
    is_pull INTEGER NOT NULL, at REAL NOT NULL, refusals INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE INDEX by_order ON notifications (target, number);
CREATE INDEX by_importance ON notifications (target, is_pull DESC, number);
CREATE TABLE targets (
    target TEXT PRIMARY KEY, count INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, resume_at REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TRIGGER added AFTER INSERT ON notifications BEGIN
    INSERT INTO targets (target) VALUES (new.target) ON CONFLICT DO NOTHING;
    UPDATE targets SET count = count + 1, bytes = bytes + length(new.body)
        WHERE target = new.target;
END;
CREATE TRIGGER removed AFTER DELETE ON notifications BEGIN
    UPDATE targets SET count = count - 1, bytes = bytes - length(old.body)
        WHERE target = old.target;
END;
"""
QUEUE_FORM: Final = DatabaseForm("queue", _QUEUE_TABLES, version=1)
"""The database of the queue. It is no cache: events that wait are in no other place."""


@dataclass(frozen=True, slots=True)
class NewNotification:
    """A notification that is put into the queue."""

    target: str
    id: str
    is_pull: bool
    at: float
    """Seconds since the epoch at which the event happened."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Notification:
    """A notification in the queue."""

    number: int
    """Its place in the queue."""
    id: str
    at: float
    """Seconds since the epoch at which the event happened."""
    refusals: int
    """Responses that have refused it for good."""
    body: bytes


@dataclass(frozen=True, slots=True)
class TargetState:
    """The queue of one target."""

    target: str
    count: int
    failures: int
    """Failed requests since the last one that was accepted."""
    resume_at: float
    """Seconds since the epoch before which nothing is sent."""
    oldest_at: float | None
    """Seconds since the epoch at which the oldest event happened. None: none waits."""


def add(
    connection: Connection, rows: Iterable[NewNotification], targets: Collection[EventTarget]
) -> dict[str, int]:
    """Add notifications, and drop those for which there is no room.

    Returns:
        Name of a target -> the number of its notifications that were dropped.
    """
    connection.executemany(
        "INSERT INTO notifications (target, id, is_pull, at, body) VALUES (?, ?, ?, ?, ?)",
        [(row.target, row.id, row.is_pull, row.at, row.body) for row in rows],
    )
    dropped = {target.name: _trim(connection, target) for target in targets}
    return {name: count for name, count in dropped.items() if count}


def _trim(connection: Connection, target: EventTarget) -> int:
    """Drop the oldest pulls, then the oldest others, until the rest is within the bounds."""
    found = connection.execute(
        "SELECT count, bytes FROM targets WHERE target = ?", (target.name,)
    ).fetchone()
    count, size = found or (0, 0)
    numbers: list[tuple[int]] = []
    rows = connection.execute(
        "SELECT number, length(body) FROM notifications WHERE target = ?"
        " ORDER BY is_pull DESC, number",
        (target.name,),
    )
    while (count > target.max_queued or size > target.max_queued_size) and (row := rows.fetchone()):
        numbers.append((row[0],))
        count, size = count - 1, size - row[1]
    rows.close()
    connection.executemany("DELETE FROM notifications WHERE number = ?", numbers)
    return len(numbers)


def read_states(connection: Connection) -> list[TargetState]:
    """Return the state of each target that has one."""
    rows = connection.execute(
        "SELECT target, count, failures, resume_at, (SELECT at FROM notifications AS oldest"
        " WHERE oldest.target = targets.target ORDER BY number LIMIT 1) FROM targets"
    )
    return [TargetState(*row) for row in rows]


def read_next(connection: Connection, target: str) -> tuple[int, list[Notification]]:
    """Return the failures of a target in a row, and its next notifications, the oldest first."""
    found = connection.execute(
        "SELECT failures FROM targets WHERE target = ?", (target,)
    ).fetchone()
    rows = connection.execute(
        "SELECT number, id, at, refusals, body FROM notifications WHERE target = ?"
        " ORDER BY number LIMIT ?",
        (target, _ROWS_AT_ONCE),
    )
    return (found[0] if found else 0), [Notification(*row) for row in rows]


def remove_notifications(connection: Connection, notifications: Iterable[Notification]) -> None:
    """Remove notifications. Their ids are compared, too: a new file has the same numbers again."""
    connection.executemany(
        "DELETE FROM notifications WHERE number = ? AND id = ?",
        [(notification.number, notification.id) for notification in notifications],
    )


def remove_accepted(
    connection: Connection, target: str, notifications: Iterable[Notification]
) -> None:
    """Remove notifications that a target has accepted, and end its pause."""
    remove_notifications(connection, notifications)
    connection.execute(
        "UPDATE targets SET failures = 0, resume_at = 0 WHERE target = ? AND failures > 0",
        (target,),
    )


def note_failure(connection: Connection, target: str, resume_at: float) -> None:
    """Count a failure of a target. ``resume_at``: seconds since the epoch of the next request."""
    connection.execute(
        "UPDATE targets SET failures = failures + 1, resume_at = ? WHERE target = ?",
        (resume_at, target),
    )


def note_refusal(connection: Connection, number: int) -> None:
    """Count a response that refuses one notification for good."""
    connection.execute(
        "UPDATE notifications SET refusals = refusals + 1 WHERE number = ?", (number,)
    )


def remove_older(connection: Connection, target: str, before: float) -> int:
    """Remove the notifications of events before a time. Returns their number.

    ``before``: seconds since the epoch.
    """
    return connection.execute(
        "DELETE FROM notifications WHERE target = ? AND at < ?", (target, before)
    ).rowcount


def remove_target(connection: Connection, target: str) -> int:
    """Remove a target. Returns the number of its notifications."""
    count = connection.execute("DELETE FROM notifications WHERE target = ?", (target,)).rowcount
    connection.execute("DELETE FROM targets WHERE target = ?", (target,))
    return count
