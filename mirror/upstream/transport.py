"""One HTTP exchange: the only place that calls the client session.

Lives here: the session and its limits, redirects followed hop by hop through the guard, time limits
as typed errors. Must not know: repositories, manifests, which endpoint is next.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

import aiohttp
from aiohttp import hdrs
from yarl import URL

from mirror.config.settings import Limits, Upstream
from mirror.oci.errors import FailureScope, OutboundRefused, UpstreamProtocolError, UpstreamTimeout
from mirror.oci.errors import UpstreamUnavailable as Unavailable
from mirror.upstream.outbound import (
    REDIRECT_LIMIT,
    Allowed,
    GuardedResolver,
    Policy,
    Purpose,
    as_url,
    check_url,
)
from mirror.upstream.proxies import Proxies

_READ: Final = 1024 * 1024
_HEADER_LIMIT: Final = 32 * 1024
_CONNECTIONS: Final = 512
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_USER_AGENT: Final = "oci-mirror"
_ROUTES: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses that nobody has (RFC 5737, RFC 3849), to learn those by which we are reached."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose headers are in. ``redirected``: it is of another origin."""

    response: aiohttp.ClientResponse
    redirected: bool


class Transport:
    """Sends the requests of one upstream."""

    def __init__(self, settings: Upstream, environment: Mapping[str, str] = os.environ) -> None:
        self._limits = settings.limits
        self._proxies = Proxies.of(environment)
        endpoints = [as_url(url) for url in settings.endpoints]
        hosts = {url.host or "" for url in endpoints}
        named = hosts | {host.partition(":")[0] for host in settings.token_hosts}
        self._resolver = GuardedResolver(named, self._proxies.addresses)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                ssl=_system_authorities() if settings.ca is None else _authorities(settings.ca),
                limit=_CONNECTIONS,
                ttl_dns_cache=30,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            requote_redirect_url=False,
            headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self._limits.connect,
                sock_read=self._limits.idle,
            ),
            read_bufsize=_READ,
            max_line_size=_HEADER_LIMIT,
            max_field_size=_HEADER_LIMIT,
            # proxies are read by us; netrc is not a source of credentials that anybody named
            trust_env=False,
        )

    @property
    def private_hosts(self) -> Collection[str]:
        """Configured hosts on a network that is not public; grows as names are resolved."""
        return self._resolver.private_hosts

    def deadline(self) -> float:
        """Until when an answer that is asked for now may take, by the event loop's clock."""
        limit = self._limits.connect + self._limits.headers
        return asyncio.get_running_loop().time() + limit

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        policy: Policy,
        *,
        follow: bool = True,
        form: Mapping[str, str] | None = None,
        until: float | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request, follow its redirects, and yield the answer once its headers are in.

        They are awaited ``until`` then, by the event loop's clock; None: as :meth:`deadline` says.
        ``Authorization`` is shown to the endpoint's own origin only. Raises ``UpstreamTimeout``,
        ``UpstreamUnavailable``, ``UpstreamProtocolError`` or ``OutboundRefused``.
        """
        sent = dict(headers)
        crossed = False
        until = self.deadline() if until is None else until
        for _ in range(REDIRECT_LIMIT + 1):
            try:
                response = await self._send(method, url, sent, form, until)
            except Unavailable as error:
                if crossed:
                    error.scope = FailureScope.REQUEST
                raise
            try:
                target = response.headers.get(hdrs.LOCATION)
                if response.status not in _REDIRECTS or target is None or not follow:
                    yield Response(response, crossed)
                    return
            finally:
                # The connection is kept for the next request if nothing more is to come on it.
                response.release()
            verdict = check_url(target, Purpose.REDIRECT, url, policy)
            if not isinstance(verdict, Allowed):
                raise OutboundRefused(f"redirect refused: {verdict.why}")
            if not verdict.same_origin:
                sent.pop("Authorization", None)
                crossed = True
            url = verdict.url
        raise UpstreamProtocolError(f"more than {REDIRECT_LIMIT} redirects")

    async def _send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
        until: float,
    ) -> aiohttp.ClientResponse:
        proxy = self._proxies.of_url(url)
        if proxy is not None and url.scheme == "http":
            # No tunnel is asked for here: the proxy reads the request itself.
            headers = {**headers, **proxy.headers}
        try:
            async with asyncio.timeout_at(until):
                return await self._session.request(
                    method,
                    url,
                    headers=headers,
                    data=form,
                    proxy=proxy.url if proxy is not None else None,
                    proxy_headers=proxy.headers if proxy is not None else None,
                    allow_redirects=False,
                )
        except TimeoutError as error:
            message = "no answer within the time limit"
            raise UpstreamTimeout(message, scope=FailureScope.ENDPOINT) from error
        except aiohttp.ClientConnectorCertificateError as error:
            message = "the certificate is not valid for this upstream"
            raise Unavailable(message, scope=FailureScope.ENDPOINT) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            connected = not isinstance(error, aiohttp.ClientConnectorError)
            scope = FailureScope.PATH if connected else FailureScope.ENDPOINT
            raise Unavailable(f"no answer: {type(error).__name__}", scope=scope) from error


def _authorities(ca: str) -> ssl.SSLContext:
    """The system's authorities, and those of a PEM file."""
    context = ssl.create_default_context()
    context.load_verify_locations(cafile=ca)
    return context


@cache
def _system_authorities() -> ssl.SSLContext:
    """The system's authorities: read once, which takes longer than all else that a start does."""
    return ssl.create_default_context()


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body of at most ``limit`` bytes.

    Raises ``UpstreamProtocolError`` for one that is larger or encoded.
    """
    if response.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() not in ("", "identity"):
        raise UpstreamProtocolError("a content encoding that nobody asked for")
    parts: list[bytes] = []
    size = 0
    try:
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise UpstreamProtocolError(f"an answer of more than {limit} bytes")
            parts.append(chunk)
    except TimeoutError as error:
        message = "silence in the middle of an answer"
        raise UpstreamTimeout(message, scope=FailureScope.PATH) from error
    except (aiohttp.ClientError, OSError) as error:
        message = f"the answer broke off: {type(error).__name__}"
        raise Unavailable(message, scope=FailureScope.PATH) from error
    return b"".join(parts)


async def read_chunks(
    response: aiohttp.ClientResponse, limits: Limits, expected: int | None
) -> AsyncIterator[bytes]:
    """The body as it comes.

    ``expected`` bytes are to come, where that is known. Raises ``UpstreamTimeout`` for silence of
    ``limits.idle`` seconds or a rate below ``limits.min_rate``, ``UpstreamUnavailable`` for a break
    or an end that comes too early. The rate is that of the upstream: only the time in which we wait
    for it counts, not that in which our disk is waited for.
    """
    received = 0
    waited, arrived = 0.0, 0
    content = response.content
    try:
        while True:
            begun = time.monotonic()
            chunk = await content.readany()
            waited += time.monotonic() - begun
            if not chunk:
                break
            received += len(chunk)
            arrived += len(chunk)
            yield chunk
            if waited >= limits.idle:
                if arrived < limits.min_rate * waited:
                    raise UpstreamTimeout("slower than the rate floor", scope=FailureScope.PATH)
                waited, arrived = 0.0, 0
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        # The reader raises before it has handed out all that came; that need not come again.
        if rest := content._read_nowait(-1):
            yield rest
        if isinstance(error, TimeoutError):
            message = "silence in the middle of a body"
            raise UpstreamTimeout(message, scope=FailureScope.PATH) from error
        message = f"the body broke off: {type(error).__name__}"
        raise Unavailable(message, scope=FailureScope.PATH) from error
    if expected is not None and received < expected:
        message = f"the body ended at {received} of {expected} bytes"
        raise Unavailable(message, scope=FailureScope.PATH)
    if expected is not None and received > expected:
        raise UpstreamProtocolError("more bytes than were announced")


def own_addresses(listen: str) -> Collection[tuple[str, int]]:
    """(host, port) pairs that are ourselves, for ``listen`` (host:port)."""
    host, _, text = listen.rpartition(":")
    host = host.strip("[]")
    names = {host, socket.gethostname()}
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        names |= {address for family, target in _ROUTES if (address := _source(family, target))}
    return {(name, int(text)) for name in names}


def _source(family: socket.AddressFamily, target: str) -> str | None:
    """Our address on the way to ``target``; no packet is sent. None where there is no way."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
