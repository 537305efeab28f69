"""Restore of an image layout of another program, which fills a site without a connection.

Lives here: from the names of ``index.json`` to rows: manifests name what a repository gets. Must
not know: backups that have rows (``restore.py``).

Each manifest is checked as one that is pushed. An image that is not whole is not restored, also if
other repositories have what it lacks: whoever has made the layout may not have the right to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from sqlite3 import Connection
from typing import Any, Final, TypeVar

from mirror.hosted import restored_rows
from mirror.hosted.change_rows import record_change
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.hosted.staged_names import opened_names
from mirror.oci.errors import InvalidRequest, ManifestRefused, StorageUnavailable
from mirror.oci.headers import media_type_of
from mirror.oci.image_name import parse_with_reference
from mirror.oci.reference import Digest, Reference, Tag
from mirror.operations.backup_files import INDEX
from mirror.operations.restore_plan import PlannedRepository
from mirror.operations.restore_report import RestoreContext, RestoreReport
from mirror.operations.restored_content import LeasedContent
from mirror.threads import run_in_thread

T = TypeVar("T")

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_MAX_NESTING: Final = 8
"""Indexes within indexes."""
_CONTENTS_AT_A_TIME: Final = 64
"""Contents that are open at a time."""


@dataclass(frozen=True, slots=True)
class RestoredName:
    """An entry of ``index.json``."""

    repository: str
    reference: Reference
    digest: Digest
    media_type: str


class LayoutRestore:
    """One restore of a layout without rows."""

    def __init__(self, context: RestoreContext) -> None:
        """Read nothing yet."""
        self._context = context
        self._content = context.content
        self._done: set[tuple[str, Digest]] = set()
        self._report = RestoreReport()
        self._names: list[RestoredName] = []
        self._known: set[tuple[str, Digest]] = set()
        """(repository, blob) that the layout names, and that the repository has already."""
        self._proven: set[Digest] = set()
        """Blobs that were here, and that the layout has undamaged."""

    def plan(self) -> Iterator[PlannedRepository]:
        """Return what the restore brings. Blocks. Raises ``StorageUnavailable``."""
        self._names = self._read_names()
        by_repository: dict[str, list[RestoredName]] = {}
        for name in self._names:
            by_repository.setdefault(name.repository, []).append(name)
        with opened_names(self._context.layout) as connection:
            for repository, names in by_repository.items():
                blobs: dict[Digest, int | None] = {}
                manifests: dict[Digest, int] = {}
                for name in names:
                    with suppress(InvalidRequest, ManifestRefused):  # Not restored, or in part.
                        self._plan_manifest(name.digest, name.media_type, blobs, manifests, 0)
                tags = [
                    (one.reference, one.digest) for one in names if isinstance(one.reference, Tag)
                ]
                copied = {digest: size for digest, size in blobs.items() if size is not None}
                known = restored_rows.known_blobs(connection, repository, blobs)
                self._known |= {(repository, digest) for digest in known}
                yield PlannedRepository(repository, copied, manifests, tags)

    def _plan_manifest(
        self,
        digest: Digest,
        media_type: str,
        blobs: dict[Digest, int | None],
        manifests: dict[Digest, int],
        depth: int,
    ) -> None:
        if digest in manifests or depth > _MAX_NESTING:
            return
        body = self._content.read_manifest(digest)
        manifest = read_pushed_manifest(body, media_type, digest)
        manifests[digest] = len(body)
        types = _types_of(body)
        for child in manifest.children:
            if self._content.size_of_copy(child) is not None:
                self._plan_manifest(child, types.get(str(child), ""), blobs, manifests, depth + 1)
        for blob in manifest.blobs:
            blobs[blob] = self._content.size_of_copy(blob)

    async def stage(self) -> RestoreReport:
        """Copy the content, and record all images. Call it after :meth:`plan`."""
        for name in self._names:
            try:
                await self._restore(name)
            except InvalidRequest as error:
                self._report.problems.append(f"{name.repository}: {error.message}")
        return self._report

    def _read_names(self) -> list[RestoredName]:
        entries = self._context.source.document(INDEX).get("manifests")
        if not isinstance(entries, list):
            raise StorageUnavailable("index.json is missing, or has no list of manifests")
        names = []
        for entry in entries:
            try:
                names.append(_name_of(entry))
            except (InvalidRequest, KeyError, TypeError, AttributeError):
                self._report.problems.append(
                    "an entry of index.json has no full name, such as registry.example/app:1"
                )
        return names

    # --- one image ------------------------------------------------------------------------------

    async def _restore(self, name: RestoredName) -> None:
        manifest = await self._restore_manifest(name.repository, name.digest, name.media_type, 0)
        tag = name.reference if isinstance(name.reference, Tag) else None
        change = self._context.change(
            name.repository, name.digest, tag, manifest.media_type, manifest.size
        )

        def is_recorded(connection: Connection) -> bool:
            if tag is not None:
                if not restored_rows.may_set_tag(connection, name.repository, tag, name.digest):
                    return False
                restored_rows.set_tag(
                    connection, name.repository, tag, name.digest, self._context.now(), ""
                )
            record_change(connection, change)
            return True

        if await self._write(is_recorded):
            self._report.images += 1
        else:
            self._report.problems.append(
                f"{name.repository}:{tag} is twice in index.json: the first one is restored"
            )

    async def _write(self, change: Callable[[Connection], T]) -> T:
        return await self._context.database.write(change, is_durable=False)

    async def _restore_manifest(
        self, repository: str, digest: Digest, media_type: str, depth: int
    ) -> PushedManifest:
        """Restore a manifest, and before it all that it refers to.

        Raises ``InvalidRequest`` if it is malformed or not whole.
        """
        body = await run_in_thread(self._content.read_manifest, digest)
        manifest = read_pushed_manifest(body, media_type, digest)
        if (repository, digest) in self._done:
            return manifest
        if depth > _MAX_NESTING:
            raise InvalidRequest(f"{digest}: too many indexes within each other")
        types = _types_of(body)
        for child in manifest.children:
            if (repository, child) in self._done:
                continue
            # Otherwise the index is sparse.
            if await run_in_thread(self._content.size_of_copy, child) is not None:
                child_type = types.get(str(child), "")
                await self._restore_manifest(repository, child, child_type, depth + 1)
        blobs = dict.fromkeys(manifest.required_blobs)
        for blob in manifest.blobs:  # A layer that a registry need not have, and that is there.
            if blob in blobs:
                continue
            if await run_in_thread(self._content.size_of_copy, blob) is not None:
                blobs[blob] = None
        await self._restore_blobs(repository, iter(blobs))

        record = partial(
            restored_rows.restore_manifest,
            repository=repository,
            manifest=manifest,
            now=self._context.now(),
        )
        async with self._content.leased([digest]) as leased:
            _check_all(leased)
            await self._write(record)
        self._done.add((repository, digest))
        return manifest

    async def _restore_blobs(self, repository: str, blobs: Iterator[Digest]) -> None:
        while batch := list(islice(blobs, _CONTENTS_AT_A_TIME)):
            wanted = [one for one in batch if (repository, one) not in self._done]
            async with self._content.leased(wanted) as leased:
                contents = _check_all(leased)
                await run_in_thread(self._check_source, repository, contents)
                sizes = {digest: content.size for digest, content in contents.items()}
                await self._write(partial(self._record_blobs, repository, sizes))
            self._done.update((repository, one) for one in wanted)

    def _check_source(self, repository: str, contents: dict[Digest, LeasedContent]) -> None:
        """Raise ``InvalidRequest`` for a blob that was here, but not in this repository.

        Unless the layout has it undamaged, too.
        """
        for digest, content in contents.items():
            is_known = digest in self._proven or (repository, digest) in self._known
            if not content.is_copied and not is_known:
                self._content.verify_copy(digest)
                self._proven.add(digest)

    def _record_blobs(
        self, repository: str, sizes: dict[Digest, int], connection: Connection
    ) -> None:
        restored_rows.restore_blobs(connection, repository, sizes, self._context.now())


def _check_all(
    leased: dict[Digest, LeasedContent | InvalidRequest],
) -> dict[Digest, LeasedContent]:
    """Return the same contents. Raises the first ``InvalidRequest`` among them."""
    contents = {}
    for digest, content in leased.items():
        if isinstance(content, InvalidRequest):
            raise content
        contents[digest] = content
    return contents


def _name_of(entry: Any) -> RestoredName:
    repository, reference = parse_with_reference(entry["annotations"][_REF_NAME])
    return RestoredName(
        repository.path,
        reference,
        Digest.parse(entry["digest"]),
        media_type_of(entry["mediaType"]),
    )


def _types_of(body: bytes) -> dict[str, str]:
    """Return the media types that a manifest states of its parts, by digest."""
    entries = json.loads(body).get("manifests")
    return {
        str(entry.get("digest")): str(entry.get("mediaType", ""))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    }
