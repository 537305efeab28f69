"""``history``: list the digests that a tag has named.

Lives here: the arguments, and how the history and the index become one list. Must not know: where
either is kept.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from mirror.cli.arguments import Commands, add_config, add_json, image_name, load_settings
from mirror.cli.data_directory import find_layout, opened_index
from mirror.cli.listing import print_rows
from mirror.cli.output import UsageError, print_note
from mirror.cli.table_layout import Column, short_digests
from mirror.oci.reference import Digest, Repository, Tag
from mirror.oci.text import time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mirror.history.stored_pull import TagDigest
    from mirror.store.layout import Layout
    from mirror.store.records import TagRecord


def add_parser(commands: Commands) -> None:
    """Add the parser of ``history``."""
    parser = commands.add_parser(
        "history",
        help="list the digests that a tag has named",
        description="Lists each digest that a tag has named, the newest first, with the times at "
        "which the upstream has named it first and last, and whether it is still on the disk.",
    )
    add_config(parser)
    add_json(parser)
    parser.add_argument(
        "--no-trunc", dest="is_whole", action="store_true", help="print whole digests"
    )
    parser.add_argument("image", metavar="IMAGE:TAG", type=image_name, help="image with a tag")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``history``. Returns the exit code."""
    from mirror.history.queries import open_history

    name = arguments.image.with_default_tag()
    if not isinstance(name.reference, Tag):
        raise UsageError(f"{name} is a digest, which never changes: name a tag")
    layout = find_layout(load_settings(arguments))
    with open_history(layout) as history:
        digests = history.tag_digests(name.repository, name.reference)
    record = asyncio.run(_read_record(layout, name.repository, name.reference))
    rows = build_rows(str(name), digests, record, lambda one: _part_on_disk(layout, one))
    columns = (
        Column("DIGEST", "digest", str if arguments.is_whole else short_digests),
        Column("FIRST SEEN", "first_seen"),
        Column("LAST SEEN", "last_seen"),
        Column("CACHED", "here"),
    )
    print_rows(columns, rows, is_json=arguments.is_json)
    if not rows:
        print_note(f"{name} has not been pulled through this mirror")
    return 0


async def _read_record(layout: Layout, repository: Repository, tag: Tag) -> TagRecord | None:
    if not layout.index.is_dir():
        return None
    # Not without the saved names: a lost index would be marked as restored, and its names be lost.
    async with opened_index(layout) as index:
        return await index.tag(repository, tag)


def _part_on_disk(layout: Layout, digest: str) -> str:
    """Return ``complete``, ``partial`` or ``no``. A rollback to what is complete needs no fetch."""
    from mirror.operations.marking import count_missing

    image = Digest.parse(digest)
    if not layout.blob(image).is_file():
        return "no"
    return "partial" if count_missing(layout, image) else "complete"


def build_rows(
    name: str,
    digests: Iterable[TagDigest],
    record: TagRecord | None,
    part_on_disk: Callable[[str], str],
) -> list[dict[str, Any]]:
    """Return the rows of ``history``, the newest first.

    Args:
        name: The name of the image.
        digests: From the history, which may be lost.
        record: The tag record of the index, which has the latest confirmation, and some earlier
            digests. None: there is none.
        part_on_disk: Returns how much of an image is on the disk.
    """
    seen: dict[tuple[str, int], float] = {}
    """(digest, first seen in whole seconds) -> last seen."""
    found = [(one.digest, one.first_seen, one.last_seen) for one in digests]
    if record is not None:
        found.append((str(record.digest), record.first_seen, record.confirmed))
        found += [(str(p.digest), p.first_seen, p.last_seen) for p in record.previous_digests]
    for digest, first_seen, last_seen in found:
        key = (digest, int(first_seen))
        seen[key] = max(seen.get(key, 0.0), last_seen)
    order = sorted(seen.items(), key=lambda item: (item[0][1], item[1]), reverse=True)
    current = str(record.digest) if record is not None else None
    rows: list[dict[str, Any]] = []
    for (digest, first_seen), last_seen in order:
        if rows and rows[-1]["digest"] == digest:
            # The index had forgotten it in between, or only one of both has all times.
            rows[-1]["first_seen"] = time_text(first_seen or None) or rows[-1]["first_seen"]
            continue
        is_current = digest == current and not any(row["is_current"] for row in rows)
        rows.append(
            {
                "image": name,
                "digest": digest,
                # An index that was restored knows no times.
                "first_seen": time_text(first_seen or None),
                "last_seen": time_text(last_seen or None),
                "is_current": is_current,
                "here": part_on_disk(digest),
            }
        )
    return rows
