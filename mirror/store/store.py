"""The store: composes the parts of the data directory, and owns their threads.

Lives here: opening and closing, the running ingests of this process, readiness, restoring the index
from ``index.json``. Must not know: HTTP, registries, which repository may read which content.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from mirror.config.settings import Storage
from mirror.observability.events import (
    Event,
    Evicted,
    IngestsMeasured,
    LogMessage,
    Observer,
    Published,
    StorageMeasured,
    Uncached,
)
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import ManifestInvalid, StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.store import disk, image_layout
from mirror.store.blobs import BlobStore
from mirror.store.eviction import Catalog, Evictor
from mirror.store.hosted_contents import HostedContents
from mirror.store.image_links import Links
from mirror.store.index import Index
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestContext
from mirror.store.ingest_writer import MemoryBudget
from mirror.store.layout import Layout
from mirror.store.names import root_record
from mirror.store.protection import Protection
from mirror.store.records import AccessRecord, parse_with_records
from mirror.store.recovery import recover, remove_leftovers
from mirror.store.space import Space, Totals
from mirror.threads import on_running_loop, run_in_thread

_LEFTOVERS_INTERVAL_S: Final = 3600.0
"""Seconds between two removals of leftovers: each lives for a day, so an hour is soon enough."""
_RESTORE_AT_START_S: Final = 0.5
"""Seconds that a start spends on restoring the parts of images. The rest follows in the background:
the parts of a manifest are also recorded when it is served."""
_RESTORE_STEP_S: Final = 1.0
"""Seconds that one call of :meth:`Store.keep_up_index` spends on it: a fifth of the time."""
_SAVE_SHARE: Final = 0.2
"""Part of the time that a write of ``index.json`` works. It pauses for the rest."""
_SLOW_SAVE_S: Final = 2.0
"""Seconds of a write of ``index.json`` after which the next one waits: 5,000 names."""
_SAVE_INTERVALS: Final = 5
"""Pause after a slow write of ``index.json``, in multiples of its duration. A write of 100,000
names takes 5 s of processor time."""
_SAVE_LOCK_TIMEOUT_S: Final = 2.0
"""Seconds that a write of ``index.json`` waits for one of another process. At a stop, the next
start writes the file in its place."""
_LINKS_TIMEOUT_S: Final = 10.0
"""Seconds to wait for what the index knows of marked images. After that nothing is evicted."""


class Store:
    """Everything on disk, for one process. Create it with :meth:`open`.

    Several processes may share one data directory: each has its own store.
    """

    def __init__(
        self,
        layout: Layout,
        index: Index,
        settings: Storage,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        """Compose the parts of a store. Call :meth:`open` instead.

        Args:
            layout: A data directory that was recovered.
            index: Its open index. The store closes it.
            settings: The quota, the memory for fetches, and how long a verification is trusted.
            emit: Receives the events of this store, on the event loop.
            now: Seconds since the epoch.
        """
        self.layout = layout
        self.index = index
        self.active_ingests: dict[Digest, Ingest] = {}
        self.memory = MemoryBudget(settings.memory)
        self._emit = emit
        self.now = now
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        # Each kind of blocking work has its own pool, so that none waits for another.
        self._opening = ThreadPoolExecutor(8, "open")
        self._writing = ThreadPoolExecutor(8, "write")
        self._publishing = ThreadPoolExecutor(4, "publish")
        self._heartbeats = ThreadPoolExecutor(1, "heartbeat")
        self._hashing = ThreadPoolExecutor(2, "hash")
        self._unwritable: str | None = None
        self._contents: int | None = None
        self._next_save_at = 0.0
        self._leftovers_removed_at = time.monotonic()
        self.blobs = BlobStore(
            layout,
            index,
            reverify=settings.reverify,
            opening=self._opening,
            hashing=self._hashing,
            emit=self._observe,
            now=now,
        )
        self.catalog = Catalog(layout)
        self._totals = Totals(layout.totals)
        self._hosted_contents = HostedContents(layout)
        self.evictor = Evictor(
            layout, self.catalog, self._totals, settings, self.protection, self._observe, now
        )
        self.space = Space(
            layout,
            self._totals,
            settings,
            self.evictor,
            self._reservations,
            self._writing,
            self._observe,
        )
        self._ingest_context = IngestContext(
            layout=layout,
            io=self._writing,
            publishing=self._publishing,
            heartbeats=self._heartbeats,
            hold_memory=self.memory.hold,
            may_take_memory=self.memory.may_take,
            emit=self._observe,
            make_room=self.space.make_room,
            on_verified=self.blobs.on_verified,
            now=now,
            boot=disk.boot_id(),
        )

    @classmethod
    async def open(
        cls, data_dir: str, settings: Storage, emit: Observer, now: Callable[[], float] = time.time
    ) -> Store:
        """Recover a data directory from any crash, and open it.

        Never raises for a disk that refuses: the store then serves the content that it has, and
        :attr:`unwritable_reason` says why it stores nothing.

        Args:
            data_dir: Its path. It is created if it is missing.
            settings: The quota, the memory for fetches, and how long a verification is trusted.
            emit: Receives the events of the store, on the event loop.
            now: Seconds since the epoch.
        """
        layout = Layout(Path(os.path.abspath(data_dir)))  # noqa: ASYNC240 - reads no disk
        unwritable = await run_in_thread(recover, layout, now(), disk.boot_id())
        read_saved_names = partial(image_layout.read_saved_names, layout, on_running_loop(emit))
        index = await Index.open(layout.index, emit, now, read_saved_names)
        store = cls(layout, index, settings, emit, now)
        store._unwritable = unwritable
        if unwritable is not None:
            emit(LogMessage("warning", "nothing can be stored", (("why", unwritable),)))
        await store.restore_parts(_RESTORE_AT_START_S)
        return store

    def _observe(self, event: Event) -> None:
        """Note what an event says about the disk and the index, and pass it on.

        A disk that refuses counts as not writable until content is published again.
        """
        if isinstance(event, Uncached) and event.reason in ("readonly", "io"):
            self._unwritable = f"content could not be stored ({event.reason})"
        elif isinstance(event, Published):
            self._unwritable = None
            self._count(count=1, size=event.bytes)
        elif isinstance(event, Evicted):
            self.index.has_changed = True  # index.json names only content on disk.
            if event.reason == "corrupt":  # It is in quarantine, which counts as a leftover.
                self._count(count=-1, size=-event.bytes, leftover=event.bytes)
        self._emit(event)

    # --- accounting ---------------------------------------------------------------------------

    def _count(self, *, count: int = 0, size: int = 0, leftover: int = 0) -> None:
        """Count content that came or went, and tell the other processes in a thread."""
        self._totals.add(count=count, size=size, leftover=leftover)
        self.space.update_reserved()
        with suppress(RuntimeError):  # The store is closed.
            self._writing.submit(self._totals.flush)

    def count_dropped(self, size: int) -> None:
        """Count ``size`` bytes of leftovers and of damaged content that were removed."""
        self._count(leftover=-size)

    def count_quarantined(self, size: int) -> None:
        """Count content of ``size`` bytes that another process has moved to ``quarantine/``."""
        self._observe(Evicted(1, size, "corrupt"))

    def _reservations(self) -> tuple[int, int]:
        """Return the bytes that the ingests of this process were granted, and the unwritten ones.

        An ingest that continues in memory has none, nor has one that another process leads.
        """
        ingests = [i for i in self.active_ingests.values() if i.granted and i.window is None]
        granted = sum(max(ingest.granted, ingest.on_disk) for ingest in ingests)
        return granted, sum(max(0, ingest.granted - ingest.on_disk) for ingest in ingests)

    def protection(self) -> Protection:
        """Return a new record of what the marks protect, for a thread that removes content."""
        return Protection(self.layout, self._find_links, self.now)

    def _find_links(self, names: Collection[str], subjects: Collection[Digest]) -> Links | None:
        """Read the index for a thread. None if it fails, or does not answer in time."""
        links = self.index.links(names, subjects)
        reading = asyncio.run_coroutine_threadsafe(links, self._loop)
        try:
            return reading.result(_LINKS_TIMEOUT_S)
        except TimeoutError:
            reading.cancel()
            return None

    # --- ingests ------------------------------------------------------------------------------

    def start_ingest(self, digest: Digest) -> Ingest:
        """Register a new ingest. The caller drives it, and ends it with :meth:`end_ingest`."""
        ingest = Ingest(self._ingest_context, digest, None)
        self.active_ingests[digest] = ingest
        return ingest

    def end_ingest(self, ingest: Ingest) -> None:
        """Unregister an ingest whose fetch has ended."""
        if self.active_ingests.get(ingest.digest) is ingest:
            del self.active_ingests[ingest.digest]
        # A failed fetch leaves its bytes for a resume.
        is_left = ingest.reserved and ingest.failure is not None and ingest.window is None
        self._count(leftover=ingest.on_disk if is_left else 0)

    def on_pushed(self, digest: Digest, size: int, *, is_new: bool) -> None:
        """Count content of ``size`` bytes that a client has pushed. It was verified just now.

        ``is_new``: False if it has replaced the same content.
        """
        self._unwritable = None
        self.blobs.mark_verified(digest, size)
        if is_new:
            count, total = self._totals.hosted
            self._totals.hosted = count + 1, total + size
            self._count(count=1, size=size)

    async def wait_until_published(self) -> None:
        """Wait until all verified content is published, or has failed to be."""
        while publishing := [
            ingest
            for ingest in self.active_ingests.values()
            if ingest.is_verified and not ingest.released.is_set()
        ]:
            await publishing[0].released.wait()

    async def idle(self) -> None:
        """Wait until no ingest runs."""
        while self.active_ingests:
            await next(iter(self.active_ingests.values())).released.wait()
            await asyncio.sleep(0)

    # --- housekeeping -------------------------------------------------------------------------

    @property
    def unwritable_reason(self) -> str | None:
        """The reason why nothing can be stored, or None."""
        if self._unwritable is None and self.space.is_disk_full:
            return "the disk is full, and no more content can be evicted"
        return self._unwritable or self.index.refusal

    def removal_refusal(self) -> str | None:
        """Return the reason why content cannot be removed, or None. Blocks.

        A full disk is no reason: to remove content needs no space, and makes room for the index.
        """
        databases = (*self.layout.index.glob("*/cache.db"),)
        for path in (*self.layout.content_directories(), self.layout.index, *databases):
            # The kernel also checks for read-only mounts here.
            if path.exists() and not os.access(path, os.W_OK):
                return f"{path}: not writable, so run this as the user of the server"
        return None

    async def measure(self) -> None:
        """Report the usage and the running ingests, and remove some outdated files.

        The server calls this every few seconds.
        """
        # If the database cannot be read, an eviction says so, and removes nothing.
        with suppress(StorageUnavailable):
            self._totals.hosted = await self._loop.run_in_executor(
                self._writing, self._hosted_contents.usage
            )
        usage = await self.space.measure()
        if usage is not None:
            self._contents, quota = usage.count, self._settings.max_size
            is_writable = self.unwritable_reason is None
            self._emit(StorageMeasured(usage.count, usage.bytes, quota, is_writable))
        await self._remove_leftovers()
        idle = (time.monotonic() - ingest.last_progress for ingest in self.active_ingests.values())
        self._emit(IngestsMeasured(len(self.active_ingests), max(idle, default=0.0)))

    async def keep_up_index(self) -> None:
        """Save verification times, repair the index, and delete some outdated rows of it.

        The server calls this every few seconds.
        """
        await self.index.return_to_disk()
        await self.blobs.flush()
        await self.restore_parts()
        if self._contents is not None:  # Before the first scan, all seems to be gone.
            await self.index.orphans.drop(self._has_or_fetches, self._contents)
        await self.index.check()

    def _has_or_fetches(self, digest: Digest) -> bool:
        """Return whether content is on the disk, or has begun to arrive, also in another process.

        A fetch on a full disk has no file, and is known in its own process only.
        """
        if self.catalog.has_blob(digest) or digest in self.active_ingests:
            return True
        return self.layout.ingest(digest).exists()

    async def _remove_leftovers(self) -> None:
        elapsed = time.monotonic() - self._leftovers_removed_at
        if elapsed > _LEFTOVERS_INTERVAL_S and self._unwritable is None:
            self._leftovers_removed_at = time.monotonic()
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                self._opening, remove_leftovers, self.layout, self.now(), disk.boot_id()
            )

    async def close(self) -> None:
        """Save verification times and ``index.json``, close the index, and end the threads.

        Call it after all fetches have ended. Work that was submitted to a thread is finished, but
        for verifications and an eviction: they end early.
        """
        self.blobs.stop_verifying()
        await self.evictor.close()
        await self.blobs.flush()
        await self.index.return_to_disk()
        await self.save_image_layout(share=1.0)
        await self.index.close()
        for pool in (
            *(self._opening, self._writing, self._publishing, self._heartbeats, self._hashing),
        ):
            await run_in_thread(pool.shutdown)
        self._totals.close()

    # --- index.json ---------------------------------------------------------------------------

    async def save_image_layout(self, share: float = _SAVE_SHARE) -> None:
        """Write ``index.json`` if names have changed, so that other tools can read the directory.

        Never raises: a failed write is logged, and is tried again at the next call.

        Args:
            share: The part of the time that it works. It pauses for the rest, and after a slow
                write. 1: it does not pause.
        """
        if not self.index.has_changed or self.unwritable_reason is not None:
            return
        begun = time.monotonic()
        if share < 1 and begun < self._next_save_at:
            return
        # Reset before the names are read: a name that is put meanwhile sets it again.
        self.index.has_changed = is_written = False
        try:
            is_written = await self._write_image_layout(share)
        except OSError as error:
            self._emit(LogMessage("warning", "index.json was not written", (("why", str(error)),)))
        finally:
            # A stop cancels the periodic save: the last save, at close, has to write then.
            self.index.has_changed |= not is_written
        end = time.monotonic()
        if end - begun > _SLOW_SAVE_S:
            self._next_save_at = end + _SAVE_INTERVALS * (end - begun)

    async def _write_image_layout(self, share: float) -> bool:
        """Write ``index.json`` in steps.

        False if the index cannot be read, or was replaced, or if another process writes the file.
        """
        run = partial(asyncio.get_running_loop().run_in_executor, self._opening)
        draft = image_layout.Draft(self.layout)
        deadline = time.monotonic() + _SAVE_LOCK_TIMEOUT_S
        after: int | None = 0
        try:
            while not await run(draft.try_begin):
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(0.02)
            openings = self.index.openings
            while after is not None:
                begun = time.monotonic()
                page = await self.index.names(after)
                if page is None or self.index.openings != openings:
                    return False
                await run(draft.add, page.names)
                after = page.after
                if after is not None:
                    await asyncio.sleep((time.monotonic() - begun) * (1 / share - 1))
            await run(draft.publish)
            return True
        finally:
            self._opening.submit(draft.discard)

    async def restore_parts(self, seconds: float = _RESTORE_STEP_S) -> None:
        """Record access to the parts of manifests whose names were restored from ``index.json``.

        Args:
            seconds: After this time, the rest is left to the next call.
        """
        end = time.monotonic() + seconds
        while (after := self.index.unrestored_after) is not None and time.monotonic() < end:
            openings = self.index.openings
            page = await self.index.names(after)
            if page is None:
                return
            for named in (manifests[0] for manifests in page.names if manifests[0].tag is None):
                if not await self._restore_parts(named.repository, root_record(named)):
                    return
            if self.index.openings != openings:
                return  # The next call begins anew, with the first page.
            if page.after is None:
                await self.index.end_restore()
            else:
                self.index.unrestored_after = page.after

    async def _restore_parts(self, repository: Repository, root: AccessRecord) -> bool:
        """Restore the access records of a manifest's parts. False if it can be tried again."""
        try:
            body = await self.blobs.read(root.digest, MANIFEST_LIMIT)
            if body is None:
                return True
            _, records = parse_with_records(body, root)
        except StorageUnavailable:
            return False
        except ManifestInvalid:
            return True
        done = await self.index.put_access_records(repository, records)
        for part in records[:-1]:
            if part.kind == "manifest":
                done = await self._restore_parts(repository, part) and done
        return done
