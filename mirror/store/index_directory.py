"""The directory of the index: opened as a whole, replaced when damaged, copied on a full disk.

Lives here: the lock under which a directory is opened or renamed, the private copy, which errors
mean damage and which a disk that refuses. Must not know: the tables in it, or their rows.

Several processes share the directory. A lock lets only one of them at a time open it, or rename a
damaged one. The others then find that the files which they have open were replaced, and open the
new ones.

On a disk that refuses writes, SQLite cannot even open a database. A private copy in the temporary
directory serves until the disk accepts writes again. Its changes are merged then.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from mirror.observability.events import IndexDamaged, LogMessage, Observer
from mirror.oci.errors import error_text
from mirror.store import disk

_LOCK_TIMEOUT_S: Final = 20.0
"""Seconds to wait while another process opens the directory: to restore 50,000 names takes 4 s."""
_RETRY_INTERVAL_S: Final = 5.0
"""Seconds between two attempts to open a directory, or to leave a copy: operations wait for one."""
_OWNERLESS_S: Final = 60.0
"""Seconds after which a copy without a lock file belongs to a process that was killed."""
_COPY_PREFIX: Final = "oci-mirror-index-"
# SQLite's and the system's codes for a disk that can be read but refuses writes.
_REFUSED: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_REFUSED_BY_DISK: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
)
# An I/O error with one of these codes comes from reading: the database is damaged.
_UNREADABLE: Final = frozenset(
    {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
)
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# Codes of temporary failures: the database is not at fault.
_TEMPORARY: Final = _BUSY | {sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT}
_TEMPORARY_OF_DISK: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR}
)


class FilesReplaced(Exception):
    """The files of open databases are not those in the directory any more."""


FAILURES: Final = (sqlite3.Error, OSError, TypeError, ValueError, EOFError, FilesReplaced)
"""Exceptions of an operation on a database that fails."""


# --- errors ---------------------------------------------------------------------------------------


def is_busy(error: Exception) -> bool:
    """Return whether another process holds a lock of the database."""
    return isinstance(error, sqlite3.Error) and _code(error) in _BUSY


def is_refusal(error: Exception) -> bool:
    """Return whether the disk can be read, but refuses writes."""
    if isinstance(error, sqlite3.Error):
        if _code(error) == sqlite3.SQLITE_IOERR:
            return error.sqlite_errorcode not in _UNREADABLE
        return _code(error) in _REFUSED
    return isinstance(error, OSError) and error.errno in _REFUSED_BY_DISK


def is_damage(error: Exception) -> bool:
    """Return whether an open database is damaged, or was replaced by another one.

    False for a database that is busy, for a disk that refuses writes, and if memory or descriptors
    are few.
    """
    if isinstance(error, sqlite3.ProgrammingError):
        return False  # Our own fault.
    if isinstance(error, sqlite3.Error):
        if _code(error) == sqlite3.SQLITE_CANTOPEN:
            return not _is_out_of_descriptors()
        return _code(error) not in _TEMPORARY and not is_refusal(error)
    if isinstance(error, OSError):
        return not is_refusal(error) and error.errno not in _TEMPORARY_OF_DISK
    return isinstance(error, FilesReplaced)


def _is_out_of_descriptors() -> bool:
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError as error:
        return error.errno in _TEMPORARY_OF_DISK
    return False


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code. Zero for an error that we raised ourselves."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


# --- the directory --------------------------------------------------------------------------------


class Closable(Protocol):
    """Open databases."""

    def close(self) -> None:
        """Close them."""

    def note_changes(self) -> None:
        """Note all changes from now on, for a later merge."""


Databases = TypeVar("Databases", bound=Closable)


class IndexDirectory(Generic[Databases]):
    """Opens the databases of one directory. All methods block, and run in one thread."""

    def __init__(
        self,
        path: Path,
        open_at: Callable[[Path], Databases],
        prepare: Callable[[Databases], None],
        emit: Observer,
    ) -> None:
        """Open nothing yet.

        Args:
            path: The directory. It is created if it is missing.
            open_at: Opens all databases in a directory, or none. May raise any exception.
            prepare: Fills databases that have lost their rows.
            emit: Receives warnings.
        """
        self._path = path
        self._open_at = open_at
        self._prepare = prepare
        self._emit = emit
        self._failed_at = 0.0
        self._copy: _PrivateCopy | None = None
        self.refusal: str | None = None
        """Why a private copy is open. None: the directory itself is open, or nothing is."""

    def open(
        self,
        damage: Exception | None,
        is_at_fault: Callable[[], bool],
        release: Callable[[], None],
    ) -> Databases:
        """Open the directory: its databases are open and prepared, all or none.

        A damaged directory is renamed, and a new one is made. If the disk refuses writes, a private
        copy is opened.

        Args:
            damage: The error of the databases that were open before. None: they had none.
            is_at_fault: Whether the directory still has the files of these databases.
            release: Closes these databases.

        Raises:
            Exception: It could not be opened, now or a few seconds ago.
        """
        if self._has_just_failed():
            raise OSError(errno.EAGAIN, "the database could not be opened a moment ago")
        self._drop_copy()
        _remove_ownerless_copies()
        try:
            try:
                return self._open_in_place(damage, is_at_fault, release)
            except Exception as error:
                if not self._is_refused(error):
                    raise
                return self._open_copy(error)
        except BaseException:
            # The end of the attempt: it may have waited for longer than the interval.
            self._failed_at = time.monotonic()
            raise

    def leave_copy(self, merge: Callable[[Databases], None]) -> Databases | None:
        """Open the directory itself, if the disk accepts writes again, and delete the private copy.

        Args:
            merge: Writes the changes of the copy into the databases that it is given.

        Returns:
            The open databases; None if the disk still refuses, or did a few seconds ago.
        """
        if self._has_just_failed():
            return None
        try:
            databases = self._open_in_place(None, lambda: False, lambda: None)
            try:
                merge(databases)
            except BaseException:
                databases.close()
                raise
        except FAILURES:
            self._failed_at = time.monotonic()
            return None
        self._drop_copy()
        self._emit(LogMessage("info", "the index is on the disk again"))
        return databases

    def close(self) -> None:
        """Remove a private copy, whose databases are closed."""
        self._drop_copy()

    def _has_just_failed(self) -> bool:
        return self._failed_at > max(0.0, time.monotonic() - _RETRY_INTERVAL_S)

    def _open_in_place(
        self,
        damage: Exception | None,
        is_at_fault: Callable[[], bool],
        release: Callable[[], None],
    ) -> Databases:
        with self._locked():
            if damage is not None and is_at_fault():
                self._set_aside(damage)
            # SQLite may delete the log of a database that it closes, by its path: the new database
            # has the same path. So this comes first.
            release()
            try:
                return self._open_prepared(self._path)
            except Exception as error:
                if not self._is_damaged(error):
                    raise
                self._set_aside(error)
            return self._open_prepared(self._path)

    def _open_prepared(self, path: Path) -> Databases:
        databases = self._open_at(path)
        try:
            self._prepare(databases)
        except BaseException:
            databases.close()
            raise
        return databases

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._path.with_name(f"{self._path.name}.lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            deadline = time.monotonic() + _LOCK_TIMEOUT_S
            while not disk.try_lock(fd):
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, "another process opens the index", str(lock))
                time.sleep(0.01)
            yield
        finally:
            os.close(fd)

    def _set_aside(self, damage: Exception) -> None:
        """Rename the damaged directory. The one that was set aside before is deleted."""
        if not os.path.lexists(self._path):
            return  # It was deleted, and a new one is made.
        aside = self._path.with_name(f"{self._path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        self._path.rename(aside)
        self._emit(IndexDamaged(error_text(damage)))

    def _is_refused(self, error: Exception) -> bool:
        if isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_CANTOPEN:
            path = self._path if self._path.exists() else self._path.parent
            return not os.access(path, os.W_OK)
        return is_refusal(error)

    def _is_damaged(self, error: Exception) -> bool:
        """Return whether databases that cannot be opened are damaged: then diskcache may raise
        any exception."""
        if isinstance(error, (sqlite3.Error, OSError)):
            return is_damage(error) and not self._is_refused(error)
        return True

    # --- the private copy -------------------------------------------------------------------------

    def _open_copy(self, refusal: Exception) -> Databases:
        self._copy = _PrivateCopy()
        try:
            databases = self._open_in_copy(self._copy.path)
        except BaseException:
            self._drop_copy()
            raise
        # Not those of the restore. The directory's own databases are restored as well, and a merge
        # must not replace their newer rows.
        databases.note_changes()
        why = str(refusal)
        if isinstance(refusal, OSError) and refusal.strerror:
            why = f"{refusal.filename or self._path}: {refusal.strerror}"
        self.refusal = f"the index cannot be written ({why})"
        message = "the index cannot be written: a temporary copy is used until the disk accepts it"
        self._emit(LogMessage("warning", message, (("why", why),)))
        return databases

    def _open_in_copy(self, path: Path) -> Databases:
        try:
            if self._path.is_dir():
                shutil.copytree(self._path, path, dirs_exist_ok=True)
            return self._open_prepared(path)
        except Exception as error:
            if not self._is_damaged(error):
                raise
            shutil.rmtree(path, ignore_errors=True)
        return self._open_prepared(path)

    def _drop_copy(self) -> None:
        if self._copy is not None:
            self._copy.remove()
            self._copy = None
        self.refusal = None


class _PrivateCopy:
    """A directory in the temporary directory. The lock in it shows that its process lives."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix=_COPY_PREFIX))
        self.path = self._root / "index"
        draft = self._root / "draft"
        self._fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        disk.try_lock(self._fd)
        draft.rename(self._root / "lock")  # So it is never seen without its lock.

    def remove(self) -> None:
        """Delete the directory, and release the lock."""
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._fd)


def _remove_ownerless_copies() -> None:
    """Delete the copies of processes that were killed."""
    with suppress(OSError):
        for root in Path(tempfile.gettempdir()).glob(f"{_COPY_PREFIX}*"):
            status = root.lstat()
            lock = root / "lock"
            if status.st_uid != os.geteuid() or disk.is_locked(lock):
                continue
            if lock.exists() or time.time() - status.st_mtime > _OWNERLESS_S:
                shutil.rmtree(root, ignore_errors=True)
