"""Requests of :class:`mirror.upstream.registry.HttpRegistry` for a range of a blob."""

from __future__ import annotations

import pytest

from mirror.observability.events import CircuitChanged
from mirror.oci.errors import MirrorError, UpstreamProtocolError, UpstreamRateLimited
from mirror.oci.reference import Repository
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, upstream_kit

SIZE = len(DATA)
WIDE = {"offset": 1000, "stop": 2000, "total": SIZE}


@pytest.mark.parametrize("offset", [0, 1, 1000, SIZE - 1])
async def test_range_is_requested_with_its_end(offset: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        stop = min(SIZE, offset + 1000)
        assert await kit.read(digest, offset=offset, stop=stop, total=SIZE) == DATA[offset:stop]
        assert fake.requests[-1].headers["range"] == f"bytes={offset}-{stop - 1}"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(content_range=f"bytes 1001-1999/{SIZE}"),
        Fault(content_range=f"bytes 1000-1998/{SIZE}"),
        Fault(content_range=f"bytes 1000-{SIZE - 1}/{SIZE}"),
        Fault(content_range=f"bytes 1000-1999/{SIZE + 1}"),
        Fault(content_range="nonsense"),
        Fault(drop_headers=("Content-Range",)),
        Fault(status=416),
        Fault(extra=b"more", drop_headers=("Content-Length",)),
    ],
    ids=range(9),
)
async def test_response_that_is_not_the_range_is_refused(fault: Fault) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(UpstreamProtocolError):
            await kit.read(digest, **WIDE)


async def test_failures_of_ranges_do_not_stop_requests_for_whole_blobs() -> None:
    """One endpoint may refuse each range of three repositories, and yet send whole blobs."""
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        repositories = [Repository("docker.io", f"library/app{n}") for n in range(4)]
        digests = [fake.add_blob(DATA, repository.path) for repository in repositories]
        fake.fault(f"blobs/{digests[0]}", Fault(status=503, times=12))
        for repository, digest in zip(repositories, digests, strict=True):
            with pytest.raises(MirrorError):
                await kit.read(digest, repository, **WIDE)
        assert [event.is_open for event in kit.seen(CircuitChanged)] == [True]
        fake.faults.clear()
        assert await kit.read(digests[0], repositories[0]) == DATA


async def test_429_of_a_range_pauses_no_request_for_a_whole_blob() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=429, headers={"Retry-After": "60"}, times=None))
        with pytest.raises(UpstreamRateLimited):
            await kit.read(digest, REPO, **WIDE)
        seen = len(fake.requests)
        with pytest.raises(UpstreamRateLimited):
            await kit.read(digest, REPO, **WIDE)
        assert len(fake.requests) == seen, "ranges pause"
        fake.faults.clear()
        assert await kit.read(digest) == DATA
