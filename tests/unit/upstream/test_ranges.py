"""Further ranges of content: where they are requested, what is refused, what a failure means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from mirror.config.settings import Limits
from mirror.observability.events import CircuitChanged, Kind
from mirror.oci.errors import (
    BlobUnknown,
    MirrorError,
    OutboundRefused,
    StorageRefused,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.upstream.api import ContentStream
from tests.fakes.registry import Answer, FakeRegistry, Fault, ReceivedRequest
from tests.unit.upstream.kit import DATA, LIMITS, REPO, Kit, at_once, upstream_kit

SIZE = len(DATA)


@dataclass
class Opened:
    """A response to a request without an end, at a registry that redirects to a storage."""

    kit: Kit
    stream: ContentStream
    registry: FakeRegistry
    storage: FakeRegistry
    digest: Digest
    key: str = "1"
    """Part of the signed URL. The storage refuses any other."""
    refusal: int = 403
    """Status of its refusal."""

    @property
    def redirected(self) -> int:
        """The number of redirects."""
        blobs = [seen for seen in self.registry.requests if "/blobs/" in seen.path]
        return sum(1 for seen in blobs if "key" not in seen.query)

    async def read(self, start: int, stop: int) -> bytes:
        async with self.stream.open_range(start, stop) as part:
            return b"".join([chunk async for chunk in part])

    async def error(self, *faults: Fault) -> MirrorError:
        """Return the error of a range whose response has these faults."""
        self.storage.fault(f"blobs/{self.digest}", *faults)
        with pytest.raises(MirrorError) as caught:
            await self.read(1000, 2000)
        return caught.value


@asynccontextmanager
async def opened(
    limits: Limits = LIMITS,
    *,
    redirects: bool = True,
    is_same_origin: bool = False,
    entity_tag: str | None = None,
) -> AsyncIterator[Opened]:
    async with FakeRegistry() as registry, FakeRegistry() as storage:
        digest = registry.add_blob(DATA)
        storage.add_blob(DATA)
        if is_same_origin:
            storage = registry

        def guard(seen: ReceivedRequest) -> Answer | None:
            if "/blobs/" not in seen.path or not redirects:
                return None
            if "key" not in seen.query:
                return 307, {"Location": f"{storage.url}{seen.path}?key={made.key}"}, b""
            return None if seen.query["key"] == [made.key] else (made.refusal, {}, b"expired")

        registry.guard = storage.guard = guard
        if entity_tag is not None:
            storage.fault(f"blobs/{digest}", Fault(headers={"ETag": entity_tag}, times=None))
        registry.token = None if is_same_origin else "secret"
        async with upstream_kit(registry.url, limits=limits) as kit:
            made = Opened(kit, None, registry, storage, digest)  # type: ignore[arg-type] # set below
            async with kit.registry.open(REPO, digest, Kind.BLOB) as stream:
                made.stream = stream
                yield made


async def test_ranges_are_requested_where_the_redirect_led_and_without_credentials() -> None:
    async with opened() as made:
        for start, stop in ((0, 1), (1000, 70_000), (SIZE - 1, SIZE)):
            assert await made.read(start, stop) == DATA[start:stop]
        assert made.registry.count("GET", "blobs/") == 1
        assert made.storage.count("GET") == 4
        assert not any("authorization" in seen.headers for seen in made.storage.requests)
        ranges = [seen.headers.get("range") for seen in made.storage.requests]
        assert ranges == [None, "bytes=0-0", "bytes=1000-69999", f"bytes={SIZE - 1}-{SIZE - 1}"]
        assert made.storage.requests[-1].headers["if-range"] == f'"{made.digest}"'


async def test_content_without_a_strong_entity_tag_is_requested_without_if_range() -> None:
    async with opened(entity_tag='W/"1"') as made:
        assert await made.read(5, 9) == DATA[5:9]
        assert "if-range" not in made.storage.requests[-1].headers


async def test_range_after_one_that_if_range_has_refused_has_no_if_range() -> None:
    """Nodes of a storage may have different tags for the same bytes."""
    async with opened() as made:
        assert isinstance(
            await made.error(Fault(headers={"ETag": '"other"'})), UpstreamProtocolError
        )
        made.storage.fault(f"blobs/{made.digest}", Fault(headers={"ETag": '"other"'}))
        assert await made.read(5, 9) == DATA[5:9]


async def test_range_can_be_read_after_the_first_response_was_closed() -> None:
    async with opened() as made:
        made.stream.close()
        made.stream.close()
        assert await made.read(5, 9) == DATA[5:9]


async def test_connection_of_a_complete_range_is_used_again() -> None:
    async with opened() as made:
        for _ in range(4):
            await made.read(1000, 2000)
        assert made.storage.connections <= 2


@pytest.mark.parametrize("is_same_origin", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 410])
async def test_signed_url_that_expired_is_renewed_once_for_all_connections(
    status: int, is_same_origin: bool
) -> None:
    async with opened(is_same_origin=is_same_origin) as made:
        made.key, made.refusal = "2", status
        spans = [(n * 1000, n * 1000 + 1000) for n in range(4)]
        got = await asyncio.gather(*(made.read(*span) for span in spans))
        assert got == [DATA[start:stop] for start, stop in spans]
        assert made.redirected == 2
        await made.read(0, 10)
        assert made.redirected == 2


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503, times=None), Fault(status=502, times=None), Fault(close=True, times=None)],
    ids=["503", "502", "closes"],
)
async def test_storage_that_goes_down_is_left_for_the_one_that_the_registry_names_now(
    fault: Fault,
) -> None:
    async with opened() as made, FakeRegistry() as other:
        other.add_blob(DATA)
        made.storage.fault(f"blobs/{made.digest}", fault)
        made.registry.guard = lambda seen: (
            (307, {"Location": f"{other.url}{seen.path}"}, b"") if "/blobs/" in seen.path else None
        )
        spans = [(n * 1000, n * 1000 + 1000) for n in range(4)]
        got = await asyncio.gather(*(made.read(*span) for span in spans))
        assert got == [DATA[start:stop] for start, stop in spans]
        assert made.registry.count("GET", "blobs/") == 2
        failed = made.storage.count("GET")
        await made.read(0, 10)
        assert made.storage.count("GET") == failed


async def test_registry_that_fails_itself_is_asked_once_a_range() -> None:
    async with opened(redirects=False) as made:
        made.registry.fault(f"blobs/{made.digest}", Fault(status=503, times=None))
        before = made.registry.count("GET", "blobs/")
        with pytest.raises(UpstreamRateLimited):
            await made.read(0, 10)
        assert made.registry.count("GET", "blobs/") == before + 1


async def test_renewal_that_is_refused_too_is_an_error_of_each_range() -> None:
    async with opened() as made:
        made.storage.guard = lambda seen: (403, {}, b"")
        results = await at_once(3, lambda: made.read(0, 10))
        assert all(isinstance(result, StorageRefused) for result in results)
        assert made.registry.count("GET", "blobs/") <= 4


async def test_registry_without_a_redirect_gets_a_token_that_is_renewed() -> None:
    async with opened(redirects=False) as made:
        assert await made.read(5, 9) == DATA[5:9]
        made.registry.token = "another"
        assert await made.read(5, 9) == DATA[5:9]


@pytest.mark.row("U4-wrong-range")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(ignore_range=True), UpstreamProtocolError),
        (Fault(content_range=f"bytes 1001-2000/{SIZE}"), UpstreamProtocolError),
        (Fault(content_range=f"bytes 1000-1998/{SIZE}"), UpstreamProtocolError),
        (Fault(content_range=f"bytes 1000-1999/{SIZE + 1}"), UpstreamProtocolError),
        (Fault(content_range="nonsense"), UpstreamProtocolError),
        (Fault(headers={"ETag": '"other"'}), UpstreamProtocolError),
        (Fault(headers={"Content-Encoding": "gzip"}), UpstreamProtocolError),
        (Fault(status=416), UpstreamProtocolError),
        (Fault(status=404, times=2), UpstreamUnavailable),
        (Fault(status=404, body=b'{"errors":[{"code":"BLOB_UNKNOWN"}]}', times=2), BlobUnknown),
        (Fault(status=500, times=2), UpstreamUnavailable),
        (Fault(close=True, times=4), UpstreamUnavailable),  # aiohttp tries a used connection again
        (Fault(end_at=10), UpstreamUnavailable),
        (Fault(reset_at=10), UpstreamUnavailable),
        (Fault(status=307, headers={"Location": "http://169.254.1.1/"}), OutboundRefused),
    ],
)
async def test_response_that_is_not_the_range_is_an_error(
    fault: Fault, error: type[MirrorError]
) -> None:
    async with opened() as made:
        assert type(await made.error(fault)) is error


async def test_range_without_a_total_in_its_header_is_accepted() -> None:
    async with opened() as made:
        made.storage.fault("", Fault(content_range="bytes 1000-1999/*"))
        assert await made.read(1000, 2000) == DATA[1000:2000]


@pytest.mark.parametrize("status", [429, 503])
async def test_429_and_503_have_their_retry_after(status: int) -> None:
    async with opened() as made:
        error = await made.error(Fault(status=status, headers={"Retry-After": "7"}))
        assert isinstance(error, UpstreamRateLimited)
        assert error.retry_after == 7
        error = await made.error(Fault(status=status, times=2))
        assert isinstance(error, UpstreamRateLimited)
        assert error.retry_after is None


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_failed_ranges_open_no_circuit_and_begin_no_pause(status: int) -> None:
    async with opened() as made:
        for _ in range(5):
            await made.error(Fault(status=status, times=1 if status == 429 else 2))
        assert made.kit.seen(CircuitChanged) == []
        assert await made.kit.read(made.digest) == DATA


@pytest.mark.row("U3-silent-upstream")
@pytest.mark.parametrize(
    ("fault", "limits"),
    [
        (Fault(stall_at=500), Limits(idle=0.3)),
        (Fault(drip=0.02), Limits(idle=0.3, min_rate=1000)),
    ],
)
async def test_range_has_the_limits_of_a_body(fault: Fault, limits: Limits) -> None:
    async with opened(limits) as made:
        assert type(await made.error(fault)) is UpstreamTimeout
