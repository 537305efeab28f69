"""Large bodies: by both kinds of connections, with faults, unread. Bytes after any body."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import aiohttp
import pytest

from mirror.observability.events import Kind
from mirror.oci.errors import BlobUnknown, UpstreamTimeout, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.upstream import body_receiver, transport
from mirror.upstream.body_receiver import BodyReceiver
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.unit.upstream.kit import LIMITS, REPO, Kit, tls_server, upstream_kit
from tests.waiting import until

BODY = bytes(range(251)) * 20_000
"""5 MB. A part of it that is repeated or left out changes the rest."""
CUT = 3_000_000
"""Offset of a fault, far after the bytes that aiohttp receives itself."""


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> list[BodyReceiver]:
    """Collect the receivers of a test."""
    made: list[BodyReceiver] = []

    def take_over(response: aiohttp.ClientResponse, received: int) -> BodyReceiver | None:
        receiver = body_receiver.take_over(response, received)
        made.extend([receiver] if receiver is not None else [])
        return receiver

    monkeypatch.setattr(transport, "take_over", take_over)
    return made


@asynccontextmanager
async def opened(kit: Kit, digest: Digest) -> AsyncIterator[AsyncIterator[bytes]]:
    """Yield the chunks of a blob."""
    async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
        yield aiter(stream)


async def received_until(kit: Kit, digest: Digest, error: type[Exception]) -> bytes:
    """Read a blob until ``error`` is raised. Returns what arrived before."""
    got = b""
    async with opened(kit, digest) as chunks:
        try:
            async for chunk in chunks:
                got += chunk
        except error:
            return got
    pytest.fail("the body ended without an error")


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
async def test_connection_of_large_bodies_is_used_again(
    is_tls: bool, tmp_path: Path, receivers: list[BodyReceiver]
) -> None:
    certificate = Certificate.make(tmp_path)
    context = tls_server(certificate) if is_tls else None
    ca = str(certificate.cert_file) if is_tls else None
    async with FakeRegistry(context) as fake, upstream_kit(fake.url, ca=ca) as kit:
        large, small = fake.add_blob(BODY), fake.add_blob(b"small")
        for _ in range(3):
            assert await kit.read(large) == BODY
            assert await kit.read(small) == b"small"
        assert (len(receivers), fake.connections) == (3, 1)


async def test_rest_of_a_large_body_is_received_by_range(receivers: list[BodyReceiver]) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY)
        assert await kit.read(digest, offset=1_000_000, total=len(BODY)) == BODY[1_000_000:]
        assert len(receivers) == 1


async def test_chunked_body_is_left_to_aiohttp(receivers: list[BodyReceiver]) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY)
        fake.fault(f"blobs/{digest}", Fault(chunked=True))
        assert await kit.read(digest) == BODY
        assert not receivers


@pytest.mark.parametrize("fault", [Fault(end_at=CUT), Fault(reset_at=CUT)], ids=["closed", "reset"])
async def test_large_body_that_breaks_gives_what_arrived_and_an_error(
    fault: Fault, receivers: list[BodyReceiver]
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY)
        fake.fault(f"blobs/{digest}", fault)
        got = await received_until(kit, digest, UpstreamUnavailable)
        # A reset may discard bytes that the kernel has not handed over.
        assert BODY.startswith(got)
        assert len(got) == CUT or fault.reset_at
        assert len(receivers) == 1
        assert await kit.read(digest) == BODY


async def test_large_body_that_stops_gives_what_arrived_and_a_timeout(
    receivers: list[BodyReceiver],
) -> None:
    limits = LIMITS.model_copy(update={"idle": 0.5})
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        digest = fake.add_blob(BODY)
        fake.fault(f"blobs/{digest}", Fault(stall_at=CUT))
        assert await received_until(kit, digest, UpstreamTimeout) == BODY[:CUT]
        assert len(receivers) == 1


async def test_large_body_is_whole_if_a_tls_upstream_closes_right_after_it(
    tmp_path: Path, receivers: list[BodyReceiver]
) -> None:
    certificate = Certificate.make(tmp_path)
    async with (
        FakeRegistry(tls_server(certificate)) as fake,
        upstream_kit(fake.url, ca=str(certificate.cert_file)) as kit,
    ):
        for size in range(2_000_000, 2_500_000, 100_000):
            digest = fake.add_blob(BODY[:size])
            closing = Fault(headers={"Connection": "close"}, end_at=size)
            fake.fault(f"blobs/{digest}", closing)
            assert await kit.read(digest) == BODY[:size]
        assert len(receivers) == fake.connections == 5


@contextmanager
def closing_server(context: ssl.SSLContext) -> Iterator[str]:
    """Yield the URL of an upstream that closes a connection without waiting for the client.

    The path of a blob ends with its size. All blobs are parts of ``BODY``.
    """

    def respond(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            size = int(re.search(rb"([0-9]+) HTTP", tls.recv(65536))[1])  # type: ignore[index] # a digest of digits
            header = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
            tls.sendall(header.encode() + BODY[:size])

    def serve() -> None:
        with ThreadPoolExecutor(16) as threads, suppress(OSError):
            while True:
                threads.submit(respond, listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve)
        thread.start()
        yield f"https://localhost:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


async def test_large_bodies_are_whole_although_a_tls_upstream_closes_before_they_are_read(
    tmp_path: Path, receivers: list[BodyReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then bytes wait in the TLS layer. With many bodies, each one is read in small parts."""
    monkeypatch.setattr(body_receiver, "_ALL_READS_BYTES", 1)
    certificate, sizes = Certificate.make(tmp_path), range(1_600_000, 2_400_000, 50_000)
    with closing_server(tls_server(certificate)) as url:
        async with upstream_kit(url, ca=str(certificate.cert_file)) as kit:

            async def read_slowly(size: int) -> bytes:
                got, digest = b"", Digest.parse(f"sha256:{size:064}")
                async with opened(kit, digest) as chunks:
                    async for chunk in chunks:
                        got += chunk
                        await asyncio.sleep(0.05)
                return got

            bodies = await asyncio.gather(*map(read_slowly, sizes))
    assert bodies == [BODY[:size] for size in sizes]
    assert len(receivers) == len(sizes)


# --- bytes after a body ---------------------------------------------------------------------------

OTHER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nDocker-Content-Digest: sha256:0\r\n\r\nWRONG"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it"
EMPTY = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n"
"""What some servers send on a connection that is idle for too long."""
SURPLUS = {"other": OTHER, "half": HALF, "junk": b"junk"}
FRAMINGS: dict[str, tuple[bytes, Fault]] = {
    "empty": (b"", Fault()),
    "small": (b"small", Fault()),
    "medium": (BODY[:200_000], Fault()),
    "chunked": (BODY[:200_000], Fault(chunked=True)),
    "large": (BODY, Fault()),
    "missing": (b"", Fault(status=404, body=b"{}")),
}


@asynccontextmanager
async def followed(
    body: bytes, fault: Fault, tls: Certificate | None = None
) -> AsyncIterator[tuple[Kit, Digest]]:
    """Yield a blob, and ``fault`` for it. Afterwards, ask for another one.

    Fails unless the connection of the first response was closed.
    """
    ca = str(tls.cert_file) if tls else None
    async with (
        FakeRegistry(tls_server(tls) if tls else None) as fake,
        upstream_kit(fake.url, ca=ca) as kit,
    ):
        digest, other = fake.add_blob(body), fake.add_blob(b"other")
        fake.fault(f"blobs/{digest}", fault)
        yield kit, digest
        # An idle connection would be closed later, too.
        await until(lambda: fake.open_connections == 0, 5.0)
        assert await kit.read(other) == b"other"
        assert fake.connections == 2


async def read_or_miss(kit: Kit, digest: Digest, framing: str) -> None:
    """Ask for the blob of a framing. Fails if the response is another one."""
    body, fault = FRAMINGS[framing]
    if fault.status is not None:
        with pytest.raises(BlobUnknown):
            await kit.read(digest)
    else:
        assert await kit.read(digest) == body


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize(
    ("framing", "surplus"),
    [
        *((framing, surplus) for framing in FRAMINGS for surplus in ("other", "half")),
        # aiohttp refuses a smaller response, because it reads all of it together with the junk.
        *((framing, "junk") for framing in ("medium", "chunked", "large")),
    ],
)
async def test_bytes_in_one_packet_with_the_end_of_a_body_are_not_the_next_response(
    framing: str, surplus: str
) -> None:
    body, fault = FRAMINGS[framing]
    async with followed(body, replace(fault, surplus=SURPLUS[surplus])) as (kit, digest):
        await read_or_miss(kit, digest, framing)


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize(
    "surplus",
    [OTHER, HALF, TIMED_OUT, b"HTTP/1.", b"\n"],
    ids=["other", "half", "408", "cut", "lf"],
)
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_bytes_on_an_idle_connection_are_not_the_next_response(
    framing: str, surplus: bytes
) -> None:
    (body, fault), gate = FRAMINGS[framing], asyncio.Event()
    late = replace(fault, surplus=surplus, surplus_gate=gate)
    async with followed(body, late) as (kit, digest):
        await read_or_miss(kit, digest, framing)
        gate.set()


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize("is_late", [False, True], ids=["at-once", "late"])
async def test_bytes_after_the_response_to_a_head_are_not_the_next_response(is_late: bool) -> None:
    gate = asyncio.Event() if is_late else None
    async with followed(BODY, Fault(surplus=EMPTY, surplus_gate=gate)) as (kit, digest):
        assert await kit.registry.head_blob(REPO, digest) == len(BODY)
        if gate is not None:
            gate.set()


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize("is_late", [False, True], ids=["at-once", "late"])
async def test_bytes_after_a_large_body_over_tls_are_not_the_next_response(
    is_late: bool, tmp_path: Path
) -> None:
    gate = asyncio.Event() if is_late else None
    fault, certificate = Fault(surplus=OTHER, surplus_gate=gate), Certificate.make(tmp_path)
    async with followed(BODY, fault, certificate) as (kit, digest):
        assert await kit.read(digest) == BODY
        if gate is not None:
            gate.set()


async def test_connection_of_a_large_body_that_is_left_is_closed(
    receivers: list[BodyReceiver],
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY * 8)
        async with opened(kit, digest) as chunks:
            for _ in range(3):
                await anext(chunks)
        assert len(receivers) == 1
        assert await kit.read(fake.add_blob(b"small")) == b"small"
        assert fake.connections == 2
        await until(lambda: receivers[0] not in BodyReceiver._receivers)


async def test_bodies_that_nobody_reads_wait_in_few_bytes(receivers: list[BodyReceiver]) -> None:
    """The limit is one read of each, and what is below the limit at which reading stops."""
    count = 24
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit, AsyncExitStack() as stack:
        digest = fake.add_blob(BODY * 2)
        bodies = [await stack.enter_async_context(opened(kit, digest)) for _ in range(count)]
        firsts = [await anext(chunks) for chunks in bodies]
        assert len(receivers) == count
        await until(lambda: all(not one._transport.is_reading() for one in receivers))
        held = [one._waiting for one in receivers]
        assert 0 < sum(held) <= body_receiver._ALL_READS_BYTES + count * (128 << 10)
        for first, chunks in zip(firsts, bodies, strict=True):
            assert first + b"".join([chunk async for chunk in chunks]) == BODY * 2


async def test_bytes_that_wait_in_the_socket_are_counted_until_they_are_read() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            got = b""
            async for chunk in stream:
                if not got:
                    await until(lambda: stream.unread > 100_000)
                got += chunk
            assert (got, stream.unread) == (BODY, 0)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            stream.close()
            assert stream.unread == 0
