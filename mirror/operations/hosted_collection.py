"""Collection of hosted content: the rows that nothing needs, and then their files.

Lives here: from rows that are gone to files that may go. Must not know: which rows are garbage
(:mod:`mirror.hosted.collection`), how content is unlinked.

A file may be needed by the cache, too: then it stays, and is cache from now on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from mirror.config import access
from mirror.config.settings import Hosted
from mirror.hosted import collection_rows
from mirror.hosted.change_rows import change_of
from mirror.hosted.collection import collect, plan_collection
from mirror.hosted.collection_rows import GarbageRow
from mirror.hosted.database import Database
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.inventory.model import Inventory
from mirror.observability.hosted_events import Actor
from mirror.oci.errors import StorageUnavailable
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.store.hosted_marker import has_hosted_names
from mirror.store.layout import Layout
from mirror.store.protection import ProtectionUnknown
from mirror.store.removal import KeptBecause, Removal
from mirror.store.store import Store
from mirror.threads import run_in_thread

COLLECTION: Final = Actor(user=access.COLLECTION_USER)
_MAX_RELEASED: Final = 100_000
"""Files of one run. The next one removes the rest."""


async def find_hosted_garbage(
    layout: Layout, hosted: Hosted | None, now: float, grace: float | None
) -> list[Item]:
    """Return what :func:`collect_hosted_garbage` would remove now. Changes nothing.

    Args:
        layout: The data directory.
        hosted: Names the registry. None: nothing is hosted.
        now: Seconds since the epoch.
        grace: Seconds for which what nothing needs is kept. None: as configured.

    Raises ``StorageUnavailable``, ``NamesDamaged``.
    """
    if hosted is None or not has_hosted_names(layout):
        return []
    database = await Database.open(layout.hosted_names)
    try:
        seconds = hosted.grace if grace is None else grace
        is_protected = ImmutableTagRules(hosted).is_protected
        found = await plan_collection(database, layout, now, seconds, is_protected)
    finally:
        await database.close()
    return [_item(hosted, row, row.size) for row in found]


async def collect_hosted_garbage(
    store: Store,
    hosted: Hosted | None,
    grace: float | None,
    read_inventory: Callable[[], Inventory],
    actor: Actor,
) -> list[Item]:
    """Remove what nothing needs, for a command beside a server. Returns what went.

    Args:
        store: The open data directory.
        hosted: Names the registry. None: nothing is hosted.
        grace: Seconds for which what nothing needs is kept. None: as configured.
        read_inventory: See :func:`collect_hosted`.
        actor: Who runs the command.

    Raises what :func:`collect_hosted` raises, and ``NamesDamaged``.
    """
    if hosted is None or not has_hosted_names(store.layout):
        return []
    database = await Database.open(store.layout.hosted_names)
    try:
        seconds = hosted.grace if grace is None else grace
        report = await collect_hosted(store, database, hosted, seconds, read_inventory, actor)
    finally:
        await database.close()
    return report.items


async def collect_hosted(
    store: Store,
    database: Database,
    hosted: Hosted,
    grace: float,
    read_inventory: Callable[[], Inventory],
    actor: Actor,
) -> CleaningReport:
    """Remove what nothing needs, with its files. Says what went.

    Args:
        store: The open data directory.
        database: The names.
        hosted: Names the registry.
        grace: Seconds for which what nothing needs is kept.
        read_inventory: Returns the content of the data directory. Called in a thread, and only if
            there are files to remove.
        actor: The user of the changes.

    Raises:
        StorageUnavailable: The database, the index or the marks cannot be read.
        OSError: Another process does not release the eviction lock.
    """
    now = store.now()
    change = partial(change_of, "delete", registry=hosted.name, actor=actor, at=now)
    is_protected = ImmutableTagRules(hosted).is_protected
    collected = await collect(database, store.layout, now, grace, change, is_protected)
    removal = await _remove_files(store, database, read_inventory)
    freed = dict(removal.sizes)
    report = CleaningReport()
    for row in collected:
        report.items.append(_item(hosted, row, freed.pop(row.digest, 0)))
    for digest, size in freed.items():  # Of deletions by clients.
        why = "no hosted repository has it any more"
        report.items.append(
            Item(action="removed", kind="hosted", digest=str(digest), bytes=size, why=why)
        )
    for digest, why in removal.kept.items():
        if why is KeptBecause.REFUSED:
            failure = removal.failures.get(digest)
            item = Item(action="kept", kind="hosted", digest=str(digest), why=why, failure=failure)
            report.items.append(item)
    return report


async def _remove_files(
    store: Store, database: Database, read_inventory: Callable[[], Inventory]
) -> Removal:
    """Remove the files of content that no repository has."""
    find = partial(collection_rows.released_digests, count=_MAX_RELEASED)
    released = await database.read(find)
    if not released:
        return Removal()
    inventory = await run_in_thread(read_inventory)
    contents = await run_in_thread(lambda: inventory.contents)
    garbage = [
        contents[one] for one in released if str(one) in inventory.orphans and one in contents
    ]
    try:
        removal = await store.evictor.remove(garbage)
    except ProtectionUnknown as error:
        raise StorageUnavailable(f"nothing more was removed: {error}") from None
    done = [one for one in released if one not in removal.kept]
    forget = partial(collection_rows.forget_released, digests=done)
    await database.write(forget, may_use_spare_space=True)
    if len(removal.sizes) < len(done):
        # The rest is cache now, and counts in its quota. Evicts only what is above that.
        eviction = store.evictor.start(0)
        if eviction is not None:
            await asyncio.wait({eviction})
    return removal


def _item(hosted: Hosted, row: GarbageRow, size: int) -> Item:
    return Item(
        action="removed",
        kind="hosted",
        name=f"{hosted.name}/{row.repository}@{row.digest}",
        digest=str(row.digest),
        bytes=size,
        why="its image was removed" if row.is_manifest else "no manifest names it",
    )
