"""Locks of byte ranges of an open file (``F_OFD_SETLK``, fcntl(2)).

Lives here: the system calls. Must not know: what a range stands for.

A range need not have bytes in the file. The lock belongs to the open file, not to the process: two
descriptors that one process has opened exclude each other. It ends when the last copy of the
descriptor is closed, so also with its process.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_FLOCK: Final = struct.Struct("@hhqqi4x")
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, pid."""


def lock_range(fd: int, start: int, length: int, *, is_shared: bool = False) -> None:
    """Lock ``length`` bytes from ``start`` on, without waiting.

    ``is_shared``: others may hold shared locks of the same bytes. That needs no descriptor that may
    write, so a directory can be locked.

    Raises ``OSError``: ``BlockingIOError`` or ``PermissionError`` if another descriptor excludes it
    (fcntl(2) permits both).
    """
    kind = fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def is_range_locked(fd: int, start: int, length: int) -> bool:
    """Return whether another descriptor holds a lock, also a shared one. Raises ``OSError``."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
