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
from dataclasses import dataclass, field
from typing import Final

from mirror.inventory.model import MANIFEST_PART_TYPES, Content, DigestText, Image, Inventory
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.oci.text import count_text, size_text
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.store.name_removal import RemovedName
from mirror.store.protection import ProtectionUnknown
from mirror.store.removal import KeptBecause, Removal, reset_future_uses
from mirror.store.store import Store
from mirror.threads import run_in_thread

_MAX_NAMES: Final = 3
"""Names of other images in a reason."""


def plan_removal(
    inventory: Inventory, images: Iterable[Image], whys: Mapping[Image, str]
) -> CleaningReport:
    """Return what :func:`remove_images` would do now. Changes nothing.

    Args:
        inventory: The content of the data directory.
        images: The images to remove.
        whys: Image -> the reason of its removal.
    """
    report = CleaningReport(is_dry_run=True)
    chosen = _without_kept(report, inventory, images)
    removal = _RemovalState({one: inventory.sizes[one] for one in inventory.freed_by(chosen)})
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
    chosen = _without_kept(report, inventory, images)
    contents = await run_in_thread(lambda: inventory.contents)
    await run_in_thread(reset_future_uses, store.layout, contents.values(), inventory.now)
    used = await run_in_thread(_used_since, store, contents, chosen)
    report.items += [_kept(image, str(KeptBecause.USED)) for image in used]
    chosen = [image for image in chosen if image not in used]
    going = inventory.going_with(chosen)
    removal = await _remove(store, inventory, going, inventory.freed_by(chosen))
    _describe(report, inventory, going, removal, whys)
    return report


def _without_kept(
    report: CleaningReport, inventory: Inventory, images: Iterable[Image]
) -> list[Image]:
    """Return the images that nothing keeps. Adds the others to the report."""
    chosen: list[Image] = []
    images = dict.fromkeys(images)
    for image in images:
        if inventory.is_platform(image):
            # It goes with the last index that has it, and its access with that.
            staying = [one.name for one in inventory.wholes_of(image) if one not in images]
            report.items += [_kept(image, f"part of {name}") for name in staying[:1]]
        elif image.keeper is None:
            chosen.append(image)
        else:
            report.items.append(_kept(image, f"{image.keeper.why}: {image.keeper.remedy}"))
    return chosen


def _kept(image: Image, why: str) -> Item:
    return Item(
        action="kept", kind="image", name=image.name, digest=image.root, bytes=image.size, why=why
    )


def _used_since(
    store: Store, contents: Mapping[Digest, Content], images: Collection[Image]
) -> set[Image]:
    """Return the images whose manifest a client has requested since the inventory was read."""
    used = set()
    for image in images:
        with suppress(OSError, KeyError):
            modified = store.layout.blob(image.digest).lstat().st_mtime
            if modified > contents[image.digest].used:
                used.add(image)
    return used


@dataclass(slots=True)
class _RemovalState:
    """The result of a removal, by text of the digests."""

    sizes: dict[DigestText, int] = field(default_factory=dict)
    """The removed contents, and their bytes."""
    kept: dict[DigestText, KeptBecause] = field(default_factory=dict)
    failures: dict[DigestText, str] = field(default_factory=dict)

    def add(self, removal: Removal) -> None:
        """Add the result of a step."""
        self.sizes.update({str(digest): size for digest, size in removal.sizes.items()})
        self.kept.update({str(digest): why for digest, why in removal.kept.items()})
        self.failures.update({str(digest): why for digest, why in removal.failures.items()})


async def _remove(
    store: Store,
    inventory: Inventory,
    going: Collection[Image],
    freed: Collection[DigestText],
) -> _RemovalState:
    """Remove contents and names, in an order that can be interrupted."""
    result = _RemovalState()
    roots = dict.fromkeys(image.root for image in going if image.root in freed)
    parts: dict[DigestText, None] = {}
    for image in going:
        for one in _parts_first(inventory, image.root):
            if one in freed and one not in roots:
                parts[one] = None
    result.add(await _remove_contents(store, inventory, parts))
    # A mark that was set meanwhile keeps the name.
    marked = {one for one, why in result.kept.items() if why is KeptBecause.MARKED}
    await store.index.return_to_disk()  # On a disk that was full, there is room now.
    names = [i for i in going if marked.isdisjoint(inventory.sharing.reached(i.root))]
    if not await store.index.remove_names(removed_names(inventory, names)):
        size = size_text(sum(result.sizes.values()))
        raise StorageUnavailable(
            f"{count_text(len(result.sizes), 'content')} ({size}) removed, but the index could not "
            f"be written ({store.index.refusal or 'it is busy'}), so the names stay: free more "
            "space on the disk if it is full, and run the command again"
        )
    left = {image.root for image in names}
    result.add(await _remove_contents(store, inventory, [one for one in roots if one in left]))
    return result


def _parts_first(inventory: Inventory, root: DigestText) -> list[DigestText]:
    """Return all that a manifest reaches, each content before every manifest that refers to it."""
    order: list[DigestText] = []
    seen: set[DigestText] = set()
    stack = [(root, False)]
    while stack:
        digest, are_parts_listed = stack.pop()
        if are_parts_listed:
            order.append(digest)
        elif digest not in seen:
            seen.add(digest)
            stack.append((digest, True))
            manifest = inventory.manifests.get(digest)
            stack += [(one, False) for one in (manifest.columns.digests if manifest else ())]
    return order


async def _remove_contents(
    store: Store, inventory: Inventory, digests: Iterable[DigestText]
) -> Removal:
    contents, parsed = inventory.contents, map(Digest.parse, digests)
    try:
        return await store.evictor.remove([contents[one] for one in parsed if one in contents])
    except ProtectionUnknown as error:
        raise StorageUnavailable(f"nothing more was removed: {error}") from None


def removed_names(inventory: Inventory, going: Collection[Image]) -> list[RemovedName]:
    """Return the names of images with the access that no other name of their repository needs."""
    gone = set(going)
    needed: dict[Repository, set[DigestText]] = {image.repository: set() for image in going}
    for image in inventory.images:
        if image.repository in needed and image not in gone:
            needed[image.repository].update(inventory.sharing.reached(image.root))
            needed[image.repository].add(image.current_root)
    names = []
    for image in going:
        unneeded = {image.current_root, *inventory.sharing.reached(image.root)}
        unneeded -= needed[image.repository]
        manifests = {one for one in unneeded if _is_manifest(inventory, image, one)}
        names.append(
            RemovedName(
                repository=image.repository,
                tag=image.tag,
                digest=image.current,
                manifests=frozenset(map(Digest.parse, manifests)),
                blobs=frozenset(map(Digest.parse, unneeded - manifests)),
            )
        )
    return names


def _is_manifest(inventory: Inventory, image: Image, digest: DigestText) -> bool:
    is_root = digest in (image.root, image.current_root)
    return (
        is_root or digest in inventory.manifests or inventory.type_of(digest) in MANIFEST_PART_TYPES
    )


# --- the report -----------------------------------------------------------------------------------


def _describe(
    report: CleaningReport,
    inventory: Inventory,
    going: Collection[Image],
    result: _RemovalState,
    whys: Mapping[Image, str],
) -> None:
    """Add an item for each image, and one for each reason for which some of its content stays."""
    counted: set[DigestText] = set()
    others = _other_names(inventory, going, result)
    for image in going:
        reached = [one for one in inventory.sharing.reached(image.root) if one not in counted]
        counted.update(reached)
        freed = [one for one in reached if one in result.sizes]
        report.items.append(
            Item(
                action="removed",
                kind="image",
                name=image.name,
                digest=image.root,
                bytes=sum(result.sizes[one] for one in freed),
                count=len(freed),
                why=whys.get(image, "belongs to an image that was removed"),
            )
        )
        staying: dict[str, list[DigestText]] = {}
        for digest in reached:
            if digest in inventory.sizes and digest not in result.sizes:
                staying.setdefault(_why_kept(digest, result, others), []).append(digest)
        report.items += [
            Item(
                action="kept",
                kind="content",
                name=image.name,
                digest=digests[0] if len(digests) == 1 else None,
                bytes=inventory.size_of(digests),
                count=len(digests),
                why=why,
                failure=result.failures.get(digests[0]),
            )
            for why, digests in staying.items()
        ]


def _why_kept(
    digest: DigestText, result: _RemovalState, others: Mapping[DigestText, list[str]]
) -> str:
    why = result.kept.get(digest)
    if why is not None:
        return f"{why}: oci-mirror gc removes it later" if why is KeptBecause.READ else str(why)
    names = others.get(digest, [])
    if names:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        return f"shared by {', '.join(names[:_MAX_NAMES])}{more}"
    return str(KeptBecause.MARKED)


def _other_names(
    inventory: Inventory, going: Collection[Image], result: _RemovalState
) -> dict[DigestText, list[str]]:
    """Return which other images share the content of these that stays."""
    gone = set(going)
    shared = {
        digest
        for image in going
        for digest in inventory.sharing.reached(image.root)
        if digest in inventory.sizes and digest not in result.sizes
    }
    others: dict[DigestText, list[str]] = {}
    for image in inventory.images if shared else ():
        if image not in gone:
            for digest in shared.intersection(inventory.sharing.reached(image.root)):
                others.setdefault(digest, []).append(image.name)
    return others
