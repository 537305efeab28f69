"""Garbage collection: remove what no name reaches, and what is left of ended work.

Lives here: what counts as garbage, and when it is old enough. Must not know: how content is
unlinked.

Young content stays: a client, or a fetch ahead, may bring the blobs of an image before its
manifest. So does all content of a repository of which a manifest is not understood, since it may be
part of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirror.inventory.model import Content, Inventory
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.oci.text import age_text
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.store import disk
from mirror.store.garbage_rows import count_expired, drop_expired, read_access_beside
from mirror.store.layout import Layout
from mirror.store.protection import ProtectionUnknown
from mirror.store.quarantine import digest_of_file, quarantined_files
from mirror.store.recovery import is_resumable
from mirror.store.removal import Leftover, Removal, drop_leftover, find_leftovers
from mirror.store.store import Store
from mirror.threads import run_in_thread

DEFAULT_GRACE_S: Final = 86400.0
"""Seconds for which unused content is kept: a fetch that broke is usually repeated within them."""
MIN_GRACE_S: Final = 600.0
"""Shortest time, in seconds: the blobs of an image come before its manifest is named."""
_NO_NAME: Final = "no name reaches it"


class NothingNamed(StorageUnavailable):
    """No image is known, although there is content. The index may be lost."""

    def __init__(self) -> None:
        super().__init__(
            "no image is known, so all content would be removed: let a client pull an image first, "
            "or delete the data directory while no server runs"
        )


def find_garbage(layout: Layout, inventory: Inventory, grace: float) -> CleaningReport:
    """Return what a collection would remove now, as a report. Blocks. Changes nothing.

    Args:
        layout: The data directory.
        inventory: Its content.
        grace: Seconds since the last use for which unused content is kept.

    Raises:
        NothingNamed: No image is known.
        StorageUnavailable: The index cannot be read.
        OSError: A directory cannot be listed.
    """
    report = CleaningReport(is_dry_run=True)
    for blob in _old_orphans(layout, inventory, grace):
        report.items.append(_content_item(blob, blob.size, inventory.now))
    for leftover in _old_leftovers(layout, inventory.now, grace):
        report.items.append(_leftover_item(leftover, leftover.bytes, inventory.now))
    for path, size, age in _old_quarantine(layout, inventory, grace):
        report.items.append(_quarantine_item(path, size, age))
    expired = count_expired(layout, inventory.now)
    if expired:
        report.items.append(_expired_item(expired))
    return report


async def collect_garbage(store: Store, inventory: Inventory, grace: float) -> CleaningReport:
    """Remove the garbage of a data directory. Says what went, and what was used meanwhile.

    Args:
        store: The open data directory.
        inventory: Its content.
        grace: As for :func:`find_garbage`.

    Raises what :func:`find_garbage` raises, and ``StorageUnavailable`` if the marks cannot be read.
    """
    layout, now = store.layout, inventory.now
    report = CleaningReport()
    orphans = await run_in_thread(_old_orphans, layout, inventory, grace)
    try:
        removal = await store.evictor.remove(orphans)
    except ProtectionUnknown as error:
        raise StorageUnavailable(f"nothing more was removed: {error}") from None
    report.items += _content_items(orphans, removal, now)
    leftovers = await run_in_thread(_old_leftovers, layout, now, grace)
    dropped = await run_in_thread(_drop_leftovers, layout, leftovers)
    for leftover, size in dropped.items():
        report.items.append(_leftover_item(leftover, size, now))
    quarantined = await run_in_thread(_drop_quarantined, layout, inventory, grace)
    report.items += quarantined
    store.count_dropped(sum(dropped.values()) + sum(item.bytes for item in quarantined))
    expired = 0
    with suppress(StorageUnavailable):  # On a full disk. The index drops them as well, in time.
        expired = await run_in_thread(drop_expired, layout, now)
    if expired:
        report.items.append(_expired_item(expired))
    return report


# --- content --------------------------------------------------------------------------------------


def _old_orphans(layout: Layout, inventory: Inventory, grace: float) -> list[Content]:
    """Return content that no name reaches and nobody has used, the oldest first."""
    orphans = inventory.orphans
    if orphans and not inventory.images:
        raise NothingNamed
    found = [content for content in inventory.contents.values() if str(content.digest) in orphans]
    old = [blob for blob in found if inventory.now - blob.used > grace]
    if old:
        unclear = _unclear_content(layout, inventory)
        old = [blob for blob in old if blob.digest not in unclear]
    return sorted(old, key=lambda blob: blob.used)


def _unclear_content(layout: Layout, inventory: Inventory) -> set[Digest]:
    """Return the content of repositories of which a manifest is not understood, or is damaged."""
    repositories = set()
    for image in inventory.images:
        manifest = inventory.manifests.get(image.root)
        if manifest is None or manifest.is_opaque:
            repositories.add(image.repository)
    # What verify has moved away is in no inventory, nor is a damaged child of an index.
    moved = [Digest.parse(one) for one in inventory.quarantined]
    return read_access_beside(layout, moved, [str(one) for one in repositories])


def _content_items(orphans: Iterable[Content], removal: Removal, now: float) -> Iterator[Item]:
    for blob in orphans:
        if blob.digest in removal.sizes:
            yield _content_item(blob, removal.sizes[blob.digest], now)
        elif blob.digest in removal.kept:
            yield Item(
                action="kept",
                kind="content",
                digest=str(blob.digest),
                bytes=blob.size,
                why=str(removal.kept[blob.digest]),
            )


def _content_item(blob: Content, size: int, now: float) -> Item:
    why = f"{_NO_NAME}, last used {age_text(now - blob.used)} ago"
    return Item(action="removed", kind="content", digest=str(blob.digest), bytes=size, why=why)


# --- leftovers, quarantine, rows ------------------------------------------------------------------


def _old_leftovers(layout: Layout, now: float, grace: float) -> list[Leftover]:
    """Return the leftovers that cannot be resumed, or that nobody has resumed for long."""
    boot = disk.boot_id()
    return [
        leftover
        for leftover in find_leftovers(layout)
        if now - leftover.modified > grace
        or not is_resumable(layout, leftover.digest, leftover.length, now, boot)
    ]


def _drop_leftovers(layout: Layout, leftovers: Iterable[Leftover]) -> Mapping[Leftover, int]:
    """Remove leftovers. Returns those that no fetch has resumed, and the bytes of each."""
    sizes = {leftover: drop_leftover(layout, leftover.digest) for leftover in leftovers}
    return {
        leftover: size
        for leftover, size in sizes.items()
        if not layout.ingest(leftover.digest).exists()
    }


def _leftover_item(leftover: Leftover, size: int, now: float) -> Item:
    return Item(
        action="removed",
        kind="leftover",
        digest=str(leftover.digest),
        bytes=size,
        why=f"its fetch ended without it {age_text(now - leftover.modified)} ago",
    )


def _old_quarantine(
    layout: Layout, inventory: Inventory, grace: float
) -> Iterator[tuple[Path, int, float]]:
    for path, status in quarantined_files(layout):
        digest = digest_of_file(path)
        if str(digest) in inventory.protected and str(digest) not in inventory.present:
            continue  # As long as it is there, what may belong to it stays.
        age = inventory.now - status.st_ctime
        if age > grace:
            yield path, status.st_size, age


def _drop_quarantined(layout: Layout, inventory: Inventory, grace: float) -> list[Item]:
    items = []
    for path, size, age in list(_old_quarantine(layout, inventory, grace)):
        with suppress(OSError):
            path.unlink()
            items.append(_quarantine_item(path, size, age))
    return items


def _quarantine_item(path: Path, size: int, age: float) -> Item:
    return Item(
        action="removed",
        kind="quarantine",
        digest=f"{path.parent.name}:{path.name}",
        bytes=size,
        why=f"damaged, kept for inspection for {age_text(age)}",
    )


def _expired_item(count: int) -> Item:
    return Item(action="removed", kind="response", count=count, why="its time is over")
