"""One HTTP exchange: the only module that calls the client session.

Lives here: the sessions and their limits, redirects followed hop by hop through the outbound guard,
and reading of bodies. Must not know: which endpoint is next, credentials, what a status means.

There is one session for each rule of addresses that connections follow. So a connection that is
reused was made by the same rule.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import aiohttp
from aiohttp import hdrs
from yarl import URL

from mirror.config.settings import Limits, Upstream
from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.upstream.body_receiver import BodyReceiver, UpstreamConnector, take_over
from mirror.upstream.connections import Resolver, tls_context
from mirror.upstream.failures import Hop, ResponseLimit, connection_error, has_wrong_time
from mirror.upstream.outbound import (
    CONFIGURED,
    MAX_REDIRECTS,
    PRIVATE_ONLY,
    AddressRefused,
    AddressRule,
    Allowed,
    Policy,
    Proxies,
    Proxy,
    UrlSource,
    Zone,
    address_refusal,
    check_url,
    zone_of,
)
from mirror.upstream.retry import parse_retry_after

_READ_BUFFER_BYTES: Final = 64 * 1024
"""Bytes of a body that are buffered for each fetch. aiohttp pauses the socket at twice as many, and
one read of it adds 256 KiB. Of 40 fetches that a slow disk holds up, 1 MiB would take 90 MiB, and
would save no CPU time."""
_MAX_HEADER_BYTES: Final = 32 * 1024
"""Bytes of one header line at most: long signed URLs exceed the 8 KiB that aiohttp allows."""
_KEEPALIVE_S: Final = 15.0
"""Seconds for which an idle connection is kept, as aiohttp does. Pulls ask again sooner."""
_MAX_CONNECTIONS: Final = 512
"""Connections of one session at most. With aiohttp's 100, pulls would wait for each other."""
_DNS_TTL_S: Final = 30
"""Seconds for which resolved addresses are reused: pulls connect to the same few hosts."""
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_USER_AGENT: Final = "oci-mirror"
# RateLimit-Remaining: 76;w=21600
_RATE_LIMIT: Final = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9}))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Destination:
    """The origin of a response, after all redirects. Every hop has passed the guard.

    ``is_cross_origin``: a redirect led to another origin than that of the request. ``sender``: the
    most private zone of the hosts that redirected.
    """

    target: Allowed
    is_cross_origin: bool = False
    sender: Zone = Zone.LINK_LOCAL


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose headers have arrived. ``limits``: those of its body."""

    http: aiohttp.ClientResponse
    destination: Destination
    limits: Limits

    @property
    def is_cross_origin(self) -> bool:
        """Whether a redirect led to another origin than that of the request."""
        return self.destination.is_cross_origin


class _PeerResponse(aiohttp.ClientResponse):
    """A response that remembers its connection. aiohttp forgets it at the end of the body."""

    peer: asyncio.BaseTransport | None = None

    async def start(self, connection: aiohttp.connector.Connection) -> Self:
        """Read the headers. See :class:`aiohttp.ClientResponse`."""
        self.peer = connection.transport
        await super().start(connection)
        return self

    @property
    def zone(self) -> Zone:
        """Zone of the address that sent the response."""
        name = self.peer.get_extra_info("peername") if self.peer is not None else None
        return (zone_of(name[0]) if name else None) or Zone.PUBLIC

    @property
    def certificate(self) -> bytes:
        """The certificate of the server (DER). Empty without TLS."""
        tls = self.peer.get_extra_info("ssl_object") if self.peer is not None else None
        return (tls.getpeercert(binary_form=True) if tls is not None else None) or b""


class Transport:
    """Sends the requests of one upstream."""

    def __init__(
        self,
        settings: Upstream,
        environment: Mapping[str, str] = os.environ,
        own_addresses: Collection[tuple[str, int]] = (),
    ) -> None:
        """Create a transport without connections.

        Args:
            settings: The upstream.
            environment: The variables that name the proxies.
            own_addresses: (host, port) pairs at which this mirror listens.
        """
        self._own_addresses = own_addresses
        self._settings = settings
        self._limits = settings.limits
        self._proxies = Proxies.from_environment(environment)
        self._resolver = Resolver()
        self._sessions: dict[tuple[AddressRule, bool], aiohttp.ClientSession] = {}
        self._session(CONFIGURED, is_own=True)

    def _session(self, addresses: AddressRule, *, is_own: bool) -> aiohttp.ClientSession:
        """Return the session for connections of one kind.

        Args:
            addresses: The addresses that they may be made to.
            is_own: Whether they are to hosts of the configuration. Only those get to see the
                client certificate.
        """
        session = self._sessions.get((addresses, is_own))
        if session is None:
            session = self._sessions[addresses, is_own] = self._open_session(addresses, is_own)
        return session

    def _open_session(self, addresses: AddressRule, is_own: bool) -> aiohttp.ClientSession:
        settings = self._settings
        certificate = None
        if is_own and settings.client_certificate is not None:
            certificate = settings.client_certificate, settings.client_key
        return aiohttp.ClientSession(
            connector=UpstreamConnector(
                resolver=self._resolver,
                socket_factory=partial(addresses.open_socket, own_addresses=self._own_addresses),
                ssl=tls_context(settings.ca, certificate, settings.insecure),
                limit=_MAX_CONNECTIONS,
                ttl_dns_cache=_DNS_TTL_S,
                keepalive_timeout=_KEEPALIVE_S,
            ),
            response_class=_PeerResponse,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            requote_redirect_url=False,
            headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
            # `connect` limits names and the wait for a free connection, too. Until the headers are
            # in, `ResponseLimit` applies, and then `limits.idle` (see `read_chunks`).
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=self._limits.connect + self._limits.headers,
                sock_connect=self._limits.connect,
            ),
            read_bufsize=_READ_BUFFER_BYTES,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            # We read the proxies ourselves, and nobody configured netrc for credentials.
            trust_env=False,
        )

    def response_limit(self, kind: Kind | None = None, *, is_urgent: bool = False) -> ResponseLimit:
        """Return the time limit of a response that is requested now.

        A blob may come late: an upstream that is a cache itself may have to fetch it first.

        Args:
            kind: The kind of the requested object. None: a token.
            is_urgent: Other requests wait for the outcome, or another endpoint can be asked. So a
                blob gets the limit of the other kinds.
        """
        limits, name = self._limits, "headers"
        if kind is Kind.BLOB and not is_urgent:
            name = "first_byte"
        seconds = limits.connect + getattr(limits, name)
        return ResponseLimit(asyncio.get_running_loop().time() + seconds, name, seconds)

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        policy: Policy,
        *,
        may_follow_redirects: bool = True,
        body: Mapping[str, str] | bytes | None = None,
        limit: ResponseLimit,
        addresses: AddressRule = CONFIGURED,
        destination: Destination | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request, follow its redirects, and yield the response once its headers are in.

        ``Authorization`` is sent to the origin of the endpoint only, and is dropped for good at the
        first redirect to another origin.

        Args:
            method: ``GET``, ``HEAD`` or ``POST``. Redirects do not change it.
            url: A URL that the outbound guard has allowed.
            headers: Request headers, beside those of the session.
            policy: Rules for redirects.
            may_follow_redirects: False: a redirect is the response.
            body: Fields of a form, or bytes. None: no body.
            limit: The time limit, see :meth:`response_limit`.
            addresses: The addresses that the host of ``url`` may have.
            destination: That of an earlier response to a request for ``url``. The request is sent
                there at once. None: it is sent to ``url``.

        Raises:
            UpstreamTimeout: the time limit has run out, or that of the connection.
            UpstreamUnavailable: no connection, or no valid response.
            UpstreamProtocolError: too many redirects.
            OutboundRefused: the guard refused a redirect, or the address of a host.
        """
        request_headers = dict(headers)
        hop = destination or Destination(Allowed(url, is_same_origin=True, addresses=addresses))
        for _ in range(MAX_REDIRECTS + 1):
            if hop.is_cross_origin:
                request_headers.pop("Authorization", None)
            try:
                response = await self._send(
                    method, hop.target, policy, limit, headers=request_headers, data=body
                )
            except errors.UpstreamUnavailable as error:
                if hop.is_cross_origin:
                    error.scope = errors.FailureScope.REQUEST
                raise
            try:
                location = response.headers.get(hdrs.LOCATION)
                is_redirect = response.status in _REDIRECTS and may_follow_redirects
                if location is None or not is_redirect:
                    yield Response(response, hop, self._limits)
                    return
            finally:
                # Keeps the connection for the next request if the body has been read to its end.
                response.release()
            # No host may lead nearer to the mirror than each host before it may.
            sender = min(hop.sender, self._sender_zone(hop.target.url, response))
            verdict = check_url(location, UrlSource.REDIRECT, hop.target.url, policy, sender)
            if not isinstance(verdict, Allowed):
                origin = hop.target.url.origin()
                raise errors.OutboundRefused(f"{origin}: redirect refused: {verdict.why}")
            is_cross_origin = hop.is_cross_origin or not verdict.is_same_origin
            hop = Destination(verdict, is_cross_origin=is_cross_origin, sender=sender)
        raise errors.UpstreamProtocolError(f"{url.origin()}: more than {MAX_REDIRECTS} redirects")

    def _sender_zone(self, url: URL, response: _PeerResponse) -> Zone:
        """Return the zone of the host that sent ``response``."""
        if self._proxies.proxy_for(url) is None:
            return response.zone
        # The address is that of the proxy, which says nothing about the host.
        return zone_of(url.host or "") or Zone.PUBLIC

    async def _send(
        self,
        method: str,
        target: Allowed,
        policy: Policy,
        limit: ResponseLimit,
        *,
        headers: Mapping[str, str],
        data: Mapping[str, str] | bytes | None,
    ) -> _PeerResponse:
        url, addresses = target.url, target.addresses
        proxy = self._proxies.proxy_for(url)
        if proxy is not None:
            if addresses == PRIVATE_ONLY:
                raise errors.OutboundRefused(f"{url.origin()}: behind a proxy it must have TLS")
            # Only the proxy knows the addresses of the host.
            addresses = CONFIGURED
            if url.scheme == "http":
                # Plain HTTP has no tunnel: the proxy reads the request itself.
                headers = {**headers, **proxy.headers}
        session = self._session(addresses, is_own=target.is_same_origin)
        try:
            async with asyncio.timeout_at(limit.deadline):
                return await _request(session, method, url, proxy, headers=headers, data=data)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            os_error = getattr(error, "os_error", error)
            if isinstance(os_error, AddressRefused):
                why = address_refusal(os_error, addresses, policy)
                raise errors.OutboundRefused(f"{url.origin()}: {why}") from error
            hop = Hop(
                url,
                proxy,
                policy,
                self._limits,
                limit,
                is_looking_up=self._resolver.is_looking_up(url.host or ""),
                certificate=await self._expired_certificate(session, url, proxy, error),
            )
            raise connection_error(error, hop) from error

    async def _expired_certificate(
        self, session: aiohttp.ClientSession, url: URL, proxy: Proxy | None, error: Exception
    ) -> bytes:
        """Return the certificate (DER) that was refused for its time. Empty for other failures.

        A failed handshake does not show it. So it is asked for again, without verification: nothing
        secret is sent, and nothing of the response is used.
        """
        if not has_wrong_time(getattr(error, "certificate_error", error)):
            return b""
        context = tls_context(None, None, insecure=True)
        try:
            async with asyncio.timeout(self._limits.connect):
                response = await _request(session, "HEAD", url.origin(), proxy, ssl=context)
                response.release()
                return response.certificate
        except (aiohttp.ClientError, OSError, ValueError):
            return b""


async def _request(
    session: aiohttp.ClientSession, method: str, url: URL, proxy: Proxy | None, **options: Any
) -> _PeerResponse:
    """Send one request, without redirects. ``options``: further ones of aiohttp."""
    response = await session.request(
        method,
        url,
        proxy=proxy.url if proxy is not None else None,
        proxy_headers=proxy.headers if proxy is not None else None,
        allow_redirects=False,
        **options,
    )
    assert isinstance(response, _PeerResponse)
    if response.status == 407 and proxy is not None:
        response.release()
        raise aiohttp.ClientHttpProxyError(response.request_info, response.history, status=407)
    return response


@asynccontextmanager
async def token_deadline(limit: ResponseLimit) -> AsyncIterator[None]:
    """Raise ``UpstreamTimeout`` in the block at the end of ``limit``.

    It marks this error, and any other ``MirrorError`` of the block, with ``is_without_token``.
    """
    try:
        async with asyncio.timeout_at(limit.deadline):
            yield
    except TimeoutError as timeout:
        message = "no token within the time limit (limits.connect and limits.headers)"
        error = errors.UpstreamTimeout(message, scope=errors.FailureScope.SAME_KIND)
        error.is_without_token = True
        raise error from timeout
    except errors.MirrorError as error:
        error.is_without_token = True
        raise


# --- bodies ---------------------------------------------------------------------------------------


def check_encoding(response: aiohttp.ClientResponse) -> None:
    """Raise ``UpstreamProtocolError`` for a compressed body: we accept ``identity`` only."""
    if response.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() not in ("", "identity"):
        raise errors.UpstreamProtocolError(
            "the response has a content encoding that was not requested"
        )


async def read_body(response: Response, max_bytes: int) -> bytes:
    """Read a whole body of at most ``max_bytes``.

    Raises:
        UpstreamProtocolError: the body is larger, or compressed.
        UpstreamTimeout, UpstreamUnavailable: see :func:`read_chunks`.
    """
    check_encoding(response.http)
    parts: list[bytes] = []
    size = 0
    async for chunk in read_chunks(response.http, response.limits, None):
        size += len(chunk)
        if size > max_bytes:
            raise errors.UpstreamProtocolError(f"the response has more than {max_bytes} bytes")
        parts.append(chunk)
    return b"".join(parts)


async def read_chunks(
    response: aiohttp.ClientResponse, limits: Limits, expected: int | None
) -> AsyncIterator[bytes]:
    """Yield a body as it arrives.

    The rate is measured over ``limits.idle`` seconds of waiting for the upstream. Time in which the
    caller works, such as writing to disk, does not count.

    Args:
        response: The response.
        limits: ``idle`` in seconds, ``min_rate`` in bytes a second.
        expected: Length of the body. None: not known.

    Raises:
        UpstreamTimeout: no byte for ``limits.idle`` seconds, or too slow.
        UpstreamUnavailable: the connection broke, or the body ended early.
        UpstreamProtocolError: the body is too long.
    """
    received = 0
    waited_s, received_in_window = 0.0, 0
    content = response.content
    receiver: BodyReceiver | None = None
    try:
        while received != expected:
            waiting_since = time.monotonic()
            async with asyncio.timeout(limits.idle):
                chunk = await (receiver or content).readany()
            waited_s += time.monotonic() - waiting_since
            if not chunk:
                break
            received += len(chunk)
            if expected is not None and received > expected:
                raise errors.UpstreamProtocolError("the body is longer than announced")
            receiver = receiver or take_over(response, received)
            received_in_window += len(chunk)
            yield chunk
            if waited_s >= limits.idle:
                if received_in_window < limits.min_rate * waited_s:
                    host = response.url.origin()
                    message = f"{host} sends less than {limits.min_rate} bytes/s (limits.min_rate)"
                    raise errors.UpstreamTimeout(message, scope=errors.FailureScope.SAME_KIND)
                waited_s, received_in_window = 0.0, 0
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        # The reader raises before it has handed out all received bytes. They are good, and would
        # have to be sent again.
        if rest := content._read_nowait(-1):
            yield rest
        raise _body_error(error, response) from error
    if expected is not None and received < expected:
        message = f"the body ended at {received} of {expected} bytes"
        raise errors.UpstreamUnavailable(message, scope=errors.FailureScope.SAME_KIND)


def _body_error(error: Exception, response: aiohttp.ClientResponse) -> errors.UpstreamUnavailable:
    """Translate a failure in the middle of a body."""
    host = response.url.origin()
    if isinstance(error, TimeoutError):
        message = f"{host} stopped sending in the middle of a body (limits.idle)"
        return errors.UpstreamTimeout(message, scope=errors.FailureScope.SAME_KIND)
    message = f"{host}: the connection broke in the middle of a body"
    return errors.UpstreamUnavailable(message, scope=errors.FailureScope.SAME_KIND)


# --- headers --------------------------------------------------------------------------------------


def parse_rate_limit(headers: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Return (limit, remaining, window in seconds) of Docker Hub's headers. None: not metered.

    See "Docker Hub pull usage and limits" in Docker's documentation. Values that are missing or
    malformed are 0.
    """
    remaining = _RATE_LIMIT.fullmatch(headers.get("ratelimit-remaining", ""))
    if remaining is None:
        return None
    limit = _RATE_LIMIT.fullmatch(headers.get("ratelimit-limit", ""))
    window = int(remaining[2] or 0)
    return int(limit[1]) if limit is not None else 0, int(remaining[1]), window


def retry_after_of(response: aiohttp.ClientResponse) -> float | None:
    """Return the seconds of the ``Retry-After`` header. None if it is missing or malformed."""
    return parse_retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
