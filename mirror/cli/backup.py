"""``backup`` and ``restore``: the hosted images as an OCI image layout.

Lives here: their arguments, and what is printed. Must not know: what a backup has, how it is read
(:mod:`mirror.operations.write_backup`, :mod:`mirror.operations.restore`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.cleaning import giving_way
from mirror.cli.data_directory import find_layout, opened_store
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.output import CommandFailed, print_line, print_note
from mirror.oci.text import printable, size_text
from mirror.store.hosted_marker import has_hosted_names

if TYPE_CHECKING:
    from mirror.config.settings import Hosted, Settings
    from mirror.operations.restore_report import RestoreReport

_MAX_PROBLEMS: Final = 20
"""Problems that are printed, one a line."""


def add_parser(commands: Commands) -> None:
    """Add ``backup`` and ``restore``."""
    writing = commands.add_parser(
        "backup",
        help="write all hosted images to a directory or a tar file",
        description="Writes all images of the hosted repositories to an OCI image layout, as of "
        "one moment, while clients push and pull. A directory with an earlier backup is brought up "
        "to date. A run that was killed leaves the earlier backup as it was, and is run again.",
    )
    writing.add_argument("target", metavar="TARGET", type=Path, help="directory, or FILE.tar")
    add_config(writing)
    add_json(writing)
    writing.set_defaults(run=_backup)
    reading = commands.add_parser(
        "restore",
        help="bring the images of a backup into the hosted repositories",
        description="Reads an OCI image layout that `backup` has written, or that has full names "
        "of images. Verifies each content. Works beside a running server, and on an empty data "
        "directory. A run that was killed is run again.",
    )
    reading.add_argument("source", metavar="SOURCE", type=Path, help="directory, or tar file")
    reading.add_argument(
        "--force",
        dest="may_replace",
        action="store_true",
        help="replace tags that name another manifest now",
    )
    add_config(reading)
    add_json(reading)
    reading.set_defaults(run=_restore)


def _hosted_of(settings: Settings) -> Hosted:
    if settings.hosted is None:
        raise CommandFailed("the configuration has no section hosted: nothing is hosted")
    return settings.hosted


def _backup(arguments: argparse.Namespace) -> int:
    from mirror.operations.write_backup import write_backup

    settings = load_settings(arguments)
    layout, hosted = find_layout(settings), _hosted_of(settings)
    if not has_hosted_names(layout):
        raise CommandFailed(f"{layout.root} has no hosted repositories: nothing was pushed yet")
    with giving_way():
        report = write_backup(layout, hosted.name, arguments.target)
    if arguments.is_json:
        print_line(json.dumps(report.row()))
    else:
        print_line(
            f"{report.images} images, {report.contents} contents, {size_text(report.bytes)} in "
            f"{arguments.target}; {size_text(report.added_bytes)} of it new"
        )
    mode = arguments.target.stat().st_mode
    if mode & 0o077:
        print_note(
            f"{arguments.target} can be read by other users of this machine: chmod"
            f" {'700' if stat.S_ISDIR(mode) else '600'} {arguments.target}"
        )
    for digest in report.missing[:_MAX_PROBLEMS]:
        print_note(f"{digest} is lost or damaged on the disk, so the backup does not have it")
    return EX_FAILED if report.missing else 0


def _restore(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    hosted = _hosted_of(settings)
    Path(settings.data_dir).mkdir(parents=True, exist_ok=True)
    report = asyncio.run(
        _restore_all(settings, hosted, arguments.source, may_replace=arguments.may_replace)
    )
    if arguments.is_json:
        print_line(json.dumps(report.row()))
    else:
        print_line(
            f"{report.images} images restored; {report.contents} contents, "
            f"{size_text(report.bytes)} were not here"
        )
    for problem in report.problems[:_MAX_PROBLEMS]:
        print_note(printable(problem))
    return EX_FAILED if report.problems else 0


async def _restore_all(
    settings: Settings, hosted: Hosted, source: Path, *, may_replace: bool
) -> RestoreReport:
    from mirror.operations.local_actor import local_actor
    from mirror.operations.restore import restore_backup

    async with opened_store(settings) as store:
        return await restore_backup(
            store, hosted, source, may_replace=may_replace, actor=local_actor()
        )
