"""The files of uploads: creating and locking them, publishing one as content.

Lives here: calls that block, for threads. Must not know: rows, the event loop.

An upload is a file that only grows. Its length is how far the upload has come: no state beside it
can differ. An exclusive ``flock`` on it means that a request feeds the upload, or finishes it. The
lock ends with its process, so another one can go on after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store.content_hold import ContentHold
from mirror.store.disk import (
    Layout,
    is_at,
    open_locked,
    open_whole,
    size_of_whole,
    sync_directory,
    try_lock,
)
from mirror.store.ingest_writer import ShortWrite, write_all
from mirror.store.private_directory import make_private_directory

# 128 random bits (secrets.token_hex). Nothing else becomes part of a path.
_UPLOAD_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_EVICTION_TIMEOUT_S: Final = 10.0
"""Seconds to wait for another process that looks at the same content. It takes microseconds."""
_NANOSECONDS: Final = 10**9
"""Nanoseconds in a second."""
_CLOCK_STEP_S: Final = 60.0
"""If the last byte is more than so many seconds in the future, the clock was set back."""
_LOCK_FORM: Final = "hhqqi4x"
"""``struct flock`` of Linux: type, whence, start, length, process."""
_WAITING: Final = struct.pack(_LOCK_FORM, fcntl.F_WRLCK, os.SEEK_SET, 2**62, 1, 0)
"""The lock of a request that waits: a byte that no upload reaches. It belongs to the open file
(``F_OFD_SETLK``), so no other request of the process ends it."""


def is_upload_id(text: str) -> bool:
    """Return whether a text can be the id of an upload, and so the name of its file."""
    return _UPLOAD_ID.fullmatch(text) is not None


def path_of(layout: Layout, upload_id: str) -> Path:
    """Return the path of an upload's file. Raises ``ValueError`` for what is no id."""
    if not is_upload_id(upload_id):
        raise ValueError("not the id of an upload")
    return layout.uploads / upload_id


def create(layout: Layout, upload_id: str) -> None:
    """Create the empty file of a new upload. Raises ``OSError``."""
    path = path_of(layout, upload_id)
    make_private_directory(path.parent)  # An operator may have removed it.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(path, flags, 0o644))


def open_to_feed(layout: Layout, upload_id: str) -> tuple[int | None, int] | None:
    """Open and lock the file of an upload.

    Returns:
        The descriptor, None if another request has the lock, and the length in bytes. None if
        there is no such file.

    Raises:
        OSError: The file cannot be opened or locked.
    """
    path = path_of(layout, upload_id)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        size = os.fstat(fd).st_size
        if not try_lock(fd):
            os.close(fd)
            return None, size
        if is_at(fd, path):
            return fd, os.fstat(fd).st_size
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)  # It was finished or cancelled a moment ago.
    return None


def close_opened(opened: tuple[int | None, int] | None) -> None:
    """Close and unlock what :func:`open_to_feed` has returned."""
    if opened is not None and opened[0] is not None:
        os.close(opened[0])


def upload_length(layout: Layout, upload_id: str) -> int | None:
    """Return the length of an upload in bytes. None if there is no such file."""
    try:
        status = path_of(layout, upload_id).lstat()
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def remove(layout: Layout, upload_id: str) -> None:
    """Remove the file of an upload whose lock we hold. A missing one is passed over."""
    path_of(layout, upload_id).unlink(missing_ok=True)


def lock_idle(layout: Layout, upload_id: str) -> int | None:
    """Open and lock the file of an upload that no request feeds. The caller closes it.

    Returns the descriptor. None if a request feeds it, if there is no such file, or if it cannot be
    opened.
    """
    with suppress(OSError):
        opened = open_to_feed(layout, upload_id)
        return None if opened is None else opened[0]
    return None


def is_fed(layout: Layout, upload_id: str) -> bool:
    """Return whether a request feeds an upload. Raises ``OSError``."""
    opened = open_to_feed(layout, upload_id)
    close_opened(opened)
    return opened is not None and opened[0] is None


def start_waiting(layout: Layout, upload_id: str, last: float) -> int | None:
    """Tell the process that feeds an upload that a newer request waits for it.

    Args:
        layout: The data directory.
        upload_id: Its id.
        last: Seconds since the epoch. An upload that has got a byte after it is not waited for.

    Returns the descriptor, until whose end the request waits. None if there is no such file, if the
    upload was fed after ``last``, or if another request waits. Raises ``OSError``.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path_of(layout, upload_id), flags)
    except FileNotFoundError:
        return None
    try:
        changed = os.fstat(fd).st_mtime
        if not last < changed <= last + _CLOCK_STEP_S:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WAITING)
            return fd
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    os.close(fd)
    return None


def has_waiting(fd: int) -> bool:
    """Return whether a request waits for the upload whose open file this is. Does not block."""
    with suppress(OSError):
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WAITING)
        return bool(struct.unpack(_LOCK_FORM, found)[0] != fcntl.F_UNLCK)
    return False


def remove_abandoned(
    layout: Layout, upload_id: str, now: float, ttl: float, empty_ttl: float
) -> bool:
    """Remove the file of an upload that nobody has fed for ``ttl`` seconds.

    If the last byte is in the future, because the clock was set back, it counts as of now.

    Args:
        layout: The data directory.
        upload_id: Its id.
        now: Seconds since the epoch.
        ttl: See above. Zero: however long nobody has fed it.
        empty_ttl: The same for an upload without a byte.

    Returns:
        Whether it was removed: not if it was fed since, is being fed, or is not there.
    """
    with suppress(FileNotFoundError), open_locked(path_of(layout, upload_id)) as fd:
        if fd is None:
            return False
        status = os.fstat(fd)
        limit = ttl if status.st_size else empty_ttl
        if limit and now < status.st_mtime:
            os.utime(fd, (now, now))
        if limit and now - status.st_mtime < limit:
            return False
        remove(layout, upload_id)
        return True
    return False


def list_ids(layout: Layout) -> list[str]:
    """Return the ids of the files of uploads. Other names are passed over."""
    try:
        return [name for name in os.listdir(layout.uploads) if is_upload_id(name)]
    except FileNotFoundError:
        return []


def publish_upload(
    layout: Layout, path: Path, fd: int, digest: Digest, now: float, hold: ContentHold
) -> bool:
    """Make a verified file durable and visible as content: fsync, rename, fsync of the directory.

    Content of the same digest is replaced: its last verification may be old, and these bytes were
    hashed just now.

    Args:
        layout: The data directory.
        path: The file.
        fd: Its descriptor.
        digest: The digest of its bytes.
        now: Seconds since the epoch.
        hold: Keeps the content from removal. The caller holds it until a row that names the content
            is committed.

    Returns:
        True if there was no such content before.

    Raises:
        OSError: One of the steps failed. An ``fsync`` that failed is never tried again. If only the
            directory could not be synced, the content stays, and others may have it: without a row
            it is cache.
        StorageUnavailable: A removal of the same content does not end.
    """
    used = int(now) * _NANOSECONDS
    os.utime(fd, ns=(used, used))
    os.fsync(fd)
    if not is_at(fd, path):
        raise FileNotFoundError(errno.ENOENT, "the file of the upload was removed", str(path))
    # From now on clients can open it as whole content, and its readers share the lock.
    fcntl.flock(fd, fcntl.LOCK_SH)
    with hold:
        hold.acquire([digest])
        is_new = size_of_whole(layout, digest) is None
        path.rename(layout.blob(digest))
        sync_directory(hold.directory_of(digest))
    return is_new


def lease_content(layout: Layout, digest: Digest) -> int | None:
    """Keep content from eviction: return a descriptor with a shared lock. None if there is none.

    Another process may hold the exclusive lock for a moment: an eviction that looks at the content,
    or a fetch that has just published it. That ends first.

    Raises:
        OSError: The content cannot be opened.
        StorageUnavailable: The other process does not release the lock.
    """
    deadline = time.monotonic() + _EVICTION_TIMEOUT_S
    while True:
        opened = open_whole(layout, digest)
        if opened is not None:
            return opened[0]
        try:
            status = layout.blob(digest).lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        if time.monotonic() > deadline:
            raise StorageUnavailable("another process does not release the lock of this content")
        time.sleep(0.001)


def publish_body(
    layout: Layout, digest: Digest, body: bytes, now: float, hold: ContentHold
) -> bool:
    """Write small content, and publish it.

    Args:
        layout: The data directory.
        digest: The digest of ``body``.
        body: All bytes.
        now: Seconds since the epoch.
        hold: See :func:`publish_upload`.

    Returns:
        True if there was no such content before.

    Raises:
        OSError: One of the steps failed.
        StorageUnavailable: See :func:`publish_upload`.
    """
    draft = path_of(layout, secrets.token_hex(16))
    make_private_directory(draft.parent)
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try_lock(fd)  # No sweep removes it.
        try:
            write_all(fd, [body], 0)
        except ShortWrite as short:
            raise short.cause from short
        return publish_upload(layout, draft, fd, digest, now, hold)
    except BaseException:
        try_remove(draft)
        raise
    finally:
        os.close(fd)


def try_remove(path: Path) -> None:
    """Remove a file. Never raises: the next sweep removes what is left."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn errors of the disk into ``StorageUnavailable``. ``what``: what cannot be done now."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageUnavailable(f"{what}: {reason}") from error
