"""The names in the index, read without opening the index: for commands beside a server.

Lives here: a read-only connection to one database of the index. Must not know: what its rows mean.

:class:`mirror.store.index.Index` repairs and restores what it opens, and reads in small pages so
that requests do not wait. A listing needs neither: it reads one consistent state, and changes
nothing.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from mirror.oci.errors import StorageUnavailable
from mirror.store.layout import Layout
from mirror.store.statements import SELECT_KEYS, SELECT_TEXTS

# The same as in mirror.store.names, which is slow to import: it has diskcache.
_NAMED: Final = "named"
_RESTORED: Final = "restored"
_INDEX_TIMEOUT_S: Final = 10.0
"""Seconds to wait while a server recovers the database after a crash. Reads do not wait for
writers."""


class IndexUnreadable(StorageUnavailable):
    """The names in the index cannot be read. That does not mean that there are none."""


def read_names(layout: Layout) -> tuple[list[tuple[str, str]], bool]:
    """Read all rows about names. It takes 50 ms with 20,000 rows.

    Returns:
        (key, text) of the rows, and whether these are all. They are not if there is no index, or a
        new one that does not have the names in ``index.json`` yet.

    Raises:
        IndexUnreadable: There is one, and it cannot be read.
    """
    rows = _query(layout, SELECT_TEXTS)
    return rows, any(key == _RESTORED for key, _ in rows)


def read_keys_beginning(layout: Layout, beginning: str) -> list[str]:
    """Return the keys of rows about names that begin with an ASCII text, by an index.

    Raises ``IndexUnreadable``.
    """
    return [row[0] for row in _query(layout, SELECT_KEYS, beginning, f"{beginning}\x7f")]


def _query(layout: Layout, query: str, *values: str) -> list[tuple[str, str]]:
    """Return the rows of a query. Without an index, there are none. Raises ``IndexUnreadable``."""
    path = layout.index / _NAMED / "cache.db"
    try:
        if not path.exists():
            return []
        with closing(connect_to_read(path, _INDEX_TIMEOUT_S)) as database:
            return database.execute(query, values).fetchall()
    except (sqlite3.Error, OSError) as error:
        raise IndexUnreadable(
            f"the index cannot be read ({error}): start the server, which repairs it, or check the "
            f"permissions of {layout.index}"
        ) from None


def connect_to_read(path: Path, timeout: float) -> sqlite3.Connection:
    """Connect to a database of the data directory, also on a disk that refuses writes.

    Args:
        path: The database.
        timeout: Seconds to wait for other processes.

    Raises:
        sqlite3.Error: It cannot be read.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        return _checked(sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None))
    except sqlite3.OperationalError:
        # A full disk also refuses the file that readers and writers share. Without it, the log
        # cannot be read, and is not needed if it is empty.
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise
        return sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)


def _checked(database: sqlite3.Connection) -> sqlite3.Connection:
    """Return a connection that can read its database. Raises ``sqlite3.Error`` otherwise."""
    try:
        database.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
    except sqlite3.Error:
        database.close()
        raise
    return database
