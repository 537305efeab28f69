"""The blobs of hosted repositories: mount, find, read, delete. ``sessions.py`` has their upload.

Lives here: the order of steps of each operation. Must not know: HTTP, who may do what.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.hosted import name_rows, upload_rows
from mirror.hosted.change_feed import ChangeFeed
from mirror.hosted.content_row import ContentRow
from mirror.hosted.database import Database
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.hosted.sessions import UploadSessions
from mirror.hosted.upload_files import disk_errors
from mirror.observability.hosted_events import Actor
from mirror.oci.errors import BlobUnknown
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest
from mirror.store.disk import size_of_whole
from mirror.store.reader import Reader
from mirror.store.store import Store

_BLOB_LOST: Final = "the content of this blob is lost: push it again"


class HostedBlobs:
    """The blobs of all repositories. A repository is its path, such as ``team/app``."""

    def __init__(
        self,
        hosted: Hosted,
        database: Database,
        store: Store,
        uploads: UploadSessions,
        changes: ChangeFeed,
        immutable_tags: ImmutableTagRules,
        now: Callable[[], float],
    ) -> None:
        """Use the parts of the service.

        Args:
            hosted: The quota, and the grace time.
            database: The names.
            store: The content.
            uploads: Give way to what needs their room.
            changes: Records each change, and tells of it.
            immutable_tags: The tags that keep what they name.
            now: Returns the seconds since the epoch.
        """
        self._settings = hosted
        self._database = database
        self._store = store
        self._uploads = uploads
        self._changes = changes
        self._immutable_tags = immutable_tags
        self._now = now

    async def mount(self, source: str, repository: str, digest: Digest, actor: Actor) -> bool:
        """Give a repository a blob of another one. Returns False if that is not possible.

        The caller has checked that the client may read ``source``. Raises ``QuotaExceeded``,
        and ``StorageUnavailable`` if the disk does not answer.
        """
        try:
            await self.size(source, digest)
        except BlobUnknown:
            return False

        def mount(connection: Connection) -> ContentRow | None:
            with upload_rows.within_quota(connection, repository, self._settings):
                size = name_rows.mount_blob(connection, source, repository, digest, self._now())
            return None if size is None else ContentRow(repository, digest, OCTET_STREAM, size)

        change = self._uploads.giving_way(mount, repository, actor.owner)
        return bool(await self._changes.commit(change, "mount", actor))

    async def size(self, repository: str, digest: Digest) -> int:
        """Return the size in bytes of a blob whose file is there. Raises ``BlobUnknown``.

        If the content is lost, or its file has another size, a client pushes it again, which
        repairs it. Raises ``StorageUnavailable`` if the disk does not answer.
        """
        size = await self.recorded_size(repository, digest)
        with disk_errors("the blob cannot be read"):
            if size_of_whole(self._store.layout, digest) != size:
                raise BlobUnknown(_BLOB_LOST)
        return size

    async def recorded_size(self, repository: str, digest: Digest) -> int:
        """Return the bytes of a blob, for :meth:`open`. Raises ``BlobUnknown``."""
        find = partial(name_rows.blob_size, repository=repository, digest=digest)
        size = await self._database.read(find)
        if size is None:
            raise BlobUnknown("the repository does not have this blob")
        return size

    async def read(self, digest: Digest, limit: int) -> bytes:
        """Return the bytes of a small blob. Raises ``BlobUnknown`` if they are lost or damaged."""
        body = await self._store.blobs.read_hosted(digest, limit)
        if body is None:
            raise BlobUnknown(_BLOB_LOST)
        return body

    async def open(self, digest: Digest, size: int) -> Reader:
        """Open a blob of ``size`` bytes for reading. The caller closes the reader.

        Raises ``BlobUnknown`` if its content is lost or damaged, ``StorageUnavailable`` if the disk
        cannot read it.
        """
        reader = await self._store.blobs.find_hosted(digest, size)
        if reader is not None and reader.size == size:
            return reader
        if reader is not None:
            reader.close()
        raise BlobUnknown(_BLOB_LOST)

    async def mark_used(self, repository: str, digest: Digest) -> None:
        """Record that a client may be about to push a manifest that names a blob.

        Raises ``BlobUnknown`` if that is not recorded in time, and a collection may soon remove it.
        """
        now = self._now()
        # A push asks for each of its blobs, and most are new: reading costs less than a commit.
        is_due = partial(name_rows.is_blob_mark_due, repository=repository, digest=digest, now=now)
        if not await self._database.read(is_due):
            return
        mark = partial(name_rows.mark_blob_used, repository=repository, digest=digest, now=now)
        if await self._database.write_mark(mark):
            return
        # A collection of another process may have the lock before us.
        oldest = self._now() - self._settings.grace / 2
        find = partial(name_rows.is_needed_blob, repository=repository, digest=digest, since=oldest)
        if not await self._database.read(find):
            raise BlobUnknown("the repository may lose this blob: push it again")

    async def delete(
        self,
        repository: str,
        digest: Digest,
        actor: Actor,
        *,
        may_change_immutable: bool = False,
    ) -> None:
        """Delete a blob of a repository.

        Args:
            repository: The repository.
            digest: The digest of the blob.
            actor: Who deletes it.
            may_change_immutable: Whether the images of immutable tags may lose it.

        Raises:
            BlobUnknown: The repository does not have it.
            TagImmutable: The image of an immutable tag has it.
        """

        def delete(connection: Connection) -> ContentRow | None:
            if not may_change_immutable:
                self._immutable_tags.check_deletion(
                    connection, repository, digest, is_manifest=False
                )
            size = name_rows.delete_blob(connection, repository, digest)
            return None if size is None else ContentRow(repository, digest, OCTET_STREAM, size)

        if not await self._changes.commit(delete, "delete", actor):
            raise BlobUnknown("the repository does not have this blob")
