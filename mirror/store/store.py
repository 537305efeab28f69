"""The store: composes what is on disk, and owns its threads.

Lives here: opening and closing, which content is growing in this process, recency. Must not know:
HTTP, registries, who may read what.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import inf
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
from mirror.store.catalog import Catalog
from mirror.store.disk import Layout
from mirror.store.eviction import Evictor
from mirror.store.index import Index
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import IngestContext
from mirror.store.records import AccessRecord, TagRecord, access_records_of, parse_as_recorded
from mirror.store.recovery import recover, sweep

_RECENCY_STEP: Final = 60.0
"""Seconds between two updates of one content's recency."""
_SWEEP_EVERY: Final = 3600.0
"""Seconds between two looks for what ended fetches left behind."""
_TOUCHED_LIMIT: Final = 100_000


class Store:
    """Everything on disk, for one process. Make it with :meth:`open`."""

    def __init__(
        self,
        layout: Layout,
        index: Index,
        settings: Storage,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        self.layout = layout
        self.index = index
        self.active_ingests: dict[Digest, Ingest] = {}
        self._emit = emit
        self._now = now
        self._settings = settings
        # One pool for each kind of waiting, so that none waits for another.
        self._opening = ThreadPoolExecutor(8, "open")
        self._writing = ThreadPoolExecutor(8, "write")
        self._publishing = ThreadPoolExecutor(4, "publish")
        self._hashing = ThreadPoolExecutor(2, "hash")
        self._touched: dict[Digest, float] = {}
        self._unwritable: str | None = None
        self._restored = False
        self._swept = time.monotonic()
        self.blobs = BlobStore(
            layout,
            index,
            reverify=settings.reverify,
            opening=self._opening,
            hashing=self._hashing,
            emit=self._notice,
            now=now,
        )
        self.catalog = Catalog(layout)
        self.evictor = Evictor(
            layout, self.catalog, settings, index, self._opening, self._notice, now
        )
        self._ingest_context = IngestContext(
            layout=layout,
            io=self._writing,
            publishing=self._publishing,
            emit=self._notice,
            make_room=self.evictor.make_room,
            published=self.blobs.published,
            now=now,
            boot=disk.boot_id(),
        )

    @classmethod
    async def open(
        cls,
        data_dir: str,
        settings: Storage,
        emit: Observer,
        now: Callable[[], float] = time.time,
    ) -> Store:
        """Make of what a crash left what can be served, and open it."""
        loop = asyncio.get_running_loop()
        layout = Layout(Path(os.path.abspath(data_dir)))  # noqa: ASYNC240 - reads no disk
        recovered = await loop.run_in_executor(None, recover, layout, now(), disk.boot_id())
        index = await Index.open(layout.index, emit, now)
        store = cls(layout, index, settings, emit, now)
        store._unwritable = recovered.why
        if recovered.why is not None:
            emit(LogMessage("warning", "nothing can be stored", (("why", recovered.why),)))
        store._restored = bool(await index.has_tags()) or await store._reseed()
        return store

    def _notice(self, event: Event) -> None:
        """Readiness tells of a disk that refuses, until it takes content again."""
        if isinstance(event, Uncached) and event.reason in ("readonly", "io"):
            self._unwritable = f"content could not be stored ({event.reason})"
        elif isinstance(event, Published):
            self._unwritable = None
        elif isinstance(event, Evicted):
            self.index.changed = True  # index.json names what is on disk
        self._emit(event)

    # --- growing content ----------------------------------------------------------------------

    def start_ingest(self, digest: Digest) -> Ingest:
        """New growing content: the caller drives it, and says when it is :meth:`grown`."""
        ingest = Ingest(self._ingest_context, digest, None)
        self.active_ingests[digest] = ingest
        return ingest

    def end_ingest(self, ingest: Ingest) -> None:
        """The fetch of this content is over."""
        if self.active_ingests.get(ingest.digest) is ingest:
            del self.active_ingests[ingest.digest]

    async def settled(self) -> None:
        """Wait until all content that is verified is published as well."""
        while verified := [ingest for ingest in self.active_ingests.values() if ingest.verified]:
            await verified[0].released.wait()

    async def idle(self) -> None:
        """Wait until nothing is growing any more."""
        while self.active_ingests:
            await next(iter(self.active_ingests.values())).released.wait()
            await asyncio.sleep(0)

    # --- recency ------------------------------------------------------------------------------

    async def touch(self, digests: Iterable[Digest]) -> None:
        """Refresh the recency of content that was used, at most once a minute each."""
        now, used = self._now(), list(digests)
        # All of them if any: a manifest is never ahead of its parts for longer than a step.
        if all(0 <= now - self._touched.get(d, -inf) < _RECENCY_STEP for d in used):
            return
        if len(self._touched) > _TOUCHED_LIMIT:
            self._touched.clear()
        self._touched.update(dict.fromkeys(used, now))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._opening, disk.touch, self.layout, used, now)

    # --- what is here -------------------------------------------------------------------------

    @property
    def unwritable(self) -> str | None:
        """Why nothing can be stored, or None."""
        return self._unwritable

    async def measure(self) -> None:
        """Report what is on disk and what is growing; forget what was known of what is gone."""
        loop = asyncio.get_running_loop()
        usage = await loop.run_in_executor(self._opening, self.catalog.refresh)
        self._emit(
            StorageMeasured(
                usage.count, usage.bytes, self._settings.max_size, self._unwritable is None
            )
        )
        await self._tidy()
        idle = (time.monotonic() - ingest.last_progress for ingest in self.active_ingests.values())
        self._emit(IngestsMeasured(len(self.active_ingests), max(idle, default=0.0)))

    async def _tidy(self) -> None:
        """Forget, in small steps, what was known of content that is gone."""
        await self.index.sweep(self.catalog.holds)
        if time.monotonic() - self._swept > _SWEEP_EVERY and self._unwritable is None:
            self._swept = time.monotonic()
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                self._opening, sweep, self.layout, self._now(), disk.boot_id()
            )

    async def close(self) -> None:
        """Remember what the next start wants to know, and end the threads."""
        await self.blobs.flush()
        await self.save_image_layout()
        await self.index.close()
        loop = asyncio.get_running_loop()
        for pool in (self._opening, self._writing, self._publishing, self._hashing):
            await loop.run_in_executor(None, pool.shutdown)

    async def save_image_layout(self) -> None:
        """Write ``index.json`` if there is news, so that other tools can read the directory."""
        if not self.index.changed or self._unwritable is not None:
            return
        # Until what it names is known again, index.json is all that is left of it.
        self._restored = self._restored or await self._reseed()
        # Before it is read: what is put from here on is news again.
        self.index.changed = False
        entries = await self.index.manifests() if self._restored else None
        if entries is None:
            self.index.changed = True
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._opening, image_layout.write, self.layout, entries)
        except OSError as error:
            self.index.changed = True
            self._emit(LogMessage("warning", "index.json was not written", (("why", str(error)),)))

    async def _reseed(self) -> bool:
        """The index was lost: what ``index.json`` names is known again, but not fresh.

        Whether that is done. Tags come last and all at once: where there are none, it was not.
        """
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._opening, image_layout.read, self.layout)
        done = True
        for named in read:
            root = AccessRecord(named.digest, "manifest", named.media_type, named.size, None, None)
            done = await self._reseed_parts(named.repository, root) and done
        pins = {named.digest for named in read if named.pinned}
        done = (not pins or await self.index.pin(pins)) and done
        tags = [
            TagRecord(named.repository, named.tag, named.digest, 0.0, 0.0)
            for named in read
            if named.tag is not None and await self.index.tag(named.repository, named.tag) is None
        ]
        return done and await self.index.put_tags(tags)

    async def _reseed_parts(self, repository: Repository, root: AccessRecord) -> bool:
        """Whether what the manifest refers to is known again, or cannot be any more."""
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
                done = await self._reseed_parts(repository, part) and done
        return done
