"""``rm``: remove images.

Lives here: its arguments, and what is printed. Must not know: how images are removed
(:mod:`mirror.operations.removal`).
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.cleaning import add_dry_run, exit_code, print_items, summary
from mirror.cli.data_directory import load_inventory, opened_store
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.output import CommandFailed, UsageError, print_line, print_note
from mirror.cli.short_digests import ShortName, image_or_short_name, whole_names

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.inventory.model import Image, Inventory
    from mirror.oci.image_name import ImageName
    from mirror.operations.cleaning_report import CleaningReport


def add_parser(commands: Commands) -> None:
    """Add ``rm``."""
    parser = commands.add_parser(
        "rm",
        help="remove images from the cache, or delete hosted ones",
        description="Removes the names, and all content that no other name reaches. Of a hosted "
        "image, it deletes the tag, or the manifest of a digest. Says what stays, and why. A "
        "digest also stands for the tags of its repository that have it. Works beside a running "
        "server.",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", type=_one_image, help="name of an image"
    )
    parser.add_argument(
        "--upload",
        dest="uploads",
        metavar="ID",
        action="append",
        default=[],
        help="cancel an upload in progress to a hosted repository instead (ls --uploads "
        "lists their ids). May be repeated",
    )
    parser.add_argument(
        "--force",
        dest="may_change_immutable",
        action="store_true",
        help="also delete hosted images of immutable tags (hosted.immutable_tags)",
    )
    add_dry_run(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _one_image(text: str) -> ImageName | ShortName:
    if set("*?") & set(text):
        raise argparse.ArgumentTypeError(
            f"'{text}': rm takes no pattern: use `oci-mirror prune --match '{text}'`"
        )
    return image_or_short_name(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        CommandFailed: An image is not known. Nothing is removed.
        UsageError: There are neither images nor uploads, or both.
    """
    settings = load_settings(arguments)
    if bool(arguments.images) is bool(arguments.uploads):
        raise UsageError("name images to remove, or uploads to cancel with --upload ID")
    if arguments.uploads:
        if arguments.is_dry_run:
            raise UsageError("--dry-run is about images: leave it out, or --upload")
        report = asyncio.run(_end_uploads(settings, arguments.uploads))
        print_items(report, is_json=arguments.is_json)
        return 0
    inventory = load_inventory(settings)
    images = find_images(inventory, whole_names(arguments.images, settings))
    report = _remove(
        settings,
        inventory,
        images,
        is_dry_run=arguments.is_dry_run,
        may_change_immutable=arguments.may_change_immutable,
    )
    print_items(report, is_json=arguments.is_json)
    if not arguments.is_json:
        print_line(summary(report, "image", report.removed("image")))
    has_kept = any(item.action == "kept" and item.kind == "image" for item in report.items)
    return exit_code(report) or (EX_FAILED if has_kept else 0)


def find_images(inventory: Inventory, names: list[ImageName]) -> list[Image]:
    """Return the images of all names. Raises ``CommandFailed`` if one names none."""
    images: dict[Image, None] = {}
    unknown = []
    for name in names:
        name = name.with_default_tag()
        found = inventory.find(name)
        images.update(dict.fromkeys(found))
        if not found:
            unknown.append(str(name))
    for text in unknown[:-1]:
        print_note(f"{text} is not in the cache")
    if unknown:
        raise CommandFailed(f"{unknown[-1]} is not in the cache: `oci-mirror ls` lists the images")
    return list(images)


def _remove(
    settings: Settings,
    inventory: Inventory,
    images: list[Image],
    *,
    is_dry_run: bool,
    may_change_immutable: bool,
) -> CleaningReport:
    from mirror.operations.hosted_removal import plan_removal_by_name, remove_by_name
    from mirror.operations.local_actor import local_actor

    whys = dict.fromkeys(images, "as asked for")
    if is_dry_run:
        return plan_removal_by_name(
            settings, inventory, images, whys, may_change_immutable=may_change_immutable
        )

    async def remove() -> CleaningReport:
        async with opened_store(settings) as store:
            return await remove_by_name(
                settings,
                store,
                inventory,
                images,
                whys,
                local_actor(),
                may_change_immutable=may_change_immutable,
            )

    return asyncio.run(remove())


async def _end_uploads(settings: Settings, upload_ids: list[str]) -> CleaningReport:
    from mirror.operations.hosted_removal import end_uploads

    async with opened_store(settings) as store:
        return await end_uploads(settings, store, upload_ids)
