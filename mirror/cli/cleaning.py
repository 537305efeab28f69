"""What the commands that remove and verify content share: their priority, and their reports.

Lives here: giving way to a server, and printing what went and why. Must not know: what is removed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from mirror.cli.data_directory import load_inventory
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.listing import print_text
from mirror.cli.output import print_line, print_note
from mirror.oci.text import count_text, printable, size_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.inventory.model import Inventory
    from mirror.operations.cleaning_report import CleaningReport, Item

_NICENESS: Final = 10
"""A server on the same machine goes first."""


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--dry-run``, as ``is_dry_run``."""
    parser.add_argument(
        "--dry-run",
        dest="is_dry_run",
        action="store_true",
        help="remove nothing, and print what would go",
    )


def duration(text: str) -> float:
    """Parse a duration with a unit: the ``type`` of an argument."""
    from mirror.config.values import parse_age

    try:
        return parse_age(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text.strip()}: {error}") from None


@contextmanager
def giving_way() -> Iterator[None]:
    """Use only processor time that nothing else wants, while the block runs.

    The block must hold no lock that a server waits for.

    After it, a server on the same machine still goes first.
    """
    with suppress(OSError):
        os.nice(_NICENESS)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def read_inventory_gently(settings: Settings) -> Inventory:
    """Read the content of the data directory with the lowest priority, for long operations.

    Raises what :func:`load_inventory` raises.
    """
    with giving_way():
        inventory = load_inventory(settings)
        assert inventory.contents is not None  # Asks each file for its size now.
        return inventory


# --- reports --------------------------------------------------------------------------------------


def print_items(report: CleaningReport, *, is_json: bool) -> None:
    """Print the items of a report: one JSON object a line, or sentences."""
    for item in report.items:
        if is_json:
            print_line(json.dumps(item.row()))
        else:
            print_text(_sentence(item, report), indent=4)


def _sentence(item: Item, report: CleaningReport) -> str:
    name = item.name or item.digest or ""
    size = size_text(item.bytes)
    if item.action == "removed":
        verb = "would remove" if report.is_dry_run else "removed"
        return f"{verb} {name} ({size}): {item.why}"
    if item.kind == "content" and item.name is not None:
        return f"  stays: {size}, {item.why}"
    return f"kept {name} ({size}): {item.why}"


def exit_code(report: CleaningReport) -> int:
    """Return the exit code of a report, and say why if the disk has refused something."""
    return EX_FAILED if has_failures("not everything was removed", report.failures) else 0


def has_failures(what: str, failures: Sequence[str]) -> bool:
    """Return whether the disk has refused something, and say what, in one line.

    Args:
        what: What this means for the command.
        failures: Path, reason and remedy of each.
    """
    if failures:
        more = f" ({len(failures) - 1} more)" if len(failures) > 1 else ""
        print_note(printable(f"{what}: {failures[0]}{more}"))
    return bool(failures)


def summary(report: CleaningReport, what: str, removed: Iterable[Item]) -> str:
    """Return the last line of a report, such as ``3 images removed, 1.2 GiB freed``."""
    count = sum(1 for _ in removed)
    verb = "would be removed" if report.is_dry_run else "removed"
    return f"{count_text(count, what)} {verb}, {size_text(report.freed)} freed"
