"""Large bodies: by both kinds of connections, with faults, and while nobody reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from mirror.observability.events import Kind
from mirror.oci.errors import UpstreamTimeout, UpstreamUnavailable
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


async def test_bytes_after_a_large_body_close_the_connection() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(BODY)
        fake.fault(f"blobs/{digest}", Fault(extra=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
        assert await kit.read(digest) == BODY
        assert await kit.read(digest) == BODY
        assert fake.connections == 2


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
