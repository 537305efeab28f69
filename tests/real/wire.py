"""A small HTTP client that returns status, headers and bytes unchanged."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urlsplit

Headers = http.client.HTTPMessage
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Download:
    """Result of one streamed body. Times are seconds since the epoch."""

    status: int
    size: int
    sha256: str
    begun: float
    first_byte: float
    ended: float


def _connect(url: str, timeout: float, ca: str | None) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca)
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout, context=context
        ), target
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout), target


def ask(
    url: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | Iterator[bytes] | None = None,
    *,
    timeout: float = 60.0,
    ca: str | None = None,
) -> Response:
    """Send one request, and return its whole response. Redirects are not followed.

    Raises ``http.client.IncompleteRead`` if the body ends early, ``OSError`` if the connection
    breaks. A ``body`` that is an iterator needs a ``Content-Length``.
    """
    connection, target = _connect(url, timeout, ca)
    with closing(connection):
        connection.request(method, target, body=body, headers=dict(headers or {}))
        with connection.getresponse() as response:
            return Response(response.status, response.headers, response.read())


def download(
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float = 120.0,
    pause: Callable[[int], None] | None = None,
    ca: str | None = None,
) -> Download:
    """Stream a body, hash it, and record the time of its first byte.

    ``pause``: called with the bytes read so far, to read slowly or to act in mid-body.
    """
    connection, target = _connect(url, timeout, ca)
    with closing(connection):
        begun = time.time()
        connection.request("GET", target, headers=dict(headers or {}))
        with connection.getresponse() as response:
            digest, size = hashlib.sha256(), 0
            first = response.read(1)
            first_byte = time.time()
            piece = first
            while piece:
                digest.update(piece)
                size += len(piece)
                if pause is not None:
                    pause(size)
                piece = response.read(CHUNK)
            expected = response.headers.get("Content-Length")
            if expected is not None and int(expected) != size:
                raise http.client.IncompleteRead(b"", int(expected) - size)
            return Download(
                response.status, size, digest.hexdigest(), begun, first_byte, time.time()
            )
