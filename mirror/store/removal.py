"""Remove content and leftovers from a data directory, beside servers and other commands.

Lives here: the eviction lock, the removal of a list of contents in batches, and of the leftovers of
ended fetches. Must not know: who removes content, and why.

Theory of operation: one process removes content at a time, the one with the lock of
``eviction.lock``. It removes a batch while no command can set a mark, and compares the marks before
(:meth:`mirror.store.protection.Protection.held`). Each file is unlinked under its own exclusive
lock, so a client that reads it keeps it: readers hold a shared lock. What is being pushed stays,
too (:mod:`mirror.store.content_hold`). A process that is killed leaves whole contents only. The
running total then counts at most one batch too much, until the next scan.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final, Protocol

from mirror.oci.disk_failures import disk_failure_text
from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.content_hold import removing
from mirror.store.layout import Layout
from mirror.store.pace import Pace
from mirror.store.protection import Protection
from mirror.store.space import Totals

BATCH_CONTENTS: Final = 64
"""Contents that are removed between two reports to the fetches that wait: about 5 ms. No command
can set a mark meanwhile."""
MARKS_PAUSE_S: Final = 0.003
"""Seconds of a pause after that, in which a command that waits sets its mark."""
_FUTURE_S: Final = 60.0
"""Seconds after which a last use is in the future. A client may use content while it is listed."""
_EVICTION_LOCK_INTERVAL_S: Final = 0.02
"""Seconds between two attempts to get the eviction lock."""
BLOCK_BYTES: Final = 512
"""Bytes of a block in ``st_blocks``, whatever the file system's own block size (stat(2))."""


class Candidate(Protocol):
    """Whole content that is to be removed, as it was when it was chosen."""

    @property
    def digest(self) -> Digest:
        """Its name."""

    @property
    def used(self) -> float:
        """Its last use then, in seconds since the epoch."""


class KeptBecause(StrEnum):
    """The reason why content was not removed."""

    MARKED = "a pin, a freeze or a lease protects it"
    HOSTED = "a hosted repository has it"
    READ = "a client reads it"
    PUSHED = "it is being pushed or restored"
    USED = "a client has used it since it was chosen"
    REFUSED = "the disk refuses to remove it"


@dataclass(slots=True)
class Removal:
    """The result of a removal. Content that was gone already is in neither list."""

    sizes: dict[Digest, int] = field(default_factory=dict)
    """The removed contents, and their bytes."""
    kept: dict[Digest, KeptBecause] = field(default_factory=dict)
    """The other contents."""
    failures: dict[Digest, str] = field(default_factory=dict)
    """Of those that the disk refuses to remove: path, reason and remedy."""

    @property
    def bytes(self) -> int:
        """Bytes of all removed contents."""
        return sum(self.sizes.values())


# --- the eviction lock ----------------------------------------------------------------------------


@contextmanager
def eviction_locked(
    layout: Layout, totals: Totals, timeout: float, is_stopping: Callable[[], bool]
) -> Iterator[bool]:
    """Hold the eviction lock while the block runs. Yields whether the block may go on.

    It may not if another process has the lock and frees nothing for ``timeout`` seconds, or if
    there are too few descriptors: then no directory could be listed either. It may without the
    lock if the disk refuses to create the file. Two processes that evict at once free too much,
    which is better than nothing.

    Args:
        layout: The data directory.
        totals: Its running total. It shows whether the other process frees anything.
        timeout: Seconds to wait.
        is_stopping: Whether to give up waiting.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(layout.eviction_lock, flags, 0o644)
    except OSError as error:
        yield disk.reason_of(error) != "descriptors"
        return
    try:
        yield _wait_for_lock(fd, totals, timeout, is_stopping)
    finally:
        os.close(fd)


def _wait_for_lock(
    fd: int, totals: Totals, timeout: float, is_stopping: Callable[[], bool]
) -> bool:
    deadline, held = time.monotonic() + timeout, math.inf
    while not disk.try_lock(fd):
        usage = totals.usage()
        if usage is not None and usage.total < held:
            deadline, held = time.monotonic() + timeout, usage.total
        if time.monotonic() >= deadline or is_stopping():
            return False
        time.sleep(_EVICTION_LOCK_INTERVAL_S)
    return True


# --- whole content --------------------------------------------------------------------------------


def batches(contents: Iterable[Candidate]) -> Iterator[Sequence[Candidate]]:
    """Split a list into parts for :func:`remove_batch`."""
    rest = iter(contents)
    while batch := list(islice(rest, BATCH_CONTENTS)):
        yield batch


def remove_batch(
    layout: Layout,
    totals: Totals,
    contents: Sequence[Candidate],
    protection: Protection,
    removal: Removal,
    is_stopping: Callable[[], bool],
) -> None:
    """Remove a few contents, and record in ``removal`` what became of each. Blocks.

    The caller holds the eviction lock, and pauses for :data:`MARKS_PAUSE_S` before the next batch.

    Args:
        layout: The data directory.
        totals: Its running total. What is removed is subtracted from it.
        contents: At most :data:`BATCH_CONTENTS`, in the order of their removal.
        protection: What the marks protect. It is brought up to date first.
        removal: Gets the results, also those before an exception.
        is_stopping: Whether to stop before the next content.

    Raises:
        ProtectionUnknown: The marks cannot be read, and nothing of this batch was removed. Or the
            names of hosted content cannot be read, and nothing more was removed.
        OSError: There are too few descriptors. Nothing of this batch was removed.
    """
    pace = Pace()
    try:
        with protection.held():
            for content in contents:
                if is_stopping():
                    return
                pace.keep()
                if content.digest in protection.digests:
                    removal.kept[content.digest] = KeptBecause.MARKED
                    continue
                result = _unlink(layout, content, protection, removal.failures)
                if isinstance(result, KeptBecause):
                    removal.kept[content.digest] = result
                elif result is not None:
                    removal.sizes[content.digest] = result
                    totals.add(count=-1, size=-result)
    finally:
        totals.flush()


def _unlink(
    layout: Layout, content: Candidate, protection: Protection, failures: dict[Digest, str]
) -> int | KeptBecause | None:
    """Unlink whole content, and return its bytes. None if it is gone already.

    Raises ``ProtectionUnknown`` if it may be hosted.
    """
    path = layout.blob(content.digest)
    try:
        with removing(layout, content.digest) as may_remove:
            if not may_remove:
                return KeptBecause.PUSHED
            # Before the file is locked: a client that pulls it would not find it meanwhile.
            if protection.is_hosted(content.digest):
                return KeptBecause.HOSTED
            with disk.open_locked(path) as fd:
                if fd is None:
                    return KeptBecause.READ
                status = os.fstat(fd)
                if status.st_mtime > content.used:
                    return KeptBecause.USED
                path.unlink()
                return status.st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        failures[content.digest] = disk_failure_text(error, path)
        return KeptBecause.REFUSED


def reset_future_uses(layout: Layout, contents: Iterable[Candidate], now: float) -> None:
    """Set last uses far in the future to ``now``, as an eviction does: a clock was set back.

    Otherwise this content would count as used since it was listed, for as long. Blocks. Never
    raises. ``now``: when the contents were listed, in seconds since the epoch.
    """
    for content in contents:
        if content.used >= now:
            with suppress(OSError):
                if layout.blob(content.digest).lstat().st_mtime > now + _FUTURE_S:
                    disk.touch(layout, [content.digest], now)


# --- leftovers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leftover:
    """The file of a fetch that has ended without publishing its content."""

    digest: Digest
    bytes: int
    """Bytes that it takes up on the disk."""
    length: int
    """Bytes of the file. A sparse file takes up less."""
    modified: float
    """When it was last written, in seconds since the epoch."""


def find_leftovers(layout: Layout) -> list[Leftover]:
    """Return the ingest files that no process is fetching, the oldest first. Blocks.

    Raises ``OSError`` if a directory cannot be listed.
    """
    found = []
    for directory in layout.ingest_directories():
        try:
            # The state of an ingest is in a second file, with a suffix.
            names = [name for name in os.listdir(directory) if "." not in name]
        except FileNotFoundError:
            continue
        for name in names:
            try:
                digest = Digest.parse(f"{directory.name}:{name}")
                status = (directory / name).lstat()
            except (DigestInvalid, OSError):
                continue
            if stat.S_ISREG(status.st_mode) and not disk.is_locked(layout.ingest(digest)):
                taken = status.st_blocks * BLOCK_BYTES
                found.append(Leftover(digest, taken, status.st_size, status.st_mtime))
    return sorted(found, key=lambda leftover: leftover.modified)


def drop_leftover(layout: Layout, digest: Digest) -> int:
    """Remove the leftover of an ended fetch, unless a fetch resumes it. Returns its bytes.

    Blocks. The caller subtracts the bytes from the running total. Never raises.
    """
    try:
        with disk.open_locked(layout.ingest(digest)) as fd:
            if fd is None:
                return 0
            taken = os.fstat(fd).st_blocks * BLOCK_BYTES
            disk.drop_state(layout, digest)
            disk.drop_ingest(layout, digest, fd)
            return taken
    except OSError:
        return 0
