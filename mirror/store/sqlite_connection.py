"""Connections to the SQLite databases of the data directory, which several processes use.

Lives here: how one is opened, and how long it waits for another process. Must not know: tables,
rows, what a damaged one means.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final, Literal, TypeAlias

SqliteMode: TypeAlias = Literal["ro", "ro&immutable=1", "rw", "rwc"]
"""Parameters of SQLite's URI: read, read a file that nobody writes now, write, or create, too. An
immutable file is read without its log, and no file is created beside it."""
BUSY_TIMEOUT_S: Final = 10.0
"""Seconds to wait for another process: its transactions take some milliseconds. A reader of a
write-ahead log waits only while another process recovers it after a crash."""

DIGESTS_PER_QUERY: Final = 500
"""Digests of one query: SQLite takes at most 32,766 parameters, and more than these save little."""


def connect(path: Path, mode: SqliteMode, timeout: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    """Connect to a database. Each statement is a transaction, unless ``BEGIN`` starts one.

    Any thread may use the connection, one at a time.

    Args:
        path: The database.
        mode: What it is used for.
        timeout: Seconds to wait for other processes.

    Raises:
        sqlite3.Error: It cannot be opened.
    """
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Connect to a database for a short time, also on a disk that refuses writes.

    Raises:
        sqlite3.Error: It cannot be read.
    """
    try:
        return _checked(connect(path, "ro"))
    except sqlite3.OperationalError:
        # A full disk also refuses the file that readers and writers share. Without it, the log
        # cannot be read, and is not needed if it is empty.
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise
        return connect(path, "ro&immutable=1")


def _checked(database: sqlite3.Connection) -> sqlite3.Connection:
    """Return a connection that can read its database. Raises ``sqlite3.Error`` otherwise."""
    try:
        database.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    except sqlite3.Error:
        database.close()
        raise
    return database
