"""The scheduled upkeep of hosted repositories, in a process of its own: retention, then collection.

Lives here: when a run is due, the process, its report. Must not know: which image a rule removes,
what nothing needs.

To decide about 100,000 tags takes seconds of processor time, for which the requests of a server
would wait. So the server starts ``python -m mirror.operations.hosted_job``, which gets its settings
as JSON on standard input, and prints its report as JSON at the end. A server tells of the changes
that it has recorded (:mod:`mirror.hosted.change_feed`). Of all processes of a data directory, the
one that gets the lock of ``hosted.lock`` does the work.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from mirror.config.settings import Hosted, Settings, Storage
from mirror.hosted.database import Database
from mirror.hosted.snapshot import drop_stale_snapshot
from mirror.inventory.model import Inventory
from mirror.inventory.read import read_inventory
from mirror.observability.events import Event, LogMessage, Observer
from mirror.oci.errors import MirrorError
from mirror.operations.cleaning_report import CleaningReport, save_report
from mirror.operations.hosted_collection import COLLECTION, collect_hosted
from mirror.operations.hosted_retention import RETENTION, apply_hosted_retention
from mirror.store import disk
from mirror.store.hosted_marker import raise_if_lost
from mirror.store.layout import Layout
from mirror.store.marks import Marks, read_marks
from mirror.store.store import Store
from mirror.threads import run_in_thread

HOSTED_REPORT: Final = "hosted.json"
"""File of the data directory with the report of the last run."""
HOSTED_INTERVAL_S: Final = 3600.0
"""Seconds between two runs: a small part of the grace time, which is a day by default."""
_UPKEEP_LOCK: Final = "hosted.lock"
"""File of the data directory whose lock is held while a run works."""
_FIRST_RUN_S: Final = 60.0
"""Seconds after the start of a server before the first run."""
_NICENESS: Final = 10
"""The server goes first."""


# --- in the server --------------------------------------------------------------------------------


class HostedJob:
    """Runs the upkeep each time that a run is due."""

    def __init__(self, layout: Layout, emit: Observer) -> None:
        """Start without a run.

        Args:
            layout: The data directory.
            emit: Receives a message at the end.
        """
        self._layout = layout
        self._emit = emit
        self._started = time.monotonic()

    async def run_if_due(self, settings: Settings, now: float) -> None:
        """Run, unless a process has done so within the interval. ``now``: seconds since the epoch.

        Does nothing without the section ``hosted``.
        """
        if settings.hosted is None or time.monotonic() - self._started < _FIRST_RUN_S:
            return
        if await run_in_thread(_is_due, self._layout, now):
            await self.run(settings)

    async def run(self, settings: Settings) -> None:
        """Run in a process. Reports its result, and never raises for a failed run."""
        assert settings.hosted is not None, "there is nothing to do without the section"
        document = {
            "data_dir": str(self._layout.root),
            "storage": settings.storage.model_dump(mode="json"),
            "hosted": settings.hosted.model_dump(mode="json"),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mirror.operations.hosted_job"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        report: Mapping[str, Any] = {"error": "the process has ended without a report"}
        try:
            process.stdin.write(json.dumps(document).encode())
            process.stdin.close()
            report = json.loads(await process.stdout.read())
        except (ValueError, ConnectionError) as error:
            report = {"error": f"the process has ended without a report ({error})"}
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if not report.get("is_skipped"):
            self._emit(_message(report))


def _message(report: Mapping[str, Any]) -> Event:
    error = report.get("error")
    if error is not None:
        return LogMessage("warning", "the upkeep of hosted content failed", (("why", error),))
    fields = tuple((name, report.get(name, 0)) for name in ("images", "contents", "bytes"))
    return LogMessage("info", "the upkeep of hosted content ended", fields)


def _is_due(layout: Layout, now: float) -> bool:
    try:
        last = (layout.root / HOSTED_REPORT).stat().st_mtime
    except OSError:
        return layout.hosted_names.exists()
    return not 0 <= now - last < HOSTED_INTERVAL_S


# --- in the process -------------------------------------------------------------------------------


async def run_upkeep(
    layout: Layout, storage: Storage, hosted: Hosted, now: float
) -> dict[str, Any]:
    """Apply the rules, collect, and save the report. Returns it as JSON values.

    The value of ``error`` is the reason of a failure, or None. ``is_skipped``: another process does
    the same, or has just done so.

    Args:
        layout: The data directory.
        storage: The settings of the storage.
        hosted: The rules and the grace time.
        now: Seconds since the epoch.
    """
    fd = disk.lock_file(layout.root / _UPKEEP_LOCK)
    if fd is None or not _is_due(layout, now):
        if fd is not None:
            os.close(fd)
        return {"error": None, "is_skipped": True}
    try:
        try:
            document = await _work(layout, storage, hosted, now)
        except MirrorError as error:
            document = {"error": error.message}
        except OSError as error:
            document = {"error": f"{error.filename}: {error.strerror or error}"}
        document["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        save_report(layout, HOSTED_REPORT, document)
        return document
    finally:
        os.close(fd)


async def _work(layout: Layout, storage: Storage, hosted: Hosted, now: float) -> dict[str, Any]:
    marks = read_marks(layout)
    drop_stale_snapshot(layout)
    raise_if_lost(layout)
    database = await Database.open(layout.hosted_names)
    try:
        retained = await apply_hosted_retention(database, hosted, marks, now, RETENTION)
        store = await Store.open(str(layout.root), storage, lambda event: None, lambda: now)
        try:
            refusal = store.removal_refusal()
            if refusal is not None:
                return {"error": refusal}
            read = partial(_read_inventory, layout, hosted, marks, now)
            collected = await collect_hosted(
                store, database, hosted, hosted.grace, read, COLLECTION
            )
        finally:
            await store.close()
    finally:
        await database.close()
    removed = [*retained.removed(), *collected.removed()]
    return {
        "error": None,
        "images": len(retained.removed()),
        "contents": len(collected.removed()),
        "bytes": collected.freed,
        "items": CleaningReport(items=removed).document("")["items"],
    }


def _read_inventory(layout: Layout, hosted: Hosted, marks: Marks, now: float) -> Inventory:
    return read_inventory(layout, {}, marks, now, hosted)


def main() -> int:
    """Do the work for the settings on standard input. Prints the report."""
    with suppress(OSError):
        os.nice(_NICENESS)
    given = json.loads(sys.stdin.read())
    layout = Layout(Path(given["data_dir"]))
    hosted = Hosted.model_validate(given["hosted"])
    storage = Storage.model_validate(given["storage"])
    report = asyncio.run(run_upkeep(layout, storage, hosted, time.time()))
    sys.stdout.write(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
