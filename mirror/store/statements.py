"""SQL statements on diskcache's table, for what its methods do row by row or not at all.

Lives here: the columns of diskcache that we rely on. Must not know: connections, the meaning of a
row.

``raw`` and ``mode`` are 1 for text that is kept in its row as it is.
"""

from typing import Final

INSERT_MISSING: Final = (
    "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value)"
    " VALUES (?, 1, ?, ?, ?, 1, ?) ON CONFLICT DO NOTHING"
)
INSERT_OR_REPLACE: Final = INSERT_MISSING.replace(
    "DO NOTHING",
    "(key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = NULL, tag = NULL,"
    " size = excluded.size, mode = 1, filename = NULL, value = excluded.value",
)
SELECT_BY_ID: Final = (
    "SELECT rowid, key, value, tag FROM Cache WHERE rowid > ? AND raw = 1 AND mode = 1"
    " AND typeof(key) = 'text' AND typeof(value) = 'text' ORDER BY rowid LIMIT ?"
)
SELECT_BY_KEY: Final = SELECT_BY_ID.replace("rowid > ?", "key > ? AND key < ?").replace(
    "ORDER BY rowid", "ORDER BY key"
)
SELECT_VERSION: Final = (
    "SELECT store_time, value, tag, expire_time FROM Cache WHERE key = ? AND raw = 1"
)
SELECT_TEXTS: Final = (
    "SELECT key, value FROM Cache WHERE raw = 1 AND mode = 1"
    " AND typeof(key) = 'text' AND typeof(value) = 'text'"
)
SELECT_KEYS: Final = "SELECT key FROM Cache WHERE key >= ? AND key < ? AND raw = 1"
"""The keys between two texts, without the second one."""
