"""What the commands that remove and verify content share: opening the data directory, reports.

Lives here: reading the inventory, opening the store beside a server, printing what went and why.
Must not know: what is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mirror.cli.messages import print_warnings
from mirror.cli.output import CommandFailed, print_line
from mirror.oci.text import size_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.inventory.model import Inventory
    from mirror.operations.cleaning_report import CleaningReport, Item
    from mirror.store.disk import Layout
    from mirror.store.store import Store

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
    """Parse a duration: the ``type`` of an argument."""
    from mirror.config.values import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is {error}") from None


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

    Raises what :func:`read_inventory` raises.
    """
    with giving_way():
        inventory = read_inventory(settings)
        assert inventory.contents is not None  # Asks each file for its size now.
        return inventory


def layout_of(settings: Settings) -> Layout:
    """Return the paths of the data directory."""
    from mirror.store.disk import Layout

    return Layout(Path(settings.data_dir).absolute())


def read_inventory(settings: Settings) -> Inventory:
    """Read the content of the data directory.

    Raises ``CommandFailed`` if there is none, and what the inventory raises if it is not readable.
    """
    from mirror.inventory.read import read_inventory
    from mirror.store.marks import read_marks

    layout = layout_of(settings)
    if not layout.root.is_dir():
        raise CommandFailed(
            f"{layout.root} does not exist: check data_dir and --config, or start the server, "
            "which creates it"
        )
    return read_inventory(layout, settings.upstreams, read_marks(layout), time.time())


@asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    """Open the data directory for changes, beside servers.

    Raises ``CommandFailed`` if a server could not write to the files that this process creates.
    """
    from mirror.store.store import Store

    owner = os.stat(settings.data_dir).st_uid
    if os.geteuid() == 0 and owner != 0:
        raise CommandFailed(
            f"{settings.data_dir} belongs to user {owner}: run the command as that user, so that "
            "the server can use the files that it writes"
        )
    store = await Store.open(settings.data_dir, settings.storage, print_warnings)
    try:
        if store.unwritable_reason is not None:
            raise CommandFailed(f"nothing can be removed: {store.unwritable_reason}")
        yield store
    finally:
        await store.close()


# --- reports --------------------------------------------------------------------------------------


def print_items(report: CleaningReport, *, is_json: bool) -> None:
    """Print the items of a report: one JSON object a line, or sentences."""
    for item in report.items:
        print_line(json.dumps(item.row()) if is_json else _sentence(item, report))


def _sentence(item: Item, report: CleaningReport) -> str:
    name = item.name or item.digest or ""
    size = size_text(item.bytes)
    if item.action == "removed":
        verb = "would remove" if report.is_dry_run else "removed"
        return f"{verb} {name} ({size}): {item.why}"
    if item.kind == "content" and item.name is not None:
        return f"  stays: {size}, {item.why}"
    return f"kept {name} ({size}): {item.why}"


def summary(report: CleaningReport, what: str, removed: Iterable[Item]) -> str:
    """Return the last line of a report, such as ``3 images removed, 1.2 GiB freed``."""
    count = sum(1 for _ in removed)
    verb = "would be removed" if report.is_dry_run else "removed"
    plural = "" if count == 1 else "s"
    return f"{count} {what}{plural} {verb}, {size_text(report.freed)} freed"
