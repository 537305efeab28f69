"""Collection: remove what nothing in a hosted repository needs, after a grace time.

Lives here: the order of the steps, and how long each one keeps others from writing. Must not know:
which rows are garbage (``collection_rows.py``), when a collection is due.

Theory of operation: there is no mark phase. ``parts`` says at any time which manifests refer to a
content, and a row is deleted in the same transaction that finds that none does. A push checks the
parts of a manifest in its transaction, too. So the two cannot overtake each other. What a client
was told of and has not used yet (a blob that it has pushed, mounted, or found by ``HEAD``) is
needed for the grace time, and for a day longer while clients push to the repository: the layers of
an image may take longer than that, and its manifest comes last. Files go last, and only after the
rows are durably gone: the store keeps each content of which ``store/hosted_contents.py`` finds a
row, also one of a running backup.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.hosted import collection_rows, upload_files, upload_rows
from mirror.hosted.change_rows import record_change
from mirror.hosted.collection_rows import Cutoff, GarbageRow, IsProtected
from mirror.hosted.database import Database
from mirror.hosted.upload_rows import UploadRow
from mirror.observability.hosted_events import HostedChange
from mirror.store.layout import Layout
from mirror.threads import run_in_thread

_ROWS_PER_WRITE: Final = 100
"""Rows of one transaction, in which no push can commit: about 15 ms."""

ChangeOf = Callable[[GarbageRow], HostedChange]
"""Returns what is recorded of the deletion of a row, in the same transaction."""


async def plan_collection(
    database: Database, layout: Layout, now: float, grace: float, is_protected: IsProtected
) -> list[GarbageRow]:
    """Return the rows that a collection would remove now. No push waits for it.

    Args:
        database: The names.
        layout: Has the uploads in progress.
        now: Seconds since the epoch.
        grace: Seconds for which what nothing needs is kept after its last use.
        is_protected: Tells which manifests stay anyway.
    """
    cutoff = await _find_cutoff(database, layout, now, grace)
    find = partial(_collect_in_copy, cutoff=cutoff, is_protected=is_protected)
    return await database.read(find)


async def _find_cutoff(database: Database, layout: Layout, now: float, grace: float) -> Cutoff:
    """Return until when rows must have been unused, and the repositories that are pushed to.

    A push that is older than the grace time and goes on has fed an upload within it, or has ended
    one. The uploads are looked at first: one that ends meanwhile is a blob that has just been used.
    """
    cutoff = Cutoff.of(now, grace)
    uploads = await database.read(upload_rows.all_uploads)
    fed = [one.repository for one in await run_in_thread(_fed_since, layout, uploads, cutoff.at)]
    used = await database.read(partial(collection_rows.repositories_with_uses, since=cutoff.at))
    return replace(cutoff, pushed_to=frozenset(used.union(fed)))


def _fed_since(layout: Layout, uploads: list[UploadRow], since: float) -> list[UploadRow]:
    """Return the uploads that got bytes since a time, or are about to become a blob. Blocks."""
    found = []
    for upload in uploads:
        try:
            status = upload_files.path_of(layout, upload.id).lstat()
        except FileNotFoundError:
            found.append(upload)
        else:
            if status.st_mtime >= since:
                found.append(upload)
    return found


def _collect_in_copy(
    connection: Connection, cutoff: Cutoff, is_protected: IsProtected
) -> list[GarbageRow]:
    """Collect in a copy of the database, which SQLite keeps in a temporary file. Blocks.

    Which manifests become orphans is known only once the index that lists them is deleted.
    """
    everything = 2**62
    found: list[GarbageRow] = []
    with closing(sqlite3.connect("", isolation_level=None)) as copy:
        connection.backup(copy)
        copy.execute("BEGIN")
        while rows := collection_rows.find_garbage_manifests(copy, cutoff, everything):
            found += collection_rows.delete_garbage(copy, rows, cutoff, is_protected)
        return found + collection_rows.find_garbage_blobs(copy, cutoff, everything, None)


async def collect(
    database: Database,
    layout: Layout,
    now: float,
    grace: float,
    change_of: ChangeOf,
    is_protected: IsProtected,
) -> list[GarbageRow]:
    """Remove what nothing needs. Returns it.

    A collection that is cancelled or killed has removed some of it, each wholly.

    Args:
        database: The names.
        layout: Has the uploads in progress.
        now: Seconds since the epoch.
        grace: Seconds for which what nothing needs is kept after its last use.
        change_of: Returns what is recorded of the deletion of a row.
        is_protected: Tells which manifests stay anyway.
    """
    cutoff = await _find_cutoff(database, layout, now, grace)
    collected: list[GarbageRow] = []

    def delete_recorded(connection: Connection, rows: list[GarbageRow]) -> list[GarbageRow]:
        deleted = collection_rows.delete_garbage(connection, rows, cutoff, is_protected)
        for row in deleted:
            record_change(connection, change_of(row))
        return deleted

    async def delete(rows: list[GarbageRow]) -> None:
        collected.extend(
            await database.write(partial(delete_recorded, rows=rows), may_use_spare_space=True)
        )

    # An index first, then the manifests that only it has listed: again until none is found.
    find = partial(collection_rows.find_garbage_manifests, cutoff=cutoff, count=_ROWS_PER_WRITE)
    previous: list[GarbageRow] = []  # A row that is found and never deleted must not loop forever.
    while (rows := await database.read(find)) and rows != previous:
        previous = rows
        await delete(rows)
    last: GarbageRow | None = None
    find_blobs = partial(collection_rows.find_garbage_blobs, cutoff=cutoff, count=_ROWS_PER_WRITE)
    while rows := await database.read(partial(find_blobs, after=last)):
        last = rows[-1]
        await delete(rows)
    return collected
