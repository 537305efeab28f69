"""Space on disk: how much all content takes up, and whether there is room for more.

Lives here: the running total, the limits (quota, water marks, free disk), and the wait for an
eviction. Must not know: which content is evicted, why space is needed.

Theory of operation: a fetch checks for room once or a few times. This check must not cost more when
more content is stored. So usage is a running total. All processes of a data directory share it in
one small file, ``totals``, which needs no lock: each process writes its own slot, with the bytes
that it has added and removed, and with those that its running fetches have reserved. A *scan* lists
the directories and stores what it found, less the sum of all slots, as the base. From then on, the
usage is the base plus all slots.

Changes that no process has reported make the total wrong: content that other programs added or
removed, and at most one content for each process that was killed between a rename and its report.
The next scan corrects this. There is one before each eviction, and otherwise one a minute, or fewer
if scans would take more than 1 % of the time. Content that is published during a scan may count
twice until the next one. Then eviction starts too early, never too late.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.config.settings import Storage
from mirror.observability.events import LogMessage, Observer
from mirror.store import disk
from mirror.store.disk_room import DiskRoom, Evicting
from mirror.store.layout import Layout
from mirror.store.range_lock import is_range_locked, lock_range

_DISK_RESERVE: Final = 0.01
"""Fraction of a disk that is left free: the index needs space of its own."""
_ROOM_CHECK_INTERVAL_S: Final = 0.05
"""Seconds between two checks for room while a fetch waits for an eviction. It may have room before
that eviction ends."""
_MIN_SCAN_INTERVAL_S: Final = 60.0
"""Minimum number of seconds between two scans. Only changes by other programs wait for a scan."""
_SCAN_SHARE: Final = 0.01
"""Fraction of the time that scans may take: one of 3 s is repeated after 5 minutes."""
_RECORD_BYTES: Final = 64
"""Bytes of the header and of each slot of the file."""
_SLOTS: Final = 63
"""Processes that can share the total. They fill one page of 4 KiB with the header."""
_FILE_BYTES: Final = _RECORD_BYTES * (_SLOTS + 1)
"""Bytes of the file."""
_MAGIC: Final = b"totals 1"
"""First bytes of the file, once a scan has written the header."""
_HEADER: Final = struct.Struct("<8sqqqdd")
"""Magic; count, bytes and leftover of the base; time (since the epoch) and duration of the scan, in
seconds."""
_SLOT: Final = struct.Struct("<qqqqq24x")
"""Count, bytes and leftover that a process has added, then its reserved and unwritten bytes."""
_IMPOSSIBLE: Final = 1 << 60
"""No sum of lengths, in bytes, reaches this. A slot with such a value is damaged and ignored."""


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


# --- the limits -----------------------------------------------------------------------------------


def bytes_to_free(
    usage: Usage, need: int, disk_free: int, settings: Storage
) -> tuple[int, str] | None:
    """Return how many bytes an eviction has to free. ``need`` more bytes are to be written.

    The capacity is the quota, or less if the disk allows less. An eviction starts above its high
    water mark, or if ``need`` does not fit, and goes down to its low water mark. So a full disk is
    evicted for once, and not again for each fetch.

    Args:
        usage: The current usage. It includes the caller's own reservation, if that was declared.
        need: Bytes that are about to be written.
        disk_free: Free bytes of the disk, less the reserve. Negative if the reserve is in use.
        settings: The quota and its water marks.

    Returns:
        The bytes and the reason, ``quota`` or ``disk``. ``(0, "")`` if nothing must be freed. None
        if ``need`` cannot fit, even if all content is evicted.
    """
    capacity = min(settings.max_size, max(0, usage.total - usage.unwritten + disk_free))
    high = int(settings.max_size * settings.high_water)
    if max(need, usage.reserved) > high or max(need, usage.unwritten) > capacity:
        return None
    over_disk = max(need, usage.unwritten) - disk_free
    if over_disk <= 0 and usage.total <= int(capacity * settings.high_water):
        return 0, ""
    over_low = usage.total - int(capacity * settings.low_water)
    reason = "quota" if capacity == settings.max_size and over_disk <= over_low else "disk"
    return max(over_low, over_disk, 0), reason


def has_room(usage: Usage, need: int, disk_free: int, settings: Storage) -> bool:
    """Return whether ``need`` more bytes may be written before anything is evicted.

    That is so up to the quota: above the high water mark an eviction runs, and no fetch waits for
    it. The arguments are those of :func:`bytes_to_free`.
    """
    return usage.total <= settings.max_size and max(need, usage.unwritten) <= disk_free


# --- the running total ----------------------------------------------------------------------------


class Totals:
    """The running total of one data directory. Threads may share it.

    :meth:`add` and :meth:`reserve` never wait for the disk. All other methods may.

    If the file cannot be used (the disk is full or read-only), this process counts alone, in an
    anonymous file, until a scan can open the shared one.
    """

    def __init__(self, path: Path) -> None:
        """Start without an open file: the first use opens it. ``path``: the shared file."""
        self._path = path
        self._lock = threading.Lock()
        """Protects the values of this process. Never held while the disk is used."""
        self._file = threading.Lock()
        """Protects the open file."""
        self._fd: int | None = None
        self._slot = 0
        self._count = self._bytes = self._leftover = 0
        self._reserved = self._unwritten = 0
        self.hosted = 0, 0
        """Number and bytes of hosted contents. They have a quota of their own."""

    def add(self, *, count: int = 0, size: int = 0, leftover: int = 0) -> None:
        """Count content that was added, or that was removed if negative. Writes nothing yet.

        Args:
            count: Number of whole contents.
            size: Their bytes.
            leftover: Bytes of leftovers of fetches, and of damaged content.
        """
        with self._lock:
            self._count += count
            self._bytes += size
            self._leftover += leftover

    def reserve(self, reserved: int, unwritten: int) -> None:
        """Set the bytes that the running fetches of this process need. Writes nothing yet.

        Args:
            reserved: Bytes that they have reserved.
            unwritten: The part of ``reserved`` that is not on the disk yet.
        """
        with self._lock:
            self._reserved, self._unwritten = reserved, unwritten

    def flush(self) -> None:
        """Write the slot, so that other processes count what was added and reserved here."""
        with self._file:
            self._write_slot(self._open())

    def usage(self) -> Usage | None:
        """Flush, and return the usage of all processes, without hosted content.

        None before the first scan.
        """
        with self._file:
            fd = self._open()
            self._write_slot(fd)
            raw = os.pread(fd, _FILE_BYTES, 0)
            magic, count, size, leftover, _, _ = _HEADER.unpack_from(raw)
            if magic != _MAGIC:
                return None
            reserved = unwritten = 0
            for number, slot in enumerate(_slots(raw)):
                count, size, leftover = count + slot[0], size + slot[1], leftover + slot[2]
                # What a dead process had reserved is not written any more.
                if slot[3] and (number == self._slot or is_range_locked(fd, *_range_of(number))):
                    reserved, unwritten = reserved + slot[3], unwritten + slot[4]
            hosted_count, hosted_bytes = self.hosted
            return Usage(
                count=max(0, count - hosted_count),
                bytes=max(0, size - hosted_bytes),
                reserved=max(0, reserved),
                unwritten=max(0, unwritten),
                leftover=max(0, leftover),
            )

    def is_scan_due(self, now: float) -> bool:
        """Return whether a scan is due. ``now``: seconds since the epoch."""
        with self._file:
            magic, _, _, _, scanned_at, duration = _HEADER.unpack(
                os.pread(self._open(), _HEADER.size, 0)
            )
        interval = max(_MIN_SCAN_INTERVAL_S, duration / _SCAN_SHARE)
        return magic != _MAGIC or not 0 <= now - scanned_at < interval

    def begin_scan(self) -> Usage:
        """Return the sum of all slots, before the directories are listed.

        Opens the shared file again if this process counts alone, or if the file was removed.
        """
        with self._file:
            self._open_shared()
            fd = self._open()
            self._write_slot(fd)
            slots = _slots(os.pread(fd, _FILE_BYTES, 0))
            count, size, leftover = (sum(slot[field] for slot in slots) for field in range(3))
            return Usage(count, size, 0, leftover=leftover)

    def end_scan(self, before: Usage, found: Usage, now: float, duration: float) -> None:
        """Store what a scan has found. The caller holds the eviction lock: one scan at a time.

        Args:
            before: The result of :meth:`begin_scan`.
            found: What the directories hold.
            now: Seconds since the epoch.
            duration: Seconds that the scan took.
        """
        header = _HEADER.pack(
            _MAGIC,
            found.count - before.count,
            found.bytes - before.bytes,
            found.leftover - before.leftover,
            now,
            duration,
        )
        with self._file, suppress(OSError):
            os.pwrite(self._open(), header, 0)

    def close(self) -> None:
        """Give up the slot. What this process has added stays in it for its next owner."""
        self.reserve(0, 0)
        with self._file:
            if self._fd is not None:
                self._write_slot(self._fd)
                os.close(self._fd)
                self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            self._open_shared()
        if self._fd is None:
            self._fd, self._slot = os.memfd_create("totals", os.MFD_CLOEXEC), 0
            os.ftruncate(self._fd, _FILE_BYTES)
        return self._fd

    def _open_shared(self) -> None:
        """Use the shared file, unless it is open already, or cannot be opened."""
        with suppress(OSError):
            if self._fd is not None and disk.is_at(self._fd, self._path):
                return
            fd, slot = _open_and_lock(self._path)
            if self._fd is not None:
                os.close(self._fd)
            self._fd, self._slot = fd, slot
            # The slot's earlier owner has counted what the base does not include.
            earlier = _slots(os.pread(fd, _FILE_BYTES, 0))[slot]
            self.add(count=earlier[0], size=earlier[1], leftover=earlier[2])

    def _write_slot(self, fd: int) -> None:
        with self._lock:
            values = self._count, self._bytes, self._leftover, self._reserved, self._unwritten
        with suppress(OSError):  # Written again with the next change: the values are sums.
            os.pwrite(fd, _SLOT.pack(*values), _RECORD_BYTES * (self._slot + 1))


def _slots(raw: bytes) -> list[tuple[int, ...]]:
    return [
        slot if -_IMPOSSIBLE < min(slot) <= max(slot) < _IMPOSSIBLE else (0, 0, 0, 0, 0)
        for slot in _SLOT.iter_unpack(raw[_RECORD_BYTES:])
    ]


def _open_and_lock(path: Path) -> tuple[int, int]:
    """Open or create the shared file, and lock a free slot. Raises ``OSError``."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileExistsError(f"{path} is not a regular file")
        # Takes its blocks now: later writes must not fail on a full disk. Changes no byte.
        try:
            os.posix_fallocate(fd, 0, _FILE_BYTES)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(fd, _FILE_BYTES)
        for slot in range(_SLOTS):
            # Of the open file, not of the process: two stores in one process have two slots.
            with suppress(BlockingIOError, PermissionError):
                lock_range(fd, *_range_of(slot))
                return fd, slot
        raise BlockingIOError(f"all slots of {path} are in use")
    except BaseException:
        os.close(fd)
        raise


def _range_of(slot: int) -> tuple[int, int]:
    return _RECORD_BYTES * (slot + 1), _RECORD_BYTES


# --- room for a fetch -----------------------------------------------------------------------------


class Space:
    """Says whether there is room for more bytes. All methods run on the event loop."""

    def __init__(
        self,
        layout: Layout,
        totals: Totals,
        settings: Storage,
        evictor: Evicting,
        reservations: Callable[[], tuple[int, int]],
        threads: Executor,
        emit: Observer,
    ) -> None:
        """Start without a total: :meth:`measure` begins the first scan.

        Args:
            layout: The data directory.
            totals: Its running total.
            settings: The quota and its water marks.
            evictor: Frees space.
            reservations: Returns the bytes that this process's running fetches were granted, and
                those of them that are not written yet.
            threads: Read the total and the free disk space.
            emit: Receives warnings.
        """
        self._layout = layout
        self._totals = totals
        self._settings = settings
        self._evictor = evictor
        self._reservations = reservations
        self._threads = threads
        self._emit = emit
        self._check_lock = asyncio.Lock()
        self._requested = 0
        """Bytes that the current check is about. They count as if they were granted."""
        self.disk_room = DiskRoom(evictor, self._read_disk)
        self.is_disk_full = False
        """Whether the disk has no free byte left, although content was to be evicted."""

    async def make_room(self, need: int) -> bool:
        """Return whether ``need`` more bytes may be written. Evicts content if that is necessary.

        Above the high water mark this starts an eviction. With room, it does not wait for the
        eviction. Without room, it waits until the eviction has freed enough. An error of the disk
        is logged, and the result is False.
        """
        try:
            may_write = await self._may_write(need)
            # The first eviction may have begun before this reservation. The second one counts it.
            for _ in range(2):
                eviction = self._evictor.start(need) if may_write is None else None
                while may_write is None and eviction is not None and not eviction.done():
                    await asyncio.wait({eviction}, timeout=_ROOM_CHECK_INTERVAL_S)
                    may_write = await self._may_write(need)
        except OSError as error:
            self._emit(LogMessage("warning", "space could not be freed", (("why", str(error)),)))
            return False
        return may_write is True

    def update_reserved(self) -> None:
        """Set the reserved bytes in the total: those that were granted, or are requested now."""
        reserved, unwritten = self._reservations()
        self._totals.reserve(reserved + self._requested, unwritten + self._requested)

    async def measure(self) -> Usage | None:
        """Return the usage. Begins a scan if one is due, and waits for the first one only.

        None if nothing is known yet, because the first scan of another process has not ended.
        Raises ``OSError`` if the free space of the disk cannot be read.
        """
        usage, disk_free = await self._read()
        self.is_disk_full = self.is_disk_full and disk_free <= 0
        scan = self._evictor.start_scan()
        if usage is None:
            await asyncio.wait({scan})
            usage, _ = await self._read()
        return usage

    async def is_limited_by_disk(self) -> bool:
        """Return whether the disk has less room than ``max_size`` allows: a larger one is no help.

        Raises ``OSError`` if the free space of the disk cannot be read.
        """
        usage, disk_free = await self._read()
        return usage is not None and usage.total + max(0, disk_free) < self._settings.max_size

    async def _may_write(self, need: int) -> bool | None:
        """Return True if there is room, False if there never will be, None if there is none now.

        Checks run one at a time, and count bytes that were granted to others. If each check also
        counted what the others request, all could be refused although there is room for one.
        """
        async with self._check_lock:
            self._requested = need
            try:
                usage, disk_free = await self._read()
            finally:
                self._requested = 0
        if usage is None:
            return None
        shortage = bytes_to_free(usage, need, disk_free, self._settings)
        is_granted = has_room(usage, need, disk_free, self._settings)
        self.is_disk_full = not is_granted and disk_free <= 0
        if shortage is None:
            return False
        if is_granted and shortage[0]:
            self._evictor.start(need)
        return True if is_granted else None

    async def _read_disk(self) -> tuple[int, int]:
        """Return the free bytes of the disk, and those that evictions can make it."""
        usage, disk_free = await self._read()
        if usage is None:
            return disk_free, 0
        quota = int(self._settings.max_size * self._settings.high_water)
        return disk_free, min(quota, usage.total - usage.unwritten + disk_free)

    async def _read(self) -> tuple[Usage | None, int]:
        """Return the usage, and the free bytes of the disk."""
        self.update_reserved()
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: (self._totals.usage(), free_bytes(self._layout.root))
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes of a disk, less the reserve. Negative if the reserve is in use."""
    status = os.statvfs(path)
    return int((status.f_bavail - status.f_blocks * _DISK_RESERVE) * status.f_frsize)
