"""The pull service over a real store: admission, then cached or fetched content."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from mirror.observability.events import Outcome
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    Cancelled,
    a_pull,
    blob,
    manifest,
    pull_kit,
    upstream,
)
from tests.unit.store.kit import random_bytes


async def test_cold_image_is_fetched_once_then_served_from_the_cache(tmp_path: Path) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, layer)
        for expected in (Outcome.MISS, Outcome.HIT):
            assert await manifest(kit) == (digest, expected)
            assert await blob(kit, Digest.of(layer)) == (layer, expected)
            await kit.store.wait_until_published()
        assert kit.registry.calls == {"head_manifest": 1, "get_manifest": 1, "get_blob": 1}


async def test_restart_without_upstream_serves_a_pulled_image(tmp_path: Path) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, layer)
        await manifest(kit)
        await blob(kit, Digest.of(layer))
        registry = kit.registry
    registry.failure = UpstreamUnavailable("down")
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await manifest(kit) == (digest, Outcome.HIT)
        assert await manifest(kit, digest) == (digest, Outcome.HIT)
        assert await blob(kit, Digest.of(layer)) == (layer, Outcome.HIT)


@pytest.mark.row("C12-damaged-index")
async def test_lost_index_is_rebuilt_from_the_image_layout(tmp_path: Path) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path) as kit:
        child = kit.registry.add_image(REPO.path, None, layer)
        digest = kit.registry.add_index(REPO.path, TAG.name, child)
        await manifest(kit)
        await manifest(kit, child)
        await blob(kit, Digest.of(layer))
        registry = kit.registry
    shutil.rmtree(tmp_path / "index")
    registry.failure = UpstreamUnavailable("down")
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await manifest(kit, child) == (child, Outcome.HIT)
        assert await blob(kit, Digest.of(layer)) == (layer, Outcome.HIT)
        assert await manifest(kit) == (digest, Outcome.STALE), "the lost index had the time"


async def test_no_upstream_request_is_sent_with_policy_never(tmp_path: Path) -> None:
    layer = random_bytes(1000)
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, layer)
        await manifest(kit)
        await blob(kit, Digest.of(layer))
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Never")) as kit:
        kit.clock[0] += 10**9
        assert await manifest(kit) == (digest, Outcome.HIT)
        assert await blob(kit, Digest.of(layer)) == (layer, Outcome.HIT)
        with pytest.raises(ManifestUnknown):
            await manifest(kit, Tag("absent"))
        with pytest.raises(BlobUnknown):
            await blob(kit, Digest.of(b"absent"))
        assert (await kit.service.tags(REPO, None, None, a_pull())).text == "1.0"
        with pytest.raises(NameUnknown):
            await kit.service.tags(OTHER, None, None, a_pull())
        empty = json.loads((await kit.service.referrers(REPO, digest, None, a_pull())).index)
        assert empty["manifests"] == []
        assert not kit.registry.calls


async def test_deny_list_refuses_every_request_cached_or_not(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        await blob(kit, Digest.of(b"layer"))
        registry = kit.registry
    for root in (tmp_path, tmp_path / "cold"):
        async with pull_kit(root, registry=registry, upstream=upstream(deny=("library/*",))) as kit:
            kit.registry.calls.clear()
            for ask in (
                manifest(kit),
                manifest(kit, digest),
                blob(kit, Digest.of(b"layer")),
                kit.service.tags(REPO, None, None, a_pull()),
                kit.service.referrers(REPO, digest, None, a_pull()),
            ):
                with pytest.raises(Denied):
                    await ask
            assert not kit.registry.calls


async def test_digest_of_a_manifest_is_not_served_as_a_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        with pytest.raises(BlobUnknown):
            await blob(kit, digest)


async def test_denied_request_has_the_outcome_denied(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(allow=("org/*",))) as kit:
        pull = a_pull()
        with pytest.raises(Denied, match="allow-list"):
            await kit.service.blob(REPO, Digest.of(b"x"), pull, is_head=True)
        assert pull.outcome is Outcome.DENIED


@pytest.mark.row("L1-client-that-leaves")
@pytest.mark.parametrize("warm", [False, True])
async def test_client_cancelled_at_any_await_leaves_no_follower_and_no_lease(
    tmp_path: Path, warm: bool
) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path, abandoned="cancel") as kit:
        digest = kit.registry.add_blob(REPO.path, layer)
        if warm:
            await blob(kit, digest)
        number = 0
        while True:
            if not warm:
                await kit.store.idle()
                kit.store.layout.blob(digest).unlink(missing_ok=True)
            kit.clock[0] += 3600.0  # its use is recorded again
            kit.store.blobs._verified.clear()
            left = await Cancelled(kit.service.blob(REPO, digest, a_pull(), is_head=False), number)
            if not left:
                break
            number += 1
            assert not [g for g in kit.store.active_ingests.values() if g.followers]
            for lease in list(kit.store.blobs._leases.values()):
                if lease.verification is not None:
                    # A verification reads in a thread, and ends although the client has left.
                    await asyncio.wait([lease.verification])
            assert not kit.store.blobs._leases
        assert number >= 2
