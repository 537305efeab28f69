"""Recovery of a data directory at a start: quick, without a manual step, without hashing.

Lives here: the directories of the layout, which ingest files a fetch may resume, stale drafts. Must
not know: the index, the event loop.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.quarantine import MAX_QUARANTINED_FILES, put_back_moving, trim_quarantine

_INGEST_TTL_S: Final = 86400.0
"""Seconds for which an ingest file waits to be resumed: a node that wants the content retries much
sooner."""
_DRAFT_TTL_S: Final = 60.0
"""Seconds after which a draft of ``index.json`` belongs to no running writer: one takes less."""
_LAYOUT_VERSION: Final = {"imageLayoutVersion": "1.0.0"}


def recover(layout: Layout, now: float, boot: str) -> str | None:
    """Prepare a data directory. Never raises.

    Args:
        layout: The data directory, which need not exist.
        now: Seconds since the epoch.
        boot: The kernel's boot id (:func:`mirror.store.disk.boot_id`).

    Returns:
        Why nothing can be stored; None if the directory is writable.
    """
    directories = (*layout.content_directories(), *layout.ingest_directories())
    try:
        for path in directories:
            path.mkdir(parents=True, exist_ok=True)
        _write_marker(layout.root / "oci-layout")
        remove_leftovers(layout, now, boot)
        put_back_moving(layout)
        trim_quarantine(layout, MAX_QUARANTINED_FILES)
        for path in directories:
            # The kernel also checks for read-only mounts here, and no file is left.
            if not os.access(path, os.W_OK | os.X_OK):
                return f"{path}: not writable"
    except OSError as error:
        return f"{error.filename or layout.root}: {error.strerror}"
    return None


def _write_marker(path: Path) -> None:
    text = json.dumps(_LAYOUT_VERSION)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        path.write_text(text, encoding="utf-8")


def remove_leftovers(layout: Layout, now: float, boot: str) -> None:
    """Remove the ingest files that no fetch may resume, their states, and stale drafts.

    Other processes may work in the same directories. Files that they have locked, or have removed
    in the meantime, are passed over. Raises ``OSError`` if the disk refuses.

    Args:
        layout: The data directory.
        now: Seconds since the epoch.
        boot: Identifies this boot of the machine (:func:`mirror.store.disk.boot_id`).
    """
    for directory in layout.ingest_directories():
        for name in [entry.name for entry in os.scandir(directory)]:
            digest_part, _, beside = name.partition(".json")
            path, ingest = directory / name, directory / digest_part
            with suppress(FileNotFoundError):
                if beside or name.endswith(".json"):
                    # Only the holder of the ingest file's lock writes a state: without that file
                    # the state has no owner, and without the lock a draft (``beside``) has none.
                    if not ingest.exists() or (beside and not disk.is_locked(ingest)):
                        path.unlink()
                else:
                    _remove_unless_resumable(layout, path, now, boot)
    for draft in layout.root.glob("index.json.*.tmp"):
        with suppress(FileNotFoundError):
            if abs(now - draft.lstat().st_mtime) > _DRAFT_TTL_S:
                draft.unlink()


def _remove_unless_resumable(layout: Layout, path: Path, now: float, boot: str) -> None:
    status = path.lstat()
    try:
        digest = Digest.parse(f"{path.parent.name}:{path.name}")
    except DigestInvalid:
        digest = None
    if digest is None or not stat.S_ISREG(status.st_mode):
        _remove(path)
        return
    with disk.open_locked(path) as fd:
        if fd is None:
            return  # Another process fetches it, or has removed it.
        if not is_resumable(layout, digest, status.st_size, now, boot):
            disk.drop_ingest(layout, digest, fd)
            disk.drop_state(layout, digest)


def is_resumable(layout: Layout, digest: Digest, length: int, now: float, boot: str) -> bool:
    """Return whether a fetch may resume an ingest file of ``length`` bytes. Blocks.

    ``now`` and ``boot`` are those of :func:`recover`.
    """
    last = disk.read_state(layout, digest)
    return (
        last is not None
        and last[0].boot == boot  # After another boot, unsynced bytes may be anything.
        and now - last[1] < _INGEST_TTL_S
        and (last[0].size is None or length <= last[0].size)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
