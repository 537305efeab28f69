"""``du``: what fills the disk, what could go, and what an eviction takes next.

Lives here: the arguments, the columns, the line with the quota. Must not know: how an inventory is
read, how an eviction chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mirror.cli import inventory as common
from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import layout_of, load_inventory
from mirror.cli.listing import print_rows, since_text
from mirror.cli.output import print_line
from mirror.cli.table_layout import Column
from mirror.oci.text import size_text

if TYPE_CHECKING:
    from mirror.config.settings import Hosted, Storage
    from mirror.inventory.leftovers import OtherFile
    from mirror.inventory.model import Inventory
    from mirror.observability.hosted_events import HostedUsage
    from mirror.store.layout import Layout

_NEXT: Final = 20
"""Rows of ``--verbose``: more do not fit on a screen."""
_MAX_SUMMED: Final = 100
"""Contents that are summed to these rows. To find the images of one takes up to 2 ms."""
_LEFT_OUT: Final = ("contents", "shared")
"""Keys of the columns that a narrow terminal does not show."""
_MAX_IMAGES: Final = 3
"""Names of a cell: a base layer may be in hundreds of images."""


def add_parser(commands: Commands) -> None:
    """Add the parser of ``du``."""
    parser = commands.add_parser(
        "du",
        help="show what fills the disk, and what an eviction takes next",
        description="Shows the content of the data directory by type. ACTIVE is content that an "
        "image or a mark reaches. RECLAIMABLE is all other, which `gc` removes once it is older "
        "than its --grace (a day).",
    )
    add_config(parser)
    add_json(parser)
    common.add_no_trunc(parser)
    parser.add_argument(
        "--by",
        choices=("type", "upstream", "repository"),
        default="type",
        help="one row for each type (default), upstream or repository",
    )
    parser.add_argument(
        *("-v", "--verbose"),
        dest="is_verbose",
        action="store_true",
        help="also list what an eviction removes next, by the images that lack it then",
    )
    parser.set_defaults(run=show_usage)


@common.collector_paused()
def show_usage(arguments: argparse.Namespace) -> int:
    """Run ``du``. Returns the exit code."""
    settings = load_settings(arguments)
    inventory = load_inventory(settings)
    from mirror.inventory import usage
    from mirror.inventory.hosted_names import read_hosted_usage
    from mirror.inventory.leftovers import find_other_files

    hosted = read_hosted_usage(layout_of(settings))
    leftovers = find_other_files(layout_of(settings))
    types = usage.usage_by_type(inventory, leftovers)
    if arguments.by == "type":
        rows = [{"kind": "type"} | asdict(one) for one in types]
        columns: tuple[Column, ...] = _TYPE_COLUMNS
    else:
        rows = _group_rows(inventory, arguments.by)
        columns = _group_columns(inventory.now, arguments.by)
    if not arguments.is_json:
        rows = [row for row in rows if row["size"] or row.get("total") or row.get("images")]
        if arguments.by == "type" and rows:
            rows.append({"type": "total"} | _sums(rows))
    narrower = [[one for one in columns if one.key not in _LEFT_OUT]]
    print_rows(columns, rows, is_json=arguments.is_json, narrower=narrower)
    if not arguments.is_json:
        print_line("")
        cached = max(0, usage.total_size(types) - hosted.bytes)
        print_line(_quota_text(cached, settings.storage))
        if settings.hosted is not None or hosted.contents:
            print_line(_hosted_text(hosted, settings.hosted))
        print_line(_beside_text(layout_of(settings)))
    elif settings.hosted is not None:
        quota = settings.hosted.max_size
        print_rows((), [{"kind": "hosted", **asdict(hosted), "quota": quota}], is_json=True)
    if arguments.is_verbose and arguments.is_json:
        print_rows((), _eviction_rows(inventory, leftovers, settings.storage, _NEXT), is_json=True)
    elif arguments.is_verbose:
        contents = _eviction_rows(inventory, leftovers, settings.storage, _MAX_SUMMED)
        evictions = _by_image(contents)[:_NEXT]
        print_line("")
        print_line("Next to be evicted:" if evictions else "Nothing can be evicted.")
        if evictions:
            print_rows(_eviction_columns(inventory.now), evictions, is_json=False)
    return 0


def _sums(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the sums of the numbers of rows, by key."""
    keys = ("total", "active", "size", "reclaimable")
    return {key: sum(row[key] for row in rows) for key in keys}


_TYPE_COLUMNS: Final = (
    Column("TYPE", "type"),
    Column("TOTAL", "total", is_number=True),
    Column("ACTIVE", "active", is_number=True),
    Column("SIZE", "size", size_text, is_number=True),
    Column("RECLAIMABLE", "reclaimable", size_text, is_number=True),
)


def _group_columns(now: float, by: str) -> tuple[Column, ...]:
    return (
        Column(by.upper(), "name", min_chars=16, is_name=True),
        Column("IMAGES", "images", is_number=True),
        Column("CONTENTS", "contents", is_number=True),
        Column("SIZE", "size", size_text, is_number=True),
        Column("SHARED", "shared", size_text, is_number=True),
        Column("UNIQUE", "unique", size_text, is_number=True),
        Column("LAST USED", "last_used", since_text(now)),
    )


def _group_rows(inventory: Inventory, by: str) -> list[dict[str, Any]]:
    from mirror.inventory import usage
    from mirror.oci.text import time_text

    groups = usage.usage_by_group(
        inventory,
        lambda image: image.repository.upstream if by == "upstream" else str(image.repository),
    )
    return [
        {
            "kind": by,
            "name": group.name,
            "images": group.images,
            "contents": group.contents,
            "size": group.size,
            "shared": group.shared,
            "unique": group.unique,
            "last_used": time_text(group.used or None),
        }
        for group in groups
    ]


def _quota_text(size: int, storage: Storage) -> str:
    begins = int(storage.max_size * storage.high_water)
    share = f"{size / storage.max_size:.0%}" if storage.max_size else "-"
    share = "<1%" if size and share == "0%" else share
    return (
        f"{size_text(size)} of {size_text(storage.max_size)} ({share}); "
        f"evictions begin at {size_text(begins)}"
    )


def _hosted_text(hosted: HostedUsage, settings: Hosted | None) -> str:
    text = f"hosted: {size_text(hosted.bytes)}"
    if settings is not None:
        share = f"{hosted.total / settings.max_size:.0%}" if settings.max_size else "-"
        text += f", {size_text(hosted.metadata)} of metadata, and {size_text(hosted.reserved)}"
        text += f" reserved by {hosted.uploads} uploads, of "
        text += f"{size_text(settings.max_size)} ({share})"
    return f"{text}; it is never evicted"


def _beside_text(layout: Layout) -> str:
    """Return the sizes of what is no content, so that it does not count for the quota."""
    history, index = _size_below(layout.history), _size_below(layout.index)
    return f"beside the quota: history {size_text(history)}, index {size_text(index)}"


def _size_below(directory: Path) -> int:
    """Return the bytes of all files below a directory. Another process may remove some of them."""
    size = 0
    for path in directory.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def _eviction_columns(now: float) -> tuple[Column, ...]:
    return (
        Column(*("IMAGES", "images", _names_text), min_chars=24, is_name=True, is_sentence=True),
        Column("CONTENTS", "contents", is_number=True),
        Column("SIZE", "size", size_text, is_number=True),
        Column("LAST USED", "last_used", since_text(now)),
        Column("WHY", "why", min_chars=16, is_sentence=True),
    )


def _by_image(contents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for all contents of the same images, in the order of the first of them."""
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for one in contents:
        key = (*one["images"], one["why"])
        row = rows.setdefault(key, one | {"contents": 0, "size": 0})
        row["contents"] += 1
        row["size"] += one["size"]
    return list(rows.values())


def _names_text(names: list[str]) -> str:
    text = ", ".join(names[:_MAX_IMAGES]) or "-"
    return f"{text}, and {len(names) - _MAX_IMAGES} more" if len(names) > _MAX_IMAGES else text


def _eviction_rows(
    inventory: Inventory, leftovers: list[OtherFile], storage: Storage, limit: int
) -> Iterable[dict[str, Any]]:
    from mirror.inventory import usage
    from mirror.oci.text import time_text

    enough = max(1, int(storage.max_size * (storage.high_water - storage.low_water)))
    for one in usage.next_evictions(inventory, leftovers, enough, limit):
        yield {
            "kind": "eviction",
            "digest": str(one.digest),
            "type": one.type,
            "size": one.size,
            "last_used": time_text(one.used),
            "why": one.why,
            "images": [image.name for image in one.images],
        }
