"""What is on disk, by looking: so the accounting equals ``du``, after any crash.

Lives here: one scan of the directories, kept up to date by further scans that look only at what
is new (published content never changes its size), and recency. Must not know: who wants room.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout

_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Usage:
    """What takes up space, in bytes."""

    count: int
    """Whole contents."""
    bytes: int
    """Their bytes."""
    reserved: int
    """Content that is being fetched: what was announced, or what is there if that is more."""
    unwritten: int = 0
    """What of that the disk has not got yet."""
    left: int = 0
    """What is left of fetches that nobody goes on with, and damaged content."""

    @property
    def total(self) -> int:
        """All that counts against the quota."""
        return self.bytes + self.reserved + self.left


@dataclass(frozen=True, slots=True)
class Entry:
    """One content on disk."""

    digest: Digest
    size: int
    used: float
    """Last use, in seconds since the epoch."""


class Catalog:
    """The content of one data directory. Its methods block; threads may share it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._sizes: dict[str, dict[str, int]] = {}

    def refresh(self) -> Usage:
        """Scan. Strangers (links, pipes, directories, other names) are not counted, nor opened."""
        with self._lock:
            for directory in self._layout.content_directories():
                self._scan(directory)
            sizes = [size for known in self._sizes.values() for size in known.values()]
            usage = Usage(len(sizes), sum(sizes), 0, left=disk.quarantine_size(self._layout))
            for digest, status in self._ingests():
                usage = self._with_ingest(usage, digest, status)
            return usage

    def _scan(self, directory: Path) -> None:
        algorithm = directory.name
        known = self._sizes.setdefault(algorithm, {})
        found: dict[str, int] = {}
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    size = known.get(entry.name)
                    if size is None:
                        size = _size_of(entry, algorithm)
                    if size is not None:
                        found[entry.name] = size
        except OSError:
            return
        self._sizes[algorithm] = found

    def _ingests(self) -> Iterator[tuple[Digest, os.stat_result]]:
        for directory in self._layout.ingest_directories():
            try:
                names = [entry.name for entry in os.scandir(directory)]
            except OSError:
                continue
            for name in names:
                try:
                    digest = Digest.parse(f"{directory.name}:{name}")
                    status = (directory / name).lstat()
                except (DigestInvalid, OSError):
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield digest, status

    def _with_ingest(self, usage: Usage, digest: Digest, status: os.stat_result) -> Usage:
        if not self._is_locked(digest):
            # A stale one blocks what it holds, not what it once wanted to hold.
            return replace(usage, left=usage.left + status.st_blocks * _BLOCK)
        state = disk.read_state(self._layout, digest)
        announced = max(state[0].size or 0, state[0].room) if state is not None else 0
        return replace(
            usage,
            reserved=usage.reserved + max(announced, status.st_size),
            unwritten=usage.unwritten + max(announced - status.st_size, 0),
        )

    def leftovers(self) -> list[Digest]:
        """What is left of fetches that nobody goes on with, the oldest first."""
        found = [(status.st_mtime, digest) for digest, status in self._ingests()]
        return [digest for _, digest in sorted(found) if not self._is_locked(digest)]

    def _is_locked(self, digest: Digest) -> bool:
        try:
            fd = os.open(self._layout.ingest(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def holds(self, digest: Digest) -> bool:
        """Whether this content was there when somebody last looked."""
        return digest.hex in self._sizes.get(digest.algorithm, ())

    def entries(self, now: float) -> list[Entry]:
        """All content with its recency.

        One in the future (a clock was set back) is set to ``now``, so that it ages from here on.
        """
        entries = []
        for directory in self._layout.content_directories():
            for name in list(self._sizes.get(directory.name, ())):
                try:
                    status = (directory / name).lstat()
                    digest = Digest.parse(f"{directory.name}:{name}")
                except (OSError, DigestInvalid):
                    continue
                if status.st_mtime > now:
                    disk.touch(self._layout, [digest], now)
                entries.append(Entry(digest, status.st_size, min(status.st_mtime, now)))
        return entries


def _size_of(entry: os.DirEntry[str], algorithm: str) -> int | None:
    try:
        Digest.parse(f"{algorithm}:{entry.name}")
        status = entry.stat(follow_symlinks=False)
    except (DigestInvalid, OSError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
