"""Uploads that nobody feeds give way when the quota, the disk or their number is at its limit.

Lives here: which of them end, in which order, and the lock that keeps a request from feeding one
meanwhile. Must not know: the event loop, HTTP, why there must be room.

Theory of operation: clients whose connection breaks begin a new upload, and leave the bytes of the
broken one, for which nobody will ask again. A request that feeds an upload has the lock of its
file. So an upload whose lock is free is fed by nobody, in no process, and what it has reserved
beyond its length is of a process that has died. An upload ends in the transaction of the change
that needs its room: its file is locked, its row is deleted, the change is made, and the file is
removed and unlocked after the commit. If the change or the commit is refused, nothing has ended.

A client may be between two of its requests. So an upload that nobody feeds stays for some time:

=========  =======================================================================================
0.2 s      then it gives way to its own user and repository (:data:`OWN_IDLE_S`)
5 s        one without a byte keeps what it has reserved (:data:`_STARTING_S`)
60 s       then it gives way to others (:data:`OTHERS_IDLE_S`)
1 hour     then it ends before the cache is evicted (``sessions.py``), or if it never had a byte
1 day      then it ends in any case (``abandoned_uploads.py``)
=========  =======================================================================================
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from sqlite3 import Connection
from typing import Final, TypeVar

from mirror.hosted import upload_files, upload_rows
from mirror.hosted.database import Database
from mirror.hosted.upload_feed import MIN_STEP_BYTES
from mirror.hosted.upload_rows import UploadRow
from mirror.oci.errors import QuotaExceeded
from mirror.store.disk import boot_id
from mirror.store.layout import Layout

T = TypeVar("T")

OWN_IDLE_S: Final = 0.2
"""Seconds after which an upload gives way to another one of its owner and repository. The longest
idle one goes first: so one between two requests goes only if no broken attempt has enough bytes."""
OTHERS_IDLE_S: Final = 60.0
"""Seconds after which an upload gives way to others."""
_STARTING_S: Final = 5.0
"""Seconds for which an upload without a byte keeps what it has reserved. A ``POST`` with the whole
blob creates the upload first, and locks it a moment later."""
_MAX_GIVING_WAY: Final = 256
"""Uploads that end in one change. Each needs a descriptor until the commit."""
_LOOK_TTL_S: Final = 1.0
"""Seconds for which a look at the files of all uploads (some 20 ms, with the lock of the database)
is remembered."""


@dataclass(frozen=True, slots=True)
class UploadState:
    """An upload as it was found. Whether a request feeds it is known once its file is locked."""

    row: UploadRow
    length: int
    """Bytes in its file."""
    idle: float
    """Seconds since its last byte. Infinite if the machine was booted since, so that nobody goes on
    with it, or if its last byte is in the future, because the clock was set back."""

    def may_give_way(self, repository: str, owner: str, age: float = 0.0) -> bool:
        """Return whether it has been idle for long enough to end for a push.

        Args:
            repository: The repository of the push.
            owner: Who pushes.
            age: Seconds since it was found so. It counts as idle since then.
        """
        is_own = (self.row.repository, self.row.owner) == (repository, owner)
        return self.idle + age >= (OWN_IDLE_S if is_own else OTHERS_IDLE_S)


@dataclass(slots=True)
class LastLook:
    """The uploads as a process has found them last, for a push that did not fit."""

    at: float = -math.inf
    """Seconds since the epoch."""
    found: list[UploadState] = field(default_factory=list)


class IdleUploads:
    """The uploads that end in one transaction. Use it as a context manager, in the transaction.

    The files of the ended uploads are removed after the commit. All methods block.
    """

    def __init__(
        self,
        database: Database,
        connection: Connection,
        layout: Layout,
        now: float,
        look: LastLook | None = None,
    ) -> None:
        """End nothing yet.

        Args:
            database: Has the transaction.
            connection: In the transaction.
            layout: Has the files.
            now: Seconds since the epoch.
            look: What the process remembers from one transaction to the next. None: nothing.
        """
        self._database = database
        self._connection = connection
        self._layout = layout
        self._now = now
        self._last_look = look or LastLook()
        self._boot = boot_id()
        self._locked: dict[str, int] = {}
        """The descriptors of the ended uploads."""

    def __enter__(self) -> IdleUploads:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self._database.after_commit(self._unlock)
        else:
            self._unlock(has_ended=False)

    def _unlock(self, has_ended: bool) -> None:
        for upload_id, fd in self._locked.items():
            if has_ended:
                with suppress(OSError):  # A sweep removes a file without a row.
                    upload_files.remove(self._layout, upload_id)
            os.close(fd)

    # --- the quota ------------------------------------------------------------------------------

    def run_within_quota(self, change: Callable[[Connection], T], repository: str, owner: str) -> T:
        """Return ``change(connection)``. If the quota refuses it, uploads give way to it.

        Args:
            change: Writes rows only: it may be undone, and called again.
            repository: The repository that it is for.
            owner: Who makes it.

        Raises ``QuotaExceeded`` if that does not help, and then no upload has ended.
        """
        try:
            return self._try(change)
        except QuotaExceeded as error:
            refusal = error
        if not self._may_fit_with(change, self._lowest_reservations(repository, owner)):
            raise refusal
        found = self._find()
        self._last_look.at, self._last_look.found = self._now, found
        surplus = [one.row for one in found if one.row.reserved > one.length]
        if self._release_ahead(found) + self.release_surplus(surplus):
            with suppress(QuotaExceeded):
                return self._try(change)
        found = [one for one in found if one.row.reserved and one.length]
        candidates = _in_order(found, repository, owner)
        if not self._may_fit_with(change, {one.row.id: 0 for one in candidates}):
            raise refusal
        for upload in candidates:
            if self._end(upload, repository, owner):
                with suppress(QuotaExceeded):
                    return self._try(change)
        raise refusal

    def release_surplus(self, rows: Iterable[UploadRow]) -> int:
        """Let the uploads that nobody feeds reserve no more than they have. Returns their number.

        The request that feeds one next reserves what it needs, whatever was reserved before.
        """
        released = 0
        for row in rows:
            may_release = has_surplus(self._layout, row)
            if not may_release or (fd := upload_files.lock_idle(self._layout, row.id)) is None:
                continue
            try:
                status = os.fstat(fd)
                is_starting = not status.st_size and 0 <= self._now - status.st_mtime < _STARTING_S
                if row.reserved > status.st_size and not is_starting:
                    upload_rows.set_reservation(self._connection, row.id, status.st_size)
                    released += 1
            finally:
                os.close(fd)
        return released

    def _release_ahead(self, found: Iterable[UploadState]) -> int:
        """Take back what fed uploads have reserved ahead, but for a little. Returns their number.

        The request that feeds one does not know it. It goes on up to what it had reserved: its
        bytes exceed the quota by no more, and not when they become a blob.
        """
        released = 0
        for upload in found:
            kept = upload.length + MIN_STEP_BYTES
            if upload.row.reserved > kept:
                upload_rows.set_reservation(self._connection, upload.row.id, kept)
                released += 1
        return released

    def _try(self, change: Callable[[Connection], T]) -> T:
        self._connection.execute("SAVEPOINT attempt")
        try:
            result = change(self._connection)
        except QuotaExceeded:
            self._connection.execute("ROLLBACK TO attempt")
            self._connection.execute("RELEASE attempt")
            raise
        self._connection.execute("RELEASE attempt")
        return result

    def _lowest_reservations(self, repository: str, owner: str) -> dict[str, int]:
        """Return the lower reservations that uploads may have once they give way, by the last look.

        Files only grow, and an upload that was fed since has been idle for less. So a look now
        finds no more room than the last one shows, if uploads that it did not find have no byte.
        """
        age = self._now - self._last_look.at
        found = self._last_look.found if 0 <= age < _LOOK_TTL_S else []
        staying = [one for one in found if not one.may_give_way(repository, owner, age)]
        kept = {one.row.id: one.length for one in staying}
        rows = upload_rows.reservations(self._connection).items()
        return {one: kept.get(one, 0) for one, reserved in rows if reserved > kept.get(one, 0)}

    def _may_fit_with(
        self, change: Callable[[Connection], object], reservations: dict[str, int]
    ) -> bool:
        """Return whether a refused change fits if uploads reserve only this. Changes nothing."""
        if not reservations:
            return False
        self._connection.execute("SAVEPOINT question")
        try:
            for upload_id, reserved in reservations.items():
                upload_rows.set_reservation(self._connection, upload_id, reserved)
            with suppress(QuotaExceeded):
                self._try(change)
                return True
            return False
        finally:
            self._connection.execute("ROLLBACK TO question")
            self._connection.execute("RELEASE question")

    # --- their number ---------------------------------------------------------------------------

    def end_one_for(self, row: UploadRow) -> None:
        """Let uploads give way to a new one, if there are too many.

        An owner with too many loses one. If all owners have too many together, the one with the
        most loses one: so whoever has fewer than another one can always begin one.

        Raises ``TooManyRequests`` if requests feed all of these.
        """
        owners = upload_rows.owners_to_give_way(self._connection, row.owner)
        ranks = {owner: rank for rank, owner in enumerate(owners)}

        def rank(upload: UploadState) -> tuple[int, bool, float, str]:
            # One without a byte is no loss, unless its client is about to send the first one.
            is_loss = upload.length > 0 or upload.idle < OTHERS_IDLE_S
            return (ranks[upload.row.owner], is_loss, -upload.idle, upload.row.id)

        found = [one for one in self._find() if one.row.owner in ranks] if owners else []
        if not any(self._end(upload) for upload in sorted(found, key=rank)):
            upload_rows.check_count(self._connection, row)

    # --- the disk -------------------------------------------------------------------------------

    def end_for_bytes(self, missing: int, min_idle: float, repository: str, owner: str) -> int:
        """End uploads until ``missing`` bytes are free, or none is left. Returns what it has freed.

        Args:
            missing: Bytes.
            min_idle: Seconds for which an upload must have been idle in any case.
            repository: The repository that the space is for.
            owner: Who needs it.
        """
        freed = 0
        for upload in _in_order(self._find(), repository, owner):
            has_use = freed < missing and upload.length and upload.idle >= min_idle
            if has_use and self._end(upload, repository, owner):
                freed += upload.length
        return freed

    # --- one upload -----------------------------------------------------------------------------

    def _find(self) -> list[UploadState]:
        """Return the uploads that have a file. Without one, an upload is about to become a blob."""
        found = []
        directory = str(self._layout.uploads)  # Thousands of path objects cost more than the files.
        for row in upload_rows.all_uploads(self._connection):
            with suppress(OSError):
                status = os.lstat(f"{directory}/{row.id}")
                found.append(self._measure(row, status))
        return found

    def _measure(self, row: UploadRow, status: os.stat_result) -> UploadState:
        idle = self._now - status.st_mtime
        is_known = row.boot == self._boot and idle >= 0
        return UploadState(row, status.st_size, idle if is_known else math.inf)

    def _end(self, upload: UploadState, repository: str = "", owner: str | None = None) -> bool:
        """End an upload, unless a request feeds it, or has done so meanwhile.

        ``owner``: None if the time since its last byte does not matter.
        """
        row = upload.row
        if len(self._locked) >= _MAX_GIVING_WAY:
            return False
        fd = upload_files.lock_idle(self._layout, row.id)
        if fd is None:
            return False
        current = self._measure(row, os.fstat(fd))
        if owner is not None and not current.may_give_way(repository, owner):
            os.close(fd)
            return False
        self._locked[row.id] = fd
        return upload_rows.end_upload(self._connection, row.id)


def has_surplus(layout: Layout, row: UploadRow) -> bool:
    """Return whether an upload that has a file has reserved more than its bytes. Blocks."""
    length = upload_files.upload_length(layout, row.id) if row.reserved else None
    return length is not None and row.reserved > length


def _in_order(uploads: list[UploadState], repository: str, owner: str) -> list[UploadState]:
    """Return the uploads that may give way to a push, in the order in which they do.

    First those of the same owner and repository, then others of the repository, then all others;
    of each, the longest idle first.
    """

    def rank(upload: UploadState) -> tuple[bool, bool, float, str]:
        row = upload.row
        is_same_repository = row.repository == repository
        is_own = is_same_repository and row.owner == owner
        return (not is_own, not is_same_repository, -upload.idle, row.id)

    return sorted((one for one in uploads if one.may_give_way(repository, owner)), key=rank)
