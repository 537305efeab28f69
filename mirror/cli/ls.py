"""``ls``: list the images in the data directory.

Lives here: the arguments, the columns, sorting and filtering. Must not know: how an inventory is
read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from heapq import merge
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from mirror.cli import inventory as common
from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import find_layout, opened_listing
from mirror.cli.listing import is_terminal, print_rows, since_text
from mirror.cli.output import CommandFailed, UsageError, print_note
from mirror.cli.table_layout import Column
from mirror.oci.text import size_text

if TYPE_CHECKING:
    from mirror.inventory.model import Image, Inventory

SORT_KEYS: Final[Mapping[str, tuple[str, bool]]] = {
    "name": ("name", False),
    "size": ("size", True),
    "unique": ("unique", True),
    "used": ("last_used", True),
    "confirmed": ("confirmed", True),
}
"""``--sort`` -> (key of the row, whether the largest or the latest comes first)."""
FILTER_KEYS: Final = (
    *("upstream", "repository", "tag", "digest", "platform", "state", "kind", "accept"),
)
"""Keys of ``--filter``."""

_FILTER_VALUES: Final = {
    "state": (
        *("complete", "partial", "absent", "stale", "hosted", "pinned", "frozen", "leased"),
        "blocked",
    ),
    "kind": ("image", "platform", "referrer"),
}
"""Key of ``--filter`` -> all values that it can have. Other keys may have any."""
_REASON_CHARS: Final = 40
"""Characters of a reason on a terminal. One of `block` has up to 500: `show` prints all of it."""
_FEW_PLATFORMS: Final = 2
"""Platforms of a row that a terminal shows by name."""


def add_parser(commands: Commands) -> None:
    """Add the parser of ``ls``."""
    parser = commands.add_parser(
        "ls",
        help="list the images in the data directory",
        description="Lists the images in the data directory, also beside a running server. UNIQUE "
        "is what `rm` would free.",
    )
    add_config(parser)
    add_json(parser)
    common.add_no_trunc(parser)
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="?",
        help="shell-style pattern of names, such as 'nginx', '*/team/*' or 'ghcr.io/*:v1*'",
    )
    parser.add_argument(
        "--sort", choices=SORT_KEYS, default="name", help="order of the rows (default: name)"
    )
    parser.add_argument("--reverse", action="store_true", help="turn the order around")
    parser.add_argument(
        "--filter",
        dest="filters",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"only rows whose value matches; KEY is one of {', '.join(FILTER_KEYS)}; VALUE may be "
        "a shell-style pattern; may be repeated, and then all must match",
    )
    parser.add_argument(
        "--all",
        dest="has_all",
        action="store_true",
        help="also list signatures and other referrers, and the platforms of indexes that were "
        "pulled by digest (as --filter kind=referrer and kind=platform do)",
    )
    parser.add_argument(
        "--uploads",
        dest="has_uploads",
        action="store_true",
        help="list the uploads in progress to hosted repositories instead",
    )
    parser.add_argument(
        "--users",
        dest="has_users",
        action="store_true",
        help="list the users of the server instead, and when each has last used it",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``ls``. Returns the exit code."""
    if arguments.has_users:
        return list_users(arguments)
    return list_uploads(arguments) if arguments.has_uploads else list_images(arguments)


def list_users(arguments: argparse.Namespace) -> int:
    """Run ``ls --users``. Returns the exit code."""
    from mirror.history.user_uses import read_user_uses

    layout = find_layout(load_settings(arguments))
    rows = [one.row() for one in read_user_uses(layout)]
    if arguments.pattern:
        rows = [row for row in rows if fnmatchcase(row["user"], arguments.pattern)]
    since = since_text(time.time())
    columns = [
        Column("USER", "user"),
        Column("LAST USED", "last_used", since),
        Column("LAST PUSH", "last_push", since),
        Column("REQUESTS", "requests", is_number=True),
    ]
    print_rows(columns, rows, is_json=arguments.is_json)
    return 0


def list_uploads(arguments: argparse.Namespace) -> int:
    """Run ``ls --uploads``. Returns the exit code."""
    from mirror.inventory.hosted_names import read_uploads

    settings, now = load_settings(arguments), time.time()
    if settings.hosted is None:
        raise CommandFailed("there are no hosted repositories: the configuration has no hosted")
    uploads = read_uploads(find_layout(settings), settings.hosted.name)
    rows = [upload.row(now) for upload in uploads]
    if arguments.pattern:
        rows = [row for row in rows if fnmatchcase(row["repository"], arguments.pattern)]
    since = since_text(now)
    columns = [
        Column("REPOSITORY", "repository"),
        Column("USER", "user"),
        Column("RECEIVED", "size", size_text, is_number=True),
        Column("RESERVED", "reserved", size_text, is_number=True),
        Column("STARTED", "started", since),
        Column("LAST BYTE", "last_byte", since),
        Column("ID", "id"),
    ]
    print_rows(columns, rows, is_json=arguments.is_json)
    return 0


@common.collector_paused()
def list_images(arguments: argparse.Namespace) -> int:
    """List images. Returns the exit code."""
    filters = [_parse_filter(text) for text in arguments.filters]
    settings = load_settings(arguments)
    with opened_listing(settings) as inventory:
        rows = iter(_find_rows(inventory, arguments, filters))
        first = list(islice(rows, 1))
        rows = chain(first, rows)
        if not arguments.is_json:
            rows = _with_texts(arguments, rows)
        columns, *narrower = _layouts(inventory.now, arguments)
        print_rows(
            *(columns, rows),
            is_json=arguments.is_json,
            narrower=narrower,
            is_whole=arguments.is_whole,
        )
        if not first:
            common.note_if_empty(inventory, settings.data_dir)
        for image in inventory.holding:
            print_note(
                f"nothing of {image.repository} is evicted or removed, since the manifest of "
                f"{image.name} is not in the cache: fetch it with "
                f"`oci-mirror verify --repair {image.name}`, or take its mark away"
            )
    return 0


def _find_rows(
    inventory: Inventory, arguments: argparse.Namespace, filters: Sequence[tuple[str, str]]
) -> Iterable[dict[str, Any]]:
    """Return the rows of the images that are wanted. In the order of names, one after the other."""
    from mirror.inventory.images import image_order
    from mirror.inventory.json_rows import image_row, streamed_rows
    from mirror.inventory.name_patterns import is_name_match, is_named

    images: Iterable[Image] = inventory.images
    pattern = arguments.pattern
    has_parts = arguments.has_all or any(key == "kind" for key, _ in filters)
    if has_parts:
        images = (*inventory.images, *inventory.platforms, *inventory.absent)
    else:
        absent = inventory.absent if ("state", "absent") in filters else inventory.lost
        images = (one for one in (*inventory.images, *absent) if not one.is_referrer)
    images = sorted(images, key=image_order)
    if pattern:
        images = (image for image in images if is_named(image, pattern))
    hosted = streamed_rows(inventory, has_referrers=has_parts)
    if pattern:
        hosted = (
            row
            for row in hosted
            if is_name_match(row["name"], row["upstream"], row["repository"], pattern)
        )
    rows = merge((image_row(inventory, image) for image in images), hosted, key=_row_order)
    if filters:
        rows = (row for row in rows if all(_is_match(row, *one) for one in filters))
    return _sorted(rows, arguments.sort, is_reversed=arguments.reverse)


def _row_order(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the order of names, as :func:`mirror.inventory.images.image_order`."""
    place = row["upstream"], row["repository"], row["tag"] or ""
    return (*place, row["digest"], row["accept"] or "")


def _with_texts(
    arguments: argparse.Namespace, rows: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Return rows with the values that only people read."""
    has_terminal = is_terminal()
    max_chars = _REASON_CHARS if has_terminal and not arguments.is_whole else None
    for row in rows:
        row["state_text"] = common.state_text(row, max_chars)
        if has_terminal:
            row["whole_repository"] = f"{row['upstream']}/{row['repository']}"
        yield row


def _layouts(now: float, arguments: argparse.Namespace) -> list[list[Column]]:
    """Return all columns, then those of narrower terminals."""
    since = lru_cache(10_000)(since_text(now))  # Many images were confirmed at the same time.
    upstream = Column("UPSTREAM", "upstream")
    repository = Column("REPOSITORY", "repository", min_chars=24)
    whole_repository = Column("REPOSITORY", "whole_repository", min_chars=16, is_name=True)
    tag = Column("TAG", "tag", min_chars=16)
    platforms = Column("PLATFORMS", "platforms", _platforms_text, short=_few_platforms_text)
    digest = common.digest_column(arguments)
    sized = lru_cache(10_000)(size_text)  # Tags of one manifest have its size.
    size = Column("SIZE", "size", sized, is_number=True)
    unique = Column("UNIQUE", "unique", sized, is_number=True)
    used = Column("LAST USED", "last_used", since)
    confirmed = Column("CONFIRMED", "confirmed", since)
    state = Column("STATE", "state_text", min_chars=16, is_sentence=True)
    sizes = [digest, size, unique]
    narrow_name = [replace(whole_repository, min_chars=10), replace(tag, min_chars=8)]
    layouts = [
        [upstream, repository, tag, platforms, *sizes, used, confirmed, state],
        [upstream, repository, tag, platforms, *sizes, used, state],
        [whole_repository, tag, platforms, *sizes, used, state],
        [whole_repository, tag, *sizes, used, state],
        [*narrow_name, *sizes, replace(state, min_chars=11)],
        [*narrow_name, digest, size, replace(state, min_chars=9)],
        [*narrow_name, digest, replace(state, min_chars=9)],
    ]
    if arguments.is_whole:
        # Whole digests leave no room on many terminals. Then a row is one line, which the terminal
        # breaks, and nothing of it is shortened.
        layouts[4:] = [
            [replace(one, min_chars=0) for one in (whole_repository, tag, *sizes, state)]
        ]
    return layouts


def _platforms_text(names: list[str]) -> str:
    return ", ".join(names) or "-"


def _few_platforms_text(names: list[str]) -> str:
    """Return one or two platforms, and the number of the others: some images have ten."""
    if len(names) <= _FEW_PLATFORMS:
        return _platforms_text(names)
    return f"{names[0]} and {len(names) - 1} more"


def _parse_filter(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or key not in FILTER_KEYS:
        raise UsageError(f"--filter '{text}': write KEY=VALUE, KEY one of {', '.join(FILTER_KEYS)}")
    if key in _FILTER_VALUES and not any(fnmatchcase(one, value) for one in _FILTER_VALUES[key]):
        raise UsageError(f"--filter '{text}': {key} is one of {', '.join(_FILTER_VALUES[key])}")
    return key, value


def _is_match(row: Mapping[str, Any], key: str, pattern: str) -> bool:
    value = row["platforms" if key == "platform" else key]
    values: Iterable[str] = value if isinstance(value, list) else (value or "",)
    if key == "digest" and not pattern.startswith(("sha256:", "sha512:")):
        values = [one.partition(":")[2] for one in values]
    pattern = f"{pattern}*" if key == "digest" else pattern
    return any(fnmatchcase(one, pattern) for one in values)


def _sorted(
    rows: Iterable[dict[str, Any]], order: str, *, is_reversed: bool
) -> Iterable[dict[str, Any]]:
    """Sort rows, which are in the order of their names. Values that are not known come last."""
    if order == "name" and not is_reversed:
        return rows  # They need not be in memory together.
    found = list(rows)
    key, is_descending = SORT_KEYS[order]
    if order != "name":
        known = [row for row in found if row[key] is not None]
        known.sort(key=itemgetter(key), reverse=is_descending)
        found = known + [row for row in found if row[key] is None]
    return found[::-1] if is_reversed else found
