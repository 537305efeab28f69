"""What a restore needs, before it begins: tags that may be set, the quota, space on the disk.

Lives here: the sums, and the refusals. Must not know: how a backup is read, what is restored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mirror.config.settings import Hosted
from mirror.config.values import format_size
from mirror.hosted import restored_rows
from mirror.hosted.staged_names import opened_names
from mirror.hosted.upload_rows import UsedBytes, used_bytes, used_bytes_of_repository
from mirror.oci.errors import QuotaExceeded, StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.oci.text import size_text
from mirror.store.layout import Layout
from mirror.store.space import free_bytes
from mirror.store.store import Store
from mirror.threads import run_in_thread

_MAX_TAGS_SHOWN: Final = 5
"""Tags that an error names: it is one line."""
_ROW_BYTES: Final = 2048
"""Bytes of the rows of one content: in the database of the restore, in the names, in their log."""


@dataclass(frozen=True, slots=True)
class PlannedRepository:
    """The content and the tags that a restore brings to one repository."""

    repository: str
    blobs: Mapping[Digest, int]
    """Blob -> its bytes."""
    manifests: Mapping[Digest, int]
    """Manifest -> its bytes."""
    tags: Sequence[tuple[Tag, Digest]]


async def check_plan(
    store: Store, hosted: Hosted, plan: Iterable[PlannedRepository], *, may_replace: bool
) -> None:
    """Check that a restore can end well. Evicts cached images if the disk needs that.

    Args:
        store: The open data directory.
        hosted: The quota.
        plan: What the restore brings, each repository once. Read in a thread.
        may_replace: Whether tags that name another manifest are replaced.

    Raises:
        StorageUnavailable: Tags name another manifest, or the disk has too little space.
        QuotaExceeded: The quota has too little left.
        NamesDamaged: The names cannot be used.
    """
    needed = await run_in_thread(_check, store.layout, hosted, plan, may_replace)
    if needed <= await run_in_thread(free_bytes, store.layout.root):
        return
    await store.space.measure()
    await store.space.disk_room.make_room(needed)
    free = await run_in_thread(free_bytes, store.layout.root)
    if needed > free:
        raise StorageUnavailable(
            f"{size_text(needed)} are needed on the disk of {store.layout.root}, and"
            f" {size_text(max(free, 0))} are free for it: nothing was restored; free"
            f" {size_text(needed - free)} there, or name a larger disk by data_dir"
        )


def _check(
    layout: Layout, hosted: Hosted, plan: Iterable[PlannedRepository], may_replace: bool
) -> int:
    """Check tags and quota. Returns the bytes that are needed on the disk. Blocks."""
    root = os.fspath(layout.root)
    moved: list[str] = []
    seen: set[bytes] = set()
    growth: dict[str, int] = {}
    added = needed = 0
    with opened_names(layout) as names:
        for one in plan:
            moved += (
                f"{one.repository}:{tag}"
                for tag, digest in one.tags
                if not restored_rows.may_set_tag(names, one.repository, tag, digest)
            )
            content, metadata = restored_rows.bytes_to_add(
                names, one.repository, one.blobs, one.manifests, {tag for tag, _ in one.tags}
            )
            growth[one.repository] = content + metadata
            added += metadata
            for digest, size in (*one.blobs.items(), *one.manifests.items()):
                key = bytes.fromhex(digest.hex)
                if key in seen:
                    continue
                seen.add(key)
                added += 0 if restored_rows.is_hosted(names, digest) else size
                is_here = os.path.lexists(f"{root}/blobs/{digest.algorithm}/{digest.hex}")
                needed += _ROW_BYTES + (0 if is_here else size)
        if not may_replace:
            _check_moved_tags(moved)
        _check_quota("hosted.max_size", "", hosted.max_size, added, used_bytes(names))
        if hosted.max_repository_size is not None:
            for repository, grown in growth.items():
                used = used_bytes_of_repository(names, repository)
                where = f" for {repository}"
                limit = hosted.max_repository_size
                _check_quota("hosted.max_repository_size", where, limit, grown, used)
    return needed


def _check_moved_tags(tags: Sequence[str]) -> None:
    if tags:
        shown = ", ".join(tags[:_MAX_TAGS_SHOWN])
        raise StorageUnavailable(
            f"{len(tags)} tags name another manifest here, such as {shown}: nothing was"
            " restored; --force replaces them"
        )


def _check_quota(key: str, where: str, limit: int, added: int, used: UsedBytes) -> None:
    missing = added + used.total - limit
    if added and missing > 0:
        raise QuotaExceeded(
            f"{size_text(missing)} more than {key} ({format_size(limit)}) are needed{where}:"
            f" {size_text(added)} of the backup are not here, {used}. Nothing was restored: raise"
            f" {key}, or delete images and run oci-mirror gc --grace 10m"
        )
