"""Accounting and eviction: what the data directory holds, and what is removed to free space.

Lives here: scans of the directories, the order of eviction, its limits (quota, water marks, free
space, pins). Must not know: why space is needed.

Usage is found by a scan, never kept in a counter, so it is right after any crash. Whole content
counts with its length, a running fetch with its announced size, and the leftover of an ended fetch
with its blocks. A further scan looks only at new files, because whole content never changes its
size.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mirror.config.settings import Storage
from mirror.observability.events import Evicted, LogMessage, Observer
from mirror.oci.descriptor import MANIFEST_LIMIT, parse_manifest, sniff_media_type
from mirror.oci.errors import DigestInvalid, ManifestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout
from mirror.store.index import Index

_BLOCK_BYTES: Final = 512
"""Bytes of a block in ``st_blocks``, whatever the file system's own block size (stat(2))."""
_EVICTION_LOCK_TIMEOUT_S: Final = 5.0
"""Seconds to wait for an eviction by another process. It may have freed enough by then."""
_DISK_RESERVE: Final = 0.01
"""Fraction of a disk that is left free: the index needs space of its own."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The space that a data directory takes up. All but ``count`` in bytes."""

    count: int
    """Number of whole contents."""
    bytes: int
    """Size of the whole contents."""
    reserved: int
    """Running fetches: their announced size, or the size of the file if that is larger."""
    unwritten: int = 0
    """The part of ``reserved`` that is not on the disk yet."""
    leftover: int = 0
    """Leftovers of ended fetches, and damaged content."""

    @property
    def total(self) -> int:
        """The bytes that count against the quota."""
        return self.bytes + self.reserved + self.leftover


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One whole content on disk."""

    digest: Digest
    size: int
    used: float
    """Last use, in seconds since the epoch."""


# --- accounting -----------------------------------------------------------------------------------


class Catalog:
    """The content of one data directory. Its methods block, and threads may share it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._sizes: dict[str, dict[str, int]] = {}

    def refresh(self) -> Usage:
        """Scan the directories.

        Foreign entries (links, pipes, directories, other names) are neither counted nor opened.
        """
        with self._lock:
            for directory in self._layout.content_directories():
                self._scan(directory)
            sizes = [size for names in self._sizes.values() for size in names.values()]
            quarantined = disk.quarantine_size(self._layout)
            usage = Usage(count=len(sizes), bytes=sum(sizes), reserved=0, leftover=quarantined)
            for digest, status in self._ingests():
                usage = self._with_ingest(usage, digest, status)
            return usage

    def _scan(self, directory: Path) -> None:
        algorithm = directory.name
        known_sizes = self._sizes.setdefault(algorithm, {})
        sizes: dict[str, int] = {}
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    size = known_sizes.get(entry.name)
                    if size is None:
                        size = _size_of(entry, algorithm)
                    if size is not None:
                        sizes[entry.name] = size
        except OSError:
            return
        self._sizes[algorithm] = sizes

    def _ingests(self) -> Iterator[tuple[Digest, os.stat_result]]:
        for directory in self._layout.ingest_directories():
            try:
                # The state of an ingest is in a second file, with a suffix.
                names = [name for name in os.listdir(directory) if "." not in name]
            except OSError:
                continue
            for name in names:
                with suppress(DigestInvalid, OSError):
                    status = (directory / name).lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield Digest.parse(f"{directory.name}:{name}"), status

    def _with_ingest(self, usage: Usage, digest: Digest, status: os.stat_result) -> Usage:
        if not disk.is_locked(self._layout.ingest(digest)):
            # A leftover counts with the blocks that it takes up, not with its announced size.
            return replace(usage, leftover=usage.leftover + status.st_blocks * _BLOCK_BYTES)
        state = disk.read_state(self._layout, digest)
        announced = max(state[0].size or 0, state[0].reserved) if state is not None else 0
        return replace(
            usage,
            reserved=usage.reserved + max(announced, status.st_size),
            unwritten=usage.unwritten + max(announced - status.st_size, 0),
        )

    def leftovers(self) -> list[Digest]:
        """Return the ingest files of ended fetches, the oldest first."""
        oldest_first = sorted((status.st_mtime, digest) for digest, status in self._ingests())
        return [
            digest for _, digest in oldest_first if not disk.is_locked(self._layout.ingest(digest))
        ]

    def has_blob(self, digest: Digest) -> bool:
        """Return whether the last scan found whole content of this digest."""
        return digest.hex in self._sizes.get(digest.algorithm, ())

    def blobs(self, now: float) -> list[StoredBlob]:
        """Return all whole content of the last scan, with its recency.

        A last use in the future (a clock was set back) is set to ``now``, also on the disk: the
        content ages from now on.
        """
        blobs = []
        for directory in self._layout.content_directories():
            for name in list(self._sizes.get(directory.name, ())):
                try:
                    status = (directory / name).lstat()
                    digest = Digest.parse(f"{directory.name}:{name}")
                except (OSError, DigestInvalid):
                    continue
                if status.st_mtime > now:
                    disk.touch(self._layout, [digest], now)
                blobs.append(StoredBlob(digest, status.st_size, min(status.st_mtime, now)))
        return blobs


def _size_of(entry: os.DirEntry[str], algorithm: str) -> int | None:
    try:
        Digest.parse(f"{algorithm}:{entry.name}")
        status = entry.stat(follow_symlinks=False)
    except (DigestInvalid, OSError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


# --- the order of eviction ------------------------------------------------------------------------


def bytes_to_free(
    usage: Usage, need: int, disk_free: int, settings: Storage
) -> tuple[int, str] | None:
    """Return how many bytes must be freed before ``need`` more bytes may be written.

    Above the high water mark, this is the distance to the low water mark.

    Args:
        usage: The current usage. It includes the caller's own reservation, if that was declared.
        need: Bytes that are about to be written.
        disk_free: Free bytes of the disk, less the reserve.
        settings: The quota and its water marks.

    Returns:
        The bytes and the reason, ``quota`` or ``disk``. ``(0, "")`` if nothing must be freed. None
        if ``need`` cannot fit, even if all content is evicted.
    """
    high = int(settings.max_size * settings.high_water)
    low = int(settings.max_size * settings.low_water)
    if max(need, usage.reserved) > high:
        return None
    over_quota = usage.total - low if usage.total > high else 0
    over_disk = max(need, usage.unwritten) - disk_free
    if over_quota <= 0 and over_disk <= 0:
        return 0, ""
    return max(over_quota, over_disk), "quota" if over_quota >= over_disk else "disk"


def eviction_order(
    blobs: Iterable[StoredBlob],
    pinned: Collection[Digest],
    references: Mapping[Digest, Collection[Digest]],
) -> list[StoredBlob]:
    """Return the content that may be evicted, least recently used first.

    Pinned manifests are never evicted, nor is content that one refers to, directly or through an
    index. At the same recency small content (manifests) is evicted first: so whole images are left,
    rather than manifests without layers.
    """
    protected: set[Digest] = set()
    queue = list(pinned)
    while queue:
        digest = queue.pop()
        if digest not in protected:
            protected.add(digest)
            queue.extend(references.get(digest, ()))
    candidates = [blob for blob in blobs if blob.digest not in protected]
    return sorted(candidates, key=lambda blob: (blob.used, blob.size, blob.digest))


# --- eviction -------------------------------------------------------------------------------------


class Evictor:
    """Frees space. Only one eviction runs at a time, over all processes of a data directory."""

    def __init__(
        self,
        layout: Layout,
        catalog: Catalog,
        settings: Storage,
        index: Index,
        executor: Executor,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        self._layout = layout
        self._catalog = catalog
        self._settings = settings
        self._index = index
        self._executor = executor
        self._emit = emit
        self._now = now

    async def make_room(self, need: int) -> bool:
        """Evict as much as ``need`` more bytes require. True if they may be written now.

        Never raises: a disk that refuses is logged, and has no room.
        """
        pinned = await self._index.pinned()
        if pinned is None:
            return False  # The index cannot be read, so any manifest may be pinned.
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._make_room, need, pinned)
        except OSError as error:
            self._emit(LogMessage("warning", "no room could be made", (("why", str(error)),)))
            return False

    def _make_room(self, need: int, pinned: set[Digest]) -> bool:
        shortage = self._shortage(need)
        if shortage is None or shortage[0] == 0:
            return shortage is not None
        fd = os.open(self._layout.eviction_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _wait_for_lock(fd):
                return False
            # Another process may have made room in the meantime.
            shortage = self._shortage(need)
            if shortage is None or shortage[0] == 0:
                return shortage is not None
            self._evict(*shortage, pinned)
            return self._has_room(need)
        finally:
            os.close(fd)

    def _shortage(self, need: int) -> tuple[int, str] | None:
        return bytes_to_free(self._catalog.refresh(), need, self._disk_free(), self._settings)

    def _has_room(self, need: int) -> bool:
        """Return whether usage is below the high water mark, and ``need`` bytes of disk are free.

        That is enough, even if the low water mark was not reached.
        """
        high = int(self._settings.max_size * self._settings.high_water)
        return self._catalog.refresh().total <= high and self._disk_free() >= need

    def _disk_free(self) -> int:
        status = os.statvfs(self._layout.root)
        return int((status.f_bavail - status.f_blocks * _DISK_RESERVE) * status.f_frsize)

    def _evict(self, free: int, reason: str, pinned: set[Digest]) -> None:
        freed = disk.trim_quarantine(self._layout, keep=0)
        for digest in self._catalog.leftovers():
            if freed < free:
                freed += self._drop_leftover(digest)
        free -= freed
        count = gained = 0
        blobs = self._catalog.blobs(self._now())
        for blob in eviction_order(blobs, pinned, self._references(pinned)):
            if gained >= free:
                break
            if self._unlink(blob.digest):
                count, gained = count + 1, gained + blob.size
        if count:
            self._emit(Evicted(count, gained, reason))

    def _references(self, pinned: Iterable[Digest]) -> dict[Digest, list[Digest]]:
        """Return the parts of each pinned manifest, and of each manifest among those parts."""
        references: dict[Digest, list[Digest]] = {}
        queue = list(pinned)
        while queue:
            digest = queue.pop()
            if digest not in references:
                manifests, blobs = self._parts(digest)
                references[digest] = manifests + blobs
                queue += manifests
        return references

    def _parts(self, digest: Digest) -> tuple[list[Digest], list[Digest]]:
        """Return the manifests and the blobs that a manifest refers to."""
        opened = disk.open_whole(self._layout, digest)
        if opened is None:
            return [], []
        try:
            body = os.pread(opened[0], MANIFEST_LIMIT + 1, 0)
            parsed = parse_manifest(body, sniff_media_type(body))
        except ManifestInvalid:
            return [], []
        finally:
            os.close(opened[0])
        return [part.digest for part in parsed.children], [part.digest for part in parsed.blobs]

    def _drop_leftover(self, digest: Digest) -> int:
        """Remove the leftover of an ended fetch, unless a fetch resumes it. Returns its bytes."""
        try:
            with disk.open_locked(self._layout.ingest(digest)) as fd:
                if fd is None:
                    return 0
                disk.drop_state(self._layout, digest)
                disk.drop_ingest(self._layout, digest, fd)
                return os.fstat(fd).st_size
        except OSError:
            return 0

    def _unlink(self, digest: Digest) -> bool:
        """Unlink whole content, unless a client reads it. True if it was unlinked."""
        path = self._layout.blob(digest)
        try:
            with disk.open_locked(path) as fd:
                if fd is not None:
                    path.unlink()
                return fd is not None
        except OSError:
            return False


def _wait_for_lock(fd: int) -> bool:
    deadline = time.monotonic() + _EVICTION_LOCK_TIMEOUT_S
    while time.monotonic() < deadline:
        if disk.try_lock(fd):
            return True
        time.sleep(0.02)
    return False
