"""One listener of the server, with its handler.

Lives here: opening a listener, closing it without losing a request, and its certificate. Must
not know: what its requests are about.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from mirror.config.settings import Tls
from mirror.observability.events import Observer
from mirror.store.file_stamp import file_stamp
from mirror.web.handler import Handler
from mirror.web.limited_server import LimitedServer
from mirror.web.stored_responses import ReusingServer, UnsentConnections

_HANDLERS_TIMEOUT_S: Final = 1.0
"""Seconds that a handler may take to end after the drain, and again once it was cancelled."""


@dataclass(slots=True)
class Listener:
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
    sock: socket.socket,
    *,
    is_limited: bool,
    context: ssl.SSLContext | None,
    backlog: int,
    emit: Observer,
    options: Mapping[str, Any],
) -> AsyncIterator[Listener]:
    """Serve one listener until the context ends.

    Args:
        handler: Handles its requests.
        sock: The listening socket. It is closed at the end.
        is_limited: Whether ``max_client_connections`` limits the connections of one client.
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
        sock=sock,
        ssl=context,
        backlog=backlog,
        ssl_handshake_timeout=options["keepalive_timeout"] if context is not None else None,
    )
    try:
        yield Listener(handler, server.unsent, listening.close)
    finally:
        listening.close()
        # A connection that was accepted has to begin its request before idle ones close.
        await asyncio.sleep(0)
        server.pre_shutdown()
        await server.shutdown(_HANDLERS_TIMEOUT_S)


class Certificate:
    """The certificate of all listeners. It is loaded again when its files have changed."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded_stamps = self._find_stamps()
        self.context.load_cert_chain(tls.certificate, tls.key)

    def _find_stamps(self) -> tuple[tuple[int, ...], ...]:
        return file_stamp(self._tls.certificate), file_stamp(self._tls.key)

    def refresh(self) -> None:
        """Load a changed certificate, for new connections.

        Raises ``OSError`` (``ssl.SSLError`` is a subclass) if it cannot be loaded. The previous
        certificate stays in use, and the next call tries again.
        """
        stamps = self._find_stamps()
        if stamps != self._loaded_stamps:
            # Loaded into another context first: a key that does not match its certificate would
            # leave the context in use without a valid pair.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self._tls.certificate, self._tls.key
            )
            self.context.load_cert_chain(self._tls.certificate, self._tls.key)
            self._loaded_stamps = stamps
