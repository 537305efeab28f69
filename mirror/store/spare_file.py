"""Replace a small file durably, also on a disk that has become full since the last time.

Lives here: the spare file, into which the next content is written, and its rename. Must not know:
what the file has.

Theory of operation: beside the file is a spare one, whose blocks are already allocated. The new
content is written over it, synced, and renamed. A new spare file is allocated then. On a full disk
that fails, or another writer is faster; so the earlier file, whose blocks are still there under a
second name, becomes the spare one. So content that is not longer than before can always be written:
marks can be taken away. A crash leaves either content whole.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirror.store import disk

_ROOM_BYTES: Final = 16 * 1024
"""Bytes of a spare file beyond the content: room for some marks more on a full disk."""
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotDurable(OSError):
    """The file has its new content, but a power cut may undo that."""


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file. Blocks. The caller holds a lock, so that no other process does so.

    The file can be read by all users, whatever the umask is. Its spare file is ``NAME.spare``.

    Raises:
        NotDurable: The directory cannot be synced.
        OSError: The disk refuses. The file is as it was.
    """
    spare, earlier = path.with_suffix(".spare"), path.with_suffix(".earlier")
    # Opened first: a lack of descriptors must not come between the rename and the sync.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            _fill(_open_spare(spare, earlier), content)
            _keep_blocks(path, earlier)
            spare.replace(path)
        except OSError as error:
            if disk.reason_of(error) != "full":  # Else it is still a spare file.
                _drop(spare)
            _drop(earlier)
            raise
        try:
            disk.sync_directory(directory)
        except OSError as error:
            raise NotDurable(error.errno, error.strerror) from None
    finally:
        os.close(directory)
    if _allocate(spare, len(content) + _ROOM_BYTES):
        _drop(earlier)
    else:
        with suppress(OSError):  # There was none before.
            os.rename(earlier, spare)


def _open_spare(spare: Path, earlier: Path) -> int:
    """Open the spare file, or a new one if there is none that only we can have. Raises ``OSError``.

    A process that was killed may have left its spare blocks as ``earlier``.
    """
    with suppress(OSError):
        if not os.path.lexists(spare):
            os.rename(earlier, spare)
    with suppress(OSError):
        fd = os.open(spare, _FLAGS)
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return fd
        os.close(fd)
    spare.unlink(missing_ok=True)
    return os.open(spare, _FLAGS | os.O_CREAT | os.O_EXCL, 0o644)


def _fill(fd: int, content: bytes) -> None:
    """Write the whole content, and sync it. Raises ``OSError``. Closes the descriptor."""
    try:
        os.fchmod(fd, 0o644)
        size, position = os.fstat(fd).st_size, 0
        try:
            while position < len(content):
                position += os.pwrite(fd, content[position:], position)
        except OSError:
            os.ftruncate(fd, size)
            raise
        os.ftruncate(fd, len(content))
        os.fsync(fd)
    finally:
        os.close(fd)


def _keep_blocks(path: Path, earlier: Path) -> None:
    """Give the file a second name, so that its blocks are not freed when it is replaced."""
    _drop(earlier)
    with suppress(OSError):  # It is the first one, or a file system without links.
        os.link(path, earlier)


def _allocate(spare: Path, size: int) -> bool:
    """Create a spare file of ``size`` bytes. False if there is no room for it."""
    try:
        fd = os.open(spare, _FLAGS | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        _drop(spare)
        return False
    finally:
        os.close(fd)
    return True


def _drop(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
