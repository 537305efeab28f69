"""``refresh``: ask the upstream now which digest a tag has.

Lives here: its arguments, and what is printed. Must not know: how the upstream is asked
(:mod:`mirror.operations.refresh`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from mirror.cli.arguments import Commands, add_config, add_json, image_name, load_settings
from mirror.cli.data_directory import opened_mirror
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.listing import print_text
from mirror.cli.output import UsageError, print_failure, print_line
from mirror.oci.errors import MirrorError
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Tag
from mirror.oci.text import time_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.operations.refresh import RefreshReport


def add_parser(commands: Commands) -> None:
    """Add ``refresh``."""
    parser = commands.add_parser(
        "refresh",
        help="ask the upstream now which digest a tag has",
        description="Asks the upstream, whatever tag_ttl says and also if it has answered 404 a "
        "moment ago, and fetches the manifest. A running server serves the new digest within two "
        "seconds. The layers are fetched by `oci-mirror warm`, or by the next pull.",
    )
    parser.add_argument(
        "images", metavar="IMAGE:TAG", nargs="+", type=image_name, help="name of an image"
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    settings = load_settings(arguments)
    images = [image.with_default_tag() for image in arguments.images]
    for image in images:
        if not isinstance(image.reference, Tag):
            raise UsageError(f"{image} has a digest, which never changes: name a tag")
    is_good = asyncio.run(_refresh_all(settings, images, is_json=arguments.is_json))
    return 0 if is_good else EX_FAILED


async def _refresh_all(settings: Settings, images: list[ImageName], *, is_json: bool) -> bool:
    # Imported here: it imports aiohttp, which other commands do not need.
    from mirror.operations.refresh import refresh

    is_good = True
    async with opened_mirror(settings) as mirror:
        for image in images:
            try:
                report = await refresh(mirror, image)
            except MirrorError as error:
                is_good = False
                _print_failure(image, error.message, is_json=is_json)
            else:
                if is_json:
                    print_line(json.dumps(refresh_row(report)))
                else:
                    print_text(_text(report), indent=4)
    return is_good


def _print_failure(image: ImageName, why: str, *, is_json: bool) -> None:
    if is_json:
        print_line(json.dumps(_row(image, "failed", error=why)))
    else:
        print_failure(image, why)


def _text(report: RefreshReport) -> str:
    if report.previous is None:
        return f"{report.image}  new  {report.digest}"
    if report.has_moved:
        return f"{report.image}  moved  from {report.previous} to {report.digest}"
    return f"{report.image}  unchanged  {report.digest}"


def refresh_row(report: RefreshReport) -> dict[str, Any]:
    """Return the JSON object of a report (``docs/commands.md``)."""
    state = "unchanged" if report.previous is not None else "new"
    previous = str(report.previous) if report.previous is not None else None
    return _row(
        report.image,
        "moved" if report.has_moved else state,
        digest=str(report.digest),
        previous=previous,
        # Zero: restored from index.json, and never confirmed since.
        previous_confirmed=time_text(report.previous_confirmed or None),
    )


def _row(image: ImageName, state: str, **values: str | None) -> dict[str, Any]:
    keys = ("digest", "previous", "previous_confirmed", "error")
    return {"image": str(image), "state": state, **{key: values.get(key) for key in keys}}
