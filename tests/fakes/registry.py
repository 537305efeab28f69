"""The one fake upstream: a registry that records its requests, and fails as a test tells it.

It speaks HTTP over plain sockets, since no HTTP library would send some of the responses. ``fault``
adds a :class:`Fault` to the responses of a path. A fault is used once, ``times`` times, or always
(``times=None``)::

    async with FakeRegistry() as fake:
        digest = fake.add_blob(b"...")
        fake.fault(f"blobs/{digest}", Fault(reset_at=100))
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeAlias
from urllib.parse import parse_qs, unquote

from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest

_RESET = struct.pack("ii", 1, 0)
Answer: TypeAlias = tuple[int, dict[str, str], bytes]
"""(status, headers, body) of a response."""


@dataclass
class ReceivedRequest:
    """One request to the fake."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    at: float
    body: bytes = b""
    target: str = ""
    """The request target as it was sent. Absolute in a request to a proxy."""


@dataclass
class Fault:
    """A fault of one response. Offsets count from the start of the body that would be sent."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    close: bool = False
    """Close without a response."""
    reset_at: int | None = None
    end_at: int | None = None
    """Offset at which the body ends cleanly, before its ``Content-Length``."""
    stall_at: int | None = None
    gate: asyncio.Event | None = None
    """Ends the stall. None: the stall does not end."""
    endless: bool = False
    """Send spaces after the body without end."""
    drip: float | None = None
    """Seconds between single bytes of the body."""
    delay: float = 0.0
    flip: int | None = None
    """Offset of a byte whose lowest bit is flipped."""
    ignore_range: bool = False
    content_range: str | None = None
    chunked: bool = False
    unended: bool = False
    """Do not send the end of a chunked body."""
    no_length: bool = False
    http10: bool = False
    extra: bytes = b""
    """Bytes after the announced length."""
    surplus: bytes = b""
    """Bytes after the end of the response, on a connection that stays open."""
    surplus_gate: asyncio.Event | None = None
    """The surplus is sent after this event. None: in one packet with the end of the response."""
    drop_headers: tuple[str, ...] = ()
    rate: int | None = None
    """Bytes per second."""
    times: int | None = 1
    method: str | None = None
    """Use the fault for this method only. None: for all."""


class FakeRegistry:
    """A registry on a loopback port, with TLS if ``tls`` is given. Also an HTTP proxy of itself."""

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self._tls = tls
        self._host = host
        self.connections = 0
        self.requests: list[ReceivedRequest] = []
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.tag_key: Callable[[str], Any] = str
        """Key of the order in which tags are listed."""
        self.tag_cursors = False
        """Whether ``Link`` has an opaque cursor in place of ``last``."""
        self.max_page_tags = 1000
        self.link_base = "/v2"
        """What ``Link`` has in front of the repository, such as ``http://internal:5000/v2``."""
        self.referring: dict[str, bytes] = {}
        self.referrers_api = True
        self.base = ""
        """Path before ``/v2/`` that a front adds, and of which the registry knows nothing."""
        self.faults: list[tuple[str, Fault]] = []
        self.token: str | None = None
        """The bearer token that requests need. None: requests need no token."""
        self.basic: str | None = None
        """The ``Authorization`` that requests need instead."""
        self.challenge = ""
        """``WWW-Authenticate`` of a 401. Empty: it names the own token service."""
        self.guard: Callable[[ReceivedRequest], Answer | None] | None = None
        """Called first for each request. What it returns is the answer. None: the usual one."""
        self.token_body: bytes | None = None
        self.token_status = 200
        self.token_delay = 0.0
        self.bytes_sent = 0
        self.blob_rate: int | None = None
        """Bytes per second of the body of each blob. None: no limit."""
        self.total_rate: int | None = None
        """Bytes per second of the bodies of all blobs together."""
        self.max_transfers: int | None = None
        """Blobs that are sent at the same time. One more gets a 429."""
        self.transfers = 0
        """Blobs that are being sent."""
        self.most_transfers = 0
        """The most of them at the same time."""
        self.stalled = asyncio.Event()
        """Set when a response has reached its ``stall_at``."""
        self.port = 0
        self._free_at = 0.0
        """Time at which all bytes that were sent have passed the limit of ``total_rate``."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- set up by a test --------------------------------------------------------------------

    @property
    def open_connections(self) -> int:
        """Connections that nobody has closed."""
        return len(self._tasks)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}"

    def add_blob(self, data: bytes, repository: str = "library/app") -> Digest:
        digest = Digest.of(data)
        self.blobs[repository, str(digest)] = data
        return digest

    def add_manifest(
        self,
        body: bytes,
        repository: str = "library/app",
        tag: str | None = None,
        media_type: str = OCI_MANIFEST,
    ) -> Digest:
        digest = Digest.of(body)
        self.manifests[repository, str(digest)] = body, media_type
        if tag is not None:
            self.tags[repository, tag] = str(digest)
        return digest

    def add_image(
        self, *layers: bytes, repository: str = "library/app", tag: str | None = "latest"
    ) -> Digest:
        config = json.dumps({"layers": len(layers), "tag": tag}).encode()
        parts = [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": str(self.add_blob(layer, repository)),
                "size": len(layer),
            }
            for layer in layers
        ]
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": str(self.add_blob(config, repository)),
                "size": len(config),
            },
            "layers": parts,
        }
        return self.add_manifest(json.dumps(document).encode(), repository, tag)

    def fault(self, path: str, *faults: Fault) -> None:
        """Add faults for the next responses of each path that ends with ``path``."""
        self.faults += [(path, fault) for fault in faults]

    def count(self, method: str, path: str = "") -> int:
        """Return the number of requests of ``method`` with ``path`` in their path."""
        return sum(1 for seen in self.requests if seen.method == method and path in seen.path)

    def count_to_end(self) -> int:
        """Return the number of ``GET`` of blobs up to their end, and not of parts of them."""
        return sum(1 for wanted in self._ranges() if wanted.endswith("-"))

    def parts(self) -> list[str]:
        """Return ``Range`` of each ``GET`` of a part of a blob. Each part must be there once."""
        parts = [wanted for wanted in self._ranges() if not wanted.endswith("-")]
        assert len(parts) == len(set(parts)), parts
        return parts

    def _ranges(self) -> Iterator[str]:
        blobs = (seen for seen in self.requests if seen.method == "GET" and "blobs/" in seen.path)
        return (seen.headers.get("range", "-") for seen in blobs)

    # --- serving --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, self._host, self.port or 0, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop. Connections are refused from now on."""
        if self._server is not None:
            self._server.close()
            tasks = set(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first = await reader.readexactly(1)
        if first == b"\x16":
            return False  # a TLS handshake: some clients try it before plain HTTP
        head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        path, _, query = target.partition("?")
        if not path.startswith("/"):
            path = "/" + path.partition("://")[2].partition("/")[2]
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        sent = await reader.readexactly(int(headers.get("content-length", 0)))
        at = time.monotonic()
        seen = ReceivedRequest(method, unquote(path), parse_qs(query), headers, at, sent, target)
        self.requests.append(seen)
        fault = self._take_fault(seen.method, seen.path)
        if fault.close:
            return False
        await asyncio.sleep(fault.delay)
        status, found, body = await self._answer(seen)
        if fault.status is not None:
            status, found, body = fault.status, {}, b"" if fault.body is None else fault.body
        elif fault.body is not None:
            body = fault.body
        if method != "GET" or "/blobs/" not in seen.path or status != 200:
            return await self._send(writer, seen, fault, status, {**found, **fault.headers}, body)
        return await self._send_blob(writer, seen, fault, {**found, **fault.headers}, body)

    async def _send_blob(
        self,
        writer: asyncio.StreamWriter,
        seen: ReceivedRequest,
        fault: Fault,
        headers: dict[str, str],
        body: bytes,
    ) -> bool:
        """Send a blob within the limits of all blobs."""
        if self.max_transfers is not None and self.transfers >= self.max_transfers:
            return await self._send(writer, seen, fault, 429, {}, b"")
        if fault.rate is None:
            fault = replace(fault, rate=self.blob_rate)
        self.transfers += 1
        self.most_transfers = max(self.most_transfers, self.transfers)
        try:
            return await self._send(writer, seen, fault, 200, headers, body)
        finally:
            self.transfers -= 1

    def _take_fault(self, method: str, path: str) -> Fault:
        for index, (suffix, fault) in enumerate(self.faults):
            if path.endswith(suffix) and fault.method in (None, method):
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        del self.faults[index]
                return fault
        return Fault()

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        seen: ReceivedRequest,
        fault: Fault,
        status: int,
        headers: dict[str, str],
        body: bytes,
    ) -> bool:
        if fault.flip is not None and len(body) > fault.flip:
            body = _flip(body, fault.flip)
        wanted = seen.headers.get("range")
        if status == 200 and wanted and not fault.ignore_range and "blobs/" in seen.path:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, total = int(first), len(body)
            stop = min(total, int(last) + 1) if last else total
            if start >= total:
                status, body, headers = 416, b"", {"Content-Range": f"bytes */{total}"}
            elif seen.headers.get("if-range", headers.get("ETag")) == headers.get("ETag"):
                status, body = 206, body[start:stop]
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        if fault.content_range is not None and "Content-Range" in headers:
            headers["Content-Range"] = fault.content_range
        framed = not (fault.chunked or fault.no_length or fault.http10)
        if framed:
            headers.setdefault("Content-Length", str(len(body)))
        elif fault.chunked:
            headers["Transfer-Encoding"] = "chunked"
        for name in fault.drop_headers:
            headers.pop(name, None)
        version = "1.0" if fault.http10 else "1.1"
        lines = [f"HTTP/{version} {status} Status", *(f"{k}: {v}" for k, v in headers.items())]
        with _packed(writer, fault):
            writer.write("\r\n".join((*lines, "", "")).encode("latin-1"))
            await writer.drain()
            stays_open = True
            if seen.method != "HEAD" and status not in (204, 304):
                stays_open = await self._send_body(writer, fault, body + fault.extra, framed)
            if fault.surplus_gate is not None:
                await fault.surplus_gate.wait()
            writer.write(fault.surplus)
            await writer.drain()
        return stays_open

    async def _send_body(
        self, writer: asyncio.StreamWriter, fault: Fault, body: bytes, framed: bool
    ) -> bool:
        stops = [n for n in (fault.reset_at, fault.end_at, fault.stall_at) if n is not None]
        stop = min([*stops, len(body)])
        await self._send_pieces(writer, fault, body, stop)
        if fault.reset_at is not None and stop == fault.reset_at:
            # A reset discards bytes that are not sent yet: let them leave first.
            await asyncio.sleep(0.02)
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
            return False
        if fault.stall_at is not None and stop == fault.stall_at:
            self.stalled.set()
            await (asyncio.Event() if fault.gate is None else fault.gate).wait()
            await self._send_pieces(writer, fault, body, len(body), stop)
        while fault.endless:
            await self._send_pieces(writer, fault, b" " * 65_536, 65_536)
        if fault.unended:
            await asyncio.Event().wait()
        if fault.chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return framed and fault.end_at is None and not fault.extra

    async def _send_pieces(
        self, writer: asyncio.StreamWriter, fault: Fault, body: bytes, stop: int, start: int = 0
    ) -> None:
        piece = 1 if fault.drip is not None else 65_536
        begun = time.monotonic()
        for offset in range(start, stop, piece):
            data = body[offset : min(offset + piece, stop)]
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if fault.chunked else data)
            self.bytes_sent += len(data)
            await writer.drain()
            if fault.drip is not None:
                await asyncio.sleep(fault.drip)
            if self.total_rate is not None:
                self._free_at = max(self._free_at, time.monotonic()) + len(data) / self.total_rate
                await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            if fault.rate is not None:
                ahead = (offset - start + len(data)) / fault.rate - (time.monotonic() - begun)
                await asyncio.sleep(max(0.0, ahead))

    # --- answers --------------------------------------------------------------------------------

    async def _answer(self, seen: ReceivedRequest) -> Answer:
        guarded = self.guard(seen) if self.guard is not None else None
        if guarded is not None:
            return guarded
        if seen.path == "/token":
            await asyncio.sleep(self.token_delay)
            body = self.token_body
            if body is None:
                body = json.dumps({"token": self.token, "expires_in": 300}).encode()
            return self.token_status, {"Content-Type": "application/json"}, body
        wanted = self.basic or (f"Bearer {self.token}" if self.token else None)
        if wanted is not None and seen.headers.get("authorization") != wanted:
            bearer = f'Bearer realm="{self.url}/token",service="fake",scope="placeholder"'
            challenge = self.challenge or ('Basic realm="fake"' if self.basic else bearer)
            return 401, {"WWW-Authenticate": challenge}, b""
        if not seen.path.startswith(f"{self.base}/v2/"):
            return 404, {}, b""
        seen = replace(seen, path=seen.path.removeprefix(self.base))
        if seen.path == "/v2/":
            return 200, {}, b"{}"
        return self._content(seen)

    def _content(self, seen: ReceivedRequest) -> tuple[int, dict[str, str], bytes]:
        name, _, reference = seen.path.removeprefix("/v2/").rpartition("/")
        repository, _, kind = name.rpartition("/")
        if kind == "manifests":
            digest = self.tags.get((repository, reference), reference)
            found = self.manifests.get((repository, digest))
            if found is None:
                return 404, {}, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}'
            headers = {"Content-Type": found[1], "Docker-Content-Digest": digest}
            if not found[1]:
                del headers["Content-Type"]
            return 200, headers, found[0]
        if kind == "blobs":
            data = self.blobs.get((repository, reference))
            if data is None:
                return 404, {}, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}'
            headers = {"Content-Type": "application/octet-stream", "ETag": f'"{reference}"'}
            return 200, headers, data
        if kind == "tags":
            return self._tags(repository, seen)
        if kind == "referrers" and self.referrers_api:
            empty = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
            body = self.referring.get(reference, empty.encode())
            return 200, {"Content-Type": OCI_INDEX}, body
        return 404, {}, b""

    def _tags(self, repository: str, seen: ReceivedRequest) -> tuple[int, dict[str, str], bytes]:
        names = sorted((tag for name, tag in self.tags if name == repository), key=self.tag_key)
        if not names:
            return 404, {}, b'{"errors":[{"code":"NAME_UNKNOWN"}]}'
        count = min(int(seen.query.get("n", ["1000"])[0]), self.max_page_tags)
        start = int(seen.query.get("cursor", ["0"])[0])
        if "last" in seen.query:
            last = self.tag_key(seen.query["last"][0])
            start = sum(1 for name in names if self.tag_key(name) <= last)
        stop = start + count
        headers = {"Content-Type": "application/json"}
        if stop < len(names):
            after = f"cursor={stop}" if self.tag_cursors else f"last={names[stop - 1]}"
            target = f"{self.link_base}/{repository}/tags/list?n={count}&{after}"
            headers["Link"] = f'<{target}>; rel="next"'
        body = json.dumps({"name": repository, "tags": names[start:stop]}).encode()
        return 200, headers, body


@contextmanager
def _packed(writer: asyncio.StreamWriter, fault: Fault) -> Iterator[None]:
    """Send the end of a response in one packet with its surplus (``TCP_CORK``, tcp(7))."""
    is_packed = fault.surplus != b"" and fault.surplus_gate is None
    connection = writer.get_extra_info("socket")
    if is_packed:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    yield
    if is_packed:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def _flip(body: bytes, offset: int) -> bytes:
    return body[:offset] + bytes([body[offset] ^ 1]) + body[offset + 1 :]


def digests(values: Iterable[bytes]) -> list[str]:
    """Return the digests of values, as text."""
    return [str(Digest.of(value)) for value in values]
