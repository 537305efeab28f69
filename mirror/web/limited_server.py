"""The HTTP server, with a limit on the connections of one client address.

Lives here: counting connections, and refusing those above the limit. Must not know: requests.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from mirror.observability.events import ConnectionRefused, Observer
from mirror.oci.errors import TooManyRequests
from mirror.web.errors import SAFE_HEADERS, body_of, error_headers, status_of
from mirror.web.handler import Handler
from mirror.web.stored_responses import ReusingServer


def _build_refusal() -> bytes:
    error = TooManyRequests("too many connections of this client")
    body = body_of(error)
    fields = {**error_headers(error), **SAFE_HEADERS, "Connection": "close"}
    fields["Content-Length"] = str(len(body))
    lines = [f"HTTP/1.1 {status_of(error)} Too Many Requests"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join((*lines, "", "")).encode() + body


_REFUSAL: Final = _build_refusal()


class LimitedServer(ReusingServer):
    """Refuses a connection at once if its address has too many.

    Connections of trusted proxies are not counted, because they belong to many clients.
    """

    def __init__(self, handler: Handler, emit: Observer, **options: Any) -> None:
        """Create the server.

        Args:
            handler: Handles the requests, and counts what each client has open.
            emit: Receives ``ConnectionRefused``.
            options: Those of ``aiohttp.web.RequestHandler``.
        """
        super().__init__(handler, handler.stored_responses, **options)
        self._emit = emit
        self._addresses = handler.addresses
        self._handler = handler
        self._counted: dict[web.RequestHandler, str] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Count a new connection, or refuse it."""
        super().connection_made(handler, transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        proxies = self._handler.proxies
        if not address or (proxies is not None and proxies.is_trusted(address)):
            return
        if self._addresses.try_open(address):
            self._counted[handler] = address
        else:
            self._emit(ConnectionRefused(address))
            transport.write(_REFUSAL)
            transport.close()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Stop counting a connection that has ended."""
        super().connection_lost(handler, exc)
        if (address := self._counted.pop(handler, None)) is not None:
            self._addresses.close(address)
