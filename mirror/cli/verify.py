"""``verify``: hash content, and check that images are complete.

Lives here: its arguments, and what is printed. Must not know: how content is hashed or fetched
(:mod:`mirror.operations.verify`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.cleaning import has_failures, read_inventory_gently
from mirror.cli.data_directory import find_layout, load_inventory, opened_store
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.listing import print_text
from mirror.cli.messages import print_warnings
from mirror.cli.output import print_line, print_note
from mirror.cli.rm import find_images
from mirror.cli.short_digests import image_or_short_name, whole_names
from mirror.oci.text import count_text, size_text

_MAX_ABSENT: Final = 20
"""Tags without content that are named one by one. There may be thousands: eviction leaves them."""

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.inventory.model import Image, Inventory
    from mirror.oci.image_name import ImageName
    from mirror.operations.verify import Subset, VerifyReport


def add_parser(commands: Commands) -> None:
    """Add ``verify``."""
    parser = commands.add_parser(
        "verify",
        help="hash content, and check that images are complete",
        description="Hashes content, moves damaged content to quarantine/, and checks that no "
        "image lacks content. Each finding names the command that repairs it. It runs with the "
        "lowest priority, so that a running server does not notice it. Exit code 1 if an image "
        "has damage that was not repaired.",
    )
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="*",
        type=image_or_short_name,
        help="name of an image (default: all content)",
    )
    parser.add_argument(
        "--subset",
        metavar="N/M",
        type=_subset,
        help="hash only one part of M, such as 1/7 on the first day of a week",
    )
    parser.add_argument(
        "--repair", dest="is_repairing", action="store_true", help="fetch what is broken again"
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _subset(text: str) -> Subset:
    from mirror.operations.verify import Subset

    try:
        return Subset.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises ``CommandFailed`` if an image is not known."""
    from mirror.store.quarantine import put_back_moving

    settings = load_settings(arguments)
    put_back_moving(find_layout(settings))
    inventory = read_inventory_gently(settings)
    names = whole_names(arguments.images, settings)
    images = _find(inventory, names) if names else None
    work = _verify_and_repair if arguments.is_repairing else _verify
    report = asyncio.run(work(settings, inventory, images, arguments.subset))
    _print(report, is_json=arguments.is_json)
    is_refused = has_failures("not everything could be verified", report.failures)
    return EX_FAILED if report.has_damage or is_refused else 0


def _find(inventory: Inventory, names: list[ImageName]) -> list[Image]:
    """Return the images of names, also of those whose manifest is not on disk.

    Raises ``CommandFailed`` if a name is not known.
    """
    wanted = {str(name.with_default_tag()) for name in names}
    absent = [image for image in inventory.absent if image.name in wanted]
    known = {image.name for image in absent}
    others = [name for name in names if str(name.with_default_tag()) not in known]
    return [*absent, *find_images(inventory, others)]


async def _verify(
    settings: Settings, inventory: Inventory, images: list[Image] | None, subset: Subset | None
) -> VerifyReport:
    from mirror.operations.verify import verify

    async with opened_store(settings) as store:
        return await verify(store, inventory, images, subset, _progress().show)


async def _verify_and_repair(
    settings: Settings, inventory: Inventory, images: list[Image] | None, subset: Subset | None
) -> VerifyReport:
    # Imported here: it imports aiohttp, which other commands do not need.
    from mirror.operations.own_requests import open_recorded_mirror
    from mirror.operations.refetch import refetch
    from mirror.operations.verify import repair, verify
    from mirror.threads import run_in_thread

    async with open_recorded_mirror(settings, print_warnings) as mirror:
        report = await verify(mirror.store, inventory, images, subset, _progress().show)
        if report.problems:
            await repair(
                report,
                inventory,
                lambda: run_in_thread(load_inventory, settings),
                lambda repository, digest, kind: refetch(mirror, repository, digest, kind),
            )
        return report


class _Progress:
    """Prints how much was hashed, each time that another percent is done."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._percent = -1

    def show(self, done: int, total: int) -> None:
        """Show ``done`` of ``total`` bytes."""
        percent = 100 * done // max(total, 1)
        if self._is_shown and percent != self._percent:
            self._percent = percent
            end = "\n" if done >= total else "\r"
            sys.stderr.write(f"{size_text(done)} of {size_text(total)}, {percent} %{end}")
            sys.stderr.flush()


def _progress() -> _Progress:
    return _Progress(is_shown=sys.stderr is not None and sys.stderr.isatty())


def _print(report: VerifyReport, *, is_json: bool) -> None:
    told = 0
    for problem in report.problems:
        if is_json:
            print_line(json.dumps(problem.row()))
            continue
        told += problem.problem == "absent"
        if problem.problem == "absent" and told > _MAX_ABSENT:
            continue
        image = f" {problem.image}" if problem.image else ""
        print_text(f"{problem.problem}{image} {problem.digest}: {problem.what}", indent=4)
        if problem.is_repaired:
            print_text("  fetched again")
        elif problem.command is not None:
            verb = "repair" if problem.is_damage else "fetch"
            print_text(f"  {verb} it with: {problem.command}", indent=2, is_whole=True)
    for error in report.errors:
        print_note(f"not fetched: {error}")
    if not is_json:
        if told > _MAX_ABSENT:
            print_line(
                f"absent: {told - _MAX_ABSENT} more: oci-mirror ls --all --filter state=absent"
            )
        print_line(_summary(report))


def _summary(report: VerifyReport) -> str:
    damaged = [problem for problem in report.problems if problem.is_damage]
    repaired = sum(problem.is_repaired for problem in damaged)
    parts = [count_text(len(damaged), "problem") + (f", {repaired} repaired" if repaired else "")]
    for kind, words in (("incomplete", "lack content"), ("absent", "are not in the cache")):
        found = [one for one in report.problems if one.problem == kind and not one.is_repaired]
        if found:
            verb = words if len(found) > 1 else words.replace("lack", "lacks").replace("are", "is")
            parts.append(f"{count_text(len(found), 'image')} {verb}")
    contents, images = count_text(report.contents, "content"), count_text(report.images, "image")
    return f"{contents} ({size_text(report.bytes)}) hashed, {images} checked: {'; '.join(parts)}"
