"""Eviction: what the data directory holds, and which content is removed to free space.

Lives here: the scan of the directories, the order of eviction, the thread in which both run. Must
not know: why space is needed, which fetch waits for it.

A scan finds the usage anew: whole content counts with its length, a running fetch with its
announced size, and the leftover of an ended fetch with its blocks. It lists all names, so no
request waits for one: between scans, :class:`mirror.store.space.Totals` knows the usage.
"""

from __future__ import annotations

import asyncio
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Final

from mirror.config.settings import Storage
from mirror.observability.events import Evicted, LogMessage, Observer
from mirror.oci.errors import DigestInvalid, error_text
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.hosted_contents import HostedContents
from mirror.store.layout import Layout
from mirror.store.pace import Pace
from mirror.store.protection import Protection, ProtectionUnknown
from mirror.store.quarantine import quarantine_size, trim_quarantine
from mirror.store.removal import (
    BLOCK_BYTES,
    MARKS_PAUSE_S,
    Candidate,
    Removal,
    batches,
    drop_leftover,
    eviction_locked,
    find_leftovers,
    remove_batch,
)
from mirror.store.space import Totals, Usage, bytes_to_free, free_bytes
from mirror.threads import on_running_loop

_EVICTION_LOCK_TIMEOUT_S: Final = 5.0
"""Seconds to wait for another process that evicts, counted from its last freed byte."""
_HOLD_OFF_FACTOR: Final = 20.0
"""An eviction that frees too little is not repeated for this many times its duration. So a store
full of pinned content spends at most a twentieth of the time on looking for more."""
_LOCK_HOLD_OFF_S: Final = 1.0
"""Seconds without an eviction after an error, or after another process did not release its lock in
time."""
_REMOVAL_LOCK_TIMEOUT_S: Final = 30.0
"""Seconds that a command waits for a process that evicts, and frees nothing."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One whole content on disk."""

    digest: Digest
    size: int
    used: float
    """Last use, in seconds since the epoch."""


# --- a scan of the directories --------------------------------------------------------------------


class Catalog:
    """The content of one data directory. Its methods block, and threads may share it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def refresh(self) -> Usage:
        """List the directories, and return the usage.

        Foreign entries (links, pipes, directories, other names) are neither counted nor opened.

        Raises ``OSError`` if a directory cannot be listed: its content must not count as gone.
        """
        # Ingests come first. Content that is published meanwhile is listed twice, and not missed.
        ingests = {found: self._usage_of_ingest(found, status) for found, status in self._ingests()}
        count = size = 0
        for digest, status in self._contents():
            count, size = count + 1, size + status.st_size
            ingests.pop(digest, None)
        return Usage(
            count,
            size,
            reserved=sum(ingest.reserved for ingest in ingests.values()),
            unwritten=sum(ingest.unwritten for ingest in ingests.values()),
            leftover=sum(ingest.leftover for ingest in ingests.values())
            + quarantine_size(self._layout),
        )

    def _contents(self) -> Iterator[tuple[Digest, os.stat_result]]:
        pace = Pace()
        for directory in self._layout.content_directories():
            with suppress(FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    pace.keep()
                    with suppress(DigestInvalid, OSError):
                        digest = Digest.parse(f"{directory.name}:{entry.name}")
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield digest, status

    def _ingests(self) -> Iterator[tuple[Digest, os.stat_result]]:
        for directory in self._layout.ingest_directories():
            try:
                # The state of an ingest is in a second file, with a suffix.
                names = [name for name in os.listdir(directory) if "." not in name]
            except FileNotFoundError:
                continue
            for name in names:
                with suppress(DigestInvalid, OSError):
                    status = (directory / name).lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield Digest.parse(f"{directory.name}:{name}"), status

    def _usage_of_ingest(self, digest: Digest, status: os.stat_result) -> Usage:
        if not disk.is_locked(self._layout.ingest(digest)):
            # A leftover counts with the blocks that it takes up, not with its announced size.
            return Usage(0, 0, reserved=0, leftover=status.st_blocks * BLOCK_BYTES)
        state = disk.read_state(self._layout, digest)
        announced = max(state[0].size or 0, state[0].reserved) if state is not None else 0
        return Usage(
            0,
            0,
            reserved=max(announced, status.st_size),
            unwritten=max(announced - status.st_size, 0),
        )

    def has_blob(self, digest: Digest) -> bool:
        """Return whether there is whole content of this digest."""
        return disk.has_whole(self._layout, digest)

    def blobs(self, now: float) -> Iterator[StoredBlob]:
        """List all whole content with its recency. Holds none of it in memory.

        A last use in the future (a clock was set back) is set to ``now``, also on the disk: the
        content ages from now on.
        """
        for digest, status in self._contents():
            if status.st_mtime > now:
                disk.touch(self._layout, [digest], now)
            yield StoredBlob(digest, status.st_size, min(status.st_mtime, now))


# --- the order of eviction ------------------------------------------------------------------------


def eviction_order(
    blobs: Iterable[StoredBlob], protected: Container[Digest], enough: float = math.inf
) -> list[StoredBlob]:
    """Return the content that may be evicted, least recently used first.

    At the same recency small content (manifests) is evicted first: so whole images are left, rather
    than manifests without layers.

    Args:
        blobs: All whole content. At most about twice as much as is returned is held in memory.
        protected: Content that must stay.
        enough: Bytes to evict: the result ends with the content that reaches them.
    """
    by_use: dict[float, list[StoredBlob]] = {}
    held, newest, limit = 0, math.inf, 2 * enough
    for blob in blobs:
        if blob.used <= newest and blob.digest not in protected:
            by_use.setdefault(blob.used, []).append(blob)
            held += blob.size
            if held > limit:
                held = _drop_newest(by_use, held, enough)
                newest = max(by_use)
                # Content with the same recency stays together. So it may be more than enough.
                limit = 2 * max(held, enough)
    order: list[StoredBlob] = []
    held = 0
    for used in sorted(by_use):
        # By text: comparing digests takes five times as long, for which requests wait.
        for blob in sorted(by_use[used], key=lambda blob: (blob.size, blob.digest.hex)):
            if held >= enough:
                return order
            order.append(blob)
            held += blob.size
    return order


def _drop_newest(by_use: dict[float, list[StoredBlob]], held: int, enough: float) -> int:
    """Drop the newest entries of ``by_use`` while ``enough`` bytes are left without them.

    ``held``: bytes of all entries. Returns the bytes of those that are left.
    """
    for used in sorted(by_use, reverse=True):
        size = sum(blob.size for blob in by_use[used])
        if held - size < enough:
            break
        held -= size
        del by_use[used]
    return held


# --- eviction -------------------------------------------------------------------------------------


class Evictor:
    """Frees space, in a thread of its own. Only one eviction runs at a time, over all processes."""

    def __init__(
        self,
        layout: Layout,
        catalog: Catalog,
        totals: Totals,
        settings: Storage,
        protect: Callable[[], Protection],
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        """Start the thread with the first eviction or scan.

        Args:
            layout: The data directory.
            catalog: Lists its content.
            totals: Its running total. What is evicted is subtracted from it.
            settings: The quota and its water marks.
            protect: Returns a new record of what the marks protect. Called in the thread.
            emit: Receives events, on the event loop.
            now: Returns the seconds since the epoch.
        """
        self._layout = layout
        self._catalog = catalog
        self._hosted = HostedContents(layout)
        self._totals = totals
        self._settings = settings
        self._protect = protect
        self._emit = on_running_loop(emit)
        self._now = now
        self._thread = ThreadPoolExecutor(1, "evict")
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._eviction: asyncio.Future[None] | None = None
        self._scan: asyncio.Future[None] | None = None
        self._held_off_until = 0.0
        self._told: set[str] = set()
        """Marks that were said to keep a whole repository."""

    def start(self, need: int) -> asyncio.Future[None] | None:
        """Start an eviction, or join the running one. The future never has an exception.

        Args:
            need: Bytes that are about to be written. Those that running fetches have reserved
                count anyway.

        Returns:
            Done once the eviction has ended. None if none is started: the last one could not free
            enough a moment ago, or the store is closed.
        """
        if self._eviction is None or self._eviction.done():
            if time.monotonic() < self._held_off_until or self._stopping.is_set():
                return None
            self._eviction = self._run(lambda: self._make_room(need), "space could not be freed")
        return self._eviction

    def start_scan(self) -> asyncio.Future[None]:
        """Find the usage anew, if that is due and no other process does. Joins a running scan."""
        if self._scan is None or self._scan.done():
            self._scan = self._run(self._scan_if_due, "the usage could not be found")
        return self._scan

    async def remove(self, contents: Iterable[Candidate]) -> Removal:
        """Remove listed contents, in their order. Evictions take turns with it.

        Content stays if a mark protects it, a client reads it, or a client has used it since it was
        listed (:class:`Candidate`). Ends early if the store is closed.

        Raises:
            ProtectionUnknown: It is not known what the marks protect. Nothing more was removed.
            OSError: Another process does not release the lock, or there are too few descriptors.
        """
        removal, protection = Removal(), self._protect()
        try:
            for batch in batches(contents):
                if self._stopping.is_set():
                    break
                await self._loop.run_in_executor(
                    self._thread, self._remove_listed, batch, protection, removal
                )
                await asyncio.sleep(MARKS_PAUSE_S)
        finally:
            self._report(removal, "removed")
        return removal

    def _run(self, work: Callable[[], None], failed: str) -> asyncio.Future[None]:
        """Run in the thread. Logs an unexpected error under the message ``failed``."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._held_off_until = time.monotonic() + _LOCK_HOLD_OFF_S
                why = (("why", error_text(error)),)
                self._emit(LogMessage("warning", failed, why))

        return self._loop.run_in_executor(self._thread, run)

    async def wait_until_idle(self) -> None:
        """Wait until neither an eviction nor a scan runs."""
        while running := {f for f in (self._eviction, self._scan) if f and not f.done()}:
            await asyncio.wait(running)

    async def close(self) -> None:
        """End the thread. A running eviction stops after the content that it is removing."""
        self._stopping.set()
        await self.wait_until_idle()
        self._thread.shutdown()

    # --- in the thread --------------------------------------------------------------------------

    def _scan_if_due(self) -> None:
        if self._totals.is_scan_due(self._now()):
            with self._locked(0.0) as is_locked:
                if is_locked:
                    self._refresh()

    def _refresh(self) -> Usage:
        """Find the usage anew. Returns it without hosted content."""
        begun, before = time.monotonic(), self._totals.begin_scan()
        usage = self._catalog.refresh()
        self._totals.end_scan(before, usage, self._now(), time.monotonic() - begun)
        count, size = self._totals.hosted = self._hosted.usage()
        return replace(usage, count=max(0, usage.count - count), bytes=max(0, usage.bytes - size))

    def _make_room(self, need: int) -> None:
        with self._locked(_EVICTION_LOCK_TIMEOUT_S) as is_locked:
            if not is_locked:
                self._held_off_until = time.monotonic() + _LOCK_HOLD_OFF_S
                return
            begun = time.monotonic()
            # Another process may have made room, and another program may have changed the content.
            shortage = self._shortage(self._refresh(), need)
            if shortage is None or not shortage[0]:
                return
            protection, asked = self._protect(), time.monotonic()
            try:
                protection.update()
                self._tell_holding(protection)
                # A hold-off in proportion to the wait for the index would last for minutes.
                begun += time.monotonic() - asked
                is_enough = self._evict(*shortage, protection)
            except ProtectionUnknown as error:
                self._emit(LogMessage("warning", "nothing is evicted", (("why", str(error)),)))
                is_enough, begun = False, begun + time.monotonic() - asked
            if not is_enough:
                elapsed = time.monotonic() - begun
                self._held_off_until = time.monotonic() + elapsed * _HOLD_OFF_FACTOR

    def _tell_holding(self, protection: Protection) -> None:
        """Log once for each mark that keeps all content of its repository."""
        for name in protection.holding:
            if name not in self._told:
                self._told.add(name)
                fields = (
                    ("image", name),
                    ("why", "its manifest is damaged or missing, so its parts are not known"),
                    ("remedy", f"oci-mirror verify --repair {name}, or take its mark away"),
                )
                self._emit(LogMessage("warning", "a mark keeps a whole repository", fields))

    def _shortage(self, usage: Usage, need: int) -> tuple[int, str] | None:
        # All waiting fetches together may need more than the quota. Then not all of them get space,
        # and freeing more than this would not help.
        most = int(self._settings.max_size * self._settings.high_water)
        usage = replace(usage, reserved=min(usage.reserved, most))
        return bytes_to_free(usage, need, free_bytes(self._layout.root), self._settings)

    def _locked(self, timeout: float) -> AbstractContextManager[bool]:
        return eviction_locked(self._layout, self._totals, timeout, self._stopping.is_set)

    def _evict(self, free: int, reason: str, protection: Protection) -> bool:
        """Free ``free`` bytes. False if that much could not be freed.

        Raises ``ProtectionUnknown``.
        """
        dropped = trim_quarantine(self._layout, keep=0, staying=protection.digests)
        for leftover in find_leftovers(self._layout):
            if dropped < free:
                dropped += drop_leftover(self._layout, leftover.digest)
        self._totals.add(leftover=-dropped)
        self._totals.flush()
        removal = Removal()
        try:
            self._evict_contents(free - dropped, protection, removal)
        finally:
            self._report(removal, reason)
        return dropped + removal.bytes >= free

    def _report(self, removal: Removal, reason: str) -> None:
        if removal.sizes:
            self._emit(Evicted(len(removal.sizes), removal.bytes, reason))

    def _evict_contents(self, free: int, protection: Protection, removal: Removal) -> None:
        """Evict ``free`` bytes of whole content. ``removal`` gets the results.

        Raises ``ProtectionUnknown``, after any number of contents.
        """
        while removal.bytes < free and not self._stopping.is_set():
            blobs = protection.without_hosted(self._catalog.blobs(self._now()))
            # Other content is evicted in the place of what a client reads.
            staying = protection.digests | removal.kept.keys()
            chosen = eviction_order(blobs, staying, free - removal.bytes)
            if not chosen:
                break
            for batch in batches(chosen):
                self._remove_batch(batch, protection, removal)
                time.sleep(MARKS_PAUSE_S)

    def _remove_batch(
        self, batch: Sequence[Candidate], protection: Protection, removal: Removal
    ) -> None:
        remove_batch(self._layout, self._totals, batch, protection, removal, self._stopping.is_set)

    def _remove_listed(
        self, batch: Sequence[Candidate], protection: Protection, removal: Removal
    ) -> None:
        with self._locked(_REMOVAL_LOCK_TIMEOUT_S) as is_locked:
            if not is_locked:
                raise TimeoutError(
                    f"another process has held {self._layout.eviction_lock} for "
                    f"{_REMOVAL_LOCK_TIMEOUT_S:.0f} s: end it, and try again"
                )
            self._remove_batch(batch, protection, removal)
