"""Initial requests that fail beside further connections of ours, which are reclaimed then."""

from __future__ import annotations

from typing import NoReturn

import pytest

from mirror.oci.errors import (
    BlobUnknown,
    MirrorError,
    OutboundRefused,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
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

        def reclaim(endpoint: str) -> bool:
            asked.append(endpoint)
            return has_further

        with pytest.raises(UpstreamRateLimited):
            await kit.read(digest, reclaim=reclaim)
        assert asked == [fake.url]
        if has_further:
            assert await kit.read(digest) == DATA
        else:
            with pytest.raises(UpstreamRateLimited):
                await kit.read(digest)


@pytest.mark.parametrize(
    ("status", "is_possible"),
    [(429, True), (503, True), (500, False), (502, False), (504, False), (401, False)],
)
async def test_connections_are_reclaimed_only_for_statuses_that_limit_connections(
    status: int, is_possible: bool
) -> None:
    """Otherwise one blob that an upstream cannot send takes those of all others."""
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest, asked = fake.add_blob(DATA), list[str]()
        fake.fault(f"blobs/{digest}", Fault(status=status, times=None))

        def reclaim(endpoint: str) -> bool:
            asked.append(endpoint)
            return False

        with pytest.raises(MirrorError):
            await kit.read(digest, reclaim=reclaim)
        assert bool(asked) is is_possible


async def test_failures_beside_further_connections_open_no_circuit() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        for _ in range(2 * FAILURE_THRESHOLD):
            fake.fault(f"blobs/{digest}", Fault(status=503))
            assert await kit.read(digest, reclaim=lambda endpoint: True) == DATA


def without_token() -> MirrorError:
    error = UpstreamUnavailable("500")
    error.is_without_token = True
    return error


@pytest.mark.parametrize(
    ("error", "is_possible"),
    [
        (UpstreamUnavailable("reset"), True),
        (UpstreamRateLimited("429"), True),
        (without_token(), False),
        (BlobUnknown("404"), False),
        (UpstreamProtocolError("another size"), False),
        (OutboundRefused("a private address"), False),
    ],
    ids=repr,
)
async def test_connections_are_reclaimed_unless_the_failure_has_another_cause(
    monkeypatch: pytest.MonkeyPatch, error: MirrorError, is_possible: bool
) -> None:
    asked = list[str]()

    def reclaim(endpoint: str) -> bool:
        asked.append(endpoint)
        return False

    async def fail(*arguments: object) -> NoReturn:
        raise error

    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        monkeypatch.setattr(kit.client, "_send_authorized", fail)
        with pytest.raises(type(error)):
            await kit.read(Digest.of(DATA), reclaim=reclaim)
        assert bool(asked) is is_possible
