"""The manifests and tags of hosted repositories: push, find, read, delete.

Lives here: the order of steps of each operation, so that a push is acknowledged only once it is
durable. Must not know: HTTP, who may do what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from sqlite3 import Connection
from typing import Final

from mirror.config.settings import Hosted
from mirror.hosted import collection_rows, name_rows, upload_files, upload_rows
from mirror.hosted.change_feed import ChangeFeed
from mirror.hosted.content_row import ContentRow, PushedRow
from mirror.hosted.database import Database
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.hosted.manifest_memory import ManifestMemory
from mirror.hosted.name_rows import USE_STEP_S, ManifestRow
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.hosted.sessions import UploadSessions
from mirror.hosted.subject_rows import find_subjects
from mirror.hosted.upload_files import disk_errors
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import DigestInvalid, ManifestUnknown
from mirror.oci.reference import Digest, Reference, Tag
from mirror.store.content_hold import ContentHold
from mirror.store.disk import size_of_whole
from mirror.store.store import Store
from mirror.threads import parse_in_thread_if_large, run_in_thread

_UNLIMITED_READ_BYTES: Final = 64 * 1024
"""Bytes of a manifest that may be read at the same time as any number of others."""
_MANIFEST_LOST: Final = "the content of this manifest is lost: push it again"


class HostedManifests:
    """The manifests of all repositories. A repository is its path, such as ``team/app``."""

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
        """Use the parts of the service. Call :meth:`close` in the end.

        Args:
            hosted: The quota, and what is accepted.
            database: The names.
            store: The content.
            uploads: Give way to what needs their room.
            changes: Records each change, and tells of it.
            immutable_tags: The tags that keep what they name.
            now: Returns the seconds since the epoch.
        """
        self.memory = ManifestMemory()
        self._settings = hosted
        self._database = database
        self._store = store
        self._uploads = uploads
        self._changes = changes
        self._immutable_tags = immutable_tags
        self._now = now
        self._large_reads = asyncio.Semaphore(2)
        """So many large manifests are read at the same time, before ``web`` can share them."""
        self._publishing = ThreadPoolExecutor(4, "publish-manifest")

    async def close(self) -> None:
        """End the threads. Running requests must have ended."""
        await run_in_thread(self._publishing.shutdown)

    async def put(
        self,
        repository: str,
        reference: Reference,
        tags: Sequence[Tag],
        body: bytes,
        content_type: str | None,
        actor: Actor,
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
        async with self.memory.parsing(len(body)):
            manifest = await parse_in_thread_if_large(
                read_pushed_manifest, body, content_type, digest
            )
        all_tags = [*([] if isinstance(reference, Digest) else [reference]), *tags]

        def check(connection: Connection) -> None:
            self._immutable_tags.check_push(connection, repository, manifest, all_tags)
            name_rows.check_parts(
                connection, repository, manifest, may_be_sparse=self._settings.sparse_indexes
            )

        def check_and_find_sizes(connection: Connection) -> dict[Digest, int]:
            check(connection)
            parts = (*manifest.required_blobs, *manifest.children)
            return name_rows.content_sizes(connection, repository, parts)

        # Before anything is written. It is checked again in the transaction.
        await self._check_parts(await self._database.read(check_and_find_sizes))

        def record(connection: Connection) -> PushedRow:
            check(connection)
            with upload_rows.within_quota(connection, repository, self._settings):
                name_rows.add_manifest(
                    connection, repository, manifest, all_tags, self._now(), actor.user
                )
            return PushedRow(
                repository, digest, manifest.media_type, manifest.size, manifest.image_size
            )

        change = self._uploads.giving_way(record, repository, actor.owner)
        await self._uploads.make_room_on_disk(repository, actor.owner, len(body))
        with ContentHold(self._store.layout) as hold:
            await self._publish_body(digest, body, hold)
            await self._changes.commit(change, "push", actor, all_tags or [None], hold)
        return manifest

    async def _check_parts(self, sizes: Mapping[Digest, int]) -> None:
        """Check the files of the parts of a manifest, which have these sizes (bytes).

        A client that was told of a part before its file was damaged does not push it again. Raises
        ``PartsUnknown``, ``StorageUnavailable``.
        """
        layout, run = self._store.layout, asyncio.get_running_loop().run_in_executor

        def find_lost() -> list[str]:
            return [str(one) for one in sizes if size_of_whole(layout, one) != sizes[one]]

        with disk_errors("the parts of the manifest cannot be read"):
            lost = await run(self._publishing, find_lost)
        if lost:
            raise name_rows.parts_unknown(
                f"the content of {len(lost)} of the parts of this manifest is lost", lost
            )

    async def _publish_body(self, digest: Digest, body: bytes, hold: ContentHold) -> None:
        """Make bytes durable as content, which ``hold`` keeps from removal. Raises as a push."""
        layout, run = self._store.layout, asyncio.get_running_loop().run_in_executor
        publish = partial(upload_files.publish_body, layout, digest, body, self._now(), hold)
        with disk_errors("the manifest cannot be stored"):
            is_new = await run(self._publishing, publish)
        self._store.on_pushed(digest, len(body), is_new=is_new)

    async def find(self, repository: str, reference: Reference) -> ManifestRow:
        """Return the row of a manifest. Raises ``ManifestUnknown``."""
        if isinstance(reference, Digest):
            find = partial(name_rows.manifest_by_digest, repository=repository, digest=reference)
        else:
            find = partial(name_rows.manifest_by_tag, repository=repository, tag=reference)
        row = await self._database.read(find)
        if row is None:
            raise ManifestUnknown("the repository does not have this manifest")
        return row

    async def find_subjects(
        self, repository: str, reference: Reference, may_follow: Callable[[Digest], bool]
    ) -> list[Digest]:
        """Return the digests that a content of a repository belongs to.

        See :func:`mirror.hosted.subject_rows.find_subjects`.
        """
        find = partial(
            find_subjects, repository=repository, reference=reference, may_follow=may_follow
        )
        return await self._database.read(find)

    async def read(self, row: ManifestRow) -> bytes:
        """Return the bytes of a manifest. Raises ``ManifestUnknown`` if they are lost."""
        async with self._large_reads if row.size > _UNLIMITED_READ_BYTES else nullcontext():
            body = await self._store.blobs.read_hosted(row.digest, MANIFEST_LIMIT)
        if body is None:
            raise ManifestUnknown(_MANIFEST_LOST)
        return body

    def check_file(self, row: ManifestRow) -> None:
        """Raise ``ManifestUnknown`` if the file of a manifest is lost, or has another size.

        Then a client pushes it again. Raises ``StorageUnavailable`` if the disk does not answer.
        """
        with disk_errors("the manifest cannot be read"):
            if size_of_whole(self._store.layout, row.digest) != row.size:
                raise ManifestUnknown(_MANIFEST_LOST)

    async def mark_used(self, repository: str, reference: Reference) -> None:
        """Record that a client may be about to push an index of a manifest, or a tag of it.

        Not being committed in time is no error, as it is for a blob: a collection removes only
        orphans, and an index of one that is gone is refused.
        """
        mark = partial(
            name_rows.mark_manifest_used,
            repository=repository,
            reference=reference,
            now=self._now(),
        )
        await self._database.write_mark(mark)

    def mark_pulled(self, repository: str, row: ManifestRow) -> None:
        """Record the pull of a manifest soon. No client waits for it."""
        now = self._now()
        if row.pulled_at < now - USE_STEP_S:
            mark = partial(
                name_rows.mark_manifest_used, repository=repository, reference=row.digest, now=now
            )
            self._database.enqueue_write(mark)

    async def delete(
        self,
        repository: str,
        reference: Reference,
        actor: Actor,
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

        def delete(connection: Connection) -> ContentRow | None:
            if not may_change_immutable:
                self._immutable_tags.check_deletion(connection, repository, reference)
            if isinstance(reference, Tag):
                return name_rows.delete_tag(connection, repository, reference)
            return collection_rows.delete_and_orphan(connection, repository, reference, self._now())

        tag = reference if isinstance(reference, Tag) else None
        if not await self._changes.commit(delete, "delete", actor, [tag]):
            raise ManifestUnknown("the repository does not have this manifest")
