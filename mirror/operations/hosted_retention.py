"""Retention of hosted images: the rules of the cache, about what clients have pushed.

Lives here: from rules and rows to removed tags, with the reason for each. Must not know: how a rule
decides (:mod:`mirror.operations.retention`), when the rules run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from sqlite3 import Connection
from typing import Final

from mirror.config import access
from mirror.config.settings import Hosted
from mirror.hosted import retention_rows
from mirror.hosted.change_rows import change_of, record_change
from mirror.hosted.database import Database
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.hosted.retention_rows import HostedImageRow
from mirror.inventory.keeping import LEASED, Keepers
from mirror.inventory.model import Image, Keeper
from mirror.inventory.name import Name
from mirror.observability.hosted_events import Actor
from mirror.oci.reference import Digest, Repository
from mirror.oci.tag_selection import TagSelection
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.operations.retention import PruneDecision, PruneRule, decide
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.marks import Marks

RETENTION: Final = Actor(user=access.RETENTION_USER)
_IMAGES_PER_WRITE: Final = 100
"""Images of one transaction, in which no push can commit: about 15 ms."""
_KEPT_AS_IMMUTABLE: Final = Keeper("immutable", "delete it as an admin")


def hosted_rules_of(hosted: Hosted, *, is_untagged: bool) -> list[PruneRule]:
    """Return the rules about tags, or those about manifests without one."""
    return [
        PruneRule(
            match=rule.match,
            older_than=rule.older_than,
            keep_last=rule.keep_last,
            tags=TagSelection.parse(rule.tags) if rule.tags is not None else None,
            is_age_of_push=rule.age == "pushed",
        )
        for rule in hosted.retention
        if (rule.about == "untagged") is is_untagged
    ]


async def run_hosted_retention(
    layout: Layout,
    hosted: Hosted | None,
    marks: Marks,
    now: float,
    actor: Actor,
    *,
    is_dry_run: bool,
) -> list[Item]:
    """Apply the rules for a command beside a server. Returns what went and stayed.

    Args:
        layout: The data directory.
        hosted: The rules. None: nothing is hosted.
        marks: Images that these keep stay.
        now: Seconds since the epoch.
        actor: Who runs the command.
        is_dry_run: Change nothing.

    Raises ``StorageUnavailable``, ``NamesDamaged``.
    """
    if hosted is None or not hosted.retention or not has_hosted_names(layout):
        return []
    database = await Database.open(layout.hosted_names)
    try:
        if is_dry_run:
            return (await plan_hosted_retention(database, hosted, marks, now)).items
        return (await apply_hosted_retention(database, hosted, marks, now, actor)).items
    finally:
        await database.close()


async def plan_hosted_retention(
    database: Database, hosted: Hosted, marks: Marks, now: float
) -> CleaningReport:
    """Return what the rules would remove now. Changes nothing.

    Args:
        database: The names.
        hosted: The rules.
        marks: Images that these keep stay.
        now: Seconds since the epoch.

    Raises ``StorageUnavailable``.
    """
    decided = await database.read(partial(_decide, hosted=hosted, marks=marks, now=now))
    return CleaningReport(is_dry_run=True, items=[_item(decision) for decision, _ in decided])


async def apply_hosted_retention(
    database: Database, hosted: Hosted, marks: Marks, now: float, actor: Actor
) -> CleaningReport:
    """Remove what the rules name. Says what went and stayed, and why.

    The tags go at once. Manifests and blobs that nothing names then go with a collection, once
    their grace time has passed. What was pushed or pulled meanwhile stays.

    Args:
        database: The names.
        hosted: The rules.
        marks: Images that these keep stay.
        now: Seconds since the epoch.
        actor: The user of the changes.
    """
    decided = await database.read(partial(_decide, hosted=hosted, marks=marks, now=now))
    report = CleaningReport()
    report.items += [_item(decision) for decision, _ in decided if not decision.is_removed]
    change = partial(change_of, "delete", registry=hosted.name, actor=actor, at=now)

    def remove(connection: Connection, rows: Sequence[HostedImageRow]) -> list[HostedImageRow]:
        removed = retention_rows.remove_unchanged(connection, rows, now)
        for row in removed:
            record_change(connection, change(row, row.tag))
        return removed

    doomed = iter([pair for pair in decided if pair[0].is_removed])
    while step := list(islice(doomed, _IMAGES_PER_WRITE)):
        rows = [row for _, row in step]
        removed = set(await database.write(partial(remove, rows=rows), may_use_spare_space=True))
        report.items += [_item(decision) for decision, row in step if row in removed]
    return report


def _decide(
    connection: Connection, *, hosted: Hosted, marks: Marks, now: float
) -> list[tuple[PruneDecision, HostedImageRow]]:
    """Read all images, and decide about each that a rule covers. In a thread: 100,000 take 2 s."""
    decided: list[tuple[PruneDecision, HostedImageRow]] = []
    leased = {one.digest for one in marks.leases.values() if one.until > now}
    # A node has pulled one manifest of an index.
    owners = retention_rows.owners_of(connection, leased) if leased else set()
    queries = ((False, retention_rows.tagged_images), (True, retention_rows.untagged_images))
    for is_untagged, query in queries:
        rules = hosted_rules_of(hosted, is_untagged=is_untagged)
        if rules:
            rows = query(connection)
            images = dict(zip(_images(rows, owners, hosted, marks, now), rows, strict=True))
            decided += [(one, images[one.image]) for one in decide(images, rules, now)]
    return decided


def _images(
    rows: Sequence[HostedImageRow],
    leased: Collection[tuple[str, Digest]],
    hosted: Hosted,
    marks: Marks,
    now: float,
) -> Iterator[Image]:
    immutable = ImmutableTagRules(hosted)
    names = [
        Name(
            repository=Repository(hosted.name, row.repository),
            tag=row.tag,
            root=str(row.digest),
            current_root=str(row.digest),
        )
        for row in rows
    ]
    keepers = Keepers(marks, names, now)
    for row, name in zip(rows, names, strict=True):
        keeper = next(iter(keepers.of(name, {str(row.digest)})), None)
        if keeper is None and (row.repository, row.digest) in leased:
            keeper = LEASED
        if row.tag is not None and immutable.is_immutable(row.repository, str(row.tag)):
            keeper = _KEPT_AS_IMMUTABLE
        yield Image(
            repository=name.repository,
            tag=row.tag,
            root=str(row.digest),
            current_root=str(row.digest),
            first_seen=row.pushed_at,
            used=max(row.pushed_at, row.pulled_at),
            keeper=keeper,
        )


def _item(decision: PruneDecision) -> Item:
    return Item(
        action="removed" if decision.is_removed else "kept",
        kind="image",
        name=decision.image.name,
        digest=decision.image.root,
        why=decision.why,
    )
