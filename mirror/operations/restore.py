"""Restore: bring the images of a backup, or of another image layout, into hosted repositories.

Lives here: the order of the steps, so that a restore that was killed is run again. Must not know:
how a layout is read (``backup_files.py``).

Nothing is believed: each content is hashed while it is copied, and each manifest is checked as one
that is pushed. Content comes before the manifest that names it, and tags come last. It works beside
a server, whose clients see an image once it is whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

from mirror.config.settings import Hosted
from mirror.hosted import restored_rows, upload_files
from mirror.hosted.change_rows import record_change
from mirror.hosted.database import Database
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.observability.hosted_events import SERVER, Actor, HostedChange
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import DigestInvalid, InvalidRequest, StorageUnavailable
from mirror.oci.headers import media_type_of
from mirror.oci.image_name import parse_with_reference
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.operations.backup_files import INDEX, METADATA, BackupSource, StoredBytes
from mirror.operations.write_backup import FORMAT_VERSION
from mirror.store.disk import try_lock
from mirror.store.ingest_writer import ShortWrite, write_all
from mirror.store.store import Store
from mirror.threads import run_in_thread

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_MAX_NESTING: Final = 8
"""Indexes within indexes."""
_PARALLEL: Final = 4
"""Contents that are copied at the same time: each waits for the disk at its end."""
_MAX_TAGS_SHOWN: Final = 5
"""Tags that an error names: it is one line."""


@dataclass(frozen=True, slots=True)
class RestoredName:
    """An entry of ``index.json``."""

    repository: str
    reference: Reference
    digest: Digest
    media_type: str


@dataclass(frozen=True, slots=True)
class _Use:
    """Who has pushed something, and when. Times are seconds since the epoch."""

    pushed_at: float
    pushed_by: str = ""
    pulled_at: float = 0.0


@dataclass(slots=True)
class RestoreReport:
    """The result of a restore."""

    images: int = 0
    """Names that are there now."""
    contents: int = 0
    """Contents that were copied."""
    bytes: int = 0
    """Bytes of these."""
    problems: list[str] = field(default_factory=list)
    """Why an image was not restored, one sentence for each."""

    def row(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "images": self.images,
            "contents": self.contents,
            "bytes": self.bytes,
            "problems": self.problems,
        }


async def restore_backup(
    store: Store,
    hosted: Hosted,
    path: Path,
    *,
    may_replace: bool,
    actor: Actor = SERVER,
) -> RestoreReport:
    """Restore all images of a backup.

    Args:
        store: The open data directory.
        hosted: The quota, and the name of the registry.
        path: A directory or a tar file.
        may_replace: Whether tags that name another manifest now are replaced.
        actor: Who restores.

    Raises what :meth:`Restore.run` raises.
    """
    source = await run_in_thread(BackupSource, path)
    try:
        database = await Database.open(store.layout.hosted_names)
        try:
            restore = Restore(source, hosted, database, store, actor)
            return await restore.run(may_replace=may_replace)
        finally:
            await database.close()
    finally:
        source.close()


class Restore:
    """One restore."""

    def __init__(
        self,
        source: BackupSource,
        hosted: Hosted,
        database: Database,
        store: Store,
        actor: Actor,
    ) -> None:
        """Read nothing yet.

        Args:
            source: The backup.
            hosted: The quota, and the name of the registry.
            database: The names.
            store: The content.
            actor: Who restores.
        """
        self._source = source
        self._hosted = hosted
        self._database = database
        self._store = store
        self._actor = actor
        self._limit = asyncio.Semaphore(_PARALLEL)
        self._done: set[tuple[str, Digest]] = set()
        self._uses: Mapping[tuple[str, str], _Use] = {}
        self.report = RestoreReport()

    async def run(self, *, may_replace: bool) -> RestoreReport:
        """Restore all images. Returns what was done, and which images could not be restored.

        Args:
            may_replace: Whether tags that name another manifest now are replaced.

        Raises:
            StorageUnavailable: The backup is damaged, a tag would be replaced, or the disk refuses.
            QuotaExceeded: The quota is used up. Images that were restored before stay.
            NamesDamaged: The names cannot be used.
            OSError: The backup cannot be read.
        """
        names, self._uses = await run_in_thread(self._read_names)
        if not may_replace:
            await self._check_tags(names)
        for name in names:
            try:
                await self._restore(name, may_replace=may_replace)
            except InvalidRequest as error:
                self.report.problems.append(f"{name.repository}: {error.message}")
        return self.report

    # --- what is in the backup ------------------------------------------------------------------

    def _read_names(self) -> tuple[list[RestoredName], Mapping[tuple[str, str], _Use]]:
        metadata = self._source.document(METADATA)
        version = metadata.get("version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise StorageUnavailable(
                f"the backup has version {version}, and this program reads {FORMAT_VERSION}: use "
                "a later one"
            )
        index = self._source.document(INDEX)
        entries = index.get("manifests")
        if not isinstance(entries, list):
            raise StorageUnavailable("index.json is missing, or has no list of manifests")
        names = []
        for entry in entries:
            try:
                names.append(_name_of(entry))
            except (InvalidRequest, KeyError, TypeError, AttributeError):
                self.report.problems.append(
                    "an entry of index.json has no full name, such as registry.example/app:1"
                )
        return names, _uses_of(metadata)

    async def _check_tags(self, names: Collection[RestoredName]) -> None:
        def find(connection: Connection) -> list[str]:
            return [
                f"{name.repository}:{name.reference}"
                for name in names
                if isinstance(name.reference, Tag)
                and not restored_rows.may_set_tag(
                    connection, name.repository, name.reference, name.digest
                )
            ]

        found = await self._database.read(find)
        if found:
            shown = ", ".join(found[:_MAX_TAGS_SHOWN])
            raise StorageUnavailable(
                f"{len(found)} tags name another manifest here, such as {shown}: nothing was"
                " restored; --force replaces them"
            )

    # --- one image ------------------------------------------------------------------------------

    async def _restore(self, name: RestoredName, *, may_replace: bool) -> None:
        manifest = await self._restore_manifest(name.repository, name.digest, name.media_type, 0)
        if isinstance(name.reference, Tag):
            tag = name.reference
            use = self._uses.get((name.repository, str(tag))) or _Use(self._store.now())

            def set_tag(connection: Connection) -> bool:
                is_free = restored_rows.may_set_tag(connection, name.repository, tag, name.digest)
                if is_free or may_replace:
                    restored_rows.set_tag(
                        connection, name.repository, tag, manifest, use.pushed_at, use.pushed_by
                    )
                    record_change(connection, self._change(name, manifest))
                return is_free or may_replace

            if not await self._database.write(set_tag):
                self.report.problems.append(
                    f"{name.repository}:{tag} was pushed with another manifest meanwhile"
                )
                return
        else:
            change = self._change(name, manifest)
            await self._database.write(partial(record_change, change=change))
        self.report.images += 1

    async def _restore_manifest(
        self, repository: str, digest: Digest, media_type: str, depth: int
    ) -> PushedManifest:
        """Restore a manifest, and before it all that it refers to.

        Raises ``InvalidRequest`` if it is malformed or not whole.
        """
        body = await run_in_thread(self._read_manifest, digest)
        if body is None:
            raise InvalidRequest(f"the backup does not have {digest}")
        manifest = read_pushed_manifest(body, media_type, digest)
        if (repository, digest) in self._done:
            return manifest
        if depth > _MAX_NESTING:
            raise InvalidRequest(f"{digest}: too many indexes within each other")
        types = _types_of(body)
        for child in manifest.children:
            if await run_in_thread(self._is_in_backup, child):  # Otherwise the index was sparse.
                child_type = types.get(str(child), "")
                await self._restore_manifest(repository, child, child_type, depth + 1)
        blobs = dict.fromkeys(manifest.blobs)
        for part in manifest.parts:  # A layer that a registry need not have, and that was pushed.
            if part not in blobs and part not in manifest.children:
                blobs.update({part: None} if await run_in_thread(self._is_in_backup, part) else {})
        await asyncio.gather(*(self._restore_blob(repository, one) for one in blobs))
        use = self._uses.get((repository, str(digest))) or _Use(self._store.now())

        record = partial(
            restored_rows.restore_manifest,
            repository=repository,
            manifest=manifest,
            pushed_at=use.pushed_at,
            pushed_by=use.pushed_by,
            pulled_at=use.pulled_at,
            hosted=self._hosted,
        )
        await self._store_content(digest, body, record)
        self._done.add((repository, digest))
        return manifest

    async def _restore_blob(self, repository: str, digest: Digest) -> None:
        if (repository, digest) in self._done:
            return
        async with self._limit:
            find = partial(restored_rows.has_blob, repository=repository, digest=digest)
            if not await self._database.read(find) or not self._store.catalog.has_blob(digest):
                await self._store_content(digest, None, partial(self._add_blob, repository, digest))
        self._done.add((repository, digest))

    def _add_blob(self, repository: str, digest: Digest, connection: Connection) -> None:
        size = self._store.layout.blob(digest).stat().st_size
        now = self._store.now()
        restored_rows.restore_blob(connection, repository, digest, size, now, self._hosted)

    async def _store_content(
        self, digest: Digest, body: bytes | None, record: Callable[[Connection], None]
    ) -> None:
        """Make content durable, and then its row, while nothing can remove the content.

        ``body``: the bytes, if they were read and hashed. None: they are in the backup.
        """
        fd, size = await run_in_thread(self._write_content, digest, body)
        try:
            if size is not None:
                self.report.contents += 1
                self.report.bytes += size
                self._store.on_pushed(digest, size, is_new=True)
            await self._database.write(record)
        finally:
            os.close(fd)

    # --- files, in threads ----------------------------------------------------------------------

    def _is_in_backup(self, digest: Digest) -> bool:
        with self._source.opened_blob(digest) as stored:
            return stored is not None

    def _read_manifest(self, digest: Digest) -> bytes | None:
        with self._source.opened_blob(digest) as stored:
            if stored is None:
                return None
            if stored.size > MANIFEST_LIMIT:
                raise InvalidRequest(f"{digest}: larger than a manifest may be")
            body = b"".join(stored.chunks())
        if Digest.of(body, digest.algorithm) != digest:
            raise DigestInvalid(f"{digest}: damaged in the backup")
        return body

    def _write_content(self, digest: Digest, body: bytes | None) -> tuple[int, int | None]:
        """Return a descriptor that keeps content from removal, and its bytes if they are new.

        Content that is there was verified when it was published.
        """
        layout = self._store.layout
        try:
            lease = upload_files.lease_content(layout, digest)
            if lease is not None:
                return lease, None
            if body is not None:
                fd, _ = upload_files.store_body(layout, digest, body, self._store.now())
                return fd, len(body)
            with self._source.opened_blob(digest) as stored:
                if stored is None:
                    raise InvalidRequest(f"the backup does not have {digest}")
                return self._copy(digest, stored), stored.size
        except OSError as error:
            raise StorageUnavailable(
                f"content cannot be restored: {error.strerror or error}"
            ) from error

    def _copy(self, digest: Digest, stored: StoredBytes) -> int:
        layout = self._store.layout
        draft = upload_files.path_of(layout, secrets.token_hex(16))
        draft.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(draft, flags, 0o644)
        try:
            try_lock(fd)  # No sweep removes it.
            running, position = hashlib.new(digest.algorithm), 0
            for chunk in stored.chunks():
                running.update(chunk)
                position = write_all(fd, [chunk], position)
            if Digest(digest.algorithm, running.hexdigest()) != digest:
                raise DigestInvalid(f"{digest}: damaged in the backup")
            upload_files.publish_upload(layout, draft, fd, digest, self._store.now())
        except BaseException as error:
            upload_files.drop(draft)
            os.close(fd)
            if isinstance(error, ShortWrite):
                raise error.cause from error
            raise
        return fd

    def _change(self, name: RestoredName, manifest: PushedManifest) -> HostedChange:
        return HostedChange(
            action="push",
            repository=Repository(self._hosted.name, name.repository),
            digest=name.digest,
            tag=str(name.reference) if isinstance(name.reference, Tag) else "",
            media_type=manifest.media_type,
            size=manifest.size,
            user=self._actor.user,
            client=self._actor.client,
            at=self._store.now(),
        )


def _name_of(entry: Any) -> RestoredName:
    repository, reference = parse_with_reference(entry["annotations"][_REF_NAME])
    return RestoredName(
        repository.path,
        reference,
        Digest.parse(entry["digest"]),
        media_type_of(entry["mediaType"]),
    )


def _uses_of(metadata: Mapping[str, Any]) -> dict[tuple[str, str], _Use]:
    """Return who has pushed what, and when: (repository, digest or tag) -> its use."""
    found: dict[tuple[str, str], _Use] = {}
    for key in ("manifests", "tags"):
        rows = metadata.get(key)
        for row in rows if isinstance(rows, list) else ():
            try:
                repository, name, _, pushed_at, pushed_by, *pulled = row
                use = _Use(
                    float(pushed_at),
                    pushed_by=str(pushed_by),
                    pulled_at=float(pulled[0] if pulled else 0),
                )
            except (TypeError, ValueError):
                continue
            if math.isfinite(use.pushed_at + use.pulled_at):
                found[str(repository), str(name)] = use
    return found


def _types_of(body: bytes) -> dict[str, str]:
    """Return the media types that a manifest states of its parts, by digest."""
    entries = json.loads(body).get("manifests")
    return {
        str(entry.get("digest")): str(entry.get("mediaType", ""))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    }
