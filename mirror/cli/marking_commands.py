"""What ``pin``, ``block``, ``freeze``, ``rollback`` and their opposites do and print.

Lives here: their output. Must not know: their arguments' grammar, how a mark is kept or applied.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from mirror.cli.arguments import load_settings
from mirror.cli.data_directory import find_layout, opened_index, opened_mirror
from mirror.cli.listing import print_rows, since_text
from mirror.cli.output import print_line, print_note
from mirror.cli.short_digests import whole_names
from mirror.cli.table_layout import Column, short_digests
from mirror.config.settings import Settings
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository
from mirror.oci.text import time_text
from mirror.operations import marking
from mirror.store.layout import Layout
from mirror.store.marks import Block, Freeze, Pin, read_marks

_SERVER_NOTE: Final = "a running server applies it within a second"

# --- pins -----------------------------------------------------------------------------------------

_PIN_COLUMNS: Final = (
    Column("IMAGE", "image", min_chars=24, is_name=True),
    Column("DIGEST", "digest", short_digests),
)


def _pin(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    layout = find_layout(settings)
    if not arguments.images:
        _print_table(_PIN_COLUMNS, map(_pin_row, read_marks(layout).pins.values()), arguments)
        return 0

    names = whole_names(arguments.images, settings)
    marking.check_not_hosted(names, settings.hosted)

    async def pin() -> list[Pin]:
        async with opened_index(layout) as index:
            return await marking.pin(layout, index, names, time.time())

    pins = asyncio.run(pin())
    _report([_pin_row(one) for one in pins], [f"pinned {one.name}" for one in pins], arguments)
    _print_notes(marking.notes_of_kept(layout, pins))
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    layout, images = find_layout(settings), whole_names(arguments.images, settings)
    removed = asyncio.run(marking.unpin(layout, images))
    lines = [f"unpinned {one.name}" for one in removed]
    _report([_pin_row(one) for one in removed], lines, arguments)
    names = {one.name for one in removed}
    wanted = [str(name.with_default_tag()) for name in images]
    _note_absent([name for name in wanted if name not in names], "pinned")
    return 0


def _pin_row(pin: Pin) -> dict[str, Any]:
    return {"image": pin.name, "digest": str(pin.digest), "since": time_text(pin.since)}


# --- blocks ---------------------------------------------------------------------------------------

_BLOCK_COLUMNS: Final = (
    Column("TARGET", "target", min_chars=24),
    Column("REASON", "reason", min_chars=16, is_sentence=True),
)


def _block(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    layout = find_layout(settings)
    if arguments.target is None:
        _print_table(_BLOCK_COLUMNS, map(_block_row, read_marks(layout).blocks.values()), arguments)
        return 0

    if warning := marking.check_registry(arguments.target, settings):
        print_note(f"warning: {warning}")

    async def block() -> Block:
        async with opened_index(layout) as index:
            target, reason = arguments.target, arguments.reason
            return await marking.block(layout, index, target, reason, time.time(), settings.hosted)

    one = asyncio.run(block())
    _report([_block_row(one)], [f"blocked {one.target}: {_SERVER_NOTE}"], arguments)
    if why := marking.why_incomplete(layout, arguments.target, one):
        print_note(f"{one.target}: {why}")
    return 0


def _unblock(arguments: argparse.Namespace) -> int:
    layout = find_layout(load_settings(arguments))

    async def unblock() -> list[Block | None]:
        return [await marking.unblock(layout, target) for target in arguments.targets]

    removed = asyncio.run(unblock())
    found = [one for one in removed if one is not None]
    lines = [f"unblocked {one.target}: {_SERVER_NOTE}" for one in found]
    _report([_block_row(one) for one in found], lines, arguments)
    pairs = zip(arguments.targets, removed, strict=True)
    _note_absent([str(target) for target, one in pairs if one is None], "blocked")
    return 0


def _block_row(block: Block) -> dict[str, Any]:
    return {
        "target": block.target,
        "reason": block.reason,
        "since": time_text(block.since),
        "digests": [str(digest) for digest in sorted(block.digests)],
    }


# --- freezes --------------------------------------------------------------------------------------


def _freeze(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    layout = find_layout(settings)
    if not arguments.images:
        rows = map(_freeze_row, read_marks(layout).freezes.values())
        _print_table(_PIN_COLUMNS, rows, arguments)
        return 0

    marking.check_not_hosted(arguments.images, settings.hosted)

    async def freeze() -> list[Freeze]:
        async with opened_index(layout) as index:
            now = time.time()
            return [await marking.freeze(layout, index, name, now) for name in arguments.images]

    frozen = asyncio.run(freeze())
    lines = [f"frozen {one.name} at {one.digest}: {_SERVER_NOTE}" for one in frozen]
    _report([_freeze_row(one) for one in frozen], lines, arguments)
    _print_notes(marking.notes_of_kept(layout, frozen))
    return 0


def _unfreeze(arguments: argparse.Namespace) -> int:
    layout = find_layout(load_settings(arguments))

    async def unfreeze() -> list[Freeze | None]:
        return [await marking.unfreeze(layout, name) for name in arguments.images]

    removed = asyncio.run(unfreeze())
    found = [one for one in removed if one is not None]
    lines = [f"unfrozen {one.name}: {_SERVER_NOTE}" for one in found]
    _report([_freeze_row(one) for one in found], lines, arguments)
    pairs = zip(arguments.images, removed, strict=True)
    _note_absent([str(n.with_default_tag()) for n, one in pairs if one is None], "frozen")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    layout = find_layout(settings)
    marking.check_not_hosted([arguments.image], settings.hosted)
    done = asyncio.run(_roll_back(settings, layout, arguments.image, arguments.to))
    one = done.freeze
    row = {**_freeze_row(one), "missing": done.missing}
    _report([row], [f"frozen {one.name} at {one.digest}: {_SERVER_NOTE}"], arguments)
    _print_notes(done.notes())
    return 0


async def _roll_back(
    settings: Settings, layout: Layout, name: ImageName, to: str
) -> marking.Rollback:
    async def check_upstream(repository: Repository, digest: Digest) -> None:
        # Imported here: only an image that is not complete needs it.
        from mirror.operations.asking import fetch_manifest

        async with opened_mirror(settings) as mirror:
            await fetch_manifest(mirror, repository, digest, "rollback")

    async with opened_index(layout) as index:
        return await marking.roll_back(layout, index, name, to, time.time(), check_upstream)


def _freeze_row(freeze: Freeze) -> dict[str, Any]:
    return {"image": freeze.name, "digest": str(freeze.digest), "since": time_text(freeze.since)}


# --- output ---------------------------------------------------------------------------------------


def _print_table(
    columns: Sequence[Column], rows: Iterable[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    since = Column("SINCE", "since", since_text(time.time()))
    print_rows((*columns, since), rows, is_json=arguments.is_json)


def _report(
    rows: Sequence[dict[str, Any]], lines: Sequence[str], arguments: argparse.Namespace
) -> None:
    """Print what was done: the rows as JSON, or a line for each."""
    if arguments.is_json:
        print_rows((), rows, is_json=True)
        return
    for line in lines:
        print_line(line)


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print_note(note)


def _note_absent(names: Iterable[str], mark: str) -> None:
    for name in names:
        print_note(f"{name} was not {mark}")


RUN: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "pin": _pin,
    "unpin": _unpin,
    "block": _block,
    "unblock": _unblock,
    "freeze": _freeze,
    "unfreeze": _unfreeze,
    "rollback": _rollback,
}
"""Command -> the function that runs it, and returns the exit code."""
