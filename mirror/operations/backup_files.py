"""The files of a backup: an OCI image layout, as a directory or as one tar file.

Lives here: writing them so that a kill at any point leaves the last whole backup, and reading them
as files of another machine, which may be anything. Must not know: which content is in a backup.

A directory is brought up to date: content that it has stays, ``index.json`` is replaced in one
step, and only then goes what nothing names any more. A tar file is written beside its name, and
renamed at the end.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from mirror.oci.errors import DigestMismatch, StorageUnavailable
from mirror.oci.reference import ALGORITHMS, Digest, Verifier
from mirror.store import disk

INDEX: Final = "index.json"
METADATA: Final = "oci-mirror.json"
"""The file of all that an image layout has no place for: who has pushed what, and when."""
USERS: Final = "oci-mirror.users"
"""The file of the names that users have, or once had (:mod:`mirror.access.known_names`)."""
_LAYOUT: Final = "oci-layout"
_LAYOUT_TEXT: Final = '{"imageLayoutVersion": "1.0.0"}'
_BACKUP_STEP_BYTES: Final = 1024 * 1024
"""Bytes that are copied at a time."""
_FICLONE: Final = 0x40049409
"""Request of ioctl_ficlone(2): let two files share their bytes until one is written to."""
_CANNOT_CLONE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
)
_CANNOT_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})
_MAX_INDEX_BYTES: Final = 512 * 1024 * 1024
"""Bytes of an ``index.json`` that is read: more than a million names."""
_MAX_TAR_HEADER_BYTES: Final = 1024 * 1024
"""Bytes of the header of a file in a tar file. Those of usual programs have a few hundred."""
_DOCUMENTS: Final = frozenset({INDEX, METADATA, USERS, _LAYOUT})
_BLOB: Final = re.compile(rf"blobs/({'|'.join(ALGORITHMS)})/([0-9a-f]+)", re.ASCII)


class BackupTarget(Protocol):
    """A backup that is being written. Its methods block, and raise ``OSError``."""

    def keep(self, digest: Digest, size: int) -> bool:
        """Keep content that an earlier backup has here. Returns whether it is there, undamaged."""

    def add(self, digest: Digest, fd: int, path: str, size: int) -> None:
        """Add content that is not there. It is hashed.

        Args:
            digest: Its digest.
            fd: Its open file.
            path: The path of that file, for a link.
            size: Its bytes.

        Raises ``DigestMismatch`` if the file is damaged, or cannot be read. Nothing is added then.
        """

    def publish(self, index: Iterable[str], metadata: Iterable[str], users: str) -> None:
        """Make the backup whole: write the text of its documents, and make all durable."""


class _VerifiedReader:
    """Reads an open file in order, and hashes it. A damaged one raises ``DigestMismatch``."""

    def __init__(self, fd: int, size: int, digest: Digest) -> None:
        self._fd, self._size = fd, size
        self._verifier = Verifier(digest)

    def read(self, count: int) -> bytes:
        """Return at most ``count`` further bytes. A disk that cannot read them counts as damage."""
        count = min(count, self._size - self._verifier.position)
        try:
            data = os.pread(self._fd, count, self._verifier.position)
        except OSError as error:
            raise DigestMismatch(f"content cannot be read: {error.strerror}") from error
        if not data and count:
            raise DigestMismatch("content is cut")
        self._verifier.update(data)
        return data

    def read_all(self) -> None:
        """Verify the whole file."""
        while self.read(_BACKUP_STEP_BYTES):
            pass
        self.finish()

    def finish(self) -> None:
        """Verify the bytes that were read. Call it after the last one."""
        self._verifier.finish()


# --- a directory ----------------------------------------------------------------------------------


class DirectoryTarget:
    """A directory, which may have an earlier backup."""

    def __init__(self, root: Path) -> None:
        """Use a directory that :func:`opened_target` has locked."""
        self._root = root
        self._kept: set[tuple[str, str]] = set()
        # Text, not paths: joining paths takes a third of the time of a backup of small contents.
        self._directories = {one: os.fspath(root / "blobs" / one) for one in ALGORITHMS}
        for directory in self._directories.values():
            os.makedirs(directory, exist_ok=True)
        if not (root / METADATA).exists():  # From now on, it is known as a backup.
            self._write(METADATA, ["{}"])
        self._write(_LAYOUT, [_LAYOUT_TEXT])

    def keep(self, digest: Digest, size: int) -> bool:
        """See :class:`BackupTarget`."""
        path = f"{self._directories[digest.algorithm]}/{digest.hex}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ELOOP:  # A link, which no backup has.
                return False
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return False
            _VerifiedReader(fd, size, digest).read_all()
        except DigestMismatch:
            return False
        finally:
            os.close(fd)
        self._kept.add((digest.algorithm, digest.hex))
        return True

    def add(self, digest: Digest, fd: int, path: str, size: int) -> None:
        """See :class:`BackupTarget`."""
        target = f"{self._directories[digest.algorithm]}/{digest.hex}"
        draft = f"{target}.tmp"
        with suppress(FileNotFoundError):
            os.unlink(draft)
        source = _VerifiedReader(fd, size, digest)
        if _may_share_bytes(path, draft, fd):
            source.read_all()
        else:
            _copy_durably(source, draft)
        os.replace(draft, target)
        self._kept.add((digest.algorithm, digest.hex))

    def publish(self, index: Iterable[str], metadata: Iterable[str], users: str) -> None:
        """See :class:`BackupTarget`."""
        for directory in self._directories.values():
            _sync_directory(directory)
        self._write(USERS, [users])
        self._write(METADATA, metadata)
        self._write(INDEX, index)
        self._prune()

    def _write(self, name: str, text: Iterable[str]) -> None:
        draft = self._root / f"{name}.tmp"
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._root / name)
        _sync_directory(self._root)

    def _prune(self) -> None:
        """Remove content that the new index does not name, and drafts of a run that was killed."""
        for algorithm, directory in self._directories.items():
            for entry in os.scandir(directory):
                if (algorithm, entry.name) not in self._kept and entry.is_file():
                    os.unlink(entry.path)


def _may_share_bytes(source: str, draft: str, fd: int) -> bool:
    """Make a file with the same bytes without copying them. False if the file system cannot."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    clone = os.open(draft, flags, 0o644)
    try:
        fcntl.ioctl(clone, _FICLONE, fd)
        os.fsync(clone)
        return True
    except OSError as error:
        os.unlink(draft)
        if error.errno not in _CANNOT_CLONE:
            raise
    finally:
        os.close(clone)
    try:
        os.link(source, draft, follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    if not disk.is_at(fd, draft):  # The path names another file by now.
        os.unlink(draft)
        return False
    return True


def _copy_durably(source: _VerifiedReader, draft: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    copy = os.open(draft, flags, 0o644)
    try:
        while data := source.read(_BACKUP_STEP_BYTES):
            while data:
                data = data[os.write(copy, data) :]
        source.finish()
        os.fsync(copy)
    finally:
        os.close(copy)


def _sync_directory(path: Path | str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk.sync_directory(fd)
    finally:
        os.close(fd)


# --- a tar file -----------------------------------------------------------------------------------


class TarTarget:
    """A tar file, written beside its name."""

    def __init__(self, path: Path, draft: Path, file: IO[bytes]) -> None:
        """Use a draft that :func:`opened_target` has locked and emptied."""
        self._path, self._draft, self._file = path, draft, file
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
        self._add(_LAYOUT, len(_LAYOUT_TEXT), io.BytesIO(_LAYOUT_TEXT.encode()))

    def keep(self, digest: Digest, size: int) -> bool:
        """See :class:`BackupTarget`."""
        return False

    def add(self, digest: Digest, fd: int, path: str, size: int) -> None:
        """See :class:`BackupTarget`."""
        start, source = self._tar.offset, _VerifiedReader(fd, size, digest)
        try:
            self._add(f"blobs/{digest.algorithm}/{digest.hex}", size, source)
            source.finish()
        except DigestMismatch:
            self._file.seek(start)
            self._file.truncate()
            self._tar.offset = start
            raise

    def publish(self, index: Iterable[str], metadata: Iterable[str], users: str) -> None:
        """See :class:`BackupTarget`."""
        for name, text in ((USERS, [users]), (METADATA, metadata), (INDEX, index)):
            with tempfile.TemporaryFile(dir=self._path.parent) as file:  # Its size comes first.
                file.writelines(part.encode() for part in text)
                size = file.tell()
                file.seek(0)
                self._add(name, size, file)
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._draft.replace(self._path)
        _sync_directory(self._path.parent)

    def _add(self, name: str, size: int, file: Any) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = size, 0o644
        self._tar.addfile(entry, file)
        self._tar.getmembers().clear()  # Only a reader needs them: a kilobyte each.


@contextmanager
def opened_target(path: Path) -> Iterator[BackupTarget]:
    """Open a backup for writing: a tar file if its name ends with ``.tar``, else a directory.

    What is not published when the block ends stays in a directory, for the next run, and is removed
    of a tar file.

    Raises:
        StorageUnavailable: Another process writes it, or the directory has other files.
        OSError: It cannot be written.
    """
    try:
        with _opened_tar(path) if path.suffix == ".tar" else _opened_directory(path) as target:
            yield target
    except OSError as error:
        if error.filename is None:  # A write to an open file: the disk is full, or fails.
            error.filename = os.fspath(path)
        raise


def _busy(path: Path) -> StorageUnavailable:
    return StorageUnavailable(f"{path}: another process writes this backup")


@contextmanager
def _opened_tar(path: Path) -> Iterator[BackupTarget]:
    draft = path.with_name(f"{path.name}.tmp")
    with open(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
        if not disk.try_lock(file.fileno()) or not disk.is_at(file.fileno(), draft):
            raise _busy(path)
        file.truncate(0)
        try:
            yield TarTarget(path, draft, file)
        finally:
            if disk.is_at(file.fileno(), draft):
                draft.unlink()


@contextmanager
def _opened_directory(path: Path) -> Iterator[BackupTarget]:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise StorageUnavailable(
            f"{path}: is a file: name a directory, or a file that ends with .tar"
        ) from None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not disk.try_lock(fd):
            raise _busy(path)
        if not (path / METADATA).exists() and os.listdir(path) not in ([], [f"{METADATA}.tmp"]):
            raise StorageUnavailable(
                f"{path}: has other files than a backup: name an empty or a new directory"
            )
        yield DirectoryTarget(path)
    finally:
        os.close(fd)


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes of an open file."""

    fd: int
    start: int
    """Offset of the first byte."""
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Return the bytes, step by step. They end early if the file does. Blocks."""
        position = 0
        while position < self.size:
            step = min(_BACKUP_STEP_BYTES, self.size - position)
            data = os.pread(self.fd, step, self.start + position)
            if not data:
                return
            position += len(data)
            yield data


class _HeaderReader(io.FileIO):
    """A tar file for ``tarfile``, which reads only headers, and each of them at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most ``size`` bytes. Raises ``tarfile.ReadError`` for a larger header."""
        if size is None or not 0 <= size <= _MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError("a header is too large")
        return super().read(size)


class BackupSource:
    """A backup, or another image layout, that is read. Its methods block."""

    def __init__(self, path: Path) -> None:
        """Open a directory or a tar file. Raises ``StorageUnavailable``, ``OSError``."""
        self._path = path
        self._directory = path if path.is_dir() else None
        self._fd = -1
        self._members: Mapping[str, tuple[int, int]] = {}
        if self._directory is None:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise StorageUnavailable(f"{path}: there is no backup") from None
            self._members = self._read_members()

    def _read_members(self) -> dict[str, tuple[int, int]]:
        found = {}
        try:
            with (
                _HeaderReader(os.dup(self._fd)) as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined] # A kilobyte each.
                    if member.size < 0:
                        raise tarfile.ReadError("a file has a negative size")
                    name = member.name.removeprefix("./")
                    is_ours = name in _DOCUMENTS or _BLOB.fullmatch(name)
                    if is_ours and member.isreg() and not member.issparse():
                        found[name] = member.offset_data, member.size
        except (tarfile.TarError, ValueError, ArithmeticError) as error:
            os.close(self._fd)
            raise StorageUnavailable(
                f"{self._path}: neither a directory nor a plain tar file ({error})"
            ) from None
        return found

    @contextmanager
    def opened(self, name: str) -> Iterator[StoredBytes | None]:
        """Open a file of the layout. None if there is none."""
        if self._directory is None:
            member = self._members.get(name)
            yield None if member is None else StoredBytes(self._fd, *member)
            return
        try:
            fd = os.open(self._directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            status = os.fstat(fd)
            yield StoredBytes(fd, 0, status.st_size) if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(fd)

    def opened_blob(self, digest: Digest) -> Any:
        """Open content, as :meth:`opened` does."""
        return self.opened(f"blobs/{digest.algorithm}/{digest.hex}")

    def lines(self, name: str, limit: int) -> Iterator[bytes]:
        """Yield the lines of a file without their ends. There are none if there is no such file.

        A line that is longer than ``limit`` bytes is cut, and is the last one.
        """
        with self.opened(name) as stored:
            rest = b""
            for chunk in () if stored is None else stored.chunks():
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
                if len(rest) > limit:
                    yield rest[:limit]
                    return
            if rest:
                yield rest

    def document(self, name: str) -> dict[str, Any]:
        """Return a document. It is empty if there is none.

        Raises ``StorageUnavailable`` if it is damaged.
        """
        with self.opened(name) as stored:
            if stored is None:
                return {}
            if stored.size > _MAX_INDEX_BYTES:
                raise StorageUnavailable(f"{self._path}: {name} is too large")
            try:
                found = json.loads(b"".join(stored.chunks()))
            except (ValueError, RecursionError) as error:
                raise StorageUnavailable(f"{self._path}: {name} is damaged: {error}") from None
        if not isinstance(found, dict):
            raise StorageUnavailable(f"{self._path}: {name} is no JSON object")
        return found

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
