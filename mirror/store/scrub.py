"""Hash whole content in a process of its own that gives way to all others.

Lives here: the process, its priority, hashing in small pieces with pauses, quarantine of damaged
content. Must not know: which content is to be hashed, and what follows from damage.

A server on the same machine shall not notice it. So the process has the idle scheduling policies of
processor and disk, pauses after each piece for as long as the piece took, and leaves the kernel's
page cache as it found it: a piece that was not in the cache is dropped from it again.

``python -m mirror.store.scrub DATA_DIR`` reads digests from standard input, a line each, and prints
a line for each, in the same order (:class:`Scrubbed`).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from mirror.oci.disk_failures import disk_failure_text
from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import Digest, Verifier
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.quarantine import quarantine

_PIECE_BYTES: Final = 256 * 1024
"""Bytes that are read and hashed between two pauses: about 0.3 ms of a processor."""
_MIN_PAUSE_S: Final = 0.0005
"""Seconds of a pause at least. Each piece takes about as long."""
_IDLE_NICENESS: Final = 19
"""For kernels and sandboxes without the idle policy."""
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
"""Machine -> number of the system call ioprio_set(2), which the C library does not wrap."""
_IOPRIO_WHO_PROCESS: Final = 1
"""The priority is that of one process (ioprio_set(2))."""
_IOPRIO_CLASS_IDLE: Final = 3 << 13
"""The idle class, in the upper bits of the priority (ioprio_set(2))."""
_MOVE_REMEDY: Final = "it is never served; check that the disk can be written, and verify again"

ScrubResult: TypeAlias = Literal["intact", "missing", "damaged", "unreadable"]
"""- ``intact``: it hashes to its digest.
- ``missing``: it is gone, or is being removed.
- ``damaged``: it hashes to another digest.
- ``unreadable``: the disk cannot read it."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """The result for one content."""

    digest: str
    result: ScrubResult
    size: int = 0
    """Bytes of the file."""
    is_moved: bool = False
    """Whether this process has moved it to ``quarantine/``. If not, it is still in its place."""
    failure: str = ""
    """Path, reason and remedy, if the disk refuses something. Empty: it does not."""

    def dump(self) -> str:
        """Return the line of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, line: str) -> Scrubbed:
        """Parse a line of the process. Raises ``ValueError`` or ``TypeError``."""
        return cls(**json.loads(line))


def scrub(layout: Layout, digest: Digest) -> Scrubbed:
    """Hash whole content, and move it to ``quarantine/`` if it is damaged. Blocks.

    Hosted content that cannot be read stays: only wrong bytes prove damage.

    Raises ``OSError`` if the disk does not say whether the file exists.
    """
    opened = disk.open_whole(layout, digest)
    if opened is None:
        return Scrubbed(str(digest), "missing")
    fd, status = opened
    size, path, failure, is_moved = status.st_size, layout.blob(digest), "", False
    try:
        try:
            result = _hash(fd, digest, status)
        except OSError as error:
            result, failure = "unreadable", disk_failure_text(error, path)
        if result != "intact":
            is_moved = quarantine(layout, digest, fd, may_be_intact=result == "unreadable")
            if not is_moved and result == "damaged" and disk.is_at(fd, path):
                failure = f"{path}: is damaged, and cannot be moved to quarantine/: {_MOVE_REMEDY}"
        return Scrubbed(str(digest), result, size, is_moved=is_moved, failure=failure)
    finally:
        os.close(fd)


def _hash(fd: int, digest: Digest, status: os.stat_result) -> ScrubResult:
    """Hash an open file. Raises ``OSError`` if the disk cannot read it."""
    verifier = Verifier(digest)
    try:
        _hash_gently(fd, verifier, status.st_size)
        if verifier.position != status.st_size:
            return "damaged"
        verifier.finish()
    except DigestMismatch:
        return "damaged"
    is_unchanged = os.fstat(fd).st_mtime_ns == status.st_mtime_ns
    if is_unchanged and not disk.has_our_mtime(status):
        # Another program has written to it, or copied it. It is intact, and need not be hashed
        # again at each use.
        disk.touch_open(fd, status.st_mtime)
    return "intact"


def _hash_gently(fd: int, verifier: Verifier, size: int) -> None:
    """Hash a file from the verifier's position to ``size`` bytes, or to its end."""
    # No read-ahead: it would put pages into the cache that no piece is responsible for.
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    buffer = memoryview(bytearray(min(_PIECE_BYTES, max(size, 1))))
    while verifier.position < size:
        begun, start = time.monotonic(), verifier.position
        count, was_cached = _read(fd, buffer, start)
        if not count:
            return
        verifier.update(buffer[:count])
        if not was_cached:
            with suppress(OSError):
                os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)
        time.sleep(max(_MIN_PAUSE_S, time.monotonic() - begun))


def _read(fd: int, buffer: memoryview, offset: int) -> tuple[int, bool]:
    """Read into ``buffer``. Returns the number of bytes, and whether they were in the page cache.

    Raises ``OSError``.
    """
    with suppress(OSError):  # Not in the cache, or a file system that cannot tell.
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        if count:
            return count, True
    return os.preadv(fd, [buffer], offset), False


def give_way() -> None:
    """Let every other process go first, on processors and disks. Never raises."""
    with suppress(OSError):
        os.nice(_IDLE_NICENESS)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE)


def main() -> int:
    """Hash the contents that standard input lists. Ends once nobody reads its output."""
    give_way()
    layout = Layout(Path(sys.argv[1]))
    for line in sys.stdin:
        text = line.strip()
        try:
            scrubbed = scrub(layout, Digest.parse(text))
        except OSError as error:
            scrubbed = Scrubbed(text, "unreadable", failure=disk_failure_text(error))
        try:
            sys.stdout.write(f"{scrubbed.dump()}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
