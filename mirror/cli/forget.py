"""``forget``: forget what is known of an image, so that its next pull asks the upstream.

Lives here: its arguments, and what is printed. Must not know: which records are deleted
(:mod:`mirror.operations.forget`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from mirror.cli.arguments import Commands, add_config, add_json, image_name, load_settings
from mirror.cli.data_directory import find_layout, opened_store
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.output import UsageError, print_line, print_note
from mirror.oci.errors import MirrorError
from mirror.oci.image_name import ImageName
from mirror.oci.text import count_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.operations.forget import ForgetReport


def add_parser(commands: Commands) -> None:
    """Add ``forget``."""
    parser = commands.add_parser(
        "forget",
        help="forget what is known of an image, also a remembered 404",
        description="Deletes what is known of an image: the digest of its tag, which content its "
        "repository may serve, remembered 404 responses. No content is removed. A running server "
        "asks the upstream at the next pull after two seconds. An image that is pinned, frozen "
        "or leased is not forgotten.",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", type=image_name, help="name of an image"
    )
    parser.add_argument(
        "--all-tags",
        dest="is_repository",
        action="store_true",
        help="forget all of the repository; IMAGE has neither tag nor digest then",
    )
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises ``UsageError`` for a tag or digest beside ``--all-tags``."""
    images: list[ImageName] = arguments.images
    if arguments.is_repository:
        tagged = next((image for image in images if image.reference is not None), None)
        if tagged is not None:
            raise UsageError(f"--all-tags is about a repository: write {tagged.repository}")
    else:
        images = [image.with_default_tag() for image in images]
    settings = load_settings(arguments)
    find_layout(settings)  # With a wrong configuration, nothing would seem to be known.
    is_good = asyncio.run(_forget_all(settings, images, is_json=arguments.is_json))
    return 0 if is_good else EX_FAILED


async def _forget_all(settings: Settings, images: list[ImageName], *, is_json: bool) -> bool:
    from mirror.operations.forget import forget
    from mirror.store.marks import read_marks
    from mirror.threads import run_in_thread

    is_good = True
    async with opened_store(settings) as store:
        for image in images:
            try:
                marks = await run_in_thread(read_marks, store.layout)
                report = await forget(store, image, marks)
            except MirrorError as error:
                is_good = False
                if is_json:
                    print_line(json.dumps(_row(image, error=error.message)))
                else:
                    print_note(f"{image}: {error.message}")
            else:
                print_line(json.dumps(forget_row(report)) if is_json else _text(report))
    return is_good


def _text(report: ForgetReport) -> str:
    if not report.has_changed:
        return f"{report.image}  nothing was known"
    parts = [
        ("tag", len(report.tags)),
        ("manifest", report.manifests),
        ("blob", report.blobs),
        ("404 response", report.negatives),
    ]
    texts = (count_text(count, name) for name, count in parts if count)
    return f"{report.image}  forgotten  {', '.join(texts)}"


def forget_row(report: ForgetReport) -> dict[str, Any]:
    """Return the JSON object of a report (``docs/commands.md``)."""
    return _row(
        report.image,
        tags=list(report.tags),
        manifests=report.manifests,
        blobs=report.blobs,
        negatives=report.negatives,
    )


def _row(image: ImageName, **values: Any) -> dict[str, Any]:
    empty = {"tags": [], "manifests": 0, "blobs": 0, "negatives": 0, "error": None}
    return {"image": str(image), **empty, **values}
