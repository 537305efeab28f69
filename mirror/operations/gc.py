"""Garbage collection: remove what no name reaches, and what is left of ended work.

Lives here: what counts as garbage, and when it is old enough. Must not know: how content is
unlinked.

Young content stays: a client, or a fetch ahead, may bring the blobs of an image before its
manifest. So does all content of a repository of which a manifest is not understood, since it may be
part of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from mirror.inventory.model import Content, ContentType, Inventory
from mirror.oci.disk_failures import disk_failure_text
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.oci.text import age_text
from mirror.operations.cleaning_report import CleaningReport, Item, ItemKind
from mirror.store import disk
from mirror.store.garbage_rows import count_expired, drop_expired, read_access_beside
from mirror.store.hosted_contents import HostedContents
from mirror.store.layout import Layout
from mirror.store.protection import ProtectionUnknown
from mirror.store.quarantine import digest_of_file, quarantined_files
from mirror.store.recovery import is_resumable
from mirror.store.removal import (
    KeptBecause,
    Leftover,
    Removal,
    drop_leftover,
    find_leftovers,
)
from mirror.store.store import Store
from mirror.threads import run_in_thread

DEFAULT_GRACE_S: Final = 86400.0
"""Seconds for which unused content is kept: a fetch that broke is usually repeated within them."""
MIN_GRACE_S: Final = 600.0
"""Shortest time, in seconds: the blobs of an image come before its manifest is named."""
YOUNG: Final = "used or written within"
"""Why young content stays. The time follows."""
_BLOB_TYPES: Final = (ContentType.LAYER, ContentType.CONFIG)
_NO_NAME: Final = "no name reaches it"
_NOT_UNDERSTOOD: Final = "an image may need it, whose manifest is damaged or not understood"
_LOST: Final = "a marked image has lost it: fetch that image with oci-mirror warm"
_LOST_BY_HOSTED: Final = (
    "a hosted image has lost it: push that image again, restore it from a backup, or remove it"
)


class NothingNamed(StorageUnavailable):
    """No image is known, although there is content. The index may be lost."""

    def __init__(self) -> None:
        super().__init__(
            "no image is known, so all cached content would be removed: let a client pull an image"
            " of an upstream first, or run a restore that was killed again"
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
    orphans, kept = _old_orphans(layout, inventory, grace)
    for blob in orphans:
        report.items.append(_content_item(blob, blob.size, inventory.now))
    leftovers, kept_leftovers = _old_leftovers(layout, inventory.now, grace)
    for leftover in leftovers:
        report.items.append(_leftover_item(leftover, leftover.bytes, inventory.now))
    quarantined, kept_quarantined = _quarantined(layout, inventory, grace)
    for path, size, age in quarantined:
        report.items.append(_quarantine_item(path, size, age))
    expired = count_expired(layout, inventory.now)
    if expired:
        report.items.append(_expired_item(expired))
    report.items += [*kept, *kept_leftovers, *kept_quarantined]
    return report


async def collect_garbage(store: Store, inventory: Inventory, grace: float) -> CleaningReport:
    """Remove the garbage of a data directory. Says what went, what stays, and why.

    Args:
        store: The open data directory.
        inventory: Its content.
        grace: As for :func:`find_garbage`.

    Raises what :func:`find_garbage` raises, and ``StorageUnavailable`` if the marks cannot be read.
    """
    layout, now = store.layout, inventory.now
    report = CleaningReport()
    orphans, kept = await run_in_thread(_old_orphans, layout, inventory, grace)
    try:
        removal = await store.evictor.remove(orphans)
    except ProtectionUnknown as error:
        raise StorageUnavailable(f"nothing more was removed: {error}") from None
    report.items += _content_items(orphans, removal, now)
    leftovers, kept_leftovers = await run_in_thread(_old_leftovers, layout, now, grace)
    dropped = await run_in_thread(_drop_leftovers, layout, leftovers)
    for leftover, size in dropped.items():
        report.items.append(_leftover_item(leftover, size, now))
    report.items += await run_in_thread(_refused, layout, leftovers)
    quarantined, kept_quarantined = await run_in_thread(_drop_quarantined, layout, inventory, grace)
    report.items += quarantined
    store.count_dropped(sum(dropped.values()) + sum(item.bytes for item in quarantined))
    expired = 0
    with suppress(StorageUnavailable):  # On a full disk. The index drops them as well, in time.
        expired = await run_in_thread(drop_expired, layout, now)
    if expired:
        report.items.append(_expired_item(expired))
    report.items += [*kept, *kept_leftovers, *kept_quarantined]
    return report


def _kept(kind: ItemKind, sizes: Sequence[int], why: str, failure: str | None = None) -> list[Item]:
    """Return one item for all that stays for one reason. None, if there is nothing."""
    item = Item(
        action="kept", kind=kind, bytes=sum(sizes), count=len(sizes), why=why, failure=failure
    )
    return [item] if sizes else []


# --- content --------------------------------------------------------------------------------------


def _old_orphans(
    layout: Layout, inventory: Inventory, grace: float
) -> tuple[list[Content], list[Item]]:
    """Return content that no name reaches and nobody has used, the oldest first.

    And the items of that which stays.
    """
    orphans = inventory.orphans
    found = [content for content in inventory.contents.values() if str(content.digest) in orphans]
    # Hosted content is named elsewhere.
    hosted = HostedContents(layout)
    found = list(hosted.without(found))
    if found and not inventory.images:
        digests = [content.digest for content in found]
        if len(hosted.find_released(digests)) < len(digests):
            raise NothingNamed
    old = [blob for blob in found if inventory.now - blob.used > grace]
    young = [blob.size for blob in found if inventory.now - blob.used <= grace]
    unclear = _unclear_content(layout, inventory) if old else set()
    kept = [
        *_kept("content", young, _young(grace)),
        *_kept("content", [blob.size for blob in old if blob.digest in unclear], _NOT_UNDERSTOOD),
    ]
    old = [blob for blob in old if blob.digest not in unclear]
    return sorted(old, key=lambda blob: blob.used), kept


def _young(grace: float) -> str:
    return f"{YOUNG} {age_text(grace)}"


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
                failure=removal.failures.get(blob.digest),
            )


def _content_item(blob: Content, size: int, now: float) -> Item:
    why = f"{_NO_NAME}, last used {age_text(now - blob.used)} ago"
    return Item(action="removed", kind="content", digest=str(blob.digest), bytes=size, why=why)


# --- leftovers, quarantine, rows ------------------------------------------------------------------


def _old_leftovers(layout: Layout, now: float, grace: float) -> tuple[list[Leftover], list[Item]]:
    """Return the leftovers that cannot be resumed, or that nobody has resumed for long.

    And the items of those that stay.
    """
    boot, old, young = disk.boot_id(), [], []
    for leftover in find_leftovers(layout):
        is_young = now - leftover.modified <= grace
        if is_young and is_resumable(layout, leftover.digest, leftover.length, now, boot):
            young.append(leftover.bytes)
        else:
            old.append(leftover)
    return old, _kept("leftover", young, _young(grace))


def _drop_leftovers(layout: Layout, leftovers: Iterable[Leftover]) -> Mapping[Leftover, int]:
    """Remove leftovers. Returns those that no fetch has resumed, and the bytes of each."""
    sizes = {leftover: drop_leftover(layout, leftover.digest) for leftover in leftovers}
    return {
        leftover: size
        for leftover, size in sizes.items()
        if not layout.ingest(leftover.digest).exists()
    }


def _refused(layout: Layout, leftovers: Iterable[Leftover]) -> list[Item]:
    """Return the item of the leftovers that are still there, though no fetch resumes them."""
    paths = {layout.ingest(leftover.digest): leftover.bytes for leftover in leftovers}
    left = {
        path: size for path, size in paths.items() if path.exists() and not disk.is_locked(path)
    }
    failure = next((_why_refused(path) for path in left), None)
    return _kept("leftover", list(left.values()), KeptBecause.REFUSED, failure)


def _why_refused(path: Path) -> str:
    """Try once more to remove a leftover. Returns why that is not possible."""
    try:
        with disk.open_locked(path) as fd:
            if fd is not None:
                path.unlink()
    except OSError as error:
        return disk_failure_text(error, path)
    return f"{path}: it could not be removed at first: run the command again"


def _leftover_item(leftover: Leftover, size: int, now: float) -> Item:
    return Item(
        action="removed",
        kind="leftover",
        digest=str(leftover.digest),
        bytes=size,
        why=f"its fetch ended without it {age_text(now - leftover.modified)} ago",
    )


def _quarantined(
    layout: Layout, inventory: Inventory, grace: float
) -> tuple[list[tuple[Path, int, float]], list[Item]]:
    """Return damaged content (path, bytes, seconds since it was found), and what of it stays.

    Layers, configs and what is here again need no grace. Anything else may be a manifest: as long
    as that is there, content that may belong to it stays.
    """
    found, needed, hosted, young = [], [], [], []
    for path, status in quarantined_files(layout):
        text, age = str(digest_of_file(path)), inventory.now - status.st_ctime
        is_here = text in inventory.present
        if text in inventory.hosted and not is_here:
            hosted.append(status.st_size)
        elif text in inventory.protected and not is_here:
            needed.append(status.st_size)
        elif age > grace or is_here or inventory.type_of(text) in _BLOB_TYPES:
            found.append((path, status.st_size, age))
        else:
            young.append(status.st_size)
    kept = [
        *_kept("quarantine", needed, _LOST),
        *_kept("quarantine", hosted, _LOST_BY_HOSTED),
        *_kept("quarantine", young, _young(grace)),
    ]
    return found, kept


def _drop_quarantined(
    layout: Layout, inventory: Inventory, grace: float
) -> tuple[list[Item], list[Item]]:
    """Remove damaged content. Returns the items of that which went, and of that which stays."""
    items, refused, failures = [], [], []
    found, kept = _quarantined(layout, inventory, grace)
    for path, size, age in found:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            refused.append(size)
            failures.append(disk_failure_text(error, path))
        else:
            items.append(_quarantine_item(path, size, age))
    failure = failures[0] if failures else None
    return items, [*kept, *_kept("quarantine", refused, KeptBecause.REFUSED, failure)]


def _quarantine_item(path: Path, size: int, age: float) -> Item:
    return Item(
        action="removed",
        kind="quarantine",
        digest=f"{path.parent.name}:{path.name}",
        bytes=size,
        why=f"damaged, kept for inspection for {age_text(age)}",
    )


def _expired_item(count: int) -> Item:
    return Item(action="removed", kind="response", count=count, why="expired")
