"""The end of uploads that nobody goes on with.

Lives here: how long an upload stays, and what a crash may have left of one. Must not know: HTTP,
uploads that give way to others before (``idle_uploads.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from sqlite3 import Connection
from typing import Final

from mirror.hosted import upload_files, upload_rows
from mirror.hosted.database import Database
from mirror.hosted.idle_uploads import IdleUploads, has_surplus
from mirror.hosted.upload_rows import UploadRow
from mirror.store.disk import boot_id
from mirror.store.layout import Layout
from mirror.threads import run_in_thread

UPLOAD_TTL_S: Final = 86400.0
"""Seconds (one day) without a byte after which an upload has ended."""
EMPTY_UPLOAD_TTL_S: Final = 3600.0
"""Seconds (one hour) after which an upload without a byte has ended. Clients send the first one at
once."""
_ORPHAN_TTL_S: Final = 60.0
"""Seconds for which an upload may have a file without a row: it begins."""


class AbandonedUploads:
    """Ends the uploads of a data directory that nobody has fed for long."""

    def __init__(self, database: Database, layout: Layout, now: Callable[[], float]) -> None:
        """End nothing yet.

        Args:
            database: Has the rows.
            layout: Has the files.
            now: Returns the seconds since the epoch.
        """
        self._database = database
        self._layout = layout
        self._now = now
        self._boot = boot_id()
        self._without_file: set[str] = set()
        """The uploads that had no file at the last look."""

    async def end(self) -> int:
        """End the uploads that nobody has fed for a day, or for an hour without a byte.

        Returns their number. The server calls this at its start, and now and then. Also removes
        rows without files, files without rows, and uploads of another boot, and releases what dead
        processes have reserved. Raises ``StorageUnavailable``, ``NamesDamaged``, ``OSError``.
        """
        rows = await self._database.read(upload_rows.all_uploads)
        ended = await run_in_thread(self._remove_abandoned, rows)

        def end(connection: Connection) -> None:
            for upload_id in ended:
                upload_rows.end_upload(connection, upload_id)
            with IdleUploads(self._database, connection, self._layout, self._now()) as idle:
                idle.release_surplus(rows)

        may_release = await run_in_thread(self._has_surplus, rows)
        if ended or may_release:
            await self._database.write(end, is_durable=False, may_use_spare_space=True)
        return len(ended)

    def _has_surplus(self, rows: list[UploadRow]) -> bool:
        """Return whether an upload has reserved more than it has, in a thread."""
        return any(has_surplus(self._layout, row) for row in rows)

    def _remove_abandoned(self, rows: list[UploadRow]) -> list[str]:
        """Remove files, in a thread. Returns the ids of the rows that are to go."""
        now, layout, ended, without_file = self._now(), self._layout, [], set()
        for row in rows:
            is_of_this_boot = row.boot == self._boot
            ttl, empty_ttl = (UPLOAD_TTL_S, EMPTY_UPLOAD_TTL_S) if is_of_this_boot else (0.0, 0.0)
            if upload_files.upload_length(layout, row.id) is None:
                without_file.add(row.id)
            elif upload_files.remove_abandoned(layout, row.id, now, ttl, empty_ttl):
                ended.append(row.id)
        # An upload that becomes a blob has no file for a moment: not at two looks.
        ended += without_file & self._without_file
        self._without_file = without_file
        remove_files_without_row(layout, rows, now)
        return ended


def remove_files_without_row(layout: Layout, rows: Iterable[UploadRow], now: float) -> None:
    """Remove what pushes and restores that were killed have left. Blocks.

    Args:
        layout: The data directory.
        rows: All rows, read just now.
        now: Seconds since the epoch.
    """
    known = {row.id for row in rows}
    for upload_id in upload_files.list_ids(layout):
        if upload_id not in known:
            upload_files.remove_abandoned(layout, upload_id, now, _ORPHAN_TTL_S, _ORPHAN_TTL_S)
