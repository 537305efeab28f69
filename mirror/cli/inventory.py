"""What the commands that list the data directory share.

Lives here: their common arguments, and the texts of values. Must not know: what a command shows.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mirror.cli.output import print_note
from mirror.cli.table_layout import Column, short_digests
from mirror.oci.text import age_text, count_text, size_text

if TYPE_CHECKING:
    from mirror.inventory.model import Inventory


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run the block without garbage collections.

    They would look at a million objects several times, and none of these is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def add_no_trunc(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-trunc``, as ``is_whole``."""
    parser.add_argument(
        "--no-trunc", dest="is_whole", action="store_true", help="print whole digests"
    )


def digest_column(arguments: argparse.Namespace, title: str = "DIGEST") -> Column:
    """Return the column of digests. Those of :func:`add_no_trunc` are printed whole."""
    return Column(title, "digest", str if arguments.is_whole else short_digests)


def state_text(row: dict[str, Any], max_reason_chars: int | None = None) -> str:
    """Return the state of an image with the reasons.

    Args:
        row: Its row of ``ls --json``.
        max_reason_chars: Characters of a reason that others have written. None: all of them.
    """
    if row["state"] == ["complete"]:
        return "complete"
    if row["absent_why"] is row["stale_why"] is row["blocked_why"] and not row["missing_parts"]:
        return ", ".join(row["state"])  # As of nearly all.
    reasons = {
        "partial": f"lacks {count_text(row['missing_parts'], 'part')}, "
        f"at least {size_text(row['missing_bytes'])}",
        "absent": row["absent_why"] and f"its manifest is not in the cache: {row['absent_why']}",
        "stale": row["stale_why"],
        "blocked": _shorten(row["blocked_why"] or "", max_reason_chars),
    }
    words = (f"{word} ({reasons[word]})" if reasons.get(word) else word for word in row["state"])
    return ", ".join(words)


def _shorten(reason: str, max_chars: int | None) -> str:
    """Return the beginning of a reason. ``max_chars`` None: all of it."""
    if max_chars is None or len(reason) <= max_chars:
        return reason
    return f"{reason[: max_chars - 3].rstrip()}..."


def ago(now: float, seconds: float | None) -> str:
    """Return a time in seconds since the epoch as an age, such as ``3 d ago``."""
    return "-" if seconds is None else f"{age_text(now - seconds)} ago"


def note_if_empty(inventory: Inventory, data_dir: str) -> None:
    """Say on standard error that there is no image at all: an empty table explains nothing."""
    if not inventory.images and next(inventory.stream_hosted(), None) is None:
        print_note(
            f"no image in {data_dir} yet: pull one through the mirror, or run `oci-mirror warm`"
        )
