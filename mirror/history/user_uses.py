"""When each user has last used the server, and last pushed to it.

Lives here: an observer of requests, and the file with one row for each user. Must not know: how
users are known, who asks.

A request of a user costs one operation on a dictionary. The file is written once a minute, by a
thread. It is no part of the history's file, whose rows are bounded by the number of requests.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from mirror.observability.events import Event, Outcome, RequestEnded
from mirror.oci.text import time_text
from mirror.store.layout import Layout
from mirror.store.private_directory import make_private_directory
from mirror.store.sqlite_connection import connect, connect_to_read

SAVE_USERS_INTERVAL_S: Final = 60.0
"""Seconds between two writes of the file: so much is lost in a crash."""
USERS_FILE: Final = "users.db"
"""Name of the file in the directory of the history."""
_MAX_USERS: Final = 10_000
"""Users whose use is kept, the latest ones: tokens of an issuer may have any number of subjects."""
_CREATE_USERS: Final = """
CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY, used_at REAL NOT NULL, pushed_at REAL, requests INTEGER NOT NULL
) WITHOUT ROWID
"""
_ADD: Final = """
INSERT INTO users VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
    used_at = max(used_at, excluded.used_at), requests = requests + excluded.requests,
    pushed_at = coalesce(max(pushed_at, excluded.pushed_at), pushed_at, excluded.pushed_at)
"""
_TRIM: Final = """
DELETE FROM users WHERE name IN (SELECT name FROM users ORDER BY used_at DESC LIMIT -1 OFFSET ?)
"""

_LATEST: Final = (
    "SELECT name, used_at, pushed_at, requests FROM users ORDER BY used_at DESC, name LIMIT ?"
)


@dataclass(slots=True)
class UserUse:
    """The use of one user. Times are seconds since the epoch."""

    name: str
    used_at: float
    """The last request, also one that was refused after the user was known."""
    pushed_at: float | None = None
    """The last request of a push that succeeded. None: there is none."""
    requests: int = 0

    def row(self) -> dict[str, Any]:
        """Return the use as JSON values."""
        return {
            "kind": "user",
            "user": self.name,
            "last_used": time_text(self.used_at),
            "last_push": time_text(self.pushed_at),
            "requests": self.requests,
        }


class UserUses:
    """The observer of one process."""

    def __init__(self, layout: Layout, now: Callable[[], float] = time.time) -> None:
        """Remember nothing yet.

        Args:
            layout: The data directory.
            now: Returns the Unix time in seconds.
        """
        self._path = layout.history / USERS_FILE
        self._now = now
        self._uses: dict[str, UserUse] = {}
        self._lock = threading.Lock()

    def observe(self, event: Event) -> None:
        """Take note of a request of a user that has ended."""
        if type(event) is not RequestEnded or not event.pull.user:
            return
        name, now = event.pull.user, self._now()
        use = self._uses.get(name)
        if use is None:
            if len(self._uses) >= _MAX_USERS:
                return
            use = self._uses[name] = UserUse(name, now)
        use.used_at = now
        use.requests += 1
        if event.pull.outcome is Outcome.PUSHED and event.pull.status < 400:
            use.pushed_at = now

    def save(self) -> None:
        """Write what was observed since the last call. Blocks, in a thread.

        Raises ``OSError`` if the file cannot be written. What it has not got is lost.
        """
        with self._lock:
            uses, self._uses = self._uses, {}
            if not uses:
                return
            make_private_directory(self._path.parent)
            rows = [(one.name, one.used_at, one.pushed_at, one.requests) for one in uses.values()]
            try:
                with closing(connect(self._path, "rwc")) as database, database:
                    database.execute("BEGIN IMMEDIATE")
                    database.execute(_CREATE_USERS)
                    database.executemany(_ADD, rows)
                    database.execute(_TRIM, (_MAX_USERS,))
            except sqlite3.Error as error:
                raise OSError(f"the use of users is not recorded: {self._path}: {error}") from error


def read_user_uses(layout: Layout, limit: int = _MAX_USERS) -> list[UserUse]:
    """Return the use of users, the latest one first. A missing file has none.

    Args:
        layout: The data directory.
        limit: Users to return at most. By default all of them.

    Raises ``OSError`` if the file cannot be read.
    """
    rows = _query(layout, _LATEST, limit)
    return [UserUse(*row) for row in rows]


def count_users(layout: Layout) -> int:
    """Return the number of users whose use is kept. Raises ``OSError`` like the others."""
    return sum(number for (number,) in _query(layout, "SELECT count(*) FROM users"))


def _query(layout: Layout, query: str, *values: int) -> list[Any]:
    path = layout.history / USERS_FILE
    if not path.exists():
        return []
    try:
        with closing(connect_to_read(path)) as database:
            return database.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error} (it is a cache, and may be deleted)") from error
