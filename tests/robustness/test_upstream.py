"""Rows U1 to U6, U16: faults of an upstream in the body, seen by clients of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mirror.config.settings import Limits
from mirror.observability.events import DigestMismatched, Resumed
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import QUICK, Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(1_000_000, 21)
MIB = 1024 * 1024


async def fetch(server: Server, digest: Digest) -> bytes:
    status, headers, body = await server.get(server.blob(digest))
    assert status == 200
    assert headers["Docker-Content-Digest"] == str(digest)
    return body


async def complete_bodies(server: Server, url: str, tries: int) -> list[bytes]:
    """Return the bodies that a client takes for complete."""
    bodies = []
    for _ in range(tries):
        try:
            status, _, body = await server.get(url)
        except aiohttp.ClientError:
            continue
        if status == 200:
            bodies.append(body)
    return bodies


@pytest.mark.row("U1-reset-at-a-byte")
@pytest.mark.parametrize("at", [0, 1, 65_535, 65_536, 65_537, len(DATA) // 2, len(DATA) - 1])
async def test_reset_is_resumed_without_an_error_at_the_client(tmp_path: Path, at: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=at))
        assert await fetch(server, digest) == DATA
        assert fake.count("GET", "blobs/") == 2
        assert [e for e in server.events if isinstance(e, Resumed)]


@pytest.mark.row("U2-clean-end-too-early")
async def test_early_clean_ends_are_resumed_five_times(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    data = random_bytes(48 * MIB + 17, 22)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(data)
        fake.fault(f"blobs/{digest}", *(Fault(end_at=8 * MIB) for _ in range(5)))
        assert await fetch(server, digest) == data
        assert fake.count("GET", "blobs/") == 6
        assert fake.bytes_sent <= len(data) * 1.01
        tried(5)


@pytest.mark.row("U3-silent-upstream")
async def test_stall_is_given_up_and_resumed(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=QUICK) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=500_000))
        assert await fetch(server, digest) == DATA


@pytest.mark.row("U3-silent-upstream")
async def test_endless_trickle_of_bytes_is_given_up(tmp_path: Path) -> None:
    limits = Limits(connect=1.0, headers=1.0, idle=0.4)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(drip=0.1, times=None))
        async with asyncio.timeout(40):
            with pytest.raises(aiohttp.ClientError):
                await fetch(server, digest)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(reset_at=1000), marks=pytest.mark.row("U1-reset-at-a-byte")),
        pytest.param(Fault(stall_at=1000), marks=pytest.mark.row("U3-silent-upstream")),
    ],
    ids=["reset", "stall"],
)
async def test_body_that_breaks_early_comes_from_the_next_endpoint(
    tmp_path: Path, fault: Fault
) -> None:
    fault.times = None
    async with (
        FakeRegistry() as bad,
        FakeRegistry() as good,
        running(tmp_path, bad.url, good.url, limits=QUICK) as server,
    ):
        digest = bad.add_blob(DATA)
        good.add_blob(DATA)
        bad.fault(f"blobs/{digest}", fault)
        assert await fetch(server, digest) == DATA
        assert (bad.count("GET"), good.count("GET")) == (1, 1)
        assert bad.bytes_sent + good.bytes_sent <= len(DATA) * 1.01
        assert "if-range" not in good.requests[0].headers, "the ETag is of another endpoint"


@pytest.mark.row("U1-reset-at-a-byte")
async def test_broken_body_is_resumed_at_its_endpoint_if_no_other_has_it(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as only,
        FakeRegistry() as other,
        running(tmp_path, only.url, other.url) as server,
    ):
        digest = only.add_blob(DATA)
        only.fault(f"blobs/{digest}", Fault(reset_at=1000, times=2))
        assert await fetch(server, digest) == DATA
        assert (only.count("GET"), other.count("GET")) == (3, 2)
        assert (await server.get(server.blob(digest)))[0] == 200


@pytest.mark.row("U4-wrong-range")
@pytest.mark.parametrize(
    "second",
    [
        Fault(ignore_range=True),
        Fault(content_range="bytes 1-999999/1000000"),
        Fault(content_range="bytes 500000-999999/1000001"),
        Fault(content_range="nonsense"),
        Fault(status=416),
        Fault(headers={"ETag": '"another"'}),
    ],
    ids=["ignored", "other-start", "other-total", "nonsense", "416", "etag"],
)
async def test_response_for_another_range_is_never_spliced(tmp_path: Path, second: Fault) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=500_000), second)
        assert await fetch(server, digest) == DATA


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize(
    ("fault", "served"),
    [
        (Fault(chunked=True, times=None), True),
        (Fault(no_length=True, times=None), True),
        (Fault(http10=True, times=None), True),
        (Fault(extra=b"more", times=None), True),
        (Fault(headers={"Content-Encoding": "gzip"}, times=None), False),
        (Fault(headers={"Content-Length": "999999"}, times=None), False),
        (Fault(headers={"Content-Length": "-5"}, times=None), False),
    ],
    ids=["chunked", "no-length", "http10", "too-long", "gzip", "short-length", "negative"],
)
async def test_odd_framing_is_served_or_refused_but_never_wrong(
    tmp_path: Path, fault: Fault, served: bool
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", fault)
        bodies = await complete_bodies(server, server.blob(digest), 2)
        assert set(bodies) <= {DATA}
        assert bool(bodies) is served


@pytest.mark.row("U6-wrong-bit")
@pytest.mark.parametrize("offset", [0, 500_000, len(DATA) - 1])
async def test_body_with_a_wrong_bit_completes_for_no_client(
    tmp_path: Path, offset: int, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(flip=offset, times=None))
        results = await asyncio.gather(
            *(complete_bodies(server, server.blob(digest), 1) for _ in range(8))
        )
        assert not any(results)
        assert not server.store.layout.blob(digest).exists()
        assert [e for e in server.events if isinstance(e, DigestMismatched)]
        tried(8)


@pytest.mark.row("U6-wrong-bit")
async def test_next_endpoint_is_tried_after_wrong_bytes(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as bad,
        FakeRegistry() as good,
        running(tmp_path, bad.url, good.url) as server,
    ):
        digest = good.add_blob(DATA)
        bad.add_blob(DATA)
        bad.fault(f"blobs/{digest}", Fault(flip=10, times=None))
        assert await complete_bodies(server, server.blob(digest), 2)
        assert good.count("GET", "blobs/") == 1


@pytest.mark.row("U16-client-that-does-not-read")
async def test_slow_client_does_not_slow_the_fetch(tmp_path: Path) -> None:
    data = random_bytes(24 * MIB, 24)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(data)
        async with server.client.get(server.blob(digest)) as slow:
            await slow.content.readexactly(1000)
            for _ in range(500):
                if server.store.layout.blob(digest).exists():
                    break
                await asyncio.sleep(0.02)
            assert server.store.layout.blob(digest).exists(), (
                "the blob arrived although the client read nothing"
            )
            assert await fetch(server, digest) == data


async def test_time_limits_of_these_tests_are_shorter_than_the_defaults() -> None:
    defaults: Any = Limits()
    assert (defaults.connect, defaults.headers, defaults.idle) == (5.0, 15.0, 30.0)
    assert QUICK.idle < defaults.idle
