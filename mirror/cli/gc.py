"""``gc``: remove what no image needs.

Lives here: its arguments, and what is printed. Must not know: what garbage is
(:mod:`mirror.operations.gc`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.cleaning import (
    add_dry_run,
    duration,
    exit_code,
    giving_way,
    read_inventory_gently,
)
from mirror.cli.data_directory import find_layout, layout_of, load_inventory, opened_store
from mirror.cli.listing import print_rows
from mirror.cli.output import UsageError, print_line
from mirror.cli.table_layout import Column
from mirror.oci.errors import StorageUnavailable
from mirror.oci.text import age_text, size_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.inventory.model import Inventory
    from mirror.operations.cleaning_report import CleaningReport, Item

_WORDS: Final = {
    "content": "content that no image needs",
    "hosted": "hosted content that nothing needs",
    "leftover": "leftovers of fetches that ended",
    "quarantine": "damaged content",
    "response": "expired responses",
}
"""Kind of garbage -> its name for a person."""
_GARBAGE_COLUMNS: Final = (
    Column("WHAT", "what", min_chars=16, is_sentence=True),
    Column("COUNT", "count", is_number=True),
    Column("SIZE", "bytes", size_text, is_number=True),
    Column("RESULT", "result", min_chars=16, is_sentence=True),
)


def add_parser(commands: Commands) -> None:
    """Add ``gc``."""
    parser = commands.add_parser(
        "gc",
        help="remove what no image needs",
        description="Removes content that no image needs and nobody has used for a while, "
        "leftovers of fetches, damaged content, and expired rows of the index. Of hosted "
        "repositories, removes what nothing has referred to for their grace time. Works "
        "beside a running server.",
    )
    add_dry_run(parser)
    parser.add_argument(
        "--grace",
        metavar="TIME",
        type=duration,
        help="keep what was used or written within this time, at least 10m (default: 1d, and "
        "hosted.grace). Damaged layers are removed at any age",
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UsageError: The grace is too short.
        StorageUnavailable: Hosted or cached content cannot be collected. The other was.
    """
    from mirror.operations.cleaning_report import CleaningReport
    from mirror.operations.gc import DEFAULT_GRACE_S, MIN_GRACE_S, find_garbage

    grace = DEFAULT_GRACE_S if arguments.grace is None else arguments.grace
    if grace < MIN_GRACE_S:
        raise UsageError("--grace must be at least 10m: the blobs of an image come before its name")
    settings = load_settings(arguments)
    hosted: list[Item] = []
    failure: StorageUnavailable | None = None
    try:
        hosted = asyncio.run(
            _collect_hosted(settings, arguments.grace, is_dry_run=arguments.is_dry_run)
        )
    except StorageUnavailable as error:  # What the cache frees may be what the disk lacks.
        failure = error
    report = CleaningReport(is_dry_run=arguments.is_dry_run)
    inventory = read_inventory_gently(settings)
    try:
        if arguments.is_dry_run:
            with giving_way():
                report = find_garbage(layout_of(settings), inventory, grace)
        else:
            report = asyncio.run(_collect(settings, inventory, grace))
    except StorageUnavailable as error:  # What went of hosted content is said first.
        failure = failure or error
    report.items[:0] = hosted
    if arguments.is_json:
        for item in report.items:
            print_line(json.dumps(item.row()))
    else:
        _print(report, grace)
        if failure is None:
            _print_uploads(settings)
    if failure is not None:
        raise failure
    return exit_code(report)


def _print(report: CleaningReport, grace: float) -> None:
    """Print the report for a person. ``grace``: seconds for which garbage is kept."""
    from mirror.operations.gc import MIN_GRACE_S, YOUNG

    if report.items:
        print_rows(_GARBAGE_COLUMNS, _rows(report), is_json=False)
    verb = "would be freed" if report.is_dry_run else "freed"
    print_line(f"{size_text(report.freed)} {verb}")
    young = sum(item.bytes for item in report.items if item.why.startswith(YOUNG))
    if young:
        less = "" if grace <= MIN_GRACE_S else " (--grace 10m for less)"
        print_line(f"{size_text(young)} stay: {YOUNG} {age_text(grace)}{less}")


def _print_uploads(settings: Settings) -> None:
    """Say what uploads in progress take up: a collection leaves them alone."""
    from mirror.inventory.hosted_names import read_uploads

    if settings.hosted is None:
        return
    uploads = read_uploads(layout_of(settings), settings.hosted.name)
    size = sum(upload.size for upload in uploads)
    if size:
        print_line(
            f"{size_text(size)} are of {len(uploads)} uploads in progress, which end after a day"
            " without a byte (oci-mirror ls --uploads, rm --upload ID)"
        )


async def _collect(settings: Settings, inventory: Inventory, grace: float) -> CleaningReport:
    from mirror.operations.gc import collect_garbage

    async with opened_store(settings) as store:
        return await collect_garbage(store, inventory, grace)


async def _collect_hosted(
    settings: Settings, grace: float | None, *, is_dry_run: bool
) -> list[Item]:
    """Collect hosted content, whose files no name reaches then. ``grace``: None: as configured."""
    from mirror.operations.hosted_collection import collect_hosted_garbage, find_hosted_garbage
    from mirror.operations.local_actor import local_actor

    layout = find_layout(settings)
    if is_dry_run:
        return await find_hosted_garbage(layout, settings.hosted, time.time(), grace)
    async with opened_store(settings) as store:
        read = partial(load_inventory, settings)
        return await collect_hosted_garbage(store, settings.hosted, grace, read, local_actor())


def _rows(report: CleaningReport) -> Iterator[dict[str, Any]]:
    """Return a row for each kind of garbage, and for each reason for which some stays."""
    sums: dict[tuple[str, str], list[Item]] = {}
    removed = "would be removed" if report.is_dry_run else "removed"
    for item in report.items:
        result = removed if item.action == "removed" else f"kept: {item.why}"
        sums.setdefault((_WORDS[item.kind], result), []).append(item)
    for (what, result), items in sums.items():
        yield {"what": what, "count": _count(items), "bytes": _bytes(items), "result": result}


def _count(items: Iterable[Item]) -> int:
    return sum(item.count for item in items)


def _bytes(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)
