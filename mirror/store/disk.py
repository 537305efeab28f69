"""The blocking half of the store: each function here is system calls, run in a thread.

Lives here: opening and leasing whole content, locking growing content, appending with the hash
beside it, durable publishing. Must not know: the event loop, who waits, what a client is.

Errors are ``OSError`` as the kernel gave them; the callers decide what a full or failing disk
means. Out of descriptors (``EMFILE``, ``ENFILE``) is never taken for a missing or damaged file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import Digest, Verifier
from mirror.store.layout import Layout

READ_SIZE: Final = 4 * 1024 * 1024
_CATCH_UP: Final = 64 * 1024 * 1024
_IOV_LIMIT: Final = 512
_PATIENCE: Final = 10.0
"""Seconds that publishing waits for a descriptor."""
_NANOSECONDS: Final = 10**9
# Not there, or not what we would have put there (a link, a directory, a socket).
_ABSENT: Final = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR})
# fsync of a directory is not supported everywhere; there rename is as durable as it gets.
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP})


_GARBAGE: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def boot_id() -> str:
    """The kernel's boot id: unsynced bytes of another boot are not to be trusted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def set_by_us(status: os.stat_result) -> bool:
    """Whether nobody but us wrote to this content: we set whole seconds, the kernel does not."""
    return status.st_mtime_ns % _NANOSECONDS == 0


def reason_of(error: OSError) -> str:
    """Why the disk refused, as a bounded label."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "full"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "readonly"
        case errno.EMFILE | errno.ENFILE:
            return "descriptors"
        case _:
            return "io"


def open_whole(layout: Layout, digest: Digest) -> tuple[int, os.stat_result] | None:
    """Open whole content and lease it (``flock`` shared, which eviction respects).

    None if it is not there, is no regular file, or is being evicted at this moment.
    """
    path = layout.blob(digest)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # An eviction may have unlinked it between the open and the lock.
            status = os.fstat(fd)
            if status.st_nlink > 0:
                return fd, status
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def close(fd: int, threads: Executor) -> None:
    """Close a file; in a thread if it is the end of it: to free a few GB takes a second."""
    if os.fstat(fd).st_nlink == 0:
        with suppress(RuntimeError):  # the threads have ended
            threads.submit(os.close, fd)
            return
    os.close(fd)


def touch_open(fd: int, now: float) -> None:
    """Set the last use of an open file, in whole seconds: the mark that it is as we left it."""
    seconds = int(now) * _NANOSECONDS
    try:
        os.utime(fd, ns=(seconds, seconds))
    except OSError:
        return  # read-only: it will be verified again at its next use


def touch(layout: Layout, digests: Iterable[Digest], now: float) -> None:
    """Set the last use of whole content, in whole seconds (see :func:`set_by_us`).

    A missing file is passed over. So is a file that another program wrote to: its time is the
    evidence of that write. Never raises for a disk that refuses.
    """
    seconds = int(now) * _NANOSECONDS
    for digest in digests:
        path = layout.blob(digest)
        try:
            if set_by_us(path.lstat()):
                os.utime(path, ns=(seconds, seconds), follow_symlinks=False)
        except OSError:
            continue


def verify(fd: int, size: int, digest: Digest) -> None:
    """Hash ``size`` bytes of an open file. Raises :class:`DigestMismatch` or ``OSError``."""
    verifier = Verifier(digest)
    hash_file(fd, verifier, size)
    if verifier.position != size:
        raise DigestMismatch(f"content of {digest} is cut at {verifier.position} bytes")
    verifier.finish()


def hash_file(fd: int, verifier: Verifier, stop: int) -> None:
    """Let ``verifier`` catch up with the file, up to ``stop``."""
    while verifier.position < stop:
        data = os.pread(fd, min(READ_SIZE, stop - verifier.position), verifier.position)
        if not data:
            return
        verifier.update(data)


# --- growing content ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IngestState:
    """What the fetcher of growing content tells other processes, in a file beside it."""

    size: int | None
    """Bytes of the whole content, where the upstream said so."""
    boot: str = ""
    written: int = 0
    """Bytes that were in the file when this was written (at least once a second)."""
    error: tuple[str, str] | None = None
    """(OCI code, message) of a fetch that failed."""
    holder: str = ""
    """Who writes this: another one every time somebody gets hold of the lock."""
    kept: int = 0
    """Bytes that were in the file when this holder began: what follows is its own."""
    room: int = 0
    """Bytes that the file may take, as far as room was asked for."""


def read_state(layout: Layout, digest: Digest) -> tuple[IngestState, float] | None:
    """The state and the time of its last sign of life; None if there is none to be read."""
    path = layout.ingest_state(digest)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = json.loads(os.read(fd, 16384))
        error = raw.get("error")
        state = IngestState(
            size=raw["size"] if type(raw["size"]) is int and raw["size"] >= 0 else None,
            boot=str(raw.get("boot", "")),
            written=int(raw.get("written", 0)),
            error=(str(error[0]), str(error[1])) if error else None,
            holder=str(raw.get("holder", "")),
            kept=int(raw.get("kept", 0)),
            room=int(raw.get("room", 0)),
        )
        return state, os.fstat(fd).st_mtime
    except (OSError, RecursionError, *_GARBAGE):
        return None
    finally:
        os.close(fd)


def write_state(layout: Layout, digest: Digest, state: IngestState) -> None:
    """Replace the state atomically."""
    path = layout.ingest_state(digest)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    document = {
        "size": state.size,
        "boot": state.boot,
        "written": state.written,
        "error": state.error,
        "holder": state.holder,
        "kept": state.kept,
        "room": state.room,
    }
    try:
        draft.write_text(json.dumps(document), encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def stamp_of_state(layout: Layout, digest: Digest) -> tuple[int, int] | None:
    """Another value whenever the state was written; None if there is none."""
    try:
        status = layout.ingest_state(digest).lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def open_ingest(layout: Layout, digest: Digest) -> int:
    """Open or create the file that grows. Never follows a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(layout.ingest(digest), flags, 0o644)


def try_lock(fd: int) -> bool:
    """Take the exclusive lock if nobody holds one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    """Whether ``path`` still names this open file: a lock on an unlinked file locks nothing."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def open_locked(path: Path, access: int = os.O_RDWR) -> Iterator[int | None]:
    """Open an existing file and hold its exclusive lock while the block runs.

    Args:
        path: The file. A link is not followed.
        access: ``os.O_RDONLY`` where the file itself may be read-only.

    Yields:
        The descriptor; None if another process holds a lock, or if ``path`` does not name this file
        any more (a lock on an unlinked file locks nothing).

    Raises:
        OSError: The file cannot be opened; ``FileNotFoundError`` if it does not exist.
    """
    fd = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd if try_lock(fd) and is_at(fd, path) else None
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds the exclusive lock of a file. False if it cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, so that two processes that check at the same time do not see each other's lock.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def write_all(fd: int, chunks: Sequence[bytes], offset: int) -> int:
    """Write at ``offset`` until all is written; returns the new end. Short writes go on.

    Raises ``ShortWrite`` with the end that was reached, so that what is in the file stays known.
    """
    views = [memoryview(chunk) for chunk in chunks if chunk]
    while views:
        try:
            count = os.pwritev(fd, views[:_IOV_LIMIT], offset)
        except OSError as error:
            raise ShortWrite(error, offset) from error
        if count == 0:
            raise ShortWrite(OSError(errno.ENOSPC, "nothing could be written"), offset)
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return offset


def append(
    fd: int | None,
    verifier: Verifier,
    batch: list[bytes],
    start: int,
    *,
    last: bool,
    keep: bool,
) -> int:
    """Hash ``batch`` and, to ``keep`` it, write it at ``start``; returns its end.

    ``last``: the content ends with it, so all of it is hashed before these bytes are written.
    Raises ``DigestMismatch``, ``ShortWrite`` or ``OSError``.
    """
    if last or not keep:
        if verifier.position < start:
            hash_file(_opened(fd), verifier, start)
        verifier.update_all(batch)
        if last:
            verifier.finish()
        if not keep:
            return start + sum(map(len, batch))
    end = write_all(_opened(fd), batch, start)
    if not last and verifier.position == start:
        verifier.update_all(batch)
    elif not last:
        # Behind what an earlier fetch left: a part of it with each batch.
        hash_file(_opened(fd), verifier, min(end, verifier.position + _CATCH_UP))
    return end


def _opened(fd: int | None) -> int:
    if fd is None:
        raise OSError(errno.EBADF, "growing content is closed")
    return fd


class ShortWrite(Exception):
    """The disk refused in the middle of a batch: ``end`` bytes of the content are in the file."""

    def __init__(self, cause: OSError, end: int) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.end = end


def after(batch: list[bytes], count: int) -> list[bytes]:
    """What of ``batch`` comes after its first ``count`` bytes."""
    rest = []
    for chunk in batch:
        if count < len(chunk):
            rest.append(chunk[max(0, count) :])
        count -= len(chunk)
    return rest


def publish(layout: Layout, digest: Digest, fd: int, now: float) -> None:
    """Make verified content durable and visible: fsync, rename, fsync of the directory.

    Raises ``OSError`` of whichever failed; then nothing is left under ``blobs/`` and the file is
    gone: an ``fsync`` that failed once may report success later without having written anything
    (Rebello et al., "Can Applications Recover from fsync Failures?"), so it is never tried again.
    """
    source, target = layout.ingest(digest), layout.blob(digest)
    try:
        directory = _open_directory(target.parent)
    except OSError:
        drop_ingest(layout, digest, fd)
        raise
    try:
        _rename_durably(source, target, fd, directory, int(now) * _NANOSECONDS)
    except OSError:
        drop_ingest(layout, digest, fd)
        raise
    finally:
        os.close(directory)
        drop_state(layout, digest)


def _rename_durably(source: Path, target: Path, fd: int, directory: int, used: int) -> None:
    os.utime(fd, ns=(used, used))
    os.fsync(fd)
    if not is_at(fd, source):
        raise FileNotFoundError(errno.ENOENT, "growing content was taken away", str(source))
    # From here on it can be opened as whole content, whose readers share the lock.
    fcntl.flock(fd, fcntl.LOCK_SH)
    source.rename(target)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            target.unlink(missing_ok=True)
            raise


def _open_directory(path: Path) -> int:
    """Opened before it is needed, and waited for: few descriptors are no reason to drop content."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if reason_of(error) != "descriptors" or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def drop_ingest(layout: Layout, digest: Digest, fd: int) -> None:
    """Remove growing content whose lock we hold. Never raises: there is nothing left to do."""
    try:
        if is_at(fd, layout.ingest(digest)):
            layout.ingest(digest).unlink(missing_ok=True)
    except OSError:
        return


def drop_state(layout: Layout, digest: Digest) -> None:
    """Remove the state of growing content. Never raises: a stale one is not believed."""
    try:
        layout.ingest_state(digest).unlink(missing_ok=True)
    except OSError:
        return
