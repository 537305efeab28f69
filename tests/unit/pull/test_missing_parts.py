"""Row FB12: a part that an image refers to, and that its upstream does not have."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import BlobUnknown, ManifestUnknown, UpstreamUnavailable
from mirror.oci.reference import Digest
from tests.unit.pull.kit import (
    REPO,
    TAG,
    MemoryRegistry,
    PullKit,
    a_pull,
    blob,
    manifest,
    pull_kit,
    upstream,
)

FOREIGN = b"a foreign layer"
LAYER = Digest.of(FOREIGN)
DOWN = UpstreamUnavailable("down")
SETTINGS = upstream(negative_ttl=10.0, tag_ttl=0.0)

pytestmark = pytest.mark.row("FB12-foreign-layers")


def without_part(tag: str = TAG.name) -> MemoryRegistry:
    """Make a registry with an image whose layer it does not have."""
    registry = MemoryRegistry()
    registry.add_image(REPO.path, tag, FOREIGN)
    del registry.blobs[REPO.path, LAYER]
    return registry


async def miss(kit: PullKit, *, head: bool = False) -> str:
    """Request the layer, which must be 404. Returns the warning of the response."""
    pull = a_pull()
    with pytest.raises(BlobUnknown):
        await kit.service.blob(REPO, LAYER, pull, is_head=head)
    return pull.warning


@pytest.mark.parametrize("first_head", [True, False], ids=["HEAD", "GET"])
async def test_missing_part_stays_404_while_the_upstream_is_down_and_after_a_restart(
    tmp_path: Path, first_head: bool
) -> None:
    registry, clock = without_part(), [1_800_000_000.0]
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS, clock=clock) as kit:
        await manifest(kit)
        assert await miss(kit, head=first_head) == ""
        registry.failure = DOWN
        for seconds in (1, 11, 86400, 20 * 86400):
            clock[0] += seconds
            for head in (True, False):
                assert bool(await miss(kit, head=head)) == (seconds > 1), "stale after its ttl"
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS, clock=clock) as kit:
        for head in (True, False):
            assert await miss(kit, head=head) == "down"


async def test_missing_part_stays_404_when_another_image_refers_to_it(tmp_path: Path) -> None:
    registry = without_part()
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        await manifest(kit)
        await miss(kit)
        other = registry.add_image(REPO.path, "other", FOREIGN, b"another layer")
        del registry.blobs[REPO.path, LAYER]
        await manifest(kit, other)
        registry.failure = DOWN
        kit.clock[0] += 100
        assert await miss(kit) == "down"


async def test_missing_child_of_an_index_stays_404(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    absent = Digest.of(b"absent")
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{"mediaType": OCI_MANIFEST, "digest": str(absent), "size": 6}],
    }
    registry.add_manifest(REPO.path, document, TAG.name)
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        await manifest(kit)
        with pytest.raises(ManifestUnknown):
            await manifest(kit, absent)
        registry.failure = DOWN
        kit.clock[0] += 100
        for head in (True, False):
            with pytest.raises(ManifestUnknown):
                await manifest(kit, absent, head=head)


async def test_missing_part_is_404_within_the_confirm_timeout_of_a_silent_upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.CONFIRM_TIMEOUT_S", 0.1)
    registry = without_part()
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        await manifest(kit)
        await miss(kit)
        kit.clock[0] += 100
        hung = asyncio.Event()

        async def hang(*arguments: object) -> None:
            await hung.wait()

        monkeypatch.setattr(registry, "head_blob", hang)
        async with asyncio.timeout(5):
            assert await miss(kit)
        assert registry.calls["get_blob"] == 1, "no second fetch"
        hung.set()


async def test_missing_part_that_was_pushed_since_is_served(tmp_path: Path) -> None:
    registry = without_part()
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        await manifest(kit)
        await miss(kit)
        registry.add_blob(REPO.path, FOREIGN)
        kit.clock[0] += 11
        assert await blob(kit, LAYER) == (FOREIGN, Outcome.MISS)
        await kit.store.idle()
        kit.clock[0] += 365 * 86400.0
        registry.failure = DOWN
        assert await blob(kit, LAYER) == (FOREIGN, Outcome.STALE), "the 404 is older"
        kit.store.layout.blob(LAYER).unlink()
        with pytest.raises(UpstreamUnavailable):
            await blob(kit, LAYER)


async def test_404_is_not_repeated_for_a_down_upstream_if_no_image_refers_to_the_digest(
    tmp_path: Path,
) -> None:
    """Otherwise a client could fill the index with digests that it makes up."""
    async with pull_kit(tmp_path, upstream=SETTINGS) as kit:
        await miss(kit)
        kit.clock[0] += 11
        await miss(kit)
        kit.clock[0] += 11
        kit.registry.failure = DOWN
        with pytest.raises(UpstreamUnavailable):
            await blob(kit, LAYER)


async def test_404_is_not_repeated_for_a_down_upstream_without_serve_stale(tmp_path: Path) -> None:
    registry = without_part()
    settings = upstream(serve_stale=False, negative_ttl=10.0)
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        await manifest(kit)
        await miss(kit)
        registry.failure = DOWN
        kit.clock[0] += 11
        for head in (True, False):
            pull = a_pull()
            with pytest.raises(UpstreamUnavailable):
                await kit.service.blob(REPO, LAYER, pull, is_head=head)


async def test_missing_part_is_remembered_with_a_negative_ttl_of_zero(tmp_path: Path) -> None:
    registry = without_part()
    async with pull_kit(tmp_path, registry=registry, upstream=upstream(negative_ttl=0.0)) as kit:
        await manifest(kit)
        await miss(kit)
        await miss(kit)
        assert registry.calls["head_blob"] == 1, "asked again"
        registry.failure = DOWN
        assert await miss(kit) == "down"
