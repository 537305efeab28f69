"""All parts of one process but the listener: the store, the registries, the pull service.

Lives here: how these parts are put together, for the server and for commands that fetch. A command
may run beside a server: file locks let the processes share a data directory. Must not know: HTTP
clients of ours, signals, the command line.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from mirror.config.settings import Settings
from mirror.hosted.database import Database
from mirror.hosted.hosted_service import HostedService
from mirror.observability.events import LogMessage, Observer
from mirror.pull.content import ContentService
from mirror.pull.hosted import HostedPulls
from mirror.pull.marks_watch import MarksWatch
from mirror.pull.service import PullService
from mirror.single_flight import SingleFlight
from mirror.store.hosted_marker import has_unfinished_restore, note_hosted_names, raise_if_lost
from mirror.store.layout import Layout
from mirror.store.private_directory import close_to_others
from mirror.store.store import Store
from mirror.threads import run_in_thread
from mirror.upstream.registries import Registries, open_registries


@dataclass(slots=True)
class Mirror:
    """The parts of a mirror that works on the event loop of this process."""

    settings: Settings
    """The configuration in use."""
    store: Store
    single_flight: SingleFlight
    registries: Registries
    content: ContentService
    service: PullService
    marks: MarksWatch
    """Has the service follow the operator's blocks and freezes."""
    hosted: HostedService | None
    """The hosted repositories. None without the section ``hosted``."""
    emit: Observer
    """Receives the events of all parts."""

    def apply(self, settings: Settings) -> None:
        """Use a changed configuration for new requests. Running fetches keep their connections.

        Raises ``OSError`` or ``ValueError`` if a file that it names cannot be used. Nothing has
        changed then.
        """
        self.registries.configure(settings.upstreams)
        self.content.configure(settings)
        self.settings = settings


@asynccontextmanager
async def open_mirror(
    settings: Settings, emit: Observer, now: Callable[[], float] = time.time
) -> AsyncIterator[Mirror]:
    """Open the data directory, and compose the parts that fetch and store content.

    At the end, running fetches are cancelled, and all connections and files are closed.

    Args:
        settings: The configuration.
        emit: Receives the events of all parts.
        now: Returns the Unix time in seconds. Tests pass a clock of their own.

    Does not raise for a disk that refuses: see :meth:`mirror.store.store.Store.open`.
    """
    store = await Store.open(settings.data_dir, settings.storage, emit, now)
    try:
        if settings.access is not None:  # There is content that not everybody may read.
            await run_in_thread(close_to_others, store.layout.root)
        async with (
            SingleFlight() as single_flight,
            open_registries(settings, emit, single_flight) as registries,
        ):
            content = ContentService(settings, store, registries, single_flight, emit, now)
            async with open_hosted(settings, store, now, emit) as hosted:
                service = PullService(content, None if hosted is None else HostedPulls(hosted))
                marks = MarksWatch(store.layout, service.restrict, emit)
                await marks.check()
                try:
                    yield Mirror(
                        settings,
                        store,
                        single_flight,
                        registries,
                        content,
                        service,
                        marks,
                        hosted,
                        emit,
                    )
                finally:
                    # Before the registries close: fetches use their connections.
                    await single_flight.drain(0.0)
    finally:
        await store.close()


@asynccontextmanager
async def open_hosted(
    settings: Settings, store: Store, now: Callable[[], float], emit: Observer | None
) -> AsyncIterator[HostedService | None]:
    """Open the hosted repositories. None without the section ``hosted``.

    Args:
        settings: The configuration.
        store: The open data directory.
        now: Returns the Unix time in seconds.
        emit: Receives the changes of repositories. None: a server tells of them.

    Raises:
        NamesDamaged: The names cannot be used.
        StorageUnavailable: The names are gone, or the disk refuses.
    """
    if settings.hosted is None:
        yield None
        return
    await run_in_thread(raise_if_lost, store.layout)
    database = await Database.open(store.layout.hosted_names)
    try:
        await run_in_thread(note_hosted_names, store.layout)
        if emit is not None:
            database.on_file_lost = partial(_tell_of_loss, emit)
            if await run_in_thread(has_unfinished_restore, store.layout):
                _tell_of_restore(emit, store.layout)
        hosted = HostedService(settings.hosted, database, store, now, emit)
        try:
            yield hosted
        finally:
            await hosted.close()
    finally:
        await database.close()


def _tell_of_restore(emit: Observer, layout: Layout) -> None:
    remedy = f"run oci-mirror restore again, or delete {layout.staged_names} to do without it"
    emit(
        LogMessage(
            "warning", "a restore has not finished: no name of it is here", (("remedy", remedy),)
        )
    )


def _tell_of_loss(emit: Observer, why: str) -> None:
    fields = (("why", why), ("remedy", "put the file back, and start the server again"))
    emit(LogMessage("error", "pushes are refused until a restart", fields))
