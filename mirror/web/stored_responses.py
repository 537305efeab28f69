"""Reuse the response to a request with the same bytes, without parsing the request again.

Lives here: the stored responses, and the connection that reuses them. Must not know: how content is
obtained, how a request is parsed.

Theory of operation: many nodes pull the same image, and send the same few requests, byte for byte.
aiohttp's parser, its task for each request, and our way through ``handler.py`` take three quarters
of the time of a small response. So a response is stored, as in a cache by RFC 9111. Its key is all
bytes of its request.

- **Framing cannot differ.** A response is reused only on a connection that has sent nothing but
  whole requests without a body, and only while aiohttp waits for the next one.
  :func:`is_whole_request` is stricter than any parser: what it does not know is left to aiohttp,
  and so is everything that follows on this connection. aiohttp has parsed the same bytes once
  before, in the same state.
- **A response is not reused after its content has left memory.** The pull service keeps the result
  of a hit in memory for a second, and says whether it is fresh
  (:data:`~mirror.pull.results.IsFresh`). This also decides again whether a tag is fresh. A new
  configuration discards all responses, and so does a new block or freeze: admission, the choice
  of the upstream, and what everybody may pull depend on nothing else but the request. A server
  that drains reuses none.
- **A request is a request.** Each has its own record, id and events. The client is the peer of the
  connection. Behind a trusted proxy, it is not, so nothing is stored if one is configured.
- **Memory is bounded.** A stored response has its bytes, and refers to nothing else that is large.
  All are discarded before a new one would exceed the limit.
- **Slow clients.** A response is reused only if nothing else waits to be written. A client that
  reads nothing for a minute is cut off, whatever it was sent. A stop waits for those that read.

Of aiohttp's ``RequestHandler`` this uses ``_waiter``, which is pending while a connection is idle,
``_request_count``, the requests that were parsed, and the time at which an idle connection is
closed. ``test_stored_responses.py`` fails if a version of aiohttp does without them.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from aiohttp import web

from mirror.observability.events import (
    Observer,
    Outcome,
    RequestEnded,
    RequestRecord,
    RequestStarted,
)
from mirror.web import client_socket
from mirror.web.client_connection import ClientConnection
from mirror.web.client_socket import StallWatch, abort_connection
from mirror.web.health import Health
from mirror.web.streaming import SingleWriteResponse, format_date

# A request line and header fields (RFC 9112, sections 3 and 5), in printable ASCII only.
_WHOLE: Final = re.compile(
    rb"(?:GET|HEAD) /[!-~]* HTTP/1\.1\r\n(?:[A-Za-z0-9-]+:[\t -~]*\r\n)*\r\n"
)
# The first line: fields that say that more than the header follows, or that the connection changes.
# The second line: credentials. So all stored responses are those that everybody may get.
_EXCLUDED: Final = re.compile(
    rb"\r\n(?:content-length|transfer-encoding|trailer|te|expect|upgrade|http2-settings"
    rb"|authorization|proxy-authorization|cookie):",
    re.IGNORECASE,
)
_MAX_REQUEST_BYTES: Final = 4096
"""Bytes of a request whose response is stored: those of container clients have a few hundred."""
_MAX_BYTES: Final = 16 * 1024 * 1024
"""Bytes of all stored responses, with their requests. Clients that send a new id in each request
fill it without any use."""
_EXTRA_BYTES: Final = 2048
"""Bytes that a stored response takes in memory beside its request and its body."""


def is_whole_request(data: bytes) -> bool:
    """Return whether ``data`` is certainly one whole request without a body, and nothing more."""
    return (
        len(data) <= _MAX_REQUEST_BYTES
        and _WHOLE.fullmatch(data) is not None
        and _EXCLUDED.search(data) is None
    )


def make_request_id() -> str:
    """Return a new ``X-Request-Id``: 16 hex digits."""
    return f"{random.getrandbits(64):016x}"


class StoredResponse:
    """A response that may be reused, and the record of the request that had it first.

    Nothing is computed until it is reused: most requests are never repeated.
    """

    __slots__ = ("_record", "_request_id", "_template", "response")

    def __init__(
        self, response: SingleWriteResponse, record: RequestRecord, request_id: str
    ) -> None:
        """Store a response.

        Args:
            response: It is about to be sent.
            record: The record of its request.
            request_id: The id that the client has sent with the same bytes. Empty: each request
                gets a new one.
        """
        self.response = response
        self._record = record
        self._request_id = request_id
        self._template = ""
        """The header, to be filled in (see :func:`_build_template`). Empty until it is needed."""

    def reuse(self, client: str, started: float, seconds: float) -> tuple[RequestRecord, bytes]:
        """Return the record of a further request, and the bytes of its response.

        Args:
            client: Address of the client.
            started: Time (monotonic, in seconds) at which the request has begun.
            seconds: Seconds that have passed since then.
        """
        if not self._template:
            self._template = _build_template(self.response)
        first = self._record
        record = RequestRecord(
            self._request_id or make_request_id(),
            first.method,
            first.path,
            client=client,
            user_agent=first.user_agent,
            user=first.user,
            kind=first.kind,
            ns=first.ns,
            upstream=first.upstream,
            repository=first.repository,
            reference=first.reference,
            digest=first.digest,
            outcome=first.outcome,
            status=first.status,
            bytes_sent=first.bytes_sent,
            bytes_received=first.bytes_received,
            is_sent_in_one_write=first.is_sent_in_one_write,
            is_complete=first.is_complete,
            started=started,
            first_byte=seconds,
            # Of a hit, only that its tag is frozen holds for the next request, too.
            trace=first.trace if first.trace is not None and first.trace.is_frozen else None,
        )
        date = format_date(int(time.time()))
        header = self._template % (record.request_id, seconds * 1000, date)
        return record, header.encode() + self.response.content


def _build_template(response: SingleWriteResponse) -> str:
    """Return the header of a response that was sent, to be filled in for each request.

    ``%s`` stands for its id and its date. ``%.2f`` stands for its duration in milliseconds, the
    only entry of ``Server-Timing``: a reused response has no stages. The order is that of all
    responses: id, duration, date. aiohttp has sent these fields, so it has found no line break in
    them.
    """
    fields = {name: value.replace("%", "%%") for name, value in response.fields.items()}
    fields |= {"X-Request-Id": "%s", "Date": "%s"}
    fields["Server-Timing"] = "total;dur=%.2f"
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join(("HTTP/1.1 200 OK", *lines, "", ""))


class StoredResponses:
    """The stored responses of one process, by the bytes of their requests."""

    def __init__(self, health: Health, emit: Observer) -> None:
        """Start without responses.

        Args:
            health: While it drains, no response is reused.
            emit: Receives the events of each request.
        """
        self._health = health
        self.emit = emit
        self._responses: dict[bytes, StoredResponse] = {}
        self._bytes = 0
        self._cleared_at = 0.0
        """Time (monotonic, in seconds) at which all responses were discarded last."""

    def find(self, data: bytes) -> StoredResponse | None:
        """Return the stored response to the bytes of a request. It may be stale."""
        return None if self._health.is_draining else self._responses.get(data)

    def discard(self, data: bytes) -> None:
        """Discard the response to these bytes, if there is one."""
        stored = self._responses.pop(data, None)
        if stored is not None:
            self._bytes -= _size(data, stored.response)

    def clear(self) -> None:
        """Discard all responses, also those of requests that are being handled.

        The configuration or the operator's marks have changed, or there are too many.
        """
        self._responses.clear()
        self._bytes = 0
        self._cleared_at = time.monotonic()

    def store(
        self, request: web.BaseRequest, response: SingleWriteResponse, pull: RequestRecord
    ) -> None:
        """Store a response if it may be reused.

        Args:
            request: The request, as aiohttp has parsed it.
            response: It is about to be sent.
            pull: The record of the request. Only a hit is stored that everybody may have.
        """
        connection = request.protocol
        data = connection.request_bytes if isinstance(connection, ReusingConnection) else b""
        if not data or pull.outcome is not Outcome.HIT or not response.is_fresh():
            return
        if pull.is_private or pull.started <= self._cleared_at:
            return
        is_given = request.headers.get("X-Request-Id") == pull.request_id
        self.discard(data)
        if self._bytes + _size(data, response) > _MAX_BYTES:
            self.clear()
        self._bytes += _size(data, response)
        self._responses[data] = StoredResponse(response, pull, pull.request_id if is_given else "")


def _size(data: bytes, response: SingleWriteResponse) -> int:
    # The record has the path and the user agent, which can be most of the request, once more.
    return _EXTRA_BYTES + 2 * len(data) + len(response.content)


class UnsentConnections:
    """The connections with bytes that the kernel has not taken."""

    def __init__(self) -> None:
        self._connections: set[ReusingConnection] = set()
        self._none_left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: ReusingConnection) -> None:
        """Add a connection: the kernel has not taken all bytes."""
        self._connections.add(connection)

    def discard(self, connection: ReusingConnection) -> None:
        """Remove a connection: the kernel has all bytes, or the connection is lost."""
        self._connections.discard(connection)
        if not self._connections:
            self._none_left.set()

    async def wait_until_sent(self) -> None:
        """Wait until the kernel has all bytes for all clients."""
        while self._connections:
            self._none_left.clear()
            await self._none_left.wait()


class ReusingConnection(ClientConnection):
    """aiohttp's connection, which reuses stored responses."""

    __slots__ = (
        *("_client", "_is_framed", "_is_new", "_stall_watch", "_stored", "_unsent"),
        "request_bytes",
    )

    def __init__(
        self,
        server: ReusingServer,
        stored: StoredResponses,
        unsent: UnsentConnections,
        **options: Any,
    ) -> None:
        """Create a connection.

        Args:
            server: The server that it belongs to.
            stored: The responses that may be reused.
            unsent: It is one of them while bytes wait for its client.
            options: Those of ``aiohttp.web.RequestHandler``.
        """
        super().__init__(server, **options)
        self._stored = stored
        self._unsent = unsent
        self._client = ""
        self._stall_watch: StallWatch | None = None
        """Watches the client while bytes wait for it in the transport."""
        self._is_new = True
        """Whether no byte has come yet."""
        self._is_framed = True
        """Whether all bytes before the latest ones were whole requests, for us and for aiohttp."""
        self.request_bytes = b""
        """The bytes of the request that is being handled. Empty if its response must not be stored.
        :meth:`StoredResponses.store` reads them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the address of the client."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        # Writing is paused while the kernel has not taken all bytes. So a response ends once they
        # are sent, and the next one does not add to them. (With TLS, another 64 KiB do not count.)
        transport.set_write_buffer_limits(high=1)
        peer = transport.get_extra_info("peername")
        self._client = str(peer[0]) if peer else ""

    def connection_lost(self, exc: BaseException | None) -> None:
        """Watch the client no more."""
        self._stop_stall_watch()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Watch the client, whatever the bytes belong to. A closed connection sends them, too."""
        super().pause_writing()
        if self.transport is not None:
            abort = partial(abort_connection, self.transport, is_reset=True)
            seconds = client_socket.CLIENT_STALL_TIMEOUT_S
            self._stall_watch = StallWatch(self.transport, seconds, abort)
            self._unsent.add(self)

    def resume_writing(self) -> None:
        """Watch the client no more: the kernel has all bytes."""
        self._stop_stall_watch()
        super().resume_writing()

    def _stop_stall_watch(self) -> None:
        if self._stall_watch is not None:
            self._stall_watch.stop()
            self._stall_watch = None
            self._unsent.discard(self)

    def _process_keepalive(self) -> None:
        """Close the connection if it is idle. It is not, while bytes wait for the client."""
        if self._stall_watch is not None:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    def data_received(self, data: bytes) -> None:
        """Reuse a response if there is one for these bytes. Everything else is for aiohttp."""
        waiter = self._waiter
        is_waiting = waiter is not None and not waiter.done()
        if is_waiting and self._is_framed and self._send_stored(data):
            return
        is_whole = self._is_framed and is_whole_request(data)
        # If a request comes while another one is being handled, the response to neither is stored:
        # which response belongs to which bytes would not be certain.
        self.request_bytes = data if is_whole and (is_waiting or self._is_new) else b""
        self._is_new = False
        count = self._request_count
        super().data_received(data)
        self._is_framed = is_whole and self._request_count == count + 1

    def _send_stored(self, data: bytes) -> bool:
        """Send the stored response to a request. Returns False if there is none."""
        stored, transport = self._stored.find(data), self.transport
        if (
            stored is None
            or not stored.response.is_sent
            or transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size()
        ):
            return False
        started = time.monotonic()
        if not stored.response.is_fresh():
            self._stored.discard(data)
            return False
        emit = self._stored.emit
        pull, response = stored.reuse(self._client, started, time.monotonic() - started)
        emit(RequestStarted(pull))
        transport.write(response)
        now = time.monotonic()
        pull.duration = now - started
        self._next_keepalive_close_time = now + self._keepalive_timeout
        emit(RequestEnded(pull))
        return True


class ReusingServer(web.Server):
    """aiohttp's server, with connections that reuse stored responses."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        stored: StoredResponses,
        **options: Any,
    ) -> None:
        """Create the server.

        Args:
            handler: Handles all other requests.
            stored: The responses that may be reused. ``handler`` stores them there.
            options: Those of ``aiohttp.web.RequestHandler``.
        """
        super().__init__(handler, handler_cancellation=True)
        self.unsent = UnsentConnections()
        self._stored = stored
        self._options = options

    def __call__(self) -> web.RequestHandler:
        """Return a new connection. The event loop calls this."""
        loop = asyncio.get_running_loop()
        return ReusingConnection(self, self._stored, self.unsent, loop=loop, **self._options)
