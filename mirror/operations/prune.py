"""Prune: remove the images that retention rules name.

Lives here: from rules in text form to removed images. Must not know: the rules' decision about one
image (:mod:`mirror.operations.retention`), how images are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mirror.inventory.model import Image, Inventory
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.operations.removal import plan_removal, remove_images
from mirror.operations.retention import PruneRule, decide
from mirror.store.store import Store


def choose(inventory: Inventory, rules: Sequence[PruneRule]) -> CleaningReport:
    """Return what :func:`prune` would do now, as the same report. Changes nothing."""
    whys, kept = _decide(inventory, rules)
    report = plan_removal(inventory, whys, whys)
    report.items += kept
    return report


async def prune(store: Store, inventory: Inventory, rules: Sequence[PruneRule]) -> CleaningReport:
    """Remove the images that the rules name. Says which ones went and stayed, and why.

    Args:
        store: The open data directory.
        inventory: Its content.
        rules: The first one that is about an image decides.

    Raises what :func:`mirror.operations.removal.remove_images` raises.
    """
    whys, kept = _decide(inventory, rules)
    report = await remove_images(store, inventory, whys, whys)
    report.items += kept
    return report


def _decide(
    inventory: Inventory, rules: Sequence[PruneRule]
) -> tuple[dict[Image, str], list[Item]]:
    """Return the images to remove with the reasons, and the items of those that stay."""
    decisions = decide(_subjects(inventory), rules, inventory.now)
    whys = {decision.image: decision.why for decision in decisions if decision.is_removed}
    kept = [
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
    return whys, kept


def _subjects(inventory: Inventory) -> list[Image]:
    """Return the images without the signatures and SBOMs that go with another image."""
    return [
        image
        for image in inventory.images
        if image.subject is None or not inventory.sharing.owners.get(image.subject)
    ]
