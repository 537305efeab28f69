"""First requests that fail beside further connections of ours, which are taken back then."""

from __future__ import annotations

import pytest

from mirror.oci.errors import BlobUnknown, UpstreamRateLimited
from mirror.oci.reference import Digest
from mirror.upstream.endpoints import FAILURE_THRESHOLD
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, upstream_kit


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize("has_further", [True, False])
async def test_429_beside_further_connections_begins_no_pause(has_further: bool) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest, asked = fake.add_blob(DATA), list[str]()
        fake.fault(f"blobs/{digest}", Fault(status=429, headers={"Retry-After": "30"}))

        def take_back(endpoint: str) -> int:
            asked.append(endpoint)
            return has_further

        with pytest.raises(UpstreamRateLimited):
            await kit.read(digest, take_back=take_back)
        assert asked == [fake.url]
        if has_further:
            assert await kit.read(digest) == DATA
        else:
            with pytest.raises(UpstreamRateLimited):
                await kit.read(digest)


async def test_failures_beside_further_connections_open_no_circuit() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        for _ in range(2 * FAILURE_THRESHOLD):
            fake.fault(f"blobs/{digest}", Fault(status=503))
            assert await kit.read(digest, take_back=lambda endpoint: 1) == DATA


async def test_404_is_no_sign_of_too_many_connections() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        asked = list[str]()
        with pytest.raises(BlobUnknown):
            await kit.read(Digest.of(b"other"), take_back=lambda url: asked.append(url) or 0)
        assert asked == []
