"""What a start makes of what a crash left: quick, without a manual step, without hashing.

Must not know: the index, the event loop.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout

_STALE: Final = 86400.0
"""Seconds after which an ingest that nobody went on with is given up."""
_DRAFT: Final = 60.0
"""Seconds after which nobody is writing a draft any more."""
_LAYOUT_VERSION: Final = {"imageLayoutVersion": "1.0.0"}


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found. ``why`` says why nothing can be stored, or is None."""

    why: str | None
    dropped: int = 0


def recover(layout: Layout, now: float, boot: str) -> Recovered:
    """Prepare a data directory. Raises nothing: what cannot be written is said in ``why``."""
    try:
        for path in (*layout.content_directories(), *layout.ingest_directories()):
            path.mkdir(parents=True, exist_ok=True)
        _write_marker(layout.root / "oci-layout")
        dropped = sweep(layout, now, boot)
        disk.trim_quarantine(layout, disk.MAX_QUARANTINED_FILES)
        for path in (*layout.content_directories(), *layout.ingest_directories()):
            # Asked of the kernel, which knows of read-only mounts as well, and leaves no file.
            if not os.access(path, os.W_OK | os.X_OK):
                return Recovered(f"{path}: not writable", dropped)
    except OSError as error:
        return Recovered(f"{error.filename or layout.root}: {error.strerror}")
    return Recovered(None, dropped)


def _write_marker(path: Path) -> None:
    text = json.dumps(_LAYOUT_VERSION)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        path.write_text(text, encoding="utf-8")


def sweep(layout: Layout, now: float, boot: str) -> int:
    """Drop the ingests that will not be resumed, and drafts; returns how many ingests.

    Others may be at work in the same directories: what they have locked, or removed themselves,
    is left alone. Raises ``OSError`` where the disk refuses.
    """
    dropped = 0
    for directory in layout.ingest_directories():
        for name in [entry.name for entry in os.scandir(directory)]:
            digest_part, _, beside = name.partition(".json")
            path, ingest = directory / name, directory / digest_part
            with suppress(FileNotFoundError):
                if beside or name.endswith(".json"):
                    # A state is written beside a file that is locked: without one it is nobody's.
                    if not ingest.exists() or (beside and not _is_locked(ingest)):
                        path.unlink()
                else:
                    dropped += _sweep_one(layout, directory, path, now, boot)
    for draft in layout.root.glob("index.json.*.tmp"):
        with suppress(FileNotFoundError):
            if abs(now - draft.lstat().st_mtime) > _DRAFT:
                draft.unlink()
    return dropped


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not disk.try_lock(fd)
    finally:
        os.close(fd)


def _sweep_one(layout: Layout, directory: Path, path: Path, now: float, boot: str) -> bool:
    status = path.lstat()
    try:
        digest = Digest.parse(f"{directory.name}:{path.name}")
    except DigestInvalid:
        digest = None
    if digest is None or not stat.S_ISREG(status.st_mode):
        _remove(path)
        return True
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not disk.try_lock(fd):
            return False  # another process is fetching it
        left = disk.read_state(layout, digest)
        resumable = (
            left is not None
            and left[0].boot == boot  # after another boot unsynced bytes may be anything
            and now - left[1] < _STALE
            and (left[0].size is None or status.st_size <= left[0].size)
        )
        if not resumable:
            disk.drop_ingest(layout, digest, fd)
            disk.drop_state(layout, digest)
        return not resumable
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
