"""``warm``: fetch images ahead.

Lives here: its arguments, the lists that name images, and what is printed. Must not know: how
images are fetched (:mod:`mirror.operations.warm`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirror.cli.arguments import Commands, add_config, add_json, image_name, load_settings
from mirror.cli.data_directory import opened_mirror
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.listing import is_terminal, print_text
from mirror.cli.messages import print_warnings
from mirror.cli.output import UsageError, flush, print_failure, print_line, print_note
from mirror.cli.progress import Bars, label_of, open_bars
from mirror.cli.table_layout import familiar_names, short_digests
from mirror.oci.image_name import ImageName
from mirror.oci.platform import Platform
from mirror.oci.text import age_text, count_text, size_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.operations.image_lists import ImageList
    from mirror.operations.warm import ContentProgress, ImageReport, WarmOptions

STDIN = "-"
"""Name of the standard input in place of a file."""


def add_parser(commands: Commands) -> None:
    """Add ``warm``."""
    parser = commands.add_parser(
        "warm",
        help="fetch images before clients ask for them",
        description="Fetches images as a client's pull would, so that later pulls are served from "
        "the disk. Content that is on disk is not fetched again, and an interrupted fetch is "
        "resumed. Works beside a running server, and without one.",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", type=image_name, help="name of an image"
    )
    parser.add_argument(
        "--file",
        metavar="LIST",
        action="append",
        default=[],
        help="file with one image a line, or - for standard input; # begins a comment",
    )
    parser.add_argument(
        "--from-manifests",
        metavar="DIR",
        action="append",
        default=[],
        help="directory or file with Kubernetes objects, Compose files or the output of "
        "`helm template`, or - for standard input",
    )
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH",
        dest="platforms",
        action="append",
        default=[],
        type=_platform,
        help="fetch only this platform of each image, such as linux/amd64; may be repeated "
        "(default: all)",
    )
    parser.add_argument(
        "--referrers",
        dest="has_referrers",
        action="store_true",
        help="fetch signatures, SBOMs and other referrers, too",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_jobs,
        default=4,
        help="contents that are fetched at the same time, from 1 to 64 (default: 4)",
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _platform(text: str) -> Platform:
    try:
        return Platform.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is {error}") from None


def _jobs(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:4]) <= 64:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to 64")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises :class:`mirror.cli.output.UsageError` if no image is named."""
    if not arguments.images and not arguments.file and not arguments.from_manifests:
        raise UsageError("name an image, or give --file or --from-manifests")
    settings = load_settings(arguments)
    found = read_lists(arguments.images, arguments.file, arguments.from_manifests)
    for problem in found.problems:
        print_note(problem)
    # Imported here: it imports aiohttp, which other commands do not need.
    from mirror.operations.warm import WarmOptions

    options = WarmOptions(
        platforms=frozenset(arguments.platforms),
        has_referrers=arguments.has_referrers,
        jobs=arguments.jobs,
    )
    reports = asyncio.run(_warm(settings, list(found.images), options, is_json=arguments.is_json))
    is_complete = all(report.is_complete for report in reports)
    return 0 if is_complete and not found.problems else EX_FAILED


def read_lists(images: list[ImageName], files: list[str], manifests: list[str]) -> ImageList:
    """Read all lists of images.

    Args:
        images: Images that the command line names.
        files: Files with one image a line.
        manifests: Files and directories with manifests.
    """
    from mirror.operations.image_lists import (
        ImageList,
        add_documents,
        add_file,
        add_lines,
        decode,
        find_files,
        read_text,
    )

    found = ImageList({image.with_default_tag(): "command line" for image in images})
    for name in files:
        try:
            text = decode(_read_stdin()) if name == STDIN else read_text(Path(name))
        except OSError as error:
            found.problems.append(f"{name}: {error.strerror or error}")
        except ValueError as error:
            found.problems.append(f"{name}: {error}")
        else:
            add_lines(found, text, name)
    for name in manifests:
        if name != STDIN:
            for path in find_files(Path(name), found):
                add_file(found, path, os.environ)
            continue
        try:
            add_documents(found, decode(_read_stdin()), STDIN, os.environ)
        except ValueError as error:
            found.problems.append(f"{STDIN}: {error}")
    return found


def _read_stdin() -> bytes:
    from mirror.operations.yaml_documents import MAX_MANIFESTS_BYTES

    return sys.stdin.buffer.read(MAX_MANIFESTS_BYTES + 1) if sys.stdin is not None else b""


async def _warm(
    settings: Settings, images: list[ImageName], options: WarmOptions, *, is_json: bool
) -> list[ImageReport]:
    from mirror.operations.upkeep import start_upkeep
    from mirror.operations.warm import ImageReport, warm

    with open_bars("images", len(images), is_shown=not is_json) as bars:

        def report(event: ContentProgress | ImageReport) -> None:
            if isinstance(event, ImageReport):
                bars.count()
                if is_json or event.is_complete:
                    print_report(event, is_json=is_json)
            else:
                _move_bar(bars, event)

        async with opened_mirror(settings) as mirror:
            await start_upkeep(mirror.store, mirror.single_flight, print_warnings)
            reports = await warm(mirror, images, options, report)
    if not is_json:
        _print_end(reports)
    return reports


def _print_end(reports: list[ImageReport]) -> None:
    """Print the failures, which a long list would hide, and how many images are complete."""
    failed = [report for report in reports if not report.is_complete]
    for report in failed:
        print_report(report, is_json=False)
    if len(reports) > 1:
        complete = len(reports) - len(failed)
        print_line(f"{complete} complete" + (f", {len(failed)} failed" if failed else ""))


def _move_bar(bars: Bars, progress: ContentProgress) -> None:
    key = (progress.image, progress.digest)
    if progress.state == "fetching":
        label = label_of(str(progress.image), str(progress.digest))
        bars.move(key, label, progress.position, progress.size)
    else:
        bars.end(key)


def print_report(report: ImageReport, *, is_json: bool) -> None:
    """Print what became of an image: a line, or a JSON object. An error goes to standard error."""
    if is_json:
        print_line(json.dumps(warm_row(report)))
    elif report.is_complete:
        added = f"{report.added} new, {size_text(report.added_bytes)}" if report.added else "no new"
        whole = f"{count_text(report.contents, 'content')}, {size_text(report.bytes)}"
        digest = short_digests(str(report.digest))
        took = age_text(report.seconds)
        name = familiar_names(str(report.image)) if is_terminal() else str(report.image)
        print_text(f"{name}  complete  {digest}  {whole} ({added})  {took}", indent=4)
    else:
        print_failure(report.image, report.error)
    if report.is_complete and report.missing_platforms:
        names = ", ".join(map(str, report.missing_platforms))
        print_note(f"warning: {report.image} has no {names}")
    flush()


def warm_row(report: ImageReport) -> dict[str, Any]:
    """Return the JSON object of a report (``docs/commands.md``)."""
    return {
        "image": str(report.image),
        "digest": None if report.digest is None else str(report.digest),
        "state": "complete" if report.is_complete else "failed",
        "error": report.error or None,
        "contents": report.contents,
        "bytes": report.bytes,
        "added": report.added,
        "added_bytes": report.added_bytes,
        "referrers": report.referrers,
        "missing_platforms": [str(platform) for platform in report.missing_platforms],
        "seconds": round(report.seconds, 3),
    }
