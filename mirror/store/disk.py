"""Files of the data directory. The functions make system calls that block.

Lives here: opening and leasing whole content, locking an ingest file, appending with the
hash beside it, durable publishing. Must not know: the event loop, followers, clients.

Functions that read or write content run in a thread. Single ``stat`` calls, ``close`` and reading a
state file also run on the event loop.

Errors are ``OSError``. Only :func:`verify` also raises ``DigestMismatch``. The callers decide what
a full or failing disk means. Too few descriptors (``EMFILE``, ``ENFILE``) never count as a missing
or damaged file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Final

from mirror.oci.errors import DigestMismatch, StorageUnavailable
from mirror.oci.reference import Digest, Verifier
from mirror.store.layout import Layout as Layout
from mirror.store.records import MALFORMED

_READ_BYTES: Final = 1024 * 1024
"""Bytes that are read and hashed at a time: few calls, and little memory for each thread. Ten
threads may hash at once."""
_DESCRIPTOR_TIMEOUT_S: Final = 10.0
"""Seconds that publishing waits for a free descriptor: a burst of requests has ended by then."""
_NANOSECONDS: Final = 10**9
"""Nanoseconds in a second."""
_STATE_LIMIT_BYTES: Final = 16 * 1024
"""Bytes that are read of an ingest state. Ours are smaller, with any error message."""
# Missing, or not a file that we would have put there (a link, a directory, a socket).
_ABSENT: Final = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR})
# Some file systems cannot sync a directory. There a rename is as durable as it gets.
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP})


def boot_id() -> str:
    """Return the kernel's boot id, or an empty string if it cannot be read.

    Unsynced bytes of another boot are not trusted.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def has_our_mtime(status: os.stat_result) -> bool:
    """Return True if the mirror set the modification time, so no other program has written since.

    The mirror sets whole seconds. A write sets nanoseconds.
    """
    return status.st_mtime_ns % _NANOSECONDS == 0


def reason_of(error: OSError) -> str:
    """Return the label: ``full``, ``readonly``, ``descriptors``, ``removed`` or ``io``."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "full"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "readonly"
        case errno.EMFILE | errno.ENFILE:
            return "descriptors"
        case errno.ENOENT | errno.ESTALE:
            return "removed"
        case _:
            return "io"


# --- whole content --------------------------------------------------------------------------------


def has_whole(layout: Layout, digest: Digest) -> bool:
    """Return whether there is whole content of this digest. A link, pipe or directory is none.

    Blocks. False also if the disk does not answer.
    """
    try:
        return has_whole_or_raise(layout, digest)
    except OSError:
        return False


def has_whole_or_raise(layout: Layout, digest: Digest) -> bool:
    """Return whether there is whole content, as :func:`has_whole`.

    Raises ``OSError`` if the disk does not answer.
    """
    try:
        return stat.S_ISREG(layout.blob(digest).lstat().st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


def open_whole(layout: Layout, digest: Digest) -> tuple[int, os.stat_result] | None:
    """Open whole content and lease it: a shared ``flock``, which eviction respects.

    Returns:
        The descriptor and its status. None if the file is missing, is no regular file, or is being
        evicted at this moment.

    Raises:
        OSError: The disk does not say whether the file exists.
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
    """Close a file. An unlinked one is closed in a thread: to free a few GB takes a second."""
    if os.fstat(fd).st_nlink == 0:
        with suppress(RuntimeError):  # The threads have ended.
            threads.submit(os.close, fd)
            return
    os.close(fd)


def touch_open(fd: int, now: float) -> None:
    """Set the last use of an open file, in whole seconds (see :func:`has_our_mtime`)."""
    seconds = int(now) * _NANOSECONDS
    try:
        os.utime(fd, ns=(seconds, seconds))
    except OSError:
        # A read-only disk. If another program has set the time, the content is verified again at
        # its next use.
        return


def distrust(path: Path) -> None:
    """Let a file be hashed before its next use (see :func:`has_our_mtime`). Raises ``OSError``."""
    status = path.lstat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns | 1))


def touch(layout: Layout, digests: Iterable[Digest], now: float) -> None:
    """Set the last use of whole content, in whole seconds (see :func:`has_our_mtime`).

    A missing file is passed over. So is a file that another program wrote to: its time is the
    evidence of that write. Never raises for a disk that refuses.

    Args:
        layout: The data directory.
        digests: The content.
        now: The last use, in seconds since the epoch.
    """
    seconds = int(now) * _NANOSECONDS
    for digest in digests:
        path = layout.blob(digest)
        with suppress(OSError):
            if has_our_mtime(path.lstat()):
                os.utime(path, ns=(seconds, seconds), follow_symlinks=False)


def verify(
    fd: int, size: int, digest: Digest, is_stopping: Callable[[], bool] = lambda: False
) -> None:
    """Hash ``size`` bytes of an open file.

    Raises:
        DigestMismatch: The file is shorter, or hashes to another digest.
        StorageUnavailable: ``is_stopping``, which is called about every 10 ms, returned True.
        OSError: The file cannot be read.
    """
    verifier = Verifier(digest)
    hash_file(fd, verifier, size, is_stopping)
    if verifier.position != size:
        raise DigestMismatch(f"content of {digest} is cut at {verifier.position} bytes")
    verifier.finish()


def hash_file(
    fd: int, verifier: Verifier, stop: int, is_stopping: Callable[[], bool] = lambda: False
) -> None:
    """Hash the bytes of a file from the verifier's position up to ``stop``, or to its end."""
    while verifier.position < stop:
        if is_stopping():
            raise StorageUnavailable("the store is closed")
        data = os.pread(fd, min(_READ_BYTES, stop - verifier.position), verifier.position)
        if not data:
            return
        verifier.update(data)


# --- ingest files ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IngestState:
    """The state of a fetch, in a file beside the ingest file. Other processes read it."""

    size: int | None
    """Bytes of the whole content. None: the upstream has not declared them."""
    boot: str = ""
    """:func:`boot_id` of the writer."""
    written: int = 0
    """Bytes in the ingest file when this state was written, at least once a second."""
    error: tuple[str, str] | None = None
    """(OCI code, message) of a fetch that failed."""
    holder: str = ""
    """Identifies one hold of the lock: each one has another value."""
    beat: float = -inf
    """When the holder was last alive, in seconds of the kernel's monotonic clock. All processes of
    one boot share it, and setting the time does not change it."""
    resumed_from: int = 0
    """Bytes in the ingest file when this hold began. The holder has written all that follow."""
    reserved: int = 0
    """Length in bytes that the ingest file may reach. Written before space is made for it, so that
    an eviction in another process counts it."""

    def is_recent(self, limit: float) -> bool:
        """Return whether a state of this boot has a heartbeat of the last ``limit`` seconds."""
        return 0 <= time.monotonic() - self.beat <= limit


def read_state(layout: Layout, digest: Digest) -> tuple[IngestState, float] | None:
    """Read the state of a fetch, and when it was last renewed, in seconds since the epoch.

    Returns None if there is no readable state.
    """
    path = layout.ingest_state(digest)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = json.loads(os.read(fd, _STATE_LIMIT_BYTES))
        error = raw.get("error")
        state = IngestState(
            size=raw["size"] if type(raw["size"]) is int and raw["size"] >= 0 else None,
            boot=str(raw.get("boot", "")),
            written=int(raw.get("written", 0)),
            error=(str(error[0]), str(error[1])) if error else None,
            holder=str(raw.get("holder", "")),
            beat=float(raw.get("beat", -inf)),
            resumed_from=int(raw.get("kept", 0)),  # On disk, two fields keep their first name.
            reserved=int(raw.get("room", 0)),
        )
        return state, os.fstat(fd).st_mtime
    except (OSError, *MALFORMED):
        return None
    finally:
        os.close(fd)


def write_state(layout: Layout, digest: Digest, state: IngestState) -> None:
    """Replace the state atomically. Raises ``OSError``, and leaves no draft then.

    Args:
        layout: The data directory.
        digest: The content that is fetched.
        state: The new state.
    """
    path = layout.ingest_state(digest)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    document = {
        "size": state.size,
        "boot": state.boot,
        "written": state.written,
        "error": state.error,
        "holder": state.holder,
        "beat": state.beat,
        "kept": state.resumed_from,
        "room": state.reserved,
    }
    try:
        draft.write_text(json.dumps(document), encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def stamp_of_state(layout: Layout, digest: Digest) -> tuple[int, int] | None:
    """Return a value that differs after each write of the state. None if there is no state."""
    try:
        status = layout.ingest_state(digest).lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def open_ingest(layout: Layout, digest: Digest) -> int:
    """Open or create the ingest file. Never follows a link. Raises ``OSError``."""
    path = layout.ingest(digest)
    path.parent.mkdir(parents=True, exist_ok=True)  # An operator may have removed it.
    return os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
    )


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of a file. False if another descriptor holds a lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: Path | str) -> bool:
    """Return whether ``path`` names the file ``fd``. A lock on an unlinked file locks nothing."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def open_locked(path: Path) -> Iterator[int | None]:
    """Open an existing file and hold its exclusive lock while the block runs. No link is followed.

    It is opened for writing if its mode allows that: NFS needs this for an exclusive lock
    (flock(2)).

    Yields:
        The descriptor; None if another process holds a lock, or if ``path`` does not name this file
        any more (a lock on an unlinked file locks nothing).

    Raises:
        OSError: The file cannot be opened or locked; ``FileNotFoundError`` if it does not exist.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, os.O_RDWR | flags)
    except PermissionError:
        fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield fd if try_lock(fd) and is_at(fd, path) else None
    finally:
        os.close(fd)


def lock_file(path: Path) -> int | None:
    """Create a file if it is missing, and hold its exclusive lock while the descriptor is open.

    Returns:
        The descriptor; None if another process holds the lock.

    Raises:
        OSError: The file cannot be opened or locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if try_lock(fd):
        return fd
    os.close(fd)
    return None


def is_locked(path: Path) -> bool:
    """Return whether a process holds the exclusive lock of a file.

    False if it cannot be opened.
    """
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


def publish(layout: Layout, digest: Digest, fd: int, now: float) -> None:
    """Make verified content durable and visible: fsync, rename, fsync of the directory.

    Args:
        layout: The data directory.
        digest: The content.
        fd: Its open ingest file, whose lock we hold.
        now: Its last use, in seconds since the epoch.

    Raises:
        OSError: One of these steps failed, and the ingest file is removed. An ``fsync`` that failed
            once may report success later without having written anything (Rebello et al., "Can
            Applications Recover from fsync Failures?"), so it is never tried again. If only the
            directory could not be synced, the content stays: its bytes are whole, and its path may
            name a file that a push has put there meanwhile.
    """
    source, target = layout.ingest(digest), layout.blob(digest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)  # An operator may have removed it.
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
        raise FileNotFoundError(errno.ENOENT, "the ingest file was removed", str(source))
    # From now on clients can open it as whole content, and its readers share the lock.
    fcntl.flock(fd, fcntl.LOCK_SH)
    source.rename(target)
    sync_directory(directory)


def sync_directory(fd: int) -> None:
    """Make a rename in an open directory durable, if its file system can. Raises ``OSError``."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def _open_directory(path: Path) -> int:
    """Open a directory, and wait for a free descriptor: a lack of them must not drop content."""
    deadline = time.monotonic() + _DESCRIPTOR_TIMEOUT_S
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if reason_of(error) != "descriptors" or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def drop_ingest(layout: Layout, digest: Digest, fd: int) -> None:
    """Remove an ingest file whose lock we hold. Never raises: recovery removes it later.

    Args:
        layout: The data directory.
        digest: The content.
        fd: The open file. Another one that has its name now stays.
    """
    with suppress(OSError):
        if is_at(fd, layout.ingest(digest)):
            layout.ingest(digest).unlink(missing_ok=True)


def drop_state(layout: Layout, digest: Digest) -> None:
    """Remove the state of a fetch. Never raises: a state without its lock is not trusted."""
    with suppress(OSError):
        layout.ingest_state(digest).unlink(missing_ok=True)
