"""The data directory of a command that works on it beside a running server.

Lives here: finding the directory, reading its inventory, opening its index and its store. Must not
know: what a command does there.

Packages are imported where they are used: a listing has 0.3 s, and needs no store.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mirror.cli.output import CommandFailed
from mirror.config.settings import Settings

if TYPE_CHECKING:
    from mirror.composition import Mirror
    from mirror.inventory.model import Inventory
    from mirror.store.index import Index
    from mirror.store.layout import Layout
    from mirror.store.store import Store

_MARKER: Final = "oci-layout"
"""A file that every data directory has since the first start of a server."""


def layout_of(settings: Settings) -> Layout:
    """Return the paths of the data directory, which may be missing."""
    from mirror.store.layout import Layout

    return Layout(Path(settings.data_dir).absolute())


def find_layout(settings: Settings) -> Layout:
    """Return the data directory of the configuration.

    Raises :class:`CommandFailed` if no server has ever used it: a command with a wrong
    configuration must not seem to succeed.
    """
    layout = layout_of(settings)
    if not (layout.root / _MARKER).exists():
        relative = ""
        if not os.path.isabs(settings.data_dir):
            relative = (
                f" (data_dir {settings.data_dir} is relative to the working directory, and the "
                "server may have another one)"
            )
        raise CommandFailed(
            f"{layout.root} is no data directory of a mirror{relative}: start the server once, or "
            "name its configuration by --config"
        )
    return layout


def load_inventory(settings: Settings) -> Inventory:
    """Read the content of the data directory.

    Raises :class:`CommandFailed` if there is none, and what
    :func:`mirror.inventory.read.read_inventory` and :func:`mirror.store.marks.read_marks` raise.
    """
    from mirror.inventory.read import read_inventory
    from mirror.store.marks import read_marks

    layout = find_layout(settings)
    return read_inventory(
        layout, settings.upstreams, read_marks(layout), time.time(), settings.hosted
    )


@contextmanager
def opened_listing(settings: Settings) -> Iterator[Inventory]:
    """Read the data directory as :func:`mirror.inventory.read.open_listing` does.

    Raises like :func:`load_inventory`.
    """
    from mirror.inventory.read import open_listing
    from mirror.store.marks import read_marks

    layout, now = find_layout(settings), time.time()
    with open_listing(
        layout, settings.upstreams, read_marks(layout), now, settings.hosted
    ) as inventory:
        yield inventory


@asynccontextmanager
async def opened_mirror(settings: Settings) -> AsyncIterator[Mirror]:
    """Open the parts of a mirror, with a history. Its warnings go to standard error.

    It imports aiohttp, which commands that ask no upstream do not need.

    Raises :class:`CommandFailed` like :func:`find_layout`: a command makes no data directory.
    """
    import asyncio

    from mirror.cli.messages import print_fault, print_warnings
    from mirror.operations.own_requests import open_recorded_mirror

    find_layout(settings)
    asyncio.get_running_loop().set_exception_handler(print_fault)
    async with open_recorded_mirror(settings, print_warnings) as mirror:
        yield mirror


@asynccontextmanager
async def opened_index(layout: Layout) -> AsyncIterator[Index]:
    """Open the index of a data directory. Its warnings go to standard error."""
    from mirror.cli.messages import print_warnings
    from mirror.store import image_layout
    from mirror.store.index import Index

    read_saved_names = partial(image_layout.read_saved_names, layout, print_warnings)
    index = await Index.open(layout.index, print_warnings, time.time, read_saved_names)
    try:
        yield index
    finally:
        await index.close()


@asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[Store]:
    """Open the data directory for changes, beside servers.

    Raises ``CommandFailed`` if a server could not write to the files that this process creates.
    """
    from mirror.cli.messages import print_warnings
    from mirror.store.store import Store

    owner = os.stat(settings.data_dir).st_uid
    if os.geteuid() == 0 and owner != 0:
        raise CommandFailed(
            f"{settings.data_dir} belongs to user {owner}: run the command as that user, so that "
            "the server can use the files that it writes"
        )
    store = await Store.open(settings.data_dir, settings.storage, print_warnings)
    try:
        refusal = store.removal_refusal()
        if refusal is not None:
            raise CommandFailed(f"nothing can be removed: {refusal}")
        yield store
    finally:
        await store.close()
