"""Tell whether a file has changed since a look at it.

Lives here: what of a ``stat`` says so. Must not know: what is in the file, what counts while it
cannot be used. That differs: a removed user must not go on, so what cannot be read of the
credentials of clients counts for nothing. A certificate, or a secret of events, stays in use.
"""

from __future__ import annotations

import os


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return times, inode and size of a file. () for one that is not there. Blocks.

    The time of the last change of the inode shows a change also if the modification time is put
    back.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
