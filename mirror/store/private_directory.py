"""Directories that other users of the machine must not read: names, users, content.

Lives here: their permissions. Must not know: what they have.

A directory keeps others from all files in it, whatever their own permissions are: SQLite creates
``-wal`` and ``-shm``, and content keeps its permissions when it is renamed.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path


def make_private_directory(path: Path) -> None:
    """Create a directory for its owner only. One that exists is closed to others, not to its group.

    Raises ``OSError`` if it cannot be created.
    """
    try:
        path.mkdir(mode=stat.S_IRWXU)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    except FileExistsError:
        if not path.is_dir():
            raise
        close_to_others(path)


def close_to_others(path: Path) -> None:
    """Take the rights of others from a directory. The group keeps what the operator gave it.

    A directory of another user stays as it is, and so does a missing one.
    """
    with suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IRWXO:
            path.chmod(mode & ~stat.S_IRWXO)
