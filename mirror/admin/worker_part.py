"""The part that each process of a server has in the admin API.

Lives here: the sockets of all workers, and which of them listens. Must not know: how a request is
answered (:mod:`mirror.admin.listener`).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mirror.admin.hosted_uploads import HostedUploads
from mirror.admin.job_runs import JobRuns
from mirror.admin.listener import RunningAdmin, start_admin
from mirror.admin.live_state import LiveState
from mirror.admin.sources import Sources
from mirror.admin.store_marks import StoreMarks
from mirror.admin.store_reader import ReadHistory, ReadImages, StoreReader
from mirror.admin.worker_channel import SEND_INTERVAL_S, send_state
from mirror.composition import Mirror
from mirror.observability.events import Observer


@dataclass(frozen=True, slots=True)
class AdminSockets:
    """The sockets of the admin API, which all processes of a server share."""

    listener: socket.socket
    sender: socket.socket | None
    """Live states are sent to the first worker with it. None: there is one process."""
    receiver: socket.socket | None

    def close(self) -> None:
        """Close all."""
        for one in (self.listener, self.sender, self.receiver):
            if one is not None:
                one.close()


class AdminPart:
    """The part of one process: it observes events, and listens or sends its live state."""

    def __init__(self, sockets: AdminSockets, worker: int) -> None:
        """Begin to observe. ``worker``: number of this process. The first one, 0, listens."""
        self._sockets = sockets
        self._worker = worker
        self._live = LiveState(worker)
        self.observe = self._live.observe

    @asynccontextmanager
    async def run(
        self,
        mirror: Mirror,
        context: ssl.SSLContext | None,
        emit: Observer,
        now: Callable[[], float] = time.time,
    ) -> AsyncIterator[RunningAdmin | None]:
        """Listen, or send the live state, until the context ends.

        Args:
            mirror: The parts of this process.
            context: For TLS. None: plain HTTP.
            emit: Receives log lines.
            now: Returns the Unix time in seconds.

        Yields:
            The listener. None if another worker has it.
        """
        self._live.fetches = mirror.content.fetches.progress
        if self._worker > 0:
            task = mirror.single_flight.run(("admin-state",), self._send_states)
            try:
                yield None
            finally:
                task.cancel()
            return
        reader = StoreReader(lambda: mirror.settings, str(mirror.store.layout.root))
        sources = Sources(
            images=ReadImages(reader),
            history=ReadHistory(reader),
            marks=StoreMarks(mirror, now),
            operations=JobRuns(mirror),
            uploads=HostedUploads(mirror),
        )
        try:
            async with start_admin(
                settings=lambda: mirror.settings,
                listener=self._sockets.listener,
                context=context,
                sources=sources,
                live=self._live,
                receiver=self._sockets.receiver,
                single_flight=mirror.single_flight,
                emit=emit,
                now=now,
            ) as running:
                yield running
        finally:
            await reader.close()

    async def _send_states(self) -> None:
        """Send the live state of this worker, for ever."""
        assert self._sockets.sender is not None
        while True:
            send_state(self._sockets.sender, self._live.snapshot())
            await asyncio.sleep(SEND_INTERVAL_S)
