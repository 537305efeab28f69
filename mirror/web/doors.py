"""One listener of the server, with its handler.

Lives here: opening a listener, and closing it without losing a request. Must not know: what its
requests are about.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from mirror.observability.events import Observer
from mirror.web.handler import Handler
from mirror.web.limited_server import LimitedServer
from mirror.web.stored_responses import ReusingServer, UnsentConnections

_HANDLERS_TIMEOUT_S: Final = 1.0
"""Seconds that a handler may take to end after the drain, and again once it was cancelled."""


@dataclass(slots=True)
class Door:
    """One listener, with its handler."""

    handler: Handler
    unsent: UnsentConnections
    stop_listening: Callable[[], None]
    """Closes the listening socket. Open connections stay."""

    async def wait_until_idle(self) -> None:
        """Wait until no request is in flight, and all responses are sent."""
        await self.handler.wait_until_idle()
        # A request has ended once its response is written, if it is a small one.
        await self.unsent.wait_until_sent()


@asynccontextmanager
async def listen(
    handler: Handler,
    listener: socket.socket,
    *,
    is_limited: bool,
    context: ssl.SSLContext | None,
    backlog: int,
    emit: Observer,
    options: Mapping[str, Any],
) -> AsyncIterator[Door]:
    """Serve one listener until the context ends.

    Args:
        handler: Handles its requests.
        listener: The listening socket. It is closed at the end.
        is_limited: Whether the connections of one client are limited.
        context: The certificate. None: no TLS.
        backlog: Connections that the kernel queues until they are accepted.
        emit: Receives the events of refused connections.
        options: Those of ``aiohttp.web.RequestHandler``.
    """
    server = (
        LimitedServer(handler, emit, **options)
        if is_limited
        else ReusingServer(handler, handler.stored_responses, **options)
    )
    listening = await asyncio.get_running_loop().create_server(
        server,
        sock=listener,
        ssl=context,
        backlog=backlog,
        ssl_handshake_timeout=options["keepalive_timeout"] if context is not None else None,
    )
    try:
        yield Door(handler, server.unsent, listening.close)
    finally:
        listening.close()
        # A connection that was accepted has to begin its request before idle ones close.
        await asyncio.sleep(0)
        server.pre_shutdown()
        await server.shutdown(_HANDLERS_TIMEOUT_S)
