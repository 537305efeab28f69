"""The admin listener: its connections, and how the parts of the API are put together.

Lives here: :func:`start_admin`, the limit on connections, and the cut of clients that stop reading.
Must not know: what an operation does.

One process of a server has it: the only one, or the first worker. The others send their live state
to it (:mod:`mirror.admin.worker_channel`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from mirror.admin.admin_api import Api
from mirror.admin.dispatch import Dispatcher
from mirror.admin.event_stream import EventStreams
from mirror.admin.jobs import Jobs
from mirror.admin.live_state import LiveState
from mirror.admin.page_files import PageFiles
from mirror.admin.sources import Sources
from mirror.admin.tokens import Tickets, Tokens
from mirror.admin.worker_channel import WorkerStates
from mirror.config.settings import Settings
from mirror.observability.events import Observer
from mirror.single_flight import SingleFlight
from mirror.web.client_connection import ClientConnection
from mirror.web.client_socket import StallWatch, abort_connection

MAX_ADMIN_CONNECTIONS: Final = 128
"""Connections at the same time. A browser opens up to six for a page. One more takes the place of
the connection that has waited longest for a request: it may be one that never sends it all."""
KEEPALIVE_TIMEOUT_S: Final = 15.0
"""Seconds until a connection is closed that is idle, or whose TLS handshake or request header is
incomplete."""
STALL_TIMEOUT_S: Final = 15.0
"""Seconds after which a client is cut off that acknowledges no byte although there are some for
it."""
_ADMIN_SHUTDOWN_S: Final = 0.5
"""Seconds that a request may take to end when the server stops. Event streams never end."""
_MAX_HEADER_LINE_BYTES: Final = 32 * 1024
"""Bytes of the request line, and of one header field."""


class AdminServer(web.Server):
    """aiohttp's server, with a limit on connections, and on clients that do not read."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Create the server. ``dispatcher`` answers the requests."""
        super().__init__(self._answer, handler_cancellation=True)
        self._dispatcher = dispatcher
        self._watches: dict[web.RequestHandler, StallWatch] = {}
        self._waiting: dict[web.RequestHandler, asyncio.Transport] = {}
        """Connections without a whole request header, the one that has waited longest first."""

    def __call__(self) -> web.RequestHandler:
        """Return a new connection. The event loop calls this."""
        options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": KEEPALIVE_TIMEOUT_S,
            "max_line_size": _MAX_HEADER_LINE_BYTES,
            "max_field_size": _MAX_HEADER_LINE_BYTES,
            "logger": logging.getLogger("aiohttp.server"),
        }
        return ClientConnection(self, loop=asyncio.get_running_loop(), **options)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = self._waiting.pop(request.protocol, None)
        try:
            return await self._dispatcher(request)
        finally:
            if transport is not None and request.protocol in self._watches:
                self._waiting[request.protocol] = transport

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Watch a new connection. If there are too many, close one that has no request, or this."""
        super().connection_made(handler, transport)
        if len(self._watches) >= MAX_ADMIN_CONNECTIONS:
            if not self._waiting:
                transport.abort()
                return
            longest = next(iter(self._waiting))
            self._waiting.pop(longest).abort()
            self._watches.pop(longest).stop()
        self._waiting[handler] = transport
        self._watches[handler] = StallWatch(
            transport, STALL_TIMEOUT_S, lambda: abort_connection(transport, is_reset=True)
        )

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Forget a connection that has ended."""
        super().connection_lost(handler, exc)
        self._waiting.pop(handler, None)
        if (watch := self._watches.pop(handler, None)) is not None:
            watch.stop()


@dataclass(frozen=True, slots=True)
class RunningAdmin:
    """The admin listener while it runs."""

    jobs: Jobs
    tokens: Tokens
    port: int


@asynccontextmanager
async def start_admin(
    settings: Callable[[], Settings],
    listener: socket.socket,
    context: ssl.SSLContext | None,
    sources: Sources,
    live: LiveState,
    receiver: socket.socket | None,
    single_flight: SingleFlight,
    emit: Observer,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[RunningAdmin]:
    """Serve the admin API until the context ends.

    Args:
        settings: Returns the configuration in use. It has the section ``admin``.
        listener: A listening socket. It is closed at the end.
        context: For TLS. None: plain HTTP.
        sources: The functions of other packages.
        live: The live state of this process.
        receiver: The live states of other workers arrive here. None: there is one process.
        single_flight: Runs the jobs.
        emit: Receives log lines.
        now: Returns the Unix time in seconds.

    Raises:
        ConfigError: A file of tokens cannot be used.
    """
    admin = settings().admin
    assert admin is not None
    tokens, tickets = Tokens(admin), Tickets(time.monotonic)
    jobs = Jobs(single_flight, emit, now)
    jobs.on_end = sources.images.forget_read
    workers = WorkerStates(live.snapshot, receiver)
    streams = EventStreams(workers.merged, jobs)
    api = Api(settings, sources, workers, jobs, tickets, streams, emit)
    server = AdminServer(Dispatcher(admin, api, tokens, tickets, PageFiles(), emit))
    listening = await asyncio.get_running_loop().create_server(
        server,
        sock=listener,
        ssl=context,
        ssl_handshake_timeout=KEEPALIVE_TIMEOUT_S if context is not None else None,
    )
    workers.start()
    try:
        yield RunningAdmin(jobs, tokens, listener.getsockname()[1])
    finally:
        workers.stop()
        listening.close()
        server.pre_shutdown()
        await server.shutdown(_ADMIN_SHUTDOWN_S)
