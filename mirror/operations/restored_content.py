"""Content of a backup that is brought into the data directory.

Lives here: hashing, copying, and keeping content until its row is there. Must not know: rows.

Nothing is believed: what is copied is hashed, and what is here already is hashed, too. Damaged
content is replaced by that of the backup.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from mirror.hosted import upload_files
from mirror.hosted.upload_files import disk_errors
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.disk_failures import disk_failure_text
from mirror.oci.errors import DigestInvalid, DigestMismatch, InvalidRequest, StorageUnavailable
from mirror.oci.reference import Digest, Verifier
from mirror.operations.backup_files import BackupSource, StoredBytes
from mirror.store import disk
from mirror.store.content_hold import ContentHold
from mirror.store.ingest_writer import ShortWrite, write_all
from mirror.store.store import Store
from mirror.threads import run_in_thread

_PARALLEL: Final = 4
"""Contents that are copied at the same time: each waits for the disk at its end."""


@dataclass(frozen=True, slots=True)
class LeasedContent:
    """Verified content that nothing removes until ``fd`` is closed."""

    fd: int
    size: int
    """Bytes."""
    is_copied: bool = False
    """Whether it was copied just now."""
    is_new: bool = False
    """Whether it was copied, and has replaced no damaged content."""

    def read(self) -> bytes:
        """Return the bytes of a manifest. Blocks. Raises ``InvalidRequest`` if it is larger."""
        if self.size > MANIFEST_LIMIT:
            raise InvalidRequest("larger than a manifest may be")
        return os.pread(self.fd, self.size, 0)


class RestoredContent:
    """The content of one restore."""

    def __init__(self, source: BackupSource, store: Store) -> None:
        """Read nothing yet.

        Args:
            source: The backup.
            store: Where content goes to.
        """
        self._source = source
        self._store = store
        self._threads = ThreadPoolExecutor(_PARALLEL, "restore")
        self._verified: set[Digest] = set()
        self.copied = 0
        """Contents that were not here, or were damaged."""
        self.copied_bytes = 0

    @asynccontextmanager
    async def leased(
        self, digests: Iterable[Digest]
    ) -> AsyncIterator[dict[Digest, LeasedContent | InvalidRequest]]:
        """Bring contents here, and keep them while the block commits their rows.

        Yields each one, or why there is none. Each needs a descriptor: ask for some at a time.

        Raises ``StorageUnavailable`` if the disk refuses.
        """
        with ContentHold(self._store.layout) as hold:
            wanted = list(dict.fromkeys(digests))
            leased = await run_in_thread(self._lease_all, wanted, hold)
            try:
                for digest, content in leased.items():
                    if isinstance(content, LeasedContent):
                        self._count(digest, content)
                yield leased
            finally:
                _close_all(leased.values())

    def _count(self, digest: Digest, content: LeasedContent) -> None:
        self._verified.add(digest)
        if not content.is_copied:
            self._store.blobs.mark_verified(digest, content.size)
            return
        self._store.on_pushed(digest, content.size, is_new=content.is_new)
        self.copied += 1
        self.copied_bytes += content.size

    def close(self) -> None:
        """End the threads. Nothing is leased by now."""
        self._threads.shutdown()

    def size_of_copy(self, digest: Digest) -> int | None:
        """Return the bytes of content of the backup, which may be damaged. None without it."""
        with self._source.opened_blob(digest) as stored:
            return None if stored is None else int(stored.size)

    def verify_copy(self, digest: Digest) -> None:
        """Hash content of the backup. Blocks. Raises ``InvalidRequest`` without undamaged one."""
        with self._source.opened_blob(digest) as stored:
            if stored is None:
                raise InvalidRequest(f"the backup does not have {digest}")
            verifier = Verifier(digest)
            for chunk in _chunks_of(digest, stored):
                verifier.update(chunk)
        if not verifier.is_match():
            raise DigestInvalid(f"{digest}: damaged in the backup")

    def read_manifest(self, digest: Digest) -> bytes:
        """Return the bytes of a manifest of the backup. Blocks. Raises ``InvalidRequest``."""
        with self._source.opened_blob(digest) as stored:
            if stored is None:
                raise InvalidRequest(f"the backup does not have {digest}")
            if stored.size > MANIFEST_LIMIT:
                raise InvalidRequest(f"{digest}: larger than a manifest may be")
            try:
                body = b"".join(stored.chunks())
            except OSError as error:
                raise DigestInvalid(f"{digest}: cannot be read: {error.strerror}") from error
        if Digest.of(body, digest.algorithm) != digest:
            raise DigestInvalid(f"{digest}: damaged in the backup")
        return body

    # --- in threads -----------------------------------------------------------------------------

    def _lease_all(
        self, digests: list[Digest], hold: ContentHold
    ) -> dict[Digest, LeasedContent | InvalidRequest]:
        leased: dict[Digest, LeasedContent | InvalidRequest] = {}
        refused: StorageUnavailable | None = None
        with disk_errors("content cannot be restored"):
            hold.acquire(digests)
        lease = partial(self._try_lease, hold=hold)
        for digest, content in zip(digests, self._threads.map(lease, digests), strict=True):
            if isinstance(content, StorageUnavailable):
                refused = content
            else:
                leased[digest] = content
        try:
            if refused is not None:
                raise refused
            with hold, disk_errors("content cannot be restored"):
                hold.sync()  # A fetch may have put there a moment ago what was found here.
        except BaseException:
            _close_all(leased.values())
            raise
        return leased

    def _try_lease(
        self, digest: Digest, hold: ContentHold
    ) -> LeasedContent | InvalidRequest | StorageUnavailable:
        try:
            return self._lease(digest, hold)
        except (InvalidRequest, StorageUnavailable) as error:
            return error
        except OSError as error:
            path = self._store.layout.blob(digest) if error.filename is None else error.filename
            return StorageUnavailable(disk_failure_text(error, path))

    def _lease(self, digest: Digest, hold: ContentHold) -> LeasedContent:
        fd = upload_files.lease_content(self._store.layout, digest)
        if fd is not None:
            size = os.fstat(fd).st_size
            if digest in self._verified or _is_undamaged(fd, size, digest):
                return LeasedContent(fd, size)
            os.close(fd)
        with self._source.opened_blob(digest) as stored:
            if stored is None:
                where = (
                    "the backup does not have"
                    if fd is None
                    else "damaged here, and missing in the backup:"
                )
                raise InvalidRequest(f"{where} {digest}")
            return self._copy(digest, stored, hold)

    def _copy(self, digest: Digest, stored: StoredBytes, hold: ContentHold) -> LeasedContent:
        layout, now = self._store.layout, self._store.now()
        draft = upload_files.path_of(layout, secrets.token_hex(16))
        draft.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(draft, flags, 0o644)
        try:
            disk.try_lock(fd)  # No sweep removes it.
            verifier = Verifier(digest)
            for chunk in _chunks_of(digest, stored):
                write_all(fd, [chunk], verifier.position)
                verifier.update(chunk)
            if not verifier.is_match():
                raise DigestInvalid(f"{digest}: damaged in the backup")
            is_new = upload_files.publish_upload(layout, draft, fd, digest, now, hold)
        except BaseException as error:
            upload_files.try_remove(draft)
            os.close(fd)
            if isinstance(error, ShortWrite):
                raise error.cause from error
            raise
        return LeasedContent(fd, verifier.position, is_copied=True, is_new=is_new)


def _close_all(leased: Iterable[LeasedContent | InvalidRequest]) -> None:
    for content in leased:
        if isinstance(content, LeasedContent):
            os.close(content.fd)


def _is_undamaged(fd: int, size: int, digest: Digest) -> bool:
    try:
        disk.verify(fd, size, digest)
    except (DigestMismatch, OSError):
        return False
    return True


def _chunks_of(digest: Digest, stored: StoredBytes) -> Iterable[bytes]:
    chunks = iter(stored.chunks())
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError as error:
            raise DigestInvalid(f"{digest}: cannot be read: {error.strerror}") from error
        if not chunk:
            return
        yield chunk
