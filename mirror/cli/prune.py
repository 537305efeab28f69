"""``prune``: remove images by their age and number.

Lives here: its arguments, and what is printed. Must not know: which image a rule removes
(:mod:`mirror.operations.retention`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from typing import TYPE_CHECKING, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.cleaning import (
    add_dry_run,
    duration,
    exit_code,
    read_inventory_gently,
    summary,
)
from mirror.cli.data_directory import find_layout, opened_store
from mirror.cli.listing import print_rows
from mirror.cli.output import UsageError, print_line
from mirror.cli.table_layout import Column
from mirror.oci.tag_selection import TagSelection
from mirror.oci.text import age_text, count_text, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mirror.config.settings import Settings
    from mirror.inventory.model import Inventory
    from mirror.operations.cleaning_report import CleaningReport, Item
    from mirror.operations.retention import PruneRule

_PRUNED_COLUMNS: Final = (
    Column("IMAGE", "name", min_chars=24, is_name=True),
    Column("FREES", "bytes", size_text, is_number=True),
    Column("WHY", "why", min_chars=20, is_sentence=True),
)
_USED_AGO: Final = re.compile("used .* ago")
"""The reason of an image that is younger than its rule: the others are the same for many images."""
_MAX_KEEP_LAST: Final = 1_000_000_000
"""Most images that ``--keep-last`` can name."""


def add_parser(commands: Commands) -> None:
    """Add ``prune``."""
    parser = commands.add_parser(
        "prune",
        help="remove images that were not used for long, or are not the latest",
        description="Removes the images that fulfil all given conditions, and says why. Without "
        "--older-than and --keep-last, the rules below `retention` and `hosted.retention` in the "
        "configuration decide. "
        "Pinned, frozen and leased images stay. Works beside a running server.",
    )
    parser.add_argument(
        "--older-than",
        metavar="TIME",
        type=duration,
        help="remove images whose last use is longer ago, such as 30d",
    )
    parser.add_argument(
        "--keep-last",
        metavar="N",
        type=_count,
        help="keep the latest N of each repository: by version of their tags, else by first use",
    )
    parser.add_argument(
        "--match",
        metavar="PATTERN",
        help="only images whose name or repository matches, such as 'ghcr.io/org/*'",
    )
    parser.add_argument(
        "--tags",
        metavar="RANGE",
        type=_tags,
        help="only tags in a range of versions ('<2'), or that match a pattern ('pr-*')",
    )
    add_dry_run(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:12]) > _MAX_KEEP_LAST:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of images")
    return int(text)


def _tags(text: str) -> TagSelection:
    try:
        return TagSelection.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises :class:`mirror.cli.output.UsageError` if nothing says what goes."""
    settings = load_settings(arguments)
    rules = _rules(arguments, settings)
    hosted: list[Item] = []
    if not _has_conditions(arguments):
        hosted = _prune_hosted(settings, is_dry_run=arguments.is_dry_run)
    inventory = read_inventory_gently(settings)
    if arguments.is_dry_run:
        from mirror.operations.prune import choose

        report = choose(inventory, rules)
    else:
        report = asyncio.run(_prune(settings, inventory, rules))
    report.items[:0] = hosted
    if arguments.is_json:
        for item in report.items:
            print_line(json.dumps(item.row()))
        return exit_code(report)
    rows = [item.row() for item in report.removed("image")]
    if rows:
        print_rows(_PRUNED_COLUMNS, rows, is_json=False)
    for text in _kept(report, rules):
        print_line(text)
    print_line(summary(report, "image", report.removed("image")))
    return exit_code(report)


def _rules(arguments: argparse.Namespace, settings: Settings) -> list[PruneRule]:
    from mirror.operations.retention import PruneRule
    from mirror.operations.retention_job import rules_of

    if _has_conditions(arguments):
        return [
            PruneRule(
                match=arguments.match or "*",
                older_than=arguments.older_than,
                keep_last=arguments.keep_last,
                tags=arguments.tags,
            )
        ]
    if arguments.match is not None or arguments.tags is not None:
        raise UsageError("give --older-than or --keep-last, which say what goes")
    rules = rules_of(settings)
    if not rules and not (settings.hosted and settings.hosted.retention):
        raise UsageError(
            "give --older-than or --keep-last, or add rules below `retention` or "
            "`hosted.retention` to the configuration"
        )
    return rules


def _has_conditions(arguments: argparse.Namespace) -> bool:
    return arguments.older_than is not None or arguments.keep_last is not None


def _prune_hosted(settings: Settings, *, is_dry_run: bool) -> list[Item]:
    """Apply the rules of ``hosted.retention``. Conditions of the command are about the cache."""
    from mirror.operations.hosted_retention import run_hosted_retention
    from mirror.operations.local_actor import local_actor
    from mirror.store.marks import read_marks

    layout = find_layout(settings)
    marks = read_marks(layout)
    return asyncio.run(
        run_hosted_retention(
            layout, settings.hosted, marks, time.time(), local_actor(), is_dry_run=is_dry_run
        )
    )


async def _prune(
    settings: Settings, inventory: Inventory, rules: list[PruneRule]
) -> CleaningReport:
    from mirror.operations.prune import prune

    async with opened_store(settings) as store:
        return await prune(store, inventory, rules)


def _kept(report: CleaningReport, rules: Sequence[PruneRule]) -> list[str]:
    """Return a line for each reason that has kept images, with their number."""
    ages = {rule.older_than for rule in rules if rule.older_than is not None}
    young = age_text(ages.pop()) if len(ages) == 1 else "the time of their rule"
    counts: dict[str, int] = {}
    for item in report.items:
        if item.action == "kept" and item.kind == "image":
            key = item.why.partition(":")[0]
            if _USED_AGO.fullmatch(key):
                key = f"used within {young}"
            counts[key] = counts.get(key, 0) + 1
    return [f"kept {count_text(count, 'image')}: {why}" for why, count in sorted(counts.items())]
