"""One HTTP exchange: the only module that calls the client session.

Lives here: the session and its limits, redirects followed hop by hop through the outbound guard,
reading of bodies, and the translation of failures and status codes into typed errors. Must not
know: which endpoint is next, credentials.

Two rules of the translation. A failure never becomes a 404. The text of an error body is never
shown to anybody: it may hold secrets, or escape sequences for a terminal.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
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
from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.upstream.outbound import (
    MAX_REDIRECTS,
    Allowed,
    GuardedResolver,
    Policy,
    Proxies,
    UrlSource,
    as_url,
    check_url,
)
from mirror.upstream.retry import parse_retry_after

_READ_BUFFER_BYTES: Final = 64 * 1024
"""Bytes of a body that are buffered for each fetch. aiohttp pauses the socket at twice as many, and
one read of it adds 256 KiB. Of 40 fetches that a slow disk holds up, 1 MiB would take 90 MiB, and
would save no CPU time."""
_MAX_HEADER_BYTES: Final = 32 * 1024
"""Bytes of one header line at most: long signed URLs exceed the 8 KiB that aiohttp allows."""
_MAX_CONNECTIONS: Final = 512
"""Connections to one upstream at most. With aiohttp's 100, pulls would wait for each other."""
_DNS_TTL_S: Final = 30
"""Seconds for which resolved addresses are reused: pulls connect to the same few hosts."""
_MAX_ERROR_BODY_BYTES: Final = 8 * 1024
"""Bytes of an error body that are read. OCI error bodies have a few hundred."""
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_REFERRERS_UNSUPPORTED: Final = frozenset({*_REDIRECTS, 400, 405, 406, 501})
"""Statuses of registries that do not have the referrers API, beside 404."""
_UNABLE_TO_RESPOND: Final = frozenset({502, 503, 504})
_USER_AGENT: Final = "oci-mirror"
_UNUSED_ADDRESSES: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses that no host has (RFC 5737, RFC 3849). The route to them shows our own addresses."""
# RateLimit-Remaining: 76;w=21600
_RATE_LIMIT: Final = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9}))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Response:
    """A response whose headers have arrived.

    ``is_cross_origin``: a redirect led to another origin than that of the request.
    """

    http: aiohttp.ClientResponse
    is_cross_origin: bool


class Transport:
    """Sends the requests of one upstream."""

    def __init__(self, settings: Upstream, environment: Mapping[str, str] = os.environ) -> None:
        self._limits = settings.limits
        self._proxies = Proxies.from_environment(environment)
        hosts = {as_url(url).host or "" for url in settings.endpoints}
        hosts |= {host.partition(":")[0] for host in settings.token_hosts}
        self._resolver = GuardedResolver(hosts, self._proxies.addresses)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                ssl=_tls_context(settings.ca),
                limit=_MAX_CONNECTIONS,
                ttl_dns_cache=_DNS_TTL_S,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            requote_redirect_url=False,
            headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._limits.connect, sock_read=self._limits.idle
            ),
            read_bufsize=_READ_BUFFER_BYTES,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            # We read the proxies ourselves, and nobody configured netrc for credentials.
            trust_env=False,
        )

    @property
    def private_hosts(self) -> Collection[str]:
        """Configured hosts on a network that is not public. The set grows as names are resolved."""
        return self._resolver.private_hosts

    def response_deadline(self) -> float:
        """Return the deadline of a response that is requested now, in event loop time."""
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
        follow_redirects: bool = True,
        form: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request, follow its redirects, and yield the response once its headers are in.

        ``Authorization`` is sent to the origin of the endpoint only, and is dropped for good at the
        first redirect to another origin.

        Args:
            method: ``GET``, ``HEAD`` or ``POST``. Redirects do not change it.
            url: A URL that the outbound guard has allowed.
            headers: Request headers, beside those of the session.
            policy: Rules for redirects.
            follow_redirects: False: a redirect is the response.
            form: Fields of a form body. None: no body.
            deadline: Event loop time at which the headers must be in, with all redirects. None: see
                :meth:`response_deadline`.

        Raises:
            UpstreamTimeout: the deadline has passed.
            UpstreamUnavailable: no connection, or no valid response.
            UpstreamProtocolError: too many redirects.
            OutboundRefused: the guard refused a redirect.
        """
        request_headers = dict(headers)
        is_cross_origin = False
        deadline = self.response_deadline() if deadline is None else deadline
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await self._send(method, url, request_headers, form, deadline)
            except errors.UpstreamUnavailable as error:
                if is_cross_origin:
                    error.scope = errors.FailureScope.REQUEST
                raise
            try:
                target = response.headers.get(hdrs.LOCATION)
                if response.status not in _REDIRECTS or target is None or not follow_redirects:
                    yield Response(response, is_cross_origin)
                    return
            finally:
                # Keeps the connection for the next request if the body has been read to its end.
                response.release()
            verdict = check_url(target, UrlSource.REDIRECT, url, policy)
            if not isinstance(verdict, Allowed):
                raise errors.OutboundRefused(f"redirect refused: {verdict.why}")
            if not verdict.is_same_origin:
                request_headers.pop("Authorization", None)
                is_cross_origin = True
            url = verdict.url
        raise errors.UpstreamProtocolError(f"more than {MAX_REDIRECTS} redirects")

    async def _send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
        deadline: float,
    ) -> aiohttp.ClientResponse:
        proxy = self._proxies.proxy_for(url)
        if proxy is not None and url.scheme == "http":
            # Plain HTTP has no tunnel: the proxy reads the request itself.
            headers = {**headers, **proxy.headers}
        try:
            async with asyncio.timeout_at(deadline):
                return await self._session.request(
                    method,
                    url,
                    headers=headers,
                    data=form,
                    proxy=proxy.url if proxy is not None else None,
                    proxy_headers=proxy.headers if proxy is not None else None,
                    allow_redirects=False,
                )
        except aiohttp.ConnectionTimeoutError as error:
            message = "no connection to the upstream within the time limit"
            raise errors.UpstreamTimeout(message, scope=errors.FailureScope.ENDPOINT) from error
        except TimeoutError as error:
            # The endpoint is connected. It may take long for this content only.
            message = "the upstream sent no response within the time limit"
            raise errors.UpstreamTimeout(message, scope=errors.FailureScope.PATH) from error
        except aiohttp.ClientConnectorCertificateError as error:
            message = "the certificate of the upstream is not valid"
            raise errors.UpstreamUnavailable(message, scope=errors.FailureScope.ENDPOINT) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            is_connected = not isinstance(error, aiohttp.ClientConnectorError)
            scope = errors.FailureScope.PATH if is_connected else errors.FailureScope.ENDPOINT
            message = f"the upstream sent no valid response: {type(error).__name__}"
            raise errors.UpstreamUnavailable(message, scope=scope) from error


@cache
def _tls_context(ca: str | None) -> ssl.SSLContext:
    """Load the system's certificate authorities, and those of the PEM file ``ca``.

    Cached, because this takes longer than the rest of a start together.
    """
    context = ssl.create_default_context()
    if ca is not None:
        context.load_verify_locations(cafile=ca)
    return context


# --- bodies ---------------------------------------------------------------------------------------


def check_encoding(response: aiohttp.ClientResponse) -> None:
    """Raise ``UpstreamProtocolError`` for a compressed body: we accept ``identity`` only."""
    if response.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() not in ("", "identity"):
        raise errors.UpstreamProtocolError(
            "the response has a content encoding that was not requested"
        )


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a whole body of at most ``limit`` bytes.

    Raises:
        UpstreamProtocolError: the body is larger, or compressed.
        UpstreamTimeout: no byte for ``limits.idle`` seconds.
        UpstreamUnavailable: the connection broke.
    """
    check_encoding(response)
    parts: list[bytes] = []
    size = 0
    try:
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                raise errors.UpstreamProtocolError(f"the response has more than {limit} bytes")
            parts.append(chunk)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise _body_error(error) from error
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
    try:
        while True:
            waiting_since = time.monotonic()
            chunk = await content.readany()
            waited_s += time.monotonic() - waiting_since
            if not chunk:
                break
            received += len(chunk)
            received_in_window += len(chunk)
            yield chunk
            if waited_s >= limits.idle:
                if received_in_window < limits.min_rate * waited_s:
                    message = "the upstream sends less than min_rate"
                    raise errors.UpstreamTimeout(message, scope=errors.FailureScope.PATH)
                waited_s, received_in_window = 0.0, 0
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        # The reader raises before it has handed out all received bytes. They are good, and would
        # have to be sent again.
        if rest := content._read_nowait(-1):
            yield rest
        raise _body_error(error) from error
    if expected is not None and received < expected:
        message = f"the body ended at {received} of {expected} bytes"
        raise errors.UpstreamUnavailable(message, scope=errors.FailureScope.PATH)
    if expected is not None and received > expected:
        raise errors.UpstreamProtocolError("the body is longer than announced")


def _body_error(error: Exception) -> errors.UpstreamUnavailable:
    """Translate a failure in the middle of a body."""
    if isinstance(error, TimeoutError):
        message = "the upstream stopped sending in the middle of a body"
        return errors.UpstreamTimeout(message, scope=errors.FailureScope.PATH)
    message = f"the connection broke in the middle of a body: {type(error).__name__}"
    return errors.UpstreamUnavailable(message, scope=errors.FailureScope.PATH)


# --- headers and status codes ---------------------------------------------------------------------


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


async def error_of(response: Response, kind: Kind) -> errors.MirrorError:
    """Translate the status of a response that was not accepted into an error.

    ``kind``: the requested kind of object. It selects the error class of a 404. A 401 or 403 from
    another origin (the storage that a redirect led to) becomes ``UpstreamUnavailable``, because the
    registry itself did not refuse.
    """
    match response.http.status:
        case 404:
            return await _not_found(response, kind)
        case status if kind is Kind.REFERRERS and status in _REFERRERS_UNSUPPORTED:
            return errors.ManifestUnknown("the upstream does not list referrers")
        case 401 | 403 if response.is_cross_origin:
            # For example an expired signed URL: the next attempt gets a new one.
            return errors.UpstreamUnavailable(
                "the storage behind the registry refuses access", scope=errors.FailureScope.REQUEST
            )
        case 401:
            return errors.Unauthorized("the upstream requires credentials, or refused ours")
        case 403:
            return errors.Denied("the upstream denies access")
        case 429:
            return errors.UpstreamRateLimited(
                "the upstream limits the rate", retry_after=retry_after_of(response.http)
            )
        case status if status >= 500 or status == 408:
            is_unable = status in _UNABLE_TO_RESPOND and not response.is_cross_origin
            scope = errors.FailureScope.PATH if is_unable else errors.FailureScope.REQUEST
            return errors.UpstreamUnavailable(f"the upstream responded with {status}", scope=scope)
        case status:
            return errors.UpstreamProtocolError(f"the upstream responded with {status}")


async def _not_found(response: Response, kind: Kind) -> errors.MirrorError:
    """Translate a 404 by the code of its body (OCI Distribution specification, "Error Codes")."""
    try:
        body = await read_body(response.http, _MAX_ERROR_BODY_BYTES)
        code = str(json.loads(body)["errors"][0]["code"])
    except (errors.UpstreamError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        code = ""  # A response to HEAD has no body. Harbor's code is UNKNOWN.
    if kind is Kind.BLOB and response.is_cross_origin and not code:
        # The registry has the blob: it redirected to it. Only a registry can deny that.
        return errors.UpstreamUnavailable(
            "the storage behind the registry does not have the blob",
            scope=errors.FailureScope.REQUEST,
        )
    if code == "NAME_UNKNOWN" or kind is Kind.TAGS:
        return errors.NameUnknown("the upstream does not know this repository")
    if kind is Kind.BLOB:
        return errors.BlobUnknown("the upstream does not have this blob")
    return errors.ManifestUnknown("the upstream does not have this manifest")


# --- our own addresses ----------------------------------------------------------------------------


def own_addresses(listen: str) -> Collection[tuple[str, int]]:
    """Return the (host, port) pairs of this mirror, for ``listen`` (host:port)."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    names = {host, socket.gethostname()}
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        names |= {_source_address(*pair) or host for pair in _UNUSED_ADDRESSES}
    return {(name, int(port)) for name in names}


def _source_address(family: socket.AddressFamily, target: str) -> str | None:
    """Return our address on the route to ``target``, without a packet. None without a route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
