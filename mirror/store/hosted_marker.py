"""Whether the data directory has names of hosted repositories, has none, or has lost them.

Lives here: the file ``hosted.created``, which says that ``hosted/names.db`` was made once. Must not
know: what the names are, who restores them.

Without the file, a data directory that has lost its names looks like one that never had any: a
server would begin anew, and evict all hosted content. It lies beside the directory ``hosted``, so
that it also notices a file system that is not mounted there. A restore makes the database anew with
all names in one transaction, and leaves the file as it is. So a restore that was killed leaves at
most a database without tables, which counts as lost, too (``mirror/hosted/database.py``).
"""

from __future__ import annotations

import os
from typing import Final

from mirror.oci.errors import StorageUnavailable
from mirror.store.disk import is_locked, sync_directory
from mirror.store.layout import Layout

LOST_REMEDY: Final = (
    "stop the server, and mount the file system that has hosted/, or run oci-mirror restore BACKUP;"
    " to lose all hosted names and begin anew, remove hosted.created from the data directory"
)
"""The remedy for names that are lost."""
DAMAGED_NAMES_REMEDY: Final = (
    "stop the server, move names.db, names.db-wal and names.db-shm away, and run oci-mirror restore"
    " BACKUP; without a backup, all hosted names are lost"
)
"""The procedure that brings the hosted names back, wherever damage is found."""


def has_hosted_names(layout: Layout) -> bool:
    """Return whether there is a database. Blocks. Raises what :func:`raise_if_lost` raises."""
    raise_if_lost(layout)
    return layout.hosted_names.exists()


def raise_if_lost(layout: Layout) -> None:
    """Raise ``StorageUnavailable`` if there was a database, and it is gone. Blocks."""
    # The database is asked last: a server makes the marker after it.
    if layout.hosted_marker.exists() and not layout.hosted_names.exists():
        raise lost_names(layout)


def lost_names(layout: Layout) -> StorageUnavailable:
    """Return the error for names that are lost."""
    return StorageUnavailable(f"{layout.hosted_names} was there, and is gone: {LOST_REMEDY}")


def has_unfinished_restore(layout: Layout) -> bool:
    """Return whether a restore was killed, and none has run since. Blocks."""
    return layout.staged_names.exists() and not is_locked(layout.restore_lock)


def note_hosted_names(layout: Layout) -> None:
    """Write down durably that there is a database. Blocks. Raises ``OSError``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        os.close(os.open(layout.hosted_marker, flags, 0o644))
    except FileExistsError:
        return
    directory = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory(directory)
    finally:
        os.close(directory)
