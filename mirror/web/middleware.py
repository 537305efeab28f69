"""The frame around every request: its record, its headers, its errors, its end.

Lives here: the one place where an exception becomes an answer, and where a pull begins and ends.
Must not know: what is asked.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Final

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from mirror.observability.events import LogMessage, Observer, Outcome, Pull, PullEnded, PullStarted
from mirror.oci.errors import (
    Denied,
    Draining,
    InvalidRequest,
    MirrorError,
    NotFound,
    Unauthorized,
)
from mirror.web.errors import body_of, headers_of, status_of
from mirror.web.handlers import Handlers, common_headers
from mirror.web.health import Health

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_VERSIONS: Final = frozenset({HttpVersion10, HttpVersion11})


class Middleware:
    """Answers every request of the server."""

    def __init__(self, handlers: Handlers, health: Health, emit: Observer) -> None:
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._handlers = handlers
        self._health = health
        self._emit = emit

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its record's beginning to its end."""
        headers = request.headers
        given = headers.get("X-Request-Id")
        pull = Pull(
            given if given and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(64):016x}",
            request.method,
            request.raw_path,
            client=request.remote or "",
            user_agent=headers.get("User-Agent", ""),
        )
        self.in_flight += 1
        self._emit(PullStarted(pull))
        try:
            response = await self._answer(request, pull)
            pull.status = response.status
            if self._health.draining:
                # The next request of this client is for somebody else.
                response.force_close()
            return response
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
            pull.duration = time.monotonic() - pull.started
            if pull.first_byte is None:
                pull.first_byte = pull.duration
            self._emit(PullEnded(pull))

    async def _answer(self, request: web.BaseRequest, pull: Pull) -> web.StreamResponse:
        pull.outcome = Outcome.HIT
        try:
            _refuse_odd_framing(request)
            if self._health.draining and request.raw_path.startswith("/v2"):
                raise Draining("shutting down")
            return await self._handlers.answer(request, pull)
        except MirrorError as error:
            return self._failed(request, error, pull)
        except (ConnectionError, TimeoutError):
            # The client has left, or does not read: routine, and nothing of ours has failed.
            pull.error = pull.error or "client left"
            return _Cut(status=pull.status)
        except asyncio.CancelledError:
            pull.error = pull.error or "client left"
            raise
        except Exception as error:
            pull.outcome = Outcome.ERROR
            pull.error = f"UNKNOWN: {type(error).__name__}"
            self._emit(LogMessage("error", "unexpected error", (("error", repr(error)),)))
            return self._failed(request, MirrorError("internal error"), pull)

    def _failed(
        self, request: web.BaseRequest, error: MirrorError, pull: Pull
    ) -> web.StreamResponse:
        pull.error = f"{error.code}: {error.message}"
        match error:
            case NotFound():
                pull.outcome = Outcome.NEGATIVE
            case Denied() | Unauthorized():
                pull.outcome = Outcome.DENIED
            case _:
                pull.outcome = Outcome.ERROR
        if pull.status:
            # Its headers were on their way: the connection is cut already.
            return _Cut(status=pull.status)
        body = body_of(error)
        headers = {**headers_of(error), **common_headers(pull), "Content-Length": str(len(body))}
        if request.method == "HEAD":
            return web.Response(status=status_of(error), headers=headers)
        return web.Response(status=status_of(error), headers=headers, body=body)


class _Cut(web.StreamResponse):
    """What is left to be said on a connection that is cut: nothing.

    An exception would tell aiohttp's server that a handler failed, which it logs with a traceback.
    """

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Raises ``ConnectionResetError``, which aiohttp's server takes for what it is."""
        raise ConnectionResetError("the client has left")


def _refuse_odd_framing(request: web.BaseRequest) -> None:
    """Only what RFC 9112 section 3.2.1 calls origin-form, of HTTP/1.0 and 1.1."""
    if request.version not in _VERSIONS:
        raise InvalidRequest("only HTTP/1.0 and HTTP/1.1 are spoken here")
    if not request.raw_path.startswith("/") or "#" in request.raw_path:
        raise InvalidRequest("only a path is a request target here")
