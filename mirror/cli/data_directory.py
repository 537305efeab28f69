"""The data directory of a command that works on it beside a running server.

Lives here: finding the directory, opening its index. Must not know: what a command does there.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from mirror.cli.output import CommandFailed, print_note
from mirror.config.settings import Settings
from mirror.observability.events import Event, LogMessage
from mirror.store import image_layout
from mirror.store.index import Index
from mirror.store.layout import Layout

_MARKER: Final = "oci-layout"
"""A file that every data directory has since the first start of a server."""


def find_layout(settings: Settings) -> Layout:
    """Return the data directory of the configuration.

    Raises :class:`CommandFailed` if no server has ever used it: a command with a wrong
    configuration must not seem to succeed.
    """
    root = Path(settings.data_dir).absolute()
    if not (root / _MARKER).exists():
        raise CommandFailed(
            f"{root} is no data directory of a mirror: start the server once, or name its "
            "configuration by --config"
        )
    return Layout(root)


@asynccontextmanager
async def opened_index(layout: Layout) -> AsyncIterator[Index]:
    """Open the index of a data directory. What it logs goes to standard error."""
    read_saved_names = partial(image_layout.read_saved_names, layout, print_event)
    index = await Index.open(layout.index, print_event, time.time, read_saved_names)
    try:
        yield index
    finally:
        await index.close()


def print_event(event: Event) -> None:
    """Print a log message of the parts that a command uses. Other events are dropped."""
    if isinstance(event, LogMessage):
        fields = " ".join(f"{name}={value}" for name, value in event.fields)
        print_note(f"{event.level}: {event.message} {fields}".rstrip())
