"""``show``: the manifests and blobs of one image, what is in the cache, and who shares it.

Lives here: the arguments, the columns, the summary of the image. Must not know: how an inventory is
read.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mirror.cli import inventory as common
from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import load_inventory
from mirror.cli.listing import print_rows, print_text
from mirror.cli.output import CommandFailed, print_line
from mirror.cli.short_digests import image_or_short_name, whole_names
from mirror.cli.table_layout import Column
from mirror.oci.text import size_text

if TYPE_CHECKING:
    from mirror.inventory.model import Image, Inventory

_MAX_SHARED_NAMES = 3
"""Names of a cell: a base layer may be in hundreds of images."""
_INDENT = "  "


def add_parser(commands: Commands) -> None:
    """Add the parser of ``show``."""
    parser = commands.add_parser(
        "show",
        help="show the parts of an image: what is in the cache, and who shares it",
        description="Shows the index, manifests, configs, layers, signatures and other referrers "
        "of an image, with their sizes. Nothing is asked of the upstream.",
    )
    add_config(parser)
    add_json(parser)
    common.add_no_trunc(parser)
    parser.add_argument(
        "image",
        metavar="IMAGE",
        type=image_or_short_name,
        help="name of the image, such as nginx:1.27 or ghcr.io/org/app@sha256:…",
    )
    parser.set_defaults(run=show_image)


@common.collector_paused()
def show_image(arguments: argparse.Namespace) -> int:
    """Run ``show``. Returns the exit code."""
    settings = load_settings(arguments)
    (arguments.image,) = whole_names([arguments.image], settings)
    inventory = load_inventory(settings)
    from mirror.inventory.tree import image_tree, node_row

    name = arguments.image.with_default_tag()
    images = inventory.find(name)
    if not images:
        raise CommandFailed(_not_found(inventory, arguments))
    for number, image in enumerate(images):
        rows = [node_row(image, node) for node in image_tree(inventory, image)]
        if not arguments.is_json:
            if number:
                print_line("")
            _print_summary(inventory, image)
            rows = [row | _texts(row) for row in rows]
        columns, *narrower = _layouts(arguments)
        print_rows(
            *(columns, rows),
            is_json=arguments.is_json,
            narrower=narrower,
            is_whole=arguments.is_whole,
        )
    return 0


def _not_found(inventory: Inventory, arguments: argparse.Namespace) -> str:
    name = arguments.image.with_default_tag()
    others = [image.name for image in inventory.images if image.repository == name.repository]
    if others:
        return f"{name} is not in the cache: of its repository it has {', '.join(others[:5])}"
    return (
        f"{name} is not in the cache: `oci-mirror ls` lists what is, "
        f"`oci-mirror warm {name}` fetches it"
    )


def _print_summary(inventory: Inventory, image: Image) -> None:
    from mirror.inventory.json_rows import image_row

    row = image_row(inventory, image)
    where = "" if image.current_root in inventory.manifests else " (not in the cache)"
    lines = [
        f"digest     {image.root}",
        f"upstream   {image.current_root}{where}" if image.current_root != image.root else None,
        f"platforms  {', '.join(image.platforms) or '-'}",
        f"missing    {', '.join(image.missing_platforms)}" if image.missing_platforms else None,
        f"size       {size_text(image.size)}, of which rm frees {size_text(row['unique'])}",
        f"last used  {common.ago(inventory.now, image.used or None)}",
        f"confirmed  {common.ago(inventory.now, image.checked)}",
        f"state      {common.state_text(row)}",
    ]
    print_line(image.name)
    for line in lines:
        if line is not None:
            print_text(f"  {line}", indent=2, is_whole=True)
    print_line("")


def _layouts(arguments: argparse.Namespace) -> list[list[Column]]:
    """Return all columns, then those of narrower terminals."""
    content = Column("CONTENT", "content")
    digest = common.digest_column(arguments)
    size = Column("SIZE", "size", size_text, is_number=True)
    cached = Column("CACHED", "is_cached", lambda is_cached: "yes" if is_cached else "no")
    shared = Column("SHARED WITH", "shared", min_chars=20, is_name=True, is_sentence=True)
    return [
        [content, digest, size, cached, shared],
        [replace(content, min_chars=16), digest, size, cached, replace(shared, min_chars=12)],
    ]


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row that only people read."""
    words = [row["type"], row["platform"], row["artifact_type"]]
    if row["depth"] == 0 and row["type"] == "referrer":
        words.append(row["name"])
    names = row["shared_with"]
    shared = ", ".join(names[:_MAX_SHARED_NAMES])
    if len(names) > _MAX_SHARED_NAMES:
        shared += f", and {len(names) - _MAX_SHARED_NAMES} more"
    return {
        "content": _INDENT * row["depth"] + " ".join(word for word in words if word),
        "shared": shared or None,
    }
