"""The process of one job that looks at the whole store: ``python -m mirror.admin.job_process``.

Lives here: its protocol, and one function for each kind of job. Standard input has a JSON object:
the configuration, the kind and the arguments. Standard output has one JSON object a line:
``progress``, ``note``, and at last ``result`` or ``error``. Must not know: who has started it, or
how a job is done (:mod:`mirror.operations`).

The requests of a server would wait for the interpreter lock while a job works. And a process can be
ended at any moment: each operation goes on where it was ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from mirror.admin.json_values import JsonObject
from mirror.admin.problems import problem_of
from mirror.config.settings import Settings, build
from mirror.inventory.model import Image, Inventory
from mirror.inventory.read import read_inventory
from mirror.observability.events import Event, LogMessage
from mirror.oci.errors import MirrorError, NotFound, StorageUnavailable
from mirror.oci.image_name import ImageName
from mirror.operations.cleaning_report import CleaningReport
from mirror.operations.forget import forget
from mirror.operations.gc import DEFAULT_GRACE_S, collect_garbage, find_garbage
from mirror.operations.hosted_collection import collect_hosted_garbage, find_hosted_garbage
from mirror.operations.hosted_removal import plan_removal_by_name, remove_by_name
from mirror.operations.local_actor import ADMIN_API
from mirror.operations.prune import choose, prune
from mirror.operations.retention import PruneRule
from mirror.operations.verify import Subset, VerifyReport, repair, verify
from mirror.store.layout import Layout
from mirror.store.marks import read_marks
from mirror.store.quarantine import put_back_moving
from mirror.store.store import Store
from mirror.threads import run_in_thread

_NICENESS: Final = 10
"""The server goes first."""
_MAX_NOTES: Final = 200
"""Items of a report that are sent as notes. The numbers are complete."""
_PROGRESS_INTERVAL_S: Final = 0.25
"""Seconds between two lines of progress."""


def tell(**line: Any) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _on_event(event: Event) -> None:
    """Pass on warnings of the parts of this process."""
    if isinstance(event, LogMessage) and event.level in ("warning", "error"):
        fields = ", ".join(f"{name}: {value}" for name, value in event.fields)
        tell(note=f"{event.message} ({fields})" if fields else event.message)


def _layout(settings: Settings) -> Layout:
    return Layout(Path(settings.data_dir))


def _read(settings: Settings) -> Inventory:
    layout = _layout(settings)
    return read_inventory(
        layout, settings.upstreams, read_marks(layout), time.time(), settings.hosted
    )


def _find(inventory: Inventory, names: Iterable[str]) -> list[Image]:
    """Return the images of all names. Raises ``NotFound`` if one names none."""
    images: dict[Image, None] = {}
    for text in names:
        name = ImageName.parse(text).with_default_tag()
        found = inventory.find(name)
        if not found:
            raise NotFound(f"{name} is not in the cache")
        images.update(dict.fromkeys(found))
    return list(images)


async def _with_store(
    settings: Settings, work: Callable[[Store], Awaitable[JsonObject]]
) -> JsonObject:
    store = await Store.open(settings.data_dir, settings.storage, _on_event)
    try:
        refusal = store.removal_refusal()
        if refusal is not None:
            raise StorageUnavailable(f"nothing can be changed: {refusal}")
        return await work(store)
    finally:
        await store.close()


def _cleaning_result(report: CleaningReport) -> JsonObject:
    """Tell the items of a report, and return its numbers."""
    for item in report.items[:_MAX_NOTES]:
        name = item.name or item.digest or item.kind
        verb = "would remove" if report.is_dry_run and item.action == "removed" else item.action
        tell(note=f"{verb} {name}: {item.why}", bytes=item.bytes)
    return {
        "is_dry_run": report.is_dry_run,
        "removed_images": len(report.removed("image")),
        "removed_contents": sum(item.count for item in report.removed()),
        "kept": sum(item.action == "kept" for item in report.items),
        "freed_bytes": report.freed,
    }


# --- the kinds ------------------------------------------------------------------------------------


async def _remove(settings: Settings, given: JsonObject) -> JsonObject:
    inventory = _read(settings)
    images = _find(inventory, given["images"])
    whys = dict.fromkeys(images, "as asked for")
    if given.get("dry_run"):
        is_forced = bool(given.get("force"))
        return _cleaning_result(
            plan_removal_by_name(settings, inventory, images, whys, may_change_immutable=is_forced)
        )

    async def run(store: Store) -> JsonObject:
        report = await remove_by_name(
            settings,
            store,
            inventory,
            images,
            whys,
            ADMIN_API,
            may_change_immutable=given.get("force", False),
        )
        return _cleaning_result(report)

    return await _with_store(settings, run)


async def _forget(settings: Settings, given: JsonObject) -> JsonObject:
    async def run(store: Store) -> JsonObject:
        image = ImageName.parse(given["image"]).with_default_tag()
        report = await forget(store, image, read_marks(_layout(settings)))
        return {
            "tags": len(report.tags),
            "manifests": report.manifests,
            "blobs": report.blobs,
            "negatives": report.negatives,
        }

    return await _with_store(settings, run)


async def _gc(settings: Settings, given: JsonObject) -> JsonObject:
    hosted, layout = settings.hosted, _layout(settings)
    if given.get("dry_run"):
        report = find_garbage(layout, _read(settings), DEFAULT_GRACE_S)
        report.items[:0] = await find_hosted_garbage(layout, hosted, time.time(), None)
        return _cleaning_result(report)

    async def run(store: Store) -> JsonObject:
        # First: the files of what nothing needs are garbage then.
        items = await collect_hosted_garbage(
            store, hosted, None, partial(_read, settings), ADMIN_API
        )
        report = await collect_garbage(store, _read(settings), DEFAULT_GRACE_S)
        report.items[:0] = items
        return _cleaning_result(report)

    return await _with_store(settings, run)


async def _prune(settings: Settings, given: JsonObject) -> JsonObject:
    inventory = _read(settings)
    rule = PruneRule(
        match=given.get("match", "*"),
        older_than=float(given["older_than"]),
        keep_last=given.get("keep_last"),
    )
    if given.get("dry_run"):
        return _cleaning_result(choose(inventory, [rule]))

    async def run(store: Store) -> JsonObject:
        return _cleaning_result(await prune(store, inventory, [rule]))

    return await _with_store(settings, run)


async def _verify(settings: Settings, given: JsonObject) -> JsonObject:
    await run_in_thread(put_back_moving, _layout(settings))
    inventory = _read(settings)
    images = _find(inventory, [given["image"]]) if "image" in given else None
    subset = Subset.parse(given["subset"]) if "subset" in given else None
    told_at = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _PROGRESS_INTERVAL_S or done >= total:
            told_at = time.monotonic()
            tell(progress=[done, total, "bytes", ""])

    if not given.get("repair"):

        async def run(store: Store) -> JsonObject:
            return _verify_result(await verify(store, inventory, images, subset, on_progress))

        return await _with_store(settings, run)
    # Imported here: it imports aiohttp, which the other jobs do not need.
    from mirror.operations.own_requests import open_recorded_mirror
    from mirror.operations.refetch import refetch

    async with open_recorded_mirror(settings, _on_event) as mirror:
        report = await verify(mirror.store, inventory, images, subset, on_progress)
        if report.problems:
            await repair(
                report,
                inventory,
                lambda: run_in_thread(_read, settings),
                lambda repository, digest, kind: refetch(mirror, repository, digest, kind),
            )
        return _verify_result(report)


def _verify_result(report: VerifyReport) -> JsonObject:
    for problem in report.problems[:_MAX_NOTES]:
        repaired = " (fetched again)" if problem.is_repaired else ""
        tell(note=f"{problem.problem} {problem.image or problem.digest}: {problem.what}{repaired}")
    for error in report.errors[:_MAX_NOTES]:
        tell(note=f"not fetched: {error}")
    return {
        "contents": report.contents,
        "hashed_bytes": report.bytes,
        "images": report.images,
        "problems": len(report.problems),
        "repaired": sum(problem.is_repaired for problem in report.problems),
        "has_damage": report.has_damage,
    }


KINDS: Final[dict[str, Callable[[Settings, JsonObject], Coroutine[Any, Any, JsonObject]]]] = {
    "remove": _remove,
    "forget": _forget,
    "gc": _gc,
    "prune": _prune,
    "verify": _verify,
}
"""Kind of a job -> the function that does it, and returns its result."""


def do_job(text: str) -> None:
    """Do the job that ``text`` describes."""
    os.nice(_NICENESS)
    document = json.loads(text)
    try:
        settings = build(document["settings"])
        tell(result=asyncio.run(KINDS[document["kind"]](settings, document["arguments"])))
    except (MirrorError, OSError) as error:
        tell(error=problem_of(error).detail)


if __name__ == "__main__":
    do_job(sys.stdin.read())
