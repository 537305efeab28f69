"""The operations on hosted repositories: push, mount, delete, find, list.

Lives here: the order of steps of each operation, so that a push is acknowledged only once it is
durable. Must not know: HTTP, who may do what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.hosted import collection_rows, name_rows, upload_files, upload_rows
from mirror.hosted.change_feed import ChangeFeed
from mirror.hosted.database import Database
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.hosted.name_rows import USE_STEP_S, ManifestRow
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.hosted.referrer_rows import referrers_page
from mirror.hosted.sessions import UploadSessions, disk_errors
from mirror.observability.events import HostedChange, HostedMeasured, Observer
from mirror.observability.hosted_events import SERVER, Actor, ChangeAction
from mirror.oci.descriptor import MANIFEST_LIMIT, ReferrersPage
from mirror.oci.errors import BlobUnknown, DigestInvalid, ManifestUnknown, NameUnknown
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.store.content_hold import ContentHold
from mirror.store.disk import has_whole_or_raise
from mirror.store.reader import Reader
from mirror.store.store import Store
from mirror.threads import parse_in_thread_if_large, run_in_thread

_MAX_PAGE: Final = 10_000
"""Names on one page at most, whatever the client's ``n`` is: at most 1.3 MB of JSON."""

_NAMES_STEP: Final = 500
"""Names that are read at a time: deciding which of them are visible takes a millisecond."""
_MARK_TIMEOUT_S: Final = 1.0
"""Seconds that a client waits for the record of its use. One commit takes milliseconds."""
_BLOB_LOST: Final = "the content of this blob is lost: push it again"


class HostedService:
    """The hosted repositories of one process. A repository is its path, such as ``team/app``."""

    def __init__(
        self,
        hosted: Hosted,
        database: Database,
        store: Store,
        now: Callable[[], float],
        emit: Observer | None,
    ) -> None:
        """Compose the parts. The caller owns ``database`` and ``store``.

        Args:
            hosted: The quota, and what is accepted.
            database: The names.
            store: The content.
            now: Returns the seconds since the epoch.
            emit: Receives a :class:`HostedChange` after each durable change. None: a server
                tells of the changes that this process makes.
        """
        self.settings = hosted
        self.changes = ChangeFeed(database, hosted.name, now, emit)
        self.uploads = UploadSessions(hosted, database, store, now)
        self._immutable_tags = ImmutableTagRules(hosted)
        self._database = database
        self._store = store
        self._now = now
        self._publishing = ThreadPoolExecutor(4, "publish-manifest")

    async def close(self) -> None:
        """End the threads. Running requests must have ended."""
        await self.uploads.close()
        await self.changes.close()
        await run_in_thread(self._publishing.shutdown)

    async def _change(
        self,
        change: Callable[[Connection], ManifestRow | None],
        action: ChangeAction,
        repository: str,
        actor: Actor,
        tags: Sequence[str] = ("",),
        hold: ContentHold | None = None,
    ) -> ManifestRow | None:
        """Return the result of ``change``, once it is durable with its record, and tell of it.

        Args:
            change: Returns what it has changed. None: nothing.
            action: What it does.
            repository: The repository.
            actor: Who does it.
            tags: The changed tags; an empty one for a digest.
            hold: Keeps the content until then.
        """

        def record(connection: Connection) -> tuple[ManifestRow | None, list[HostedChange]]:
            row = change(connection)
            if row is None:
                return None, []
            changes = [self._change_of(action, repository, row, actor, tag) for tag in tags]
            for one in changes:
                self.changes.record(connection, one)
            return row, changes

        def tell(result: tuple[ManifestRow | None, list[HostedChange]]) -> None:
            for one in result[1]:
                self.changes.tell(one)

        is_removal = action == "delete"
        result = await self._database.write(
            record, is_removal=is_removal, on_committed=tell, hold=hold
        )
        return result[0]

    def _change_of(
        self, action: ChangeAction, repository: str, row: ManifestRow, actor: Actor, tag: str
    ) -> HostedChange:
        return HostedChange(
            action=action,
            repository=Repository(self.settings.name, repository),
            digest=row.digest,
            tag=tag,
            media_type=row.media_type,
            size=row.size,
            user=actor.user,
            client=actor.client,
            at=self._now(),
        )

    # --- blobs ----------------------------------------------------------------------------------

    async def mount(
        self, source: str, repository: str, digest: Digest, actor: Actor = SERVER
    ) -> bool:
        """Give a repository a blob of another one. Returns False if that is not possible.

        The caller has checked that the client may read ``source``. Raises ``QuotaExceeded``.
        """
        if not self._store.catalog.has_blob(digest):
            return False

        def mount(connection: Connection) -> ManifestRow | None:
            with upload_rows.within_quota(connection, repository, self.settings):
                size = name_rows.mount_blob(connection, source, repository, digest, self._now())
            return None if size is None else ManifestRow(digest, OCTET_STREAM, size)

        change = self.uploads.with_room(mount, repository, actor.user)
        return await self._change(change, "mount", repository, actor) is not None

    async def blob_size(self, repository: str, digest: Digest) -> int:
        """Return the bytes of a blob. Raises ``BlobUnknown``, also if its content is lost.

        Then a client pushes it again, which repairs it. Raises ``StorageUnavailable`` if the disk
        does not answer.
        """
        find = partial(name_rows.blob_size, repository=repository, digest=digest)
        size = await self._database.read(find)
        with disk_errors("the blob cannot be read"):
            if size is None or not has_whole_or_raise(self._store.layout, digest):
                raise BlobUnknown("the repository does not have this blob")
        return size

    async def read_blob(self, digest: Digest, limit: int) -> bytes:
        """Return the bytes of a small blob. Raises ``BlobUnknown`` if they are lost or damaged."""
        body = await self._store.blobs.read_hosted(digest, limit)
        if body is None:
            raise BlobUnknown(_BLOB_LOST)
        return body

    async def open_blob(self, digest: Digest, size: int) -> Reader:
        """Open a blob of ``size`` bytes for reading. The caller closes the reader.

        Raises ``BlobUnknown`` if its content is lost or damaged, ``StorageUnavailable`` if the disk
        cannot read it.
        """
        reader = await self._store.blobs.find_hosted(digest, size)
        if reader is None:
            raise BlobUnknown(_BLOB_LOST)
        return reader

    async def mark_blob_used(self, repository: str, digest: Digest) -> None:
        """Record that a client may be about to push a manifest that names a blob.

        Raises ``BlobUnknown`` if that is not recorded in time, and a collection may soon remove it.
        """
        now = self._now()
        # A push asks for each of its blobs, and most are new: reading costs less than a commit.
        is_due = partial(name_rows.is_blob_mark_due, repository=repository, digest=digest, now=now)
        if not await self._database.read(is_due):
            return
        mark = partial(name_rows.mark_blob_used, repository=repository, digest=digest, now=now)
        if await self._write_mark(mark):
            return
        # A collection of another process may have the lock before us.
        oldest = self._now() - self.settings.grace / 2
        find = partial(name_rows.is_needed_blob, repository=repository, digest=digest, since=oldest)
        if not await self._database.read(find):
            raise BlobUnknown("the repository may lose this blob: push it again")

    async def _write_mark(self, mark: Callable[[Connection], None]) -> bool:
        """Record a use. False after :data:`_MARK_TIMEOUT_S` if another process holds the lock.

        Then no collection can remove anything yet, and the record is the next write of ours.
        """
        marked = self._database.write_later(mark)
        await asyncio.wait({marked}, timeout=_MARK_TIMEOUT_S)
        if marked.done():
            marked.result()
        return marked.done()

    async def delete_blob(
        self,
        repository: str,
        digest: Digest,
        actor: Actor = SERVER,
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

        def delete(connection: Connection) -> ManifestRow | None:
            if not may_change_immutable:
                self._immutable_tags.check_deletion(connection, repository, digest)
            size = name_rows.delete_blob(connection, repository, digest)
            return None if size is None else ManifestRow(digest, OCTET_STREAM, size)

        if await self._change(delete, "delete", repository, actor) is None:
            raise BlobUnknown("the repository does not have this blob")

    # --- manifests ------------------------------------------------------------------------------

    async def put_manifest(
        self,
        repository: str,
        reference: Reference,
        tags: Sequence[Tag],
        body: bytes,
        content_type: str | None,
        actor: Actor = SERVER,
    ) -> PushedManifest:
        """Store a manifest, and let tags name it. Returns once that is durable.

        Args:
            repository: The repository.
            reference: A tag, or the digest that the client states.
            tags: Further tags.
            body: The bytes of the manifest.
            content_type: ``Content-Type`` of the request; None without one.
            actor: Who pushes.

        Raises:
            DigestInvalid: The bytes hash to another digest.
            ManifestRefused: It is no manifest that is accepted.
            PartsUnknown: The repository does not have all that the manifest refers to.
            TagImmutable: A tag names another manifest for good.
            QuotaExceeded: The quota is used up.
            StorageUnavailable: The disk refuses.
        """
        is_digest = isinstance(reference, Digest)
        algorithm = reference.algorithm if isinstance(reference, Digest) else "sha256"
        digest = Digest.of(body, algorithm)
        if is_digest and digest != reference:
            raise DigestInvalid(f"the manifest hashes to {digest}, and not to {reference}")
        manifest = await parse_in_thread_if_large(read_pushed_manifest, body, content_type, digest)
        all_tags = [*([] if isinstance(reference, Digest) else [reference]), *tags]

        def check(connection: Connection) -> None:
            self._immutable_tags.check_push(connection, repository, manifest, all_tags)
            name_rows.check_parts(
                connection, repository, manifest, may_be_sparse=self.settings.sparse_indexes
            )

        # Before anything is written. It is checked again in the transaction.
        await self._database.read(check)

        def record(connection: Connection) -> ManifestRow:
            check(connection)
            with upload_rows.within_quota(connection, repository, self.settings):
                name_rows.add_manifest(
                    connection, repository, manifest, all_tags, self._now(), actor.user
                )
            return ManifestRow(digest, manifest.media_type, manifest.size)

        names = [str(tag) for tag in all_tags] or [""]
        change = self.uploads.with_room(record, repository, actor.user)
        await self.uploads.make_room_on_disk(repository, actor.user, len(body))
        with ContentHold(self._store.layout) as hold:
            await self._publish_body(digest, body, hold)
            await self._change(change, "push", repository, actor, names, hold)
        return manifest

    async def _publish_body(self, digest: Digest, body: bytes, hold: ContentHold) -> None:
        """Make bytes durable as content, which ``hold`` keeps from removal. Raises as a push."""
        layout, run = self._store.layout, asyncio.get_running_loop().run_in_executor
        publish = partial(upload_files.publish_body, layout, digest, body, self._now(), hold)
        with disk_errors():
            is_new = await run(self._publishing, publish)
        self._store.on_pushed(digest, len(body), is_new=is_new)

    async def find_manifest(self, repository: str, reference: Reference) -> ManifestRow:
        """Return the row of a manifest. Raises ``ManifestUnknown``."""
        if isinstance(reference, Digest):
            find = partial(name_rows.manifest_by_digest, repository=repository, digest=reference)
        else:
            find = partial(name_rows.manifest_by_tag, repository=repository, tag=reference)
        row = await self._database.read(find)
        if row is None:
            raise ManifestUnknown("the repository does not have this manifest")
        return row

    async def read_manifest(self, row: ManifestRow) -> bytes:
        """Return the bytes of a manifest. Raises ``ManifestUnknown`` if they are lost."""
        body = await self._store.blobs.read_hosted(row.digest, MANIFEST_LIMIT)
        if body is None:
            raise ManifestUnknown("the content of this manifest is lost: push it again")
        return body

    async def mark_manifest_used(self, repository: str, reference: Reference) -> None:
        """Record that a client may be about to push an index of a manifest, or a tag of it."""
        mark = partial(
            name_rows.mark_manifest_used,
            repository=repository,
            reference=reference,
            now=self._now(),
        )
        await self._write_mark(mark)

    def mark_pulled(self, repository: str, row: ManifestRow) -> None:
        """Record the pull of a manifest soon. No client waits for it."""
        now = self._now()
        if row.pulled_at < now - USE_STEP_S:
            mark = partial(
                name_rows.mark_manifest_used, repository=repository, reference=row.digest, now=now
            )
            self._database.write_later(mark)

    async def delete_manifest(
        self,
        repository: str,
        reference: Reference,
        actor: Actor = SERVER,
        *,
        may_change_immutable: bool = False,
    ) -> None:
        """Delete a manifest with its tags, or one tag.

        Args:
            repository: The repository.
            reference: A digest, or a tag, whose manifest stays.
            actor: Who deletes it.
            may_change_immutable: Whether immutable tags, and their images, may be deleted.

        Raises:
            ManifestUnknown: The repository does not have it.
            TagImmutable: It would take an immutable tag away, or a part of its image.
        """

        def delete(connection: Connection) -> ManifestRow | None:
            if not may_change_immutable:
                self._immutable_tags.check_deletion(connection, repository, reference)
            if isinstance(reference, Tag):
                return name_rows.delete_tag(connection, repository, reference)
            collection_rows.orphan_dependents(connection, repository, reference, self._now())
            return name_rows.delete_manifest(connection, repository, reference)

        tag = reference.name if isinstance(reference, Tag) else ""
        if await self._change(delete, "delete", repository, actor, (tag,)) is None:
            raise ManifestUnknown("the repository does not have this manifest")

    # --- lists ----------------------------------------------------------------------------------

    async def tags(
        self, repository: str, count: int | None, last: str | None
    ) -> tuple[list[str], bool]:
        """Return one page of the tags of a repository, and True if there are more.

        Args:
            repository: The repository.
            count: Tags on the page at most. None: as many as one page may have.
            last: The page begins after this tag. None: with the first one.

        Raises:
            NameUnknown: There is no such repository.
        """
        limit = _MAX_PAGE if count is None else min(count, _MAX_PAGE)

        def find(connection: Connection) -> list[str]:
            if not name_rows.has_repository(connection, repository):
                raise NameUnknown("there is no such repository")
            return name_rows.tags_page(connection, repository, limit + 1, last or "")

        found = await self._database.read(find)
        return found[:limit], len(found) > limit > 0

    async def repositories(
        self,
        count: int | None,
        last: str,
        is_visible: Callable[[Repository], bool] | None = None,
    ) -> tuple[list[str], bool]:
        """Return one page of the repositories that have a manifest, and True if there are more.

        Neither says anything about a repository that is not visible.

        Args:
            count: Names on the page at most. None: as many as one page may have.
            last: The page begins after this name. Empty: with the first one.
            is_visible: Returns whether the client may know of a repository. None: of all.
        """
        limit = _MAX_PAGE if count is None else min(count, _MAX_PAGE)
        found: list[str] = []
        names = [last]
        while limit and names:
            # In steps: between them, the event loop serves others.
            find = partial(name_rows.repositories_page, count=_NAMES_STEP, last=names[-1])
            names = await self._database.read(find)
            for name in names:
                if is_visible and not is_visible(Repository(self.settings.name, name)):
                    continue
                if len(found) == limit:
                    return found, True
                found.append(name)
        return found, False

    async def referrers(
        self,
        repository: str,
        subject: Digest,
        artifact_type: str | None,
        last: str = "",
        max_bytes: int = MANIFEST_LIMIT,
    ) -> ReferrersPage:
        """Return one page of the manifests whose subject is ``subject``.

        See :func:`mirror.hosted.referrer_rows.referrers_page` for the arguments.
        """
        find = partial(
            referrers_page,
            repository=repository,
            subject=subject,
            artifact_type=artifact_type,
            last=last,
            max_bytes=max_bytes,
        )
        return await self._database.read(find)

    # --- the whole ------------------------------------------------------------------------------

    async def usage(self) -> name_rows.HostedUsage:
        """Return what all hosted repositories, and the uploads to them, take up."""
        return await self._database.read(name_rows.usage)

    async def measure(self, emit: Observer) -> None:
        """Emit :class:`HostedMeasured`. The server calls this now and then."""
        usage = await self.usage()
        emit(
            HostedMeasured(
                repositories=usage.repositories,
                contents=usage.contents,
                bytes=usage.bytes,
                quota=self.settings.max_size,
                uploads=usage.uploads,
                reserved=usage.reserved,
            )
        )

    async def fill_spare_space(self) -> None:
        """Keep space for deletions on a full disk. The server calls this now and then."""
        await self._database.fill_spare_space()

    async def named_digests(self, digests: Collection[Digest]) -> set[Digest]:
        """Return those of ``digests`` that a hosted repository has."""
        return await self._database.read(partial(name_rows.named_digests, digests=digests))
