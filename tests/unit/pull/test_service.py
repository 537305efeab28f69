"""The pull service: admission first, then hit, join or miss, over the real store."""

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
from mirror.pull.admission import Instead
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


async def test_a_cold_image_is_fetched_once_then_served_from_here(tmp_path: Path) -> None:
    layer = random_bytes(300_000)
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, layer)
        for expected in (Outcome.MISS, Outcome.HIT):
            assert await manifest(kit) == (digest, expected)
            assert await blob(kit, Digest.of(layer)) == (layer, expected)
            await kit.store.settled()
        assert kit.registry.calls == {"head_manifest": 1, "get_manifest": 1, "get_blob": 1}


async def test_a_restart_serves_what_was_pulled_with_the_upstream_gone(tmp_path: Path) -> None:
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
async def test_a_lost_index_is_made_anew_from_the_image_layout(tmp_path: Path) -> None:
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
        assert await manifest(kit) == (digest, Outcome.STALE), "resolved again, where one can"


async def test_never_asks_nothing(tmp_path: Path) -> None:
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
        assert (await kit.service.tags(REPO, None, None, a_pull())).tags == ("1.0",)
        with pytest.raises(NameUnknown):
            await kit.service.tags(OTHER, None, None, a_pull())
        empty = json.loads(await kit.service.referrers(REPO, digest, None, a_pull()))
        assert empty["manifests"] == []
        assert not kit.registry.calls


async def test_lists_decide_before_the_first_byte_cold_or_warm(tmp_path: Path) -> None:
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


async def test_a_manifests_digest_is_no_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        with pytest.raises(BlobUnknown):
            await blob(kit, digest)


async def test_what_is_served_instead_is_served_under_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission may name another digest: manifests follow it, blobs of the other image do not."""
    async with pull_kit(tmp_path) as kit:
        old = kit.registry.add_image(REPO.path, "old", b"old")
        new = kit.registry.add_image(REPO.path, TAG.name, b"new")
        monkeypatch.setattr("mirror.pull.admission.admit", lambda *_: Instead(old))
        assert await manifest(kit) == (old, Outcome.MISS)
        assert await manifest(kit, new) == (old, Outcome.HIT)
        assert "head_manifest" not in kit.registry.calls
        with pytest.raises(BlobUnknown):
            await blob(kit, Digest.of(b"new"))


async def test_a_refusal_is_told_in_the_record(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(allow=("org/*",))) as kit:
        pull = a_pull()
        with pytest.raises(Denied, match="allow-list"):
            await kit.service.blob(REPO, Digest.of(b"x"), pull, head=True)
        assert pull.outcome is Outcome.DENIED


@pytest.mark.row("L1-client-that-leaves")
@pytest.mark.parametrize("warm", [False, True])
async def test_a_client_that_leaves_at_any_wait_leaves_nothing_open(
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
            kit.clock[0] += 3600.0  # its use is noted anew
            kit.store.blobs._verified.clear()
            left = await Cancelled(kit.service.blob(REPO, digest, a_pull(), head=False), number)
            if not left:
                break
            number += 1
            assert not [g for g in kit.store.active_ingests.values() if g.followers]
            for lease in list(kit.store.blobs._leases.values()):
                if lease.verification is not None:
                    # It reads, too, in a thread, and ends although the client has left.
                    await asyncio.wait([lease.verification])
            assert not kit.store.blobs._leases
        assert number >= 2
