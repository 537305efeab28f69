"""Restore: bring the images of a backup, or of another image layout, into hosted repositories.

Lives here: the order of the steps, so that a restore that was killed is run again. Must not know:
how a layout is read (``backup_files.py``), how content is copied (``restored_content.py``).

A backup is restored row by row, as it was: who has pushed what, which repository has what, and what
was missing. A layout of another program has no rows: they are derived from its images
(``restore_layout.py``). Content comes before the rows that name it, and tags come last. It works
beside a server, whose clients see a tag once its image is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Final, TypeVar

from mirror.config.settings import Hosted
from mirror.hosted import restored_rows
from mirror.hosted.change_rows import record_change
from mirror.hosted.database import Database
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.hosted.snapshot import SavedManifest
from mirror.observability.hosted_events import SERVER, Actor, HostedChange
from mirror.oci.errors import InvalidRequest, ManifestRefused
from mirror.oci.reference import Digest, Tag
from mirror.operations.backup_files import METADATA, BackupSource
from mirror.operations.backup_rows import MAX_LINE_BYTES, BackupTag, RepositoryRows, read_rows
from mirror.operations.restore_layout import LayoutRestore
from mirror.operations.restore_report import RestoreReport, check_moved_tags, restore_change
from mirror.operations.restored_content import LeasedContent, RestoredContent
from mirror.store.store import Store
from mirror.threads import run_in_thread

T = TypeVar("T")

_ROWS_AT_A_TIME: Final = 64
"""Rows of one transaction, and contents that are open at a time: about 15 ms."""
_MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""Bytes of the manifests of one batch: they are in memory together."""


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

    Returns what was done, and which images could not be restored.

    Raises:
        StorageUnavailable: The backup is damaged, a tag would be replaced, or the disk refuses.
        QuotaExceeded: The quota is used up. What was restored before stays.
        NamesDamaged: The names cannot be used.
        OSError: The backup cannot be read.
    """
    source = await run_in_thread(BackupSource, path)
    try:
        database = await Database.open(store.layout.hosted_names)
        content = RestoredContent(source, store)
        try:
            with source.opened(METADATA) as metadata:
                has_rows = metadata is not None
            kind = BackupRestore if has_rows else LayoutRestore
            restore = kind(source, content, hosted, database, store, actor)
            report = await restore.run(may_replace=may_replace)
            report.contents, report.bytes = content.copied, content.copied_bytes
            return report
        finally:
            content.close()
            await database.close()
    finally:
        source.close()


class BackupRestore:
    """One restore of all rows of a backup."""

    def __init__(
        self,
        source: BackupSource,
        content: RestoredContent,
        hosted: Hosted,
        database: Database,
        store: Store,
        actor: Actor,
    ) -> None:
        """Read nothing yet.

        Args:
            source: The backup.
            content: Its content.
            hosted: The quota, and the name of the registry.
            database: The names.
            store: Has the clock.
            actor: Who restores.
        """
        self._source = source
        self._content = content
        self._hosted = hosted
        self._database = database
        self._now = store.now
        self._actor = actor
        self._report = RestoreReport()
        self._missing: set[Digest] = set()

    async def run(self, *, may_replace: bool) -> RestoreReport:
        """Restore all rows. See :func:`restore_backup`."""
        # The whole file is read first: nothing is restored from a damaged one.
        moved: list[str] = []
        rows = self._read_rows()
        while (one := await run_in_thread(next, rows, None)) is not None:
            moved += await self._moved_tags(one)
        if not may_replace:
            check_moved_tags(moved)
        rows = self._read_rows()
        while (one := await run_in_thread(next, rows, None)) is not None:
            await self._restore(one, may_replace=may_replace)
        return self._report

    def _read_rows(self) -> Iterator[RepositoryRows]:
        return read_rows(self._source.lines(METADATA, MAX_LINE_BYTES))

    async def _moved_tags(self, rows: RepositoryRows) -> list[str]:
        def find(connection: Connection) -> list[str]:
            return [
                f"{rows.repository}:{one.tag}"
                for one in rows.tags
                if not restored_rows.may_set_tag(connection, rows.repository, one.tag, one.digest)
            ]

        return await self._database.read(find)

    # --- one repository -------------------------------------------------------------------------

    async def _restore(self, rows: RepositoryRows, *, may_replace: bool) -> None:
        blobs = dict(rows.blobs)
        named: set[Digest] = {one.digest for one in rows.tags}
        restored: dict[Digest, SavedManifest] = {}
        for batch in _batches(rows.manifests):
            async with self._content.leased(row.digest for row in batch) as leased:
                manifests = await run_in_thread(self._parse, batch, leased)
                # Just before the manifests that name them: no collection comes between.
                named_blobs = dict.fromkeys(blob for _, one in manifests for blob in one.blobs)
                await self._restore_blobs(
                    rows.repository, {one: blobs.pop(one) for one in named_blobs if one in blobs}
                )
                await self._record_manifests(manifests)
            for row, manifest in manifests:
                restored[row.digest] = row
                named.update(manifest.children)
        await self._restore_blobs(rows.repository, blobs)
        await self._restore_tags(rows, restored, may_replace=may_replace)
        roots = (row for digest, row in restored.items() if digest not in named)
        while batch := list(islice(roots, _ROWS_AT_A_TIME)):
            changes = [self._change(row, None) for row in batch]
            await self._database.write(partial(_record_changes, changes=changes))
            self._report.images += len(batch)

    def _parse(
        self,
        batch: list[SavedManifest],
        leased: dict[Digest, LeasedContent | InvalidRequest],
    ) -> list[tuple[SavedManifest, PushedManifest]]:
        found = []
        for row in batch:
            content = leased[row.digest]
            try:
                if isinstance(content, InvalidRequest):
                    raise content
                body = content.read()
                found.append((row, read_pushed_manifest(body, row.media_type, row.digest)))
            except (InvalidRequest, ManifestRefused) as error:
                self._add_problem(row.repository, row.digest, error)
        return found

    async def _record_manifests(
        self, manifests: list[tuple[SavedManifest, PushedManifest]]
    ) -> None:
        def record(connection: Connection) -> None:
            for row, manifest in manifests:
                restored_rows.restore_saved_manifest(connection, row, manifest, self._hosted)

        await self._database.write(record)

    async def _restore_blobs(self, repository: str, blobs: dict[Digest, int]) -> None:
        """Restore blobs of a repository, also the rows of those whose content is lost.

        Such a row counts in the quota, and `verify` names it, as before.
        """
        rows = iter(blobs.items())
        while batch := dict(islice(rows, _ROWS_AT_A_TIME)):
            async with self._content.leased(batch) as leased:
                for digest, content in leased.items():
                    if isinstance(content, InvalidRequest):
                        self._add_problem(repository, digest, content)
                    else:
                        batch[digest] = content.size
                await self._record_blobs(repository, batch)

    async def _record_blobs(self, repository: str, blobs: dict[Digest, int]) -> None:
        def record(connection: Connection) -> None:
            for digest, size in blobs.items():
                restored_rows.restore_blob(
                    connection, repository, digest, size, self._now(), self._hosted
                )

        await self._database.write(record)

    async def _restore_tags(
        self, rows: RepositoryRows, restored: dict[Digest, SavedManifest], *, may_replace: bool
    ) -> None:
        def restore(connection: Connection, batch: list[BackupTag]) -> dict[Tag, str]:
            refused = _set_tags(connection, rows.repository, batch, may_replace=may_replace)
            done = [one for one in batch if one.tag not in refused and one.digest in restored]
            changes = [self._change(restored[one.digest], one.tag) for one in done]
            _record_changes(connection, changes)
            return refused

        tags = iter(rows.tags)
        while batch := list(islice(tags, _ROWS_AT_A_TIME)):
            refused = await self._database.write(partial(restore, batch=batch))
            for tag, why in refused.items():
                self._report.problems.append(f"{rows.repository}:{tag} {why}")
            self._report.images += len(batch) - len(refused)

    def _change(self, row: SavedManifest, tag: Tag | None) -> HostedChange:
        return restore_change(
            self._hosted,
            self._actor,
            row.repository,
            *(row.digest, tag, row.media_type, row.size),
            at=self._now(),
        )

    def _add_problem(self, repository: str, digest: Digest, error: InvalidRequest) -> None:
        """Report content that is lost, once for all repositories."""
        if digest not in self._missing:
            self._missing.add(digest)
            self._report.problems.append(f"{repository}: {error.message}")


def _record_changes(connection: Connection, changes: Iterable[HostedChange]) -> None:
    for change in changes:
        record_change(connection, change)


def _set_tags(
    connection: Connection, repository: str, tags: Iterable[BackupTag], *, may_replace: bool
) -> dict[Tag, str]:
    """Set tags. Returns those that cannot be set, and why."""
    refused = {}
    for one in tags:
        if not restored_rows.has_manifest(connection, repository, one.digest):
            refused[one.tag] = f"is not restored: its manifest {one.digest} is lost"
        elif may_replace or restored_rows.may_set_tag(connection, repository, one.tag, one.digest):
            restored_rows.set_tag(
                connection, repository, *(one.tag, one.digest, one.pushed_at, one.pushed_by)
            )
        else:
            refused[one.tag] = "was pushed with another manifest meanwhile"
    return refused


def _batches(manifests: Iterable[SavedManifest]) -> Iterator[list[SavedManifest]]:
    batch: list[SavedManifest] = []
    size = 0
    for row in manifests:
        if batch and (len(batch) == _ROWS_AT_A_TIME or size + row.size > _MAX_MANIFEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.size
    if batch:
        yield batch
