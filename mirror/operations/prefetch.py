"""Run the entries of ``prefetch``: find the images that they name, and fetch them.

Lives here: which tags an entry chooses, when it is due, the lock and the report of its runs. Must
not know: how an image is fetched (:mod:`mirror.operations.warm`).

Of all processes of a data directory, the one that gets the lock of ``prefetch.lock`` runs what is
due. ``prefetch.json`` has the last run of each entry. A run that was killed is not in it, so the
entry is due again, and fetches what is missing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from mirror.composition import Mirror
from mirror.config.prefetch import WILDCARDS, Prefetch
from mirror.observability.events import (
    Kind,
    LogMessage,
    Observer,
    PrefetchEnded,
)
from mirror.oci.descriptor import parse_referrers_tag
from mirror.oci.errors import Draining, MirrorError
from mirror.oci.image_name import ImageName
from mirror.oci.platform import Platform
from mirror.oci.reference import Repository, Tag
from mirror.oci.tag_selection import TagSelection
from mirror.oci.versions import newest_first
from mirror.operations.cleaning_report import load_report, save_report
from mirror.operations.own_requests import OwnRequests
from mirror.operations.warm import ContentProgress, ImageReport, WarmOptions, warm
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.records import repository_of
from mirror.threads import run_in_thread

PREFETCH_REPORT: Final = "prefetch.json"
"""File of the data directory with the last run of each entry."""
_PREFETCH_LOCK: Final = "prefetch.lock"
"""File of the data directory whose lock is held while entries run."""
_PREFETCH_JOBS: Final = 2
"""Contents that are fetched at the same time: pulls of clients go first."""
_MAX_RUN_IMAGES: Final = 1000
"""Images of one entry that are fetched in one run."""
_MAX_SAVED_ERRORS: Final = 100
"""Errors of one run that the report keeps."""
_FIRST_RUN_S: Final = 60.0
"""Seconds after the start of a server before the first run: clients that have waited go first."""


@dataclass(slots=True)
class PrefetchRun:
    """One run of one entry."""

    images: list[ImageReport] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Why images are missing, each as one line that names the image or the repository."""
    seconds: float = 0.0

    @property
    def complete(self) -> int:
        """Images that are complete on disk."""
        return sum(image.is_complete for image in self.images)

    @property
    def added_bytes(self) -> int:
        """Bytes that were fetched."""
        return sum(image.added_bytes for image in self.images)

    def document(self, entry: Prefetch, finished_at: float) -> dict[str, Any]:
        """Return the run as JSON values. ``finished_at``: seconds since the epoch."""
        return {
            "entry": entry.model_dump(mode="json"),
            "finished_at": finished_at,
            "images": len(self.images),
            "complete": self.complete,
            "added_bytes": self.added_bytes,
            "seconds": round(self.seconds, 3),
            "errors": self.errors[:_MAX_SAVED_ERRORS],
        }


# --- the images of an entry -----------------------------------------------------------------------


async def find_entry_images(mirror: Mirror, entry: Prefetch, errors: list[str]) -> list[ImageName]:
    """Return the images that an entry names now, each once. Asks upstreams for lists of tags.

    Args:
        mirror: The parts of this process.
        entry: The entry.
        errors: Gets a line for each repository whose tags are not known.

    Raises:
        StorageUnavailable: The index cannot be read.
    """
    found: dict[ImageName, None] = {}
    for text in entry.images:
        is_pattern = bool(WILDCARDS & set(text))
        if is_pattern:
            repositories = [one async for one in _matching(mirror, text)]
        else:
            name = ImageName.parse(text)
            repositories = [name.repository]
        for repository in repositories:
            if not is_pattern and entry.tags is None and entry.newest is None:
                found[name.with_default_tag()] = None
                continue
            try:
                tags = await _choose_tags(mirror, entry, repository)
            except Draining:
                raise
            except MirrorError as error:
                errors.append(f"{repository}: {error.message}")
                continue
            found.update((ImageName(repository, tag), None) for tag in tags)
    images = list(found)
    if len(images) > _MAX_RUN_IMAGES:
        errors.append(f"{len(images)} images are chosen, and only {_MAX_RUN_IMAGES} are fetched")
    return images[:_MAX_RUN_IMAGES]


async def _matching(mirror: Mirror, pattern: str) -> AsyncIterator[Repository]:
    """Yield the repositories with content on disk that match a pattern."""
    last, has_more = "", True
    while has_more:
        page = await mirror.service.repositories(None, None, last)
        for name in page.names:
            last = name
            repository = repository_of(name)
            if repository is not None and fnmatchcase(name, pattern):
                yield repository
        has_more = page.has_more and bool(page.names)


async def _choose_tags(mirror: Mirror, entry: Prefetch, repository: Repository) -> list[Tag]:
    """Return the tags of a repository that an entry chooses, the latest versions first."""
    if entry.tags is None and entry.newest is None:
        known = await mirror.store.index.tags_of(repository)
        return [tag for tag in sorted(known) if parse_referrers_tag(tag.name) is None]
    selection = TagSelection.parse(entry.tags or "*")
    chosen = [
        name
        for name in await _list_tags(mirror, repository)
        if parse_referrers_tag(name) is None and selection.matches(name)
    ]
    versions = newest_first(chosen)
    others = sorted(set(chosen) - set(versions), reverse=True)
    return [Tag(name) for name in [*versions, *others][: entry.newest]]


async def _list_tags(mirror: Mirror, repository: Repository) -> list[str]:
    requests = OwnRequests("prefetch", repository, mirror.emit)
    names: list[str] = []
    last: str | None = None
    has_more = True
    while has_more:
        with requests.begin(Kind.TAGS) as pull:
            page = await mirror.service.tags(repository, None, last, pull)
        names += page.text.split("\n") if page.text else []
        last = names[-1] if names else None
        has_more = page.has_more and bool(page.text)
    return names


# --- one run --------------------------------------------------------------------------------------


async def run_entry(mirror: Mirror, entry: Prefetch) -> PrefetchRun:
    """Fetch the images of an entry. Raises ``Draining`` only."""
    begun, run = time.monotonic(), PrefetchRun()
    options = WarmOptions(
        platforms=frozenset(map(Platform.parse, entry.platforms)),
        has_referrers=entry.referrers,
        jobs=_PREFETCH_JOBS,
        command="prefetch",
    )
    try:
        images = await find_entry_images(mirror, entry, run.errors)
        run.images = await warm(mirror, images, options, _ignore)
    except Draining:
        raise
    except MirrorError as error:
        run.errors.append(error.message)
    run.errors += [f"{one.image}: {one.error}" for one in run.images if not one.is_complete]
    run.seconds = time.monotonic() - begun
    return run


def _ignore(event: ContentProgress | ImageReport) -> None:
    """Report nothing: nobody watches."""


class PrefetchJob:
    """Runs each entry of a server's configuration when it is due."""

    def __init__(self, mirror: Mirror, emit: Observer) -> None:
        """Start without a run. ``emit``: receives messages, and :class:`PrefetchEnded`."""
        self._mirror = mirror
        self._emit = emit
        self._started = time.monotonic()

    async def run_if_due(self, now: float) -> None:
        """Run the entries that are due, unless another process runs some.

        The server calls this every few seconds. ``now``: seconds since the epoch. Raises
        ``OSError`` if the report cannot be written, and ``Draining`` at a stop.
        """
        entries = self._mirror.settings.prefetch
        if not entries or time.monotonic() - self._started < _FIRST_RUN_S:
            return
        await self.run(now)

    async def run(self, now: float) -> None:
        """Run the entries that are due, as :meth:`run_if_due` does, also right after the start."""
        layout, entries = self._mirror.store.layout, self._mirror.settings.prefetch
        if not await run_in_thread(_due, layout, entries, now):
            return
        lock = await run_in_thread(disk.lock_file, layout.root / _PREFETCH_LOCK)
        if lock is None:
            return
        try:
            # Another process may have run them since they were found due.
            for entry in await run_in_thread(_due, layout, entries, now):
                await self._run_entry(entry, now)
        finally:
            os.close(lock)

    async def _run_entry(self, entry: Prefetch, now: float) -> None:
        run = await run_entry(self._mirror, entry)
        layout = self._mirror.store.layout
        document = run.document(entry, now + run.seconds)
        await run_in_thread(_save_run, layout, self._mirror.settings.prefetch, document)
        for error in run.errors[:_MAX_SAVED_ERRORS]:
            self._emit(LogMessage("warning", "an image was not prefetched", (("why", error),)))
        fields = (
            ("images", ",".join(entry.images)),
            ("complete", run.complete),
            ("failed", len(run.images) - run.complete),
            ("bytes", run.added_bytes),
            ("seconds", round(run.seconds, 3)),
        )
        self._emit(LogMessage("info", "prefetch ended", fields))
        failed = len(run.images) - run.complete
        is_ok = not run.errors
        self._emit(PrefetchEnded(run.complete, failed, run.added_bytes, is_ok=is_ok))


def last_runs(layout: Layout) -> dict[str, Any]:
    """Return the last run of each entry (``runs``). Blocks."""
    return load_report(layout, PREFETCH_REPORT) or {"runs": []}


def _due(layout: Layout, entries: tuple[Prefetch, ...], now: float) -> list[Prefetch]:
    finished = {_key(run.get("entry")): run.get("finished_at") for run in _runs(layout)}

    def is_due(entry: Prefetch) -> bool:
        last = finished.get(_key(entry.model_dump(mode="json")))
        return not isinstance(last, int | float) or not 0 <= now - last < entry.interval

    return [entry for entry in entries if is_due(entry)]


def _runs(layout: Layout) -> list[dict[str, Any]]:
    runs = last_runs(layout).get("runs")
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def _key(entry: object) -> str:
    """Return a text that is the same for equal entries. A changed entry is due at once."""
    return json.dumps(entry, sort_keys=True)


def _save_run(layout: Layout, entries: tuple[Prefetch, ...], document: dict[str, Any]) -> None:
    """Put a run in place of the one before. Runs of entries that are gone are dropped."""
    own, configured = _key(document["entry"]), {_key(e.model_dump(mode="json")) for e in entries}
    kept = [run for run in _runs(layout) if _key(run.get("entry")) in configured - {own}]
    save_report(layout, PREFETCH_REPORT, {"runs": [*kept, document]})
