"""Rows of the index for garbage collection, read and deleted beside the process that opened it.

Lives here: expired responses, and the content that a repository may read. Must not know: which
content is garbage.

The index drops a response when it reads it after its time, and otherwise when the table is full.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from typing import Final

from mirror.oci.errors import InvalidRequest, StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.store.layout import Layout
from mirror.store.names import ACCESS, RESPONSES
from mirror.store.sqlite_connection import connect, connect_to_read

_STEP_ROWS: Final = 200
"""Rows of one transaction: 2 ms, for which other processes wait."""
_LAST: Final = "\U0010ffff"
"""Comes after every key with the same beginning."""
_COUNT_EXPIRED: Final = "SELECT COUNT(*) FROM Cache WHERE expire_time < ?"
_DELETE_EXPIRED: Final = (
    "DELETE FROM Cache WHERE rowid IN"
    " (SELECT rowid FROM Cache WHERE expire_time < ? ORDER BY expire_time LIMIT ?)"
)
_MANIFESTS_END: Final = "manifest!"
"""Comes after the key of every access record of a manifest."""
_KEYS_BETWEEN: Final = (
    "SELECT key FROM Cache WHERE key >= ? AND key < ? AND raw = 1 AND typeof(key) = 'text'"
)


def count_expired(layout: Layout, now: float) -> int:
    """Return the number of expired responses. ``now``: seconds since the epoch.

    Blocks. Raises ``StorageUnavailable`` if the index cannot be read.
    """
    with _opened(layout, RESPONSES, is_read_only=True) as database:
        if database is None:
            return 0
        return int(database.execute(_COUNT_EXPIRED, (now,)).fetchone()[0])


def drop_expired(layout: Layout, now: float) -> int:
    """Delete the expired responses, and return their number. Blocks.

    Raises ``StorageUnavailable`` if the index cannot be written.
    """
    count = 0
    with _opened(layout, RESPONSES, is_read_only=False) as database:
        while database is not None:
            dropped = database.execute(_DELETE_EXPIRED, (now, _STEP_ROWS)).rowcount
            count += dropped
            if dropped < _STEP_ROWS:
                break
    return count


def read_access_of(layout: Layout, repository: Repository) -> set[Digest]:
    """Return the content that a repository is known to have. Blocks.

    Raises ``StorageUnavailable`` if the index cannot be read.
    """
    return read_access_beside(layout, (), [str(repository)])


def read_access_beside(
    layout: Layout, manifests: Collection[Digest], repositories: Collection[str] = ()
) -> set[Digest]:
    """Return the content of all repositories that are known to have one of some manifests. Blocks.

    With manifests, all access records of manifests are read: 100,000 take 0.1 s.

    Args:
        layout: The data directory.
        manifests: The manifests.
        repositories: Whole names of further repositories.

    Raises:
        StorageUnavailable: The index cannot be read.
    """
    found: set[Digest] = set()
    with _opened(layout, ACCESS, is_read_only=True) as database:
        if database is None:
            return found
        names = dict.fromkeys(repositories)
        wanted = set(map(str, manifests))
        if wanted:
            for (key,) in database.execute(_KEYS_BETWEEN, ("manifest ", _MANIFESTS_END)):
                name, _, digest = key.removeprefix("manifest ").partition("@")
                if digest in wanted:
                    names[name] = None
        for name in names:
            for kind in ("blob", "manifest"):
                start = f"{kind} {name}@"
                for (key,) in database.execute(_KEYS_BETWEEN, (start, f"{start}{_LAST}")):
                    try:
                        found.add(Digest.parse(key.removeprefix(start)))
                    except InvalidRequest:
                        continue
    return found


@contextmanager
def _opened(
    layout: Layout, table: str, *, is_read_only: bool
) -> Iterator[sqlite3.Connection | None]:
    """Open a table, each statement of which is a transaction. None if there is no index."""
    path = layout.index / table / "cache.db"
    try:
        if not path.exists():
            yield None
            return
        with closing(connect_to_read(path) if is_read_only else connect(path, "rw")) as database:
            yield database
    except (sqlite3.Error, OSError) as error:
        raise StorageUnavailable(
            f"the index cannot be used ({error}): start the server, which repairs it, or check the "
            f"permissions of {layout.index}"
        ) from None
