"""What fills the disk, and what an eviction takes next.

Lives here: sums over an inventory, and the order of the evictor. Must not know: how they are
printed, who evicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from mirror.inventory.leftovers import OtherFile
from mirror.inventory.model import ContentType, Image, Inventory
from mirror.oci.reference import Digest
from mirror.store.eviction import StoredBlob, eviction_order


@dataclass(frozen=True, slots=True)
class TypeUsage:
    """The content of one type."""

    type: str
    total: int
    """Number of contents, or of files."""
    active: int
    """Number of those that a name or a mark reaches, or that a process writes."""
    size: int
    """Bytes of all."""
    reclaimable: int
    """Bytes of those that are not active."""


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """The content of one upstream or repository."""

    name: str
    images: int
    contents: int
    """Number of contents on disk that its images reach, with their referrers."""
    size: int
    """Bytes of these."""
    shared: int
    """Bytes of those that images of other groups reach, too."""
    unique: int
    """Bytes of all others."""
    used: float
    """Last use, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class NextEviction:
    """One file that an eviction removes."""

    digest: Digest
    type: str
    size: int
    """Bytes that it takes up."""
    used: float
    """Last use, in seconds since the epoch."""
    why: str
    images: tuple[Image, ...]
    """Images that lack it afterwards."""


def usage_by_type(inventory: Inventory, leftovers: Iterable[OtherFile]) -> list[TypeUsage]:
    """Return the use of the disk by type."""
    types, orphans = inventory.types, inventory.orphans
    active: dict[str, list[int]] = {content_type.value: [] for content_type in ContentType}
    idle: dict[str, list[int]] = {kind: [] for kind in active}
    for text, (size, _) in inventory.files.items():
        kind = types.get(text)
        if kind is not None:
            active[kind].append(size)
        else:
            (idle if text in orphans else active)[ContentType.OTHER].append(size)
    for leftover in leftovers:
        chosen, other = (active, idle) if leftover.is_active else (idle, active)
        chosen.setdefault(leftover.kind, []).append(leftover.size)
        other.setdefault(leftover.kind, [])
    return [
        TypeUsage(
            type=kind,
            total=len(active[kind]) + len(idle[kind]),
            active=len(active[kind]),
            size=sum(active[kind]) + sum(idle[kind]),
            reclaimable=sum(idle[kind]),
        )
        for kind in active
    ]


def usage_by_group(inventory: Inventory, group_of: Callable[[Image], str]) -> list[GroupUsage]:
    """Return the use of the disk by group, the largest first.

    Args:
        inventory: The inventory.
        group_of: Returns the name of the group of an image: its upstream, its repository.
    """
    images: dict[str, list[Image]] = {}
    for image in inventory.images:
        images.setdefault(group_of(image), []).append(image)
    reached = {
        name: set(chain.from_iterable(inventory.sharing.reached(image.root) for image in members))
        for name, members in images.items()
    }
    groups_of = Counter(chain.from_iterable(reached.values()))
    sizes = inventory.sizes
    found = []
    for name, members in images.items():
        present = [one for one in reached[name] if one in sizes]
        size = sum([sizes[one] for one in present])
        unique = sum([sizes[one] for one in present if groups_of[one] == 1])
        used = max(image.used for image in members)
        found.append(
            GroupUsage(
                name, len(members), len(present), size, size - unique, unique=unique, used=used
            )
        )
    return sorted(found, key=lambda group: (-group.size, group.name))


def next_evictions(
    inventory: Inventory, leftovers: Iterable[OtherFile], enough: int, limit: int
) -> Iterator[NextEviction]:
    """Return what an eviction removes next, in its order.

    Args:
        inventory: The inventory.
        leftovers: The files beside whole content.
        enough: Bytes that the eviction frees. It removes no more than that needs.
        limit: Most results.
    """
    order = sorted(
        (one for one in leftovers if not one.is_active),
        key=lambda one: (not one.is_damaged, one.used),
    )
    for leftover in order[:limit]:
        yield NextEviction(
            *(leftover.digest, leftover.kind, leftover.size, leftover.used, leftover.why), ()
        )
    enough -= sum(leftover.size for leftover in order)
    limit -= len(order)
    if enough <= 0 or limit <= 0:
        return
    blobs = (StoredBlob(one.digest, one.size, one.used) for one in inventory.contents.values())
    staying = {Digest.parse(one) for one in inventory.protected}
    for blob in eviction_order(blobs, staying, enough)[:limit]:
        text = str(blob.digest)
        yield NextEviction(
            blob.digest,
            inventory.type_of(text).value,
            blob.size,
            blob.used,
            "least recently used",
            inventory.images_of(text) if text in inventory.sharing.owners else (),
        )


def total_size(usages: Iterable[TypeUsage]) -> int:
    """Return the bytes of all types."""
    return sum(usage.size for usage in usages)
