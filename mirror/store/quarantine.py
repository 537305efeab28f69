"""Damaged content, put aside for whoever wants to know why.

Lives here: what becomes of a file under ``blobs/`` that does not hash to its name. It blocks. Must
not know: how damage is found.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.layout import Layout

KEPT: Final = 16
"""Damaged contents that are kept at most."""


def put_aside(layout: Layout, digest: Digest, fd: int) -> None:
    """Put damaged content aside, if ``fd`` is still what the digest's path names.

    Never raises: on a disk that takes nothing it stays, is hashed at every use, and never served.
    """
    path, target = layout.blob(digest), layout.quarantine(digest)
    with suppress(OSError):
        if not disk.is_at(fd, path):
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        except OSError:
            path.unlink(missing_ok=True)
        drop(layout, KEPT)


def drop(layout: Layout, keep: int) -> int:
    """Remove damaged content, but for the newest ``keep``; returns how many bytes that were."""
    found = []
    for path in (layout.root / "quarantine").glob("*/*"):
        with suppress(OSError):
            status = path.lstat()
            found.append((status.st_ctime, path, status.st_size))
    freed = 0
    for _, path, size in sorted(found, reverse=True)[keep:]:
        with suppress(OSError):
            path.unlink()
            freed += size
    return freed


def size(layout: Layout) -> int:
    """Bytes of all damaged content."""
    total = 0
    for path in (layout.root / "quarantine").glob("*/*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total
