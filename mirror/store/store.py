"""The store: composes the parts of the data directory, and owns their threads.

Lives here: opening and closing, the running ingests of this process, readiness, restoring the index
from ``index.json``. Must not know: HTTP, registries, which repository may read which content.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from mirror.store.disk import Layout
from mirror.store.eviction import Catalog, Evictor
from mirror.store.index import Index
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestContext
from mirror.store.records import AccessRecord, TagRecord, access_records_of, parse_as_recorded
from mirror.store.recovery import recover, remove_leftovers

_LEFTOVERS_INTERVAL_S: Final = 3600.0
"""Seconds between two removals of leftovers: each lives for a day, so an hour is soon enough."""


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
            settings: The quota, and for how long a verification is trusted.
            emit: Receives the events of this store, also from its threads.
            now: Seconds since the epoch.
        """
        self.layout = layout
        self.index = index
        self.active_ingests: dict[Digest, Ingest] = {}
        self._emit = emit
        self._now = now
        self._settings = settings
        # Each kind of blocking work has its own pool, so that none waits for another.
        self._opening = ThreadPoolExecutor(8, "open")
        self._writing = ThreadPoolExecutor(8, "write")
        self._publishing = ThreadPoolExecutor(4, "publish")
        self._hashing = ThreadPoolExecutor(2, "hash")
        self._unwritable: str | None = None
        self._is_restored = False
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
        self.evictor = Evictor(
            layout, self.catalog, settings, index, self._opening, self._observe, now
        )
        self._ingest_context = IngestContext(
            layout=layout,
            io=self._writing,
            publishing=self._publishing,
            emit=self._observe,
            make_room=self.evictor.make_room,
            on_published=self.blobs.on_published,
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
            settings: The quota, and for how long a verification is trusted.
            emit: Receives the events of the store, also from its threads.
            now: Seconds since the epoch.
        """
        loop = asyncio.get_running_loop()
        layout = Layout(Path(os.path.abspath(data_dir)))  # noqa: ASYNC240 - reads no disk
        unwritable = await loop.run_in_executor(None, recover, layout, now(), disk.boot_id())
        index = await Index.open(layout.index, emit, now)
        store = cls(layout, index, settings, emit, now)
        store._unwritable = unwritable
        if unwritable is not None:
            emit(LogMessage("warning", "nothing can be stored", (("why", unwritable),)))
        store._is_restored = bool(await index.has_tags()) or await store._restore_index()
        return store

    def _observe(self, event: Event) -> None:
        """Note what an event says about the disk and the index, and pass it on.

        A disk that refuses counts as not writable until content is published again.
        """
        if isinstance(event, Uncached) and event.reason in ("readonly", "io"):
            self._unwritable = f"content could not be stored ({event.reason})"
        elif isinstance(event, Published):
            self._unwritable = None
        elif isinstance(event, Evicted):
            self.index.changed = True  # index.json names only content on disk.
        self._emit(event)

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

    async def wait_until_published(self) -> None:
        """Wait until all verified content is published, or has failed to be."""
        while verified := [ingest for ingest in self.active_ingests.values() if ingest.is_verified]:
            await verified[0].released.wait()

    async def idle(self) -> None:
        """Wait until no ingest runs."""
        while self.active_ingests:
            await next(iter(self.active_ingests.values())).released.wait()
            await asyncio.sleep(0)

    # --- housekeeping -------------------------------------------------------------------------

    @property
    def unwritable_reason(self) -> str | None:
        """The reason why nothing can be stored, or None."""
        return self._unwritable

    async def measure(self) -> None:
        """Report the usage and the running ingests, and remove some outdated rows and files.

        The server calls this every few seconds.
        """
        loop = asyncio.get_running_loop()
        usage = await loop.run_in_executor(self._opening, self.catalog.refresh)
        self._emit(
            StorageMeasured(
                usage.count, usage.bytes, self._settings.max_size, self._unwritable is None
            )
        )
        await self.index.drop_orphaned_rows(self.catalog.has_blob)
        await self._remove_leftovers()
        idle = (time.monotonic() - ingest.last_progress for ingest in self.active_ingests.values())
        self._emit(IngestsMeasured(len(self.active_ingests), max(idle, default=0.0)))

    async def _remove_leftovers(self) -> None:
        elapsed = time.monotonic() - self._leftovers_removed_at
        if elapsed > _LEFTOVERS_INTERVAL_S and self._unwritable is None:
            self._leftovers_removed_at = time.monotonic()
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                self._opening, remove_leftovers, self.layout, self._now(), disk.boot_id()
            )

    async def close(self) -> None:
        """Save verification times and ``index.json``, close the index, and end the threads.

        Call it after all fetches have ended. Work that was submitted to a thread is finished.
        """
        await self.blobs.flush()
        await self.save_image_layout()
        await self.index.close()
        loop = asyncio.get_running_loop()
        for pool in (self._opening, self._writing, self._publishing, self._hashing):
            await loop.run_in_executor(None, pool.shutdown)

    # --- index.json ---------------------------------------------------------------------------

    async def save_image_layout(self) -> None:
        """Write ``index.json`` if names have changed, so that other tools can read the directory.

        Never raises: a failed write is logged, and is tried again at the next call.
        """
        if not self.index.changed or self._unwritable is not None:
            return
        # Until the index is restored, index.json is the only record of the names in it.
        self._is_restored = self._is_restored or await self._restore_index()
        # Reset before the names are read: a name that is put meanwhile sets it again.
        self.index.changed = is_written = False
        try:
            entries = await self.index.manifests() if self._is_restored else None
            if entries is not None:
                write, loop = image_layout.write_index_json, asyncio.get_running_loop()
                await loop.run_in_executor(self._opening, write, self.layout, entries)
                is_written = True
        except OSError as error:
            self._emit(LogMessage("warning", "index.json was not written", (("why", str(error)),)))
        finally:
            # A stop cancels the periodic save: the last save, at close, has to write then.
            self.index.changed |= not is_written

    async def _restore_index(self) -> bool:
        """Restore a lost index from ``index.json``, as never confirmed. True if all was written.

        Tags are written last and all at once: an index without tags was not fully restored.
        """
        loop = asyncio.get_running_loop()
        saved = await loop.run_in_executor(self._opening, image_layout.read_index_json, self.layout)
        done = True
        for named in saved:
            root = AccessRecord(
                digest=named.digest,
                kind="manifest",
                media_type=named.media_type,
                size=named.size,
                referrer=None,
                expires_at=None,
            )
            done = await self._restore_parts(named.repository, root) and done
        pins = {named.digest for named in saved if named.is_pinned}
        done = (not pins or await self.index.pin(pins)) and done
        tags = [
            TagRecord(named.repository, named.tag, named.digest, first_seen=0.0, confirmed=0.0)
            for named in saved
            if named.tag is not None and await self.index.tag(named.repository, named.tag) is None
        ]
        return done and await self.index.put_tags(tags)

    async def _restore_parts(self, repository: Repository, root: AccessRecord) -> bool:
        """Restore the access records of a manifest's parts. False if it can be tried again."""
        try:
            body = await self.blobs.read(root.digest, MANIFEST_LIMIT)
            parsed = parse_as_recorded(body, root) if body is not None else None
        except StorageUnavailable:
            return False
        except ManifestInvalid:
            return True
        if parsed is None:
            return True
        parts = access_records_of(root, parsed)
        done = await self.index.put_access_records(repository, [root, *parts])
        for part in parts:
            if part.kind == "manifest":
                done = await self._restore_parts(repository, part) and done
        return done
