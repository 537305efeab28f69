"""Remove images: the content that no other name reaches, and their records in the index.

Lives here: the order of these steps, and what stays for which reason. Must not know: why an image
is removed, how content is unlinked.

Theory of operation: the parts of an image go before the manifest that refers to them, then go the
records of its name, and its manifest goes last. So a removal that was interrupted finds the image
again, and removes the rest. Content that is used meanwhile stays, and so does what a mark protects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final

from mirror.inventory.model import MANIFEST_TYPES, Image, Inventory
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.operations.retention import KEEPING_MARKS
from mirror.store.eviction import StoredBlob
from mirror.store.name_removal import RemovedName
from mirror.store.protection import ProtectionUnknown
from mirror.store.removal import KeptBecause, Removal
from mirror.store.store import Store
from mirror.threads import run_in_thread

_MAX_NAMES: Final = 3
"""Names of other images in a reason."""
REMEDIES: Final = {
    "pinned": "unpin it first: oci-mirror unpin",
    "frozen": "unfreeze it first: oci-mirror unfreeze",
    "leased": "a node uses it: wait until its lease ends",
}
"""Mark that keeps an image -> what to do about it."""


def plan_removal(
    inventory: Inventory, images: Iterable[Image], whys: Mapping[Image, str]
) -> CleaningReport:
    """Return what :func:`remove_images` would do now. Changes nothing."""
    report = CleaningReport(is_dry_run=True)
    chosen = _without_kept(report, images)
    freed = inventory.freed_by(chosen)
    removal = Removal(sizes={digest: inventory.contents[digest].size for digest in freed})
    _describe(report, inventory, inventory.going_with(chosen), removal, whys)
    return report


async def remove_images(
    store: Store, inventory: Inventory, images: Iterable[Image], whys: Mapping[Image, str]
) -> CleaningReport:
    """Remove images, with their signatures and SBOMs. Says what stays, and why.

    Args:
        store: The open data directory.
        inventory: It, as it was when the images were chosen.
        images: The images. Those that a mark keeps stay.
        whys: Image -> the reason of its removal.

    Raises:
        StorageUnavailable: The marks or the index cannot be read or written.
        OSError: Another process does not release the eviction lock, or the disk refuses.
    """
    report = CleaningReport()
    chosen = _without_kept(report, images)
    used = await run_in_thread(_used_since, store, inventory, chosen)
    report.items += [_kept(image, str(KeptBecause.USED)) for image in used]
    chosen = [image for image in chosen if image not in used]
    going = inventory.going_with(chosen)
    removal = await _remove(store, inventory, going, inventory.freed_by(chosen))
    _describe(report, inventory, going, removal, whys)
    return report


def _without_kept(report: CleaningReport, images: Iterable[Image]) -> list[Image]:
    """Return the images that no mark keeps. Adds the others to the report."""
    chosen: list[Image] = []
    for image in dict.fromkeys(images):
        mark = next((mark for mark in KEEPING_MARKS if mark in image.marks), None)
        if mark is None:
            chosen.append(image)
        else:
            remedy = f"{REMEDIES[mark]} {image.name}" if mark != "leased" else REMEDIES[mark]
            report.items.append(_kept(image, f"{mark}: {remedy}"))
    return chosen


def _kept(image: Image, why: str) -> Item:
    digest = str(image.digest)
    return Item(
        action="kept", kind="image", name=image.name, digest=digest, bytes=image.size, why=why
    )


def _used_since(store: Store, inventory: Inventory, images: Collection[Image]) -> set[Image]:
    """Return the images whose manifest a client has requested since the inventory was read."""
    used = set()
    for image in images:
        with suppress(OSError, KeyError):
            modified = store.layout.blob(image.digest).lstat().st_mtime
            if modified > inventory.contents[image.digest].used:
                used.add(image)
    return used


async def _remove(
    store: Store, inventory: Inventory, going: Collection[Image], freed: Collection[Digest]
) -> Removal:
    """Remove contents and names, in an order that can be interrupted."""
    roots = dict.fromkeys(image.digest for image in going if image.digest in freed)
    parts: dict[Digest, None] = {}
    for image in going:
        # Below the manifest of an index come its layers, so its parts go from the last one.
        below = reversed(inventory.sharing.reached(image.digest))
        parts.update((digest, None) for digest in below if digest in freed and digest not in roots)
    removal = await _remove_contents(store, inventory, parts)
    # A mark that was set meanwhile keeps the name.
    marked = {digest for digest, why in removal.kept.items() if why is KeptBecause.MARKED}
    names = [
        image for image in going if not marked.intersection(inventory.sharing.reached(image.digest))
    ]
    if not await store.index.remove_names(removed_names(inventory, names)):
        raise StorageUnavailable("the index could not be written: try again")
    last = await _remove_contents(store, inventory, [root for root in roots if root not in marked])
    removal.sizes |= last.sizes
    removal.kept |= last.kept
    return removal


async def _remove_contents(
    store: Store, inventory: Inventory, digests: Iterable[Digest]
) -> Removal:
    contents: list[StoredBlob] = [inventory.contents[digest] for digest in digests]
    try:
        return await store.evictor.remove(contents)
    except ProtectionUnknown as error:
        raise StorageUnavailable(f"nothing more was removed: {error}") from None


def removed_names(inventory: Inventory, going: Collection[Image]) -> list[RemovedName]:
    """Return the names of images with the access that no other name of their repository needs."""
    gone = set(going)
    repositories = {image.repository for image in going}
    needed: dict[Repository, set[Digest]] = {repository: set() for repository in repositories}
    for image in inventory.images:
        if image.repository in needed and image not in gone:
            needed[image.repository].update(inventory.sharing.reached(image.digest))
            needed[image.repository].add(image.current)
    names = []
    for image in going:
        unneeded = {image.current, *inventory.sharing.reached(image.digest)}
        unneeded -= needed[image.repository]
        manifests = {digest for digest in unneeded if _is_manifest(inventory, image, digest)}
        names.append(
            RemovedName(
                repository=image.repository,
                tag=image.tag,
                variant=image.variant,
                digest=image.current,
                manifests=frozenset(manifests),
                blobs=frozenset(unneeded - manifests),
            )
        )
    return names


def _is_manifest(inventory: Inventory, image: Image, digest: Digest) -> bool:
    is_root = digest in (image.digest, image.current)
    return is_root or digest in inventory.manifests or inventory.type_of(digest) in MANIFEST_TYPES


# --- the report -----------------------------------------------------------------------------------


def _describe(
    report: CleaningReport,
    inventory: Inventory,
    going: Iterable[Image],
    removal: Removal,
    whys: Mapping[Image, str],
) -> None:
    """Add an item for each image, and one for each reason for which some of its content stays."""
    counted: set[Digest] = set()
    going = list(going)
    others = _other_names(inventory, going, removal)
    for image in going:
        reached = [one for one in inventory.sharing.reached(image.digest) if one not in counted]
        counted.update(reached)
        freed = [one for one in reached if one in removal.sizes]
        report.items.append(
            Item(
                action="removed",
                kind="image",
                name=image.name,
                digest=str(image.digest),
                bytes=sum(removal.sizes[one] for one in freed),
                count=len(freed),
                why=whys.get(image, "belongs to an image that was removed"),
            )
        )
        staying: dict[str, list[Digest]] = {}
        for digest in reached:
            if digest in inventory.contents and digest not in removal.sizes:
                why = _why_kept(inventory, digest, removal, others)
                staying.setdefault(why, []).append(digest)
        report.items += [
            Item(
                action="kept",
                kind="content",
                name=image.name,
                digest=str(digests[0]) if len(digests) == 1 else None,
                bytes=inventory.size_of(digests),
                count=len(digests),
                why=why,
            )
            for why, digests in staying.items()
        ]


def _why_kept(
    inventory: Inventory,
    digest: Digest,
    removal: Removal,
    others: Mapping[Digest, list[str]],
) -> str:
    why = removal.kept.get(digest)
    if why is not None:
        return f"{why}: oci-mirror gc removes it later" if why is KeptBecause.READ else str(why)
    names = others.get(digest, [])
    if names:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return f"shared by {', '.join(names[:_MAX_NAMES])}{more}"
    return str(KeptBecause.MARKED)


def _other_names(
    inventory: Inventory, going: Collection[Image], removal: Removal
) -> dict[Digest, list[str]]:
    """Return which other images share the content of these that stays."""
    gone = set(going)
    shared = {
        digest
        for image in going
        for digest in inventory.sharing.reached(image.digest)
        if digest in inventory.contents and digest not in removal.sizes
    }
    others: dict[Digest, list[str]] = {}
    for image in inventory.images if shared else ():
        if image not in gone:
            for digest in shared.intersection(inventory.sharing.reached(image.digest)):
                others.setdefault(digest, []).append(image.name)
    return others
