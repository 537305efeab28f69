"""Restore: bring the images of a backup, or of another image layout, into hosted repositories.

Lives here: the order of the steps, so that a restore is whole or not at all. Must not know: how a
layout is read (``backup_files.py``), how content is copied (``restored_content.py``).

A backup is restored row by row, as it was: who has pushed what, which repository has what, and what
was missing. A layout of another program has no rows: they are derived from its images
(``restore_layout.py``). All content comes first, then all names in one transaction
(:mod:`mirror.hosted.staged_names`). It works beside a server. A run that was killed has changed no
name, and the next one finds the content that it has copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Final

from mirror.access.known_names import add_known_names, parse_known_names
from mirror.config.settings import Hosted
from mirror.hosted import restored_rows
from mirror.hosted.change_rows import record_change
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.hosted.snapshot import SavedManifest
from mirror.hosted.staged_names import StagedNames
from mirror.observability.hosted_events import Actor, HostedChange
from mirror.oci.errors import InvalidRequest, ManifestRefused, StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.operations.backup_files import METADATA, USERS, BackupSource
from mirror.operations.backup_rows import MAX_LINE_BYTES, BackupTag, RepositoryRows, read_rows
from mirror.operations.restore_layout import LayoutRestore
from mirror.operations.restore_plan import PlannedRepository, check_plan
from mirror.operations.restore_report import RestoreContext, RestoreReport
from mirror.operations.restored_content import LeasedContent, RestoredContent
from mirror.store.layout import Layout
from mirror.store.store import Store
from mirror.threads import run_in_thread

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
    actor: Actor,
) -> RestoreReport:
    """Restore all images of a backup. After an exception, the names are as before.

    Args:
        store: The open data directory.
        hosted: The quota, and the name of the registry.
        path: A directory or a tar file.
        may_replace: Whether tags that name another manifest now are replaced.
        actor: Who restores.

    Returns what was done, and which images could not be restored.

    Raises:
        StorageUnavailable: The backup is damaged, a tag would be replaced, another restore runs, or
            the disk refuses or has too little space.
        QuotaExceeded: The quota has too little left.
        NamesDamaged: The names cannot be used.
        OSError: The backup cannot be read.
    """
    source = await run_in_thread(BackupSource, path)
    try:
        staged = await StagedNames.open(store.layout)
        content = RestoredContent(source, store)
        try:
            context = RestoreContext(
                source=source,
                content=content,
                layout=store.layout,
                database=staged.database,
                registry=hosted.name,
                actor=actor,
                now=store.now,
            )
            with source.opened(METADATA) as metadata:
                kind = LayoutRestore if metadata is None else BackupRestore
            restore = kind(context)
            # The whole backup is read first: nothing is copied of a damaged one.
            await check_plan(store, hosted, restore.plan(), may_replace=may_replace)
            report = await _stage(restore)
            await run_in_thread(_restore_users, source, store.layout)
            for kept in await staged.merge(hosted, may_replace=may_replace):
                report.problems.append(f"{kept} was pushed with another manifest meanwhile")
                report.images -= 1
            report.contents, report.bytes = content.copied, content.copied_bytes
            return report
        finally:
            content.close()
            await staged.close()
    finally:
        source.close()


def _restore_users(source: BackupSource, layout: Layout) -> None:
    """Add the names of users to those that are known here. Without any, change nothing. Blocks."""
    with source.opened(USERS) as stored:
        raw = b"" if stored is None else b"".join(islice(stored.chunks(), 2))
    try:
        names = parse_known_names(raw)
        if names:
            add_known_names(layout.user_names, names)
    except ValueError as error:
        raise StorageUnavailable(
            f"{USERS} of the backup cannot be added to {layout.user_names}: {error}: no name was"
            " restored; repair that file, or delete it"
        ) from None


async def _stage(restore: BackupRestore | LayoutRestore) -> RestoreReport:
    try:
        return await restore.stage()
    except StorageUnavailable as error:
        raise StorageUnavailable(
            f"{error.message} (no name was restored; the next run copies only what is missing)"
        ) from error


class BackupRestore:
    """One restore of all rows of a backup."""

    def __init__(self, context: RestoreContext) -> None:
        """Read nothing yet."""
        self._context = context
        self._report = RestoreReport()
        self._missing: set[Digest] = set()

    def plan(self) -> Iterator[PlannedRepository]:
        """Return what the restore brings. Blocks. Raises ``StorageUnavailable``."""
        for rows in self._read_rows():
            manifests = {row.digest: row.size for row in rows.manifests}
            tags = [(one.tag, one.digest) for one in rows.tags]
            yield PlannedRepository(rows.repository, rows.blobs, manifests, tags)

    async def stage(self) -> RestoreReport:
        """Copy the content, and record all rows. Raises ``StorageUnavailable``."""
        rows = self._read_rows()
        while (one := await run_in_thread(next, rows, None)) is not None:
            await self._restore(one)
        return self._report

    def _read_rows(self) -> Iterator[RepositoryRows]:
        return read_rows(self._context.source.lines(METADATA, MAX_LINE_BYTES))

    # --- one repository -------------------------------------------------------------------------

    async def _restore(self, rows: RepositoryRows) -> None:
        blobs = dict(rows.blobs)
        named: set[Digest] = {one.digest for one in rows.tags}
        restored: dict[Digest, SavedManifest] = {}
        for batch in _batches(rows.manifests):
            async with self._context.content.leased(row.digest for row in batch) as leased:
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
        await self._restore_tags(rows, restored)
        roots = (row for digest, row in restored.items() if digest not in named)
        while batch := list(islice(roots, _ROWS_AT_A_TIME)):
            changes = [self._change(row, None) for row in batch]
            await self._write(partial(_record_changes, changes=changes))
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
                restored_rows.restore_saved_manifest(connection, row, manifest)

        await self._write(record)

    async def _restore_blobs(self, repository: str, blobs: dict[Digest, int]) -> None:
        """Restore blobs of a repository, also the rows of those whose content is lost.

        Such a row counts in the quota, and `verify` names it, as before.
        """
        rows = iter(blobs.items())
        while batch := dict(islice(rows, _ROWS_AT_A_TIME)):
            async with self._context.content.leased(batch) as leased:
                for digest, content in leased.items():
                    if isinstance(content, InvalidRequest):
                        self._add_problem(repository, digest, content)
                    else:
                        batch[digest] = content.size
                await self._record_blobs(repository, batch)

    async def _record_blobs(self, repository: str, blobs: dict[Digest, int]) -> None:
        def record(connection: Connection) -> None:
            restored_rows.restore_blobs(connection, repository, blobs, self._context.now())

        await self._write(record)

    async def _restore_tags(
        self, rows: RepositoryRows, restored: dict[Digest, SavedManifest]
    ) -> None:
        def restore(connection: Connection, batch: list[BackupTag]) -> None:
            for one in batch:
                row = restored[one.digest]
                restored_rows.set_tag(
                    connection, row.repository, *(one.tag, one.digest, one.pushed_at, one.pushed_by)
                )
                record_change(connection, self._change(row, one.tag))

        for one in rows.tags:
            if one.digest not in restored:
                self._report.problems.append(
                    f"{rows.repository}:{one.tag} is not restored: its manifest {one.digest} is"
                    " lost"
                )
        tags = (one for one in rows.tags if one.digest in restored)
        while batch := list(islice(tags, _ROWS_AT_A_TIME)):
            await self._write(partial(restore, batch=batch))
            self._report.images += len(batch)

    async def _write(self, change: Callable[[Connection], None]) -> None:
        await self._context.database.write(change, is_durable=False)

    def _change(self, row: SavedManifest, tag: Tag | None) -> HostedChange:
        return self._context.change(row.repository, row.digest, tag, row.media_type, row.size)

    def _add_problem(self, repository: str, digest: Digest, error: InvalidRequest) -> None:
        """Report content that is lost, once for all repositories."""
        if digest not in self._missing:
            self._missing.add(digest)
            self._report.problems.append(f"{repository}: {error.message}")


def _record_changes(connection: Connection, changes: Iterable[HostedChange]) -> None:
    for change in changes:
        record_change(connection, change)


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
