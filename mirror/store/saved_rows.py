"""The names in the index, read without opening the index: for commands beside a server.

Lives here: the rows of one table of the index. Must not know: what they mean.

:class:`mirror.store.index.Index` repairs and restores what it opens, and reads in small pages so
that requests do not wait. A listing needs neither: it reads one consistent state, and changes
nothing.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Final

from mirror.oci.errors import StorageUnavailable
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect_to_read
from mirror.store.statements import SELECT_KEYS, SELECT_TEXTS

# The same as in mirror.store.names, which is slow to import: it has diskcache.
_NAMED: Final = "named"
_RESTORED: Final = "restored"


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
        with closing(connect_to_read(path)) as database:
            return database.execute(query, values).fetchall()
    except (sqlite3.Error, OSError) as error:
        raise IndexUnreadable(
            f"the index cannot be read ({error}): start the server, which repairs it, or check the "
            f"permissions of {layout.index}"
        ) from None
