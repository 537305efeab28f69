"""Streams of bodies: attributes, broken and slow transfers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mirror.config.settings import Limits
from mirror.observability.events import BytesFetched, Kind
from mirror.oci.errors import (
    MirrorError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.upstream.api import ContentStream
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, LIMITS, REPO, Kit, upstream_kit


@asynccontextmanager
async def blob(
    *faults: Fault, limits: Limits = LIMITS
) -> AsyncIterator[tuple[Kit, ContentStream, FakeRegistry]]:
    """Open a blob whose response has these faults."""
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", *faults)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            yield kit, stream, fake


async def ending(*faults: Fault, limits: Limits = LIMITS) -> tuple[bytes, MirrorError | None]:
    """Read a blob with these faults. Returns the received bytes and the error, if any."""
    parts = []
    async with blob(*faults, limits=limits) as (_, stream, _):
        try:
            async for chunk in stream:
                parts.append(chunk)  # noqa: PERF401 - chunks before the error count
        except MirrorError as error:
            return b"".join(parts), error
    return b"".join(parts), None


async def test_stream_has_size_type_and_endpoint_and_reports_its_bytes() -> None:
    headers = {"Content-Type": "application/x; charset=y"}
    async with blob(Fault(headers=headers)) as (kit, stream, fake):
        assert (stream.start, stream.total) == (0, len(DATA))
        assert (stream.media_type, stream.endpoint) == ("application/x", fake.url)
        assert b"".join([chunk async for chunk in stream]) == DATA
        assert sum(event.count for event in kit.seen(BytesFetched)) == len(DATA)


@pytest.mark.parametrize(
    ("tag", "strong"),
    [('"abc"', True), ('""', True), ('W/"abc"', False), ("abc", False), ("", False)],
)
async def test_only_a_strong_etag_is_a_validator(tag: str, strong: bool) -> None:
    async with blob(Fault(headers={"ETag": tag})) as (_, stream, _):
        assert (stream.validator is not None) is strong
    async with blob(Fault(drop_headers=("ETag",))) as (_, stream, _):
        assert stream.validator is None


@pytest.mark.row("HU11-compression-bombs")
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "identity, gzip", "zstd"])
async def test_content_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(UpstreamProtocolError):
        async with blob(Fault(headers={"Content-Encoding": encoding})):
            pass


@pytest.mark.row("U5-odd-framing")
async def test_body_without_a_length_has_no_total() -> None:
    for fault in (Fault(chunked=True), Fault(no_length=True), Fault(http10=True)):
        async with blob(fault) as (_, stream, _):
            assert stream.total is None
            assert b"".join([chunk async for chunk in stream]) == DATA
    assert await ending(Fault(headers={"Content-Encoding": "Identity"})) == (DATA, None)


@pytest.mark.row("U1-reset-at-a-byte")
@pytest.mark.parametrize("at", [0, 1, 65_536, len(DATA) - 1])
async def test_bytes_before_a_break_are_yielded(at: int) -> None:
    for fault in (Fault(reset_at=at), Fault(end_at=at), Fault(chunked=True, reset_at=at)):
        data, error = await ending(fault)
        assert data == DATA[: len(data)]
        assert type(error) is UpstreamUnavailable
        if fault.end_at is not None:
            assert len(data) == at, "an end loses nothing, a reset may overtake bytes"


@pytest.mark.row("U3-silent-upstream")
async def test_silent_body_raises_a_timeout() -> None:
    data, error = await ending(Fault(stall_at=70_000), limits=Limits(idle=0.3))
    assert (data, type(error)) == (DATA[:70_000], UpstreamTimeout)


@pytest.mark.row("U3-silent-upstream")
async def test_body_below_min_rate_raises_a_timeout() -> None:
    limits = Limits(idle=0.3, min_rate=1000)
    data, error = await ending(Fault(drip=0.02), limits=limits)
    assert type(error) is UpstreamTimeout
    assert len(data) < 300


async def test_slow_reader_does_not_count_for_min_rate() -> None:
    """A slow disk is not the upstream's fault: its bytes are in the buffer meanwhile."""
    limits = Limits(connect=15.0, headers=15.0, idle=0.2, min_rate=10**9)
    parts = []
    async with blob(limits=limits) as (_, stream, _):
        async for chunk in stream:
            parts.append(chunk)
            await asyncio.sleep(0.25)
    assert b"".join(parts) == DATA


async def test_too_long_body_raises_a_protocol_error() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fault = Fault(headers={"Content-Range": f"bytes 0-9/{len(DATA)}"}, status=206, body=DATA)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(UpstreamProtocolError):
            await kit.read(digest)


async def test_leaving_a_stream_ends_the_transfer() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        data = b"x" * 50_000_000
        digest = fake.add_blob(data)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            async for _ in stream:
                break
        assert await kit.registry.head_blob(REPO, digest) == len(data)
        assert fake.bytes_sent < len(data)
        assert fake.connections == 2


async def test_request_after_a_body_that_ended_while_its_socket_was_paused_is_answered() -> None:
    """aiohttp starts its timer for the next byte then, on a connection that nobody reads."""
    data, rest = bytes(200_000), asyncio.Event()
    limits = Limits(connect=15.0, headers=15.0, idle=0.5)
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        digest = fake.add_blob(data)
        fake.fault(f"blobs/{digest}", Fault(stall_at=50_000, gate=rest))
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            chunks = aiter(stream)
            got = await anext(chunks)
            rest.set()
            await asyncio.sleep(0.1)  # the rest, which is larger than the buffer, arrives at once
            assert got + b"".join([chunk async for chunk in chunks]) == data
        await asyncio.sleep(0.6)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            assert b"".join([chunk async for chunk in stream]) == data
