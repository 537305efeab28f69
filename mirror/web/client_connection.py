"""aiohttp's connection of a client, for all listeners.

Lives here: its response to bytes that are no HTTP request. Must not know: requests.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

_NOT_HTTP: Final = "the request is not valid HTTP/1.1, or a part of its header is too large"


class ClientConnection(web.RequestHandler):
    """A connection whose errors never repeat what the client has sent, such as its password."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to an error. ``message``: the parser's, with bytes of the request."""
        return super().handle_error(request, status, exc, message and _NOT_HTTP)
