"""What an operator reads when a disk refuses a command.

Lives here: errors of the operating system as one line, with the path and the remedy. Must not know:
which command runs, what it wanted to do.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

_AGAIN: Final = "then run the command again"
_DISK_REMEDIES: Final[Mapping[int, str]] = {
    errno.EIO: f"the disk fails: look at dmesg, repair or replace it, {_AGAIN}",
    errno.EROFS: f"mount it for writing, {_AGAIN}",
    errno.ENOSPC: f"free space there, {_AGAIN}",
    errno.EDQUOT: f"free space there, or raise the disk quota of this user, {_AGAIN}",
    errno.EACCES: "run the command as the user of the server, or correct the permissions",
    errno.EPERM: "run the command as the user of the server, or correct the permissions (lsattr)",
    errno.EMFILE: f"raise the limit of open files (ulimit -n), {_AGAIN}",
    errno.ENFILE: f"raise the limit of open files of the machine (fs.file-max), {_AGAIN}",
}
"""``errno`` -> what to do."""


def disk_failure_text(error: OSError, path: object = None) -> str:
    """Return an error as one line: path, reason, remedy.

    Args:
        error: The error.
        path: The file that it is about. None: as the error says.
    """
    where = path if path is not None else error.filename
    reason = error.strerror or str(error)
    text = reason if where is None else f"{where}: {reason}"
    remedy = None if error.errno is None else _DISK_REMEDIES.get(error.errno)
    return text if remedy is None else f"{text}: {remedy}"


def not_stored_text(root: object, unwritable: str | None) -> str:
    """Return why content that was fetched is not on the disk, with the remedy.

    Args:
        root: The data directory.
        unwritable: Why nothing can be stored. None: there was too little room.
    """
    if unwritable is None:
        return f"{root}: there was no room for it: raise storage.max_size, or free space there"
    return f"{root}: {unwritable}: look at dmesg, its mount and its permissions, {_AGAIN}"
