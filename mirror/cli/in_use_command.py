"""What ``in-use`` does and prints.

Lives here: reading the list, the output. Must not know: how a lease is kept, the Kubernetes API.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mirror.cli.arguments import load_settings
from mirror.cli.data_directory import find_layout, opened_index
from mirror.cli.listing import print_rows
from mirror.cli.output import CommandFailed, print_line, print_note
from mirror.cli.table_layout import Column
from mirror.oci.text import age_text, count_text, printable, time_text
from mirror.operations import in_use, kubernetes
from mirror.operations.kubernetes import ApiServer, UsedImage
from mirror.store.layout import Layout

_MAX_LIST_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a list that is read: 500,000 images."""
_SHOWN_NAMES: Final = 5
"""Names that mean no digest and are printed. All are in the JSON."""
_SHOWN_CHARS: Final = 200
"""Characters of a name in a message: any tenant of a cluster chooses it."""
_LEASE_COLUMNS: Final = (
    Column("SOURCE", "source", min_chars=20),
    Column("DIGESTS", "digests", is_number=True),
    Column("IN CACHE", "cached", is_number=True),
    Column("UNTIL", "until"),
)


def run_in_use(arguments: argparse.Namespace) -> int:
    """Run the command, and return its exit code."""
    layout = find_layout(load_settings(arguments))
    if arguments.release:
        if not asyncio.run(in_use.release(layout, arguments.source, time.time())):
            raise CommandFailed(
                f"{arguments.source} had no lease: `oci-mirror in-use` lists the sources"
            )
        if not arguments.is_json:
            print_line(f"{arguments.source} has no lease any more")
        return 0
    if arguments.from_kubernetes:
        server = _api_server(arguments)
        pods = kubernetes.list_pod_images(server)
        origin = count_text(pods.pods, "pod")
        return _put(arguments, layout, server.url, _sorted(pods.images), origin)
    if arguments.file is not None:
        source = arguments.file if arguments.file == "-" else str(Path(arguments.file).absolute())
        images = in_use.parse_list(_read_list(arguments.file))
        return _put(arguments, layout, source, images, count_text(len(images), "line"))
    rows = map(_row, in_use.list_leases(layout, time.time()))
    print_rows(_LEASE_COLUMNS, rows, is_json=arguments.is_json)
    return 0


def _row(leased: in_use.Leased) -> dict[str, Any]:
    return {
        "source": leased.source,
        "digests": len(leased.digests),
        "cached": leased.cached,
        "unknown": list(leased.unknown),
        "until": time_text(leased.until),
    }


def _sorted(images: frozenset[UsedImage]) -> list[UsedImage]:
    return sorted(images, key=lambda one: (one.name, one.digest))


def _api_server(arguments: argparse.Namespace) -> ApiServer:
    if arguments.api_server is None:
        inside = ApiServer.in_cluster(os.environ)
        return ApiServer(
            inside.url,
            token_file=arguments.token_file or inside.token_file,
            ca_file=arguments.ca_file or inside.ca_file,
        )
    return ApiServer(
        arguments.api_server, token_file=arguments.token_file, ca_file=arguments.ca_file
    )


def _read_list(name: str) -> str:
    if name == "-":
        text = sys.stdin.read(_MAX_LIST_BYTES + 1)
    else:
        with open(name, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_MAX_LIST_BYTES + 1)
    if len(text) > _MAX_LIST_BYTES:
        raise CommandFailed(f"{name}: a list has at most 64 MiB")
    return text


def _put(
    arguments: argparse.Namespace,
    layout: Layout,
    source: str,
    images: Sequence[UsedImage],
    origin: str,
) -> int:
    """Lease the images, and print the result. ``origin``: what the list was made of."""
    source = arguments.source or source

    async def lease() -> in_use.Leased:
        async with opened_index(layout) as index:
            return await in_use.lease(layout, index, source, images, arguments.lease, time.time())

    leased = asyncio.run(lease())
    if arguments.is_json:
        print_rows((), [_row(leased)], is_json=True)
        return 0
    print_line(
        f"leased {count_text(len(leased.digests), 'digest')} of {origin} for "
        f"{age_text(arguments.lease)}: {leased.cached} in the cache"
    )
    if leased.unknown:
        shown = ", ".join(printable(one, _SHOWN_CHARS) for one in leased.unknown[:_SHOWN_NAMES])
        more = "" if len(leased.unknown) <= _SHOWN_NAMES else ", …"
        names = count_text(len(leased.unknown), "name")
        print_note(f"{names} without an image in the cache, not leased: {shown}{more}")
    return 0
