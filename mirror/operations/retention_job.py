"""The scheduled run of the retention rules, in a process of its own.

Lives here: when a run is due, the process, its report. Must not know: which image a rule removes.

To read 10,000 images takes a second of processor time, for which the requests of a server would
wait. So the server starts ``python -m mirror.operations.retention_job``, which gets the settings as
JSON on standard input, and prints its report. Of all processes of a data directory, the one that
gets the lock of ``retention.lock`` runs the rules.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mirror.config.settings import Settings, build
from mirror.inventory.read import read_inventory
from mirror.observability.events import Event, LogMessage, Observer, RetentionEnded
from mirror.oci.errors import MirrorError
from mirror.oci.tag_selection import TagSelection
from mirror.operations.cleaning_report import RETENTION_REPORT, save_report
from mirror.operations.prune import prune
from mirror.operations.retention import PruneRule
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.marks import read_marks
from mirror.store.store import Store
from mirror.threads import run_in_thread

_LOCK: Final = "retention.lock"
"""File of the data directory whose lock is held while the rules run."""
_NICENESS: Final = 10
"""The server goes first."""
_FIRST_RUN_S: Final = 60.0
"""Seconds after the start of a server before the rules run for the first time."""
_MAX_LOGGED_IMAGES: Final = 100
"""Images that a run names in the log. The report has more."""
_SECTIONS: Final = {"data_dir", "storage", "retention", "retention_interval"}
"""Keys of the configuration that the process needs. The others may hold secrets."""


def rules_of(settings: Settings) -> list[PruneRule]:
    """Return the configured rules."""
    return [
        PruneRule(
            match=rule.match,
            older_than=rule.older_than,
            keep_last=rule.keep_last,
            tags=TagSelection.parse(rule.tags) if rule.tags is not None else None,
        )
        for rule in settings.retention
    ]


# --- in the server --------------------------------------------------------------------------------


class RetentionJob:
    """Runs the rules each time that a run is due."""

    def __init__(self, layout: Layout, emit: Observer) -> None:
        """Start without a run.

        Args:
            layout: The data directory.
            emit: Receives a message for each image, and :class:`RetentionEnded`.
        """
        self._layout = layout
        self._emit = emit
        self._started = time.monotonic()

    async def run_if_due(self, settings: Settings, now: float) -> None:
        """Run the rules, if there are any and no process has done so for the interval.

        Args:
            settings: The configuration in use.
            now: Seconds since the epoch.
        """
        if not settings.retention or time.monotonic() - self._started < _FIRST_RUN_S:
            return
        if await run_in_thread(_is_due, self._layout, settings, now):
            await self.run(settings)

    async def run(self, settings: Settings) -> None:
        """Run the rules in a process. Reports its result, and never raises for a failed run."""
        document = settings.model_dump(mode="json", include=_SECTIONS)
        document["data_dir"] = str(self._layout.root)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mirror.operations.retention_job"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            output, _ = await process.communicate(json.dumps(document).encode())
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        for event in _events(output):
            self._emit(event)


def _is_due(layout: Layout, settings: Settings, now: float) -> bool:
    try:
        last = (layout.root / RETENTION_REPORT).stat().st_mtime
    except OSError:
        return True
    return not 0 <= now - last < settings.retention_interval


def _events(output: bytes) -> Iterator[Event]:
    """Return what the output of the process means."""
    try:
        document = json.loads(output)
        error, items = document["error"], document["items"]
    except (ValueError, KeyError, TypeError):
        error, items, document = "the process has ended without a report", [], {}
    if error is None and document.get("is_skipped"):
        return
    for item in [one for one in items if one["action"] == "removed"][:_MAX_LOGGED_IMAGES]:
        fields = (("image", item["name"]), ("bytes", item["bytes"]), ("why", item["why"]))
        yield LogMessage("info", "image removed by retention", fields)
    images, freed = document.get("removed_images", 0), document.get("freed_bytes", 0)
    if error is None:
        yield LogMessage("info", "retention ended", (("images", images), ("bytes", freed)))
    else:
        yield LogMessage("warning", "retention failed", (("why", error),))
    yield RetentionEnded(images, freed, is_ok=error is None)


# --- in the process -------------------------------------------------------------------------------


async def run_rules(settings: Settings, now: float) -> dict[str, Any]:
    """Run the rules, and save the report. Returns it as JSON values.

    The value of ``error`` is the reason of a failure, or None. ``is_skipped``: another process runs
    the rules, or has just done so.
    """
    layout = Layout(Path(settings.data_dir))
    with _locked(layout) as is_locked:
        if not is_locked or not _is_due(layout, settings, now):
            return {"error": None, "items": [], "is_skipped": True}
        try:
            document = await _prune(layout, settings, now)
        except MirrorError as error:
            document = {"error": error.message, "items": []}
        except OSError as error:
            document = {"error": f"{error.filename}: {error.strerror or error}", "items": []}
        document["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            save_report(layout, RETENTION_REPORT, document)
        except OSError as error:  # What was removed is gone all the same.
            document["error"] = document["error"] or f"{RETENTION_REPORT}: {error.strerror}"
        return document


async def _prune(layout: Layout, settings: Settings, now: float) -> dict[str, Any]:
    errors: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, LogMessage) and event.level == "error":
            errors.append(event.message)

    inventory = read_inventory(layout, settings.upstreams, read_marks(layout), now, settings.hosted)
    store = await Store.open(settings.data_dir, settings.storage, note)
    try:
        refusal = store.removal_refusal()
        if refusal is not None:
            return {"error": refusal, "items": []}
        report = await prune(store, inventory, rules_of(settings))
    finally:
        await store.close()
    return {"error": errors[0] if errors else None, **report.document("")}


@contextmanager
def _locked(layout: Layout) -> Iterator[bool]:
    """Hold the lock of the job while the block runs. Yields False if another process has it."""
    fd = disk.lock_file(layout.root / _LOCK)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def main() -> int:
    """Run the rules of the configuration on standard input, and print the report."""
    with suppress(OSError):
        os.nice(_NICENESS)
    settings = build(json.loads(sys.stdin.read()))
    document = asyncio.run(run_rules(settings, time.time()))
    sys.stdout.write(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
