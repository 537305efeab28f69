"""A body that arrives: what it says of itself, and how it ends when it does not end well."""

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
    """A blob whose answer has these faults, as it arrives."""
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=limits) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", *faults)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            yield kit, stream, fake


async def ending(*faults: Fault, limits: Limits = LIMITS) -> tuple[bytes, MirrorError | None]:
    """What arrived, and what ended it."""
    parts = []
    async with blob(*faults, limits=limits) as (_, stream, _):
        try:
            async for chunk in stream:
                parts.append(chunk)  # noqa: PERF401 - what came before the error counts
        except MirrorError as error:
            return b"".join(parts), error
    return b"".join(parts), None


async def test_what_it_says_of_itself() -> None:
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
async def test_only_a_strong_tag_is_one_to_resume_with(tag: str, strong: bool) -> None:
    async with blob(Fault(headers={"ETag": tag})) as (_, stream, _):
        assert (stream.validator is not None) is strong
    async with blob(Fault(drop_headers=("ETag",))) as (_, stream, _):
        assert stream.validator is None


@pytest.mark.row("HU11-compression-bombs")
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "identity, gzip", "zstd"])
async def test_an_encoding_nobody_asked_for(encoding: str) -> None:
    with pytest.raises(UpstreamProtocolError):
        async with blob(Fault(headers={"Content-Encoding": encoding})):
            pass


@pytest.mark.row("U5-odd-framing")
async def test_sizes_that_are_not_said() -> None:
    for fault in (Fault(chunked=True), Fault(no_length=True), Fault(http10=True)):
        async with blob(fault) as (_, stream, _):
            assert stream.total is None
            assert b"".join([chunk async for chunk in stream]) == DATA
    assert await ending(Fault(headers={"Content-Encoding": "Identity"})) == (DATA, None)


@pytest.mark.row("U1-reset-at-a-byte")
@pytest.mark.parametrize("at", [0, 1, 65_536, len(DATA) - 1])
async def test_what_came_before_a_break_is_handed_out(at: int) -> None:
    for fault in (Fault(reset_at=at), Fault(end_at=at), Fault(chunked=True, reset_at=at)):
        data, error = await ending(fault)
        assert data == DATA[: len(data)]
        assert type(error) is UpstreamUnavailable
        if fault.end_at is not None:
            assert len(data) == at, "an end loses nothing, a reset may overtake what was sent"


@pytest.mark.row("U3-silent-upstream")
async def test_silence_is_given_up() -> None:
    data, error = await ending(Fault(stall_at=70_000), limits=Limits(idle=0.3))
    assert (data, type(error)) == (DATA[:70_000], UpstreamTimeout)


@pytest.mark.row("U3-silent-upstream")
async def test_less_than_the_least_rate_is_given_up() -> None:
    limits = Limits(idle=0.3, min_rate=1000)
    data, error = await ending(Fault(drip=0.02), limits=limits)
    assert type(error) is UpstreamTimeout
    assert len(data) < 300


async def test_only_the_upstream_is_held_to_the_least_rate() -> None:
    """Our disk may take its time: what the upstream has sent meanwhile is there."""
    limits = Limits(connect=15.0, headers=15.0, idle=0.2, min_rate=10**9)
    parts = []
    async with blob(limits=limits) as (_, stream, _):
        async for chunk in stream:
            parts.append(chunk)
            await asyncio.sleep(0.25)
    assert b"".join(parts) == DATA


async def test_an_upstream_that_sends_too_much_is_found_out() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fault = Fault(headers={"Content-Range": f"bytes 0-9/{len(DATA)}"}, status=206, body=DATA)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(UpstreamProtocolError):
            await kit.read(digest)


async def test_who_leaves_in_the_middle_ends_the_transfer() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        data = b"x" * 50_000_000
        digest = fake.add_blob(data)
        async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
            async for _ in stream:
                break
        assert await kit.registry.head_blob(REPO, digest) == len(data)
        assert fake.bytes_sent < len(data)
        assert fake.connections == 2
