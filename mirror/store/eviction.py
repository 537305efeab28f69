"""What goes when room is needed: pure accounting, and a thin loop that unlinks.

Lives here: the order of eviction and its limits (quota, water marks, free space, pins). Must not
know: why room is needed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from mirror.config.settings import Storage
from mirror.observability.events import Evicted, LogMessage, Observer
from mirror.oci.descriptor import MANIFEST_LIMIT, parse_manifest, sniff_media_type
from mirror.oci.errors import ManifestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.catalog import Catalog, Entry, Usage
from mirror.store.disk import Layout
from mirror.store.index import Index

_LOCK_PATIENCE: Final = 5.0
_SPARE: Final = 0.01
"""Part of a disk that is left free: the index needs some."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, in this order, until ``free`` bytes are gained."""

    free: int
    candidates: tuple[Entry, ...]


def needed(usage: Usage, need: int, disk_free: int, settings: Storage) -> tuple[int, str] | None:
    """How many bytes have to go before ``need`` more may come, and why; (0, "") for none.

    ``disk_free`` is what the disk has, less what is left free.

    Above the high water mark it is so many that the low water mark is reached. None: it cannot fit,
    whatever went. ``usage`` counts the reservation of whoever asks already, where it could be
    declared.
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


def plan(
    entries: Iterable[Entry],
    free: int,
    pinned: Collection[Digest],
    references: Mapping[Digest, Collection[Digest]],
) -> Plan:
    """What goes, least recently used first.

    Never what is pinned, or what a pinned manifest refers to, directly or through an index. At the
    same recency small content (manifests) goes first, so that what is left is rather whole images
    than manifests without layers.
    """
    kept: set[Digest] = set()
    queue = list(pinned)
    while queue:
        digest = queue.pop()
        if digest not in kept:
            kept.add(digest)
            queue.extend(references.get(digest, ()))
    candidates = [entry for entry in entries if entry.digest not in kept]
    candidates.sort(key=lambda entry: (entry.used, entry.size, entry.digest))
    return Plan(free, tuple(candidates))


class Evictor:
    """Makes room, in any process: one eviction at a time in the whole data directory."""

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
        """Whether ``need`` more bytes may be written, after evicting what has to go for them.

        Never raises for a disk that refuses: then there is no room.
        """
        pinned = await self._index.pinned()
        if pinned is None:
            return False  # anything may be pinned
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._make_room, need, pinned)
        except OSError as error:
            self._emit(LogMessage("warning", "no room could be made", (("why", str(error)),)))
            return False

    def _make_room(self, need: int, pinned: set[Digest]) -> bool:
        verdict = self._look(need)
        if verdict is None or verdict[0] == 0:
            return verdict is not None
        fd = os.open(self._layout.eviction_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock(fd):
                return False
            # Another process may have made the room while we waited.
            verdict = self._look(need)
            if verdict is None or verdict[0] == 0:
                return verdict is not None
            self._evict(*verdict, pinned)
            return self._fits(need)
        finally:
            os.close(fd)

    def _look(self, need: int) -> tuple[int, str] | None:
        return needed(self._catalog.refresh(), need, self._disk_free(), self._settings)

    def _fits(self, need: int) -> bool:
        """Below the high water mark it is enough, even if the low one was not reached."""
        high = int(self._settings.max_size * self._settings.high_water)
        return self._catalog.refresh().total <= high and self._disk_free() >= need

    def _disk_free(self) -> int:
        status = os.statvfs(self._layout.root)
        return int((status.f_bavail - status.f_blocks * _SPARE) * status.f_frsize)

    def _evict(self, free: int, reason: str, pinned: set[Digest]) -> None:
        freed = disk.trim_quarantine(self._layout, 0)
        for digest in self._catalog.leftovers():
            if freed < free:
                freed += self._drop_leftover(digest)
        chosen = plan(
            self._catalog.entries(self._now()), free - freed, pinned, self._references(pinned)
        )
        count = gained = 0
        for entry in chosen.candidates:
            if gained >= chosen.free:
                break
            if self._unlink(entry.digest):
                count, gained = count + 1, gained + entry.size
        if count:
            self._emit(Evicted(count, gained, reason))

    def _references(self, pinned: Iterable[Digest]) -> dict[Digest, list[Digest]]:
        """What the pinned manifests refer to, and the manifests among that, and so on."""
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
        """The manifests and the blobs that a manifest refers to."""
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
        """Remove what is left of a fetch, unless somebody goes on with it; returns its bytes."""
        path = self._layout.ingest(digest)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            if not disk.try_lock(fd) or not disk.is_at(fd, path):
                return 0
            disk.drop_state(self._layout, digest)
            disk.drop_ingest(self._layout, digest, fd)
            return os.fstat(fd).st_size
        except OSError:
            return 0
        finally:
            os.close(fd)

    def _unlink(self, digest: Digest) -> bool:
        """Unlink, unless somebody is reading it."""
        path = self._layout.blob(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not disk.try_lock(fd) or not disk.is_at(fd, path):
                return False
            path.unlink()
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


def _lock(fd: int) -> bool:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False
