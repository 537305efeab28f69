"""Prune: remove the images that retention rules name.

Lives here: from rules in text form to removed images. Must not know: the rules' decision about one
image (:mod:`mirror.operations.retention`), how images are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mirror.inventory.model import DigestText, Image, Inventory
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.operations.removal import find_parts, remove_images
from mirror.operations.retention import PruneRule, decide
from mirror.store.store import Store


def choose(inventory: Inventory, rules: Sequence[PruneRule]) -> CleaningReport:
    """Return what the rules would remove now, as a report of images. Changes nothing."""
    report = CleaningReport(is_dry_run=True)
    freed: dict[Image, set[DigestText]] = {}
    decisions = decide(_subjects(inventory), rules, inventory.now)
    removed = [decision.image for decision in decisions if decision.is_removed]
    parts = find_parts(inventory, set(removed))
    removed = [image for image in removed if image not in parts]
    left = set(inventory.freed_by(removed))
    for image in removed:
        own = left.intersection(inventory.sharing.reached(image.root))
        left -= own
        freed[image] = own
    for decision in decisions:
        own, is_removed = freed.get(decision.image, set()), decision.image in freed
        report.items.append(
            Item(
                action="removed" if is_removed else "kept",
                kind="image",
                name=decision.image.name,
                digest=decision.image.root,
                bytes=inventory.size_of(own) if is_removed else decision.image.size,
                count=len(own) if is_removed else 1,
                why=parts.get(decision.image, decision.why),
            )
        )
    return report


async def prune(store: Store, inventory: Inventory, rules: Sequence[PruneRule]) -> CleaningReport:
    """Remove the images that the rules name. Says which ones went and stayed, and why.

    Args:
        store: The open data directory.
        inventory: Its content.
        rules: The first one that is about an image decides.

    Raises what :func:`mirror.operations.removal.remove_images` raises.
    """
    decisions = decide(_subjects(inventory), rules, inventory.now)
    whys = {decision.image: decision.why for decision in decisions if decision.is_removed}
    report = await remove_images(store, inventory, list(whys), whys)
    report.items += [
        Item(
            action="kept",
            kind="image",
            name=decision.image.name,
            digest=decision.image.root,
            bytes=decision.image.size,
            why=decision.why,
        )
        for decision in decisions
        if not decision.is_removed
    ]
    return report


def _subjects(inventory: Inventory) -> list[Image]:
    """Return the images without the signatures and SBOMs that go with another image."""
    return [
        image
        for image in inventory.images
        if image.subject is None or not inventory.sharing.owners.get(image.subject)
    ]
