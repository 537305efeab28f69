"""Let the disk begin to write what a file has got, long before somebody waits for it.

Lives here: one call of the system. Must not know: what is written.

Linux begins to write on its own only after 30 seconds, or once a tenth of all memory is dirty. So a
large upload that ends before that would wait for the disk once more at its ``fsync``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

STEP_BYTES: Final = 16 * 1024 * 1024
"""Bytes that are handed to the disk at a time: enough for one long write, and the ``fsync`` at the
end waits for at most so many."""
_START: Final = 2  # SYNC_FILE_RANGE_WRITE, from linux/fs.h


def start_writeback(fd: int, start: int, end: int) -> None:
    """Let the disk begin to write the whole steps that end between two positions of a file.

    It is a hint: the bytes are durable only after an ``fsync``. Blocks while the disk's queue is
    full, and never raises.

    Args:
        fd: The file.
        start: Where the latest bytes begin.
        end: Where they end.
    """
    first, last = start - start % STEP_BYTES, end - end % STEP_BYTES
    call = _sync_file_range()
    if last > first and call is not None:
        call(fd, first, last - first, _START)


@cache
def _sync_file_range() -> Any:
    """Return the function of the C library. None: it has none."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
