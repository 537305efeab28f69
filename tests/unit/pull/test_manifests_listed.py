"""An index proves that a repository has its children. Its other claims may be wrong."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from mirror.observability.events import LogMessage, Outcome
from mirror.oci.descriptor import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import BlobUnknown, ManifestInvalid, ManifestUnknown, UpstreamUnavailable
from mirror.oci.reference import Digest, Reference, Repository
from mirror.store.records import AccessRecord
from tests.unit.pull.kit import (
    OTHER,
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
from tests.waiting import until

DOWN = UpstreamUnavailable("down")
LIES = [
    {"mediaType": DOCKER_MANIFEST},
    {"mediaType": DOCKER_LIST},
    {"mediaType": OCI_MANIFEST, "size": 7},
    {},
]
lies = pytest.mark.parametrize("lie", LIES, ids=str)


def add_index(
    registry: MemoryRegistry,
    child: Digest,
    said: dict[str, object],
    repository: Repository = REPO,
) -> Digest:
    """Add an index whose descriptor of a child has these fields, beside the required ones."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{"digest": str(child), "size": 500, **said}],
    }
    return registry.add_manifest(repository.path, document)


def add_artifact(registry: MemoryRegistry, part: Digest) -> Digest:
    """Add an artifact that has ``part`` as a layer."""
    config = registry.add_blob(REPO.path, b"{}")
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.example", "digest": str(config), "size": 2},
        "layers": [{"mediaType": "application/vnd.example", "digest": str(part), "size": 7}],
    }
    return registry.add_manifest(REPO.path, document)


async def media_type(
    kit: PullKit, reference: Reference, repository: Repository = REPO, head: bool = False
) -> str:
    """Request a manifest. Returns its media type."""
    result = await kit.service.manifest(repository, reference, (), a_pull(), is_head=head)
    return result.media_type


def complaints(kit: PullKit) -> list[LogMessage]:
    return [event for event in kit.events if isinstance(event, LogMessage)]


@lies
async def test_cached_manifest_is_served_after_an_index_misstated_it(
    tmp_path: Path, lie: dict[str, object]
) -> None:
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, TAG.name, b"layer")
    lying = add_index(registry, child, lie)
    async with pull_kit(tmp_path, registry=registry) as kit:
        for reference in (TAG, lying):
            await manifest(kit, reference)
        assert bool(complaints(kit)) == (lie.get("mediaType", OCI_MANIFEST) != OCI_MANIFEST)
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        for reference in (child, TAG):
            assert await media_type(kit, reference) == OCI_MANIFEST
            assert await manifest(kit, reference) == (child, Outcome.HIT)


@lies
@pytest.mark.parametrize("head", [True, False], ids=["HEAD", "GET"])
async def test_media_type_of_the_upstream_overrules_that_of_an_index(
    tmp_path: Path, lie: dict[str, object], head: bool
) -> None:
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, None, b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, add_index(registry, child, lie))
        assert await media_type(kit, child, head=head) == OCI_MANIFEST
        assert await media_type(kit, child) == OCI_MANIFEST
        await manifest(kit, add_index(registry, child, {**lie, "annotations": {}}))
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await media_type(kit, child) == OCI_MANIFEST


async def test_octet_stream_from_the_upstream_does_not_overrule_an_index(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        child = kit.registry.add_image(REPO.path, None, b"layer")
        body, _ = kit.registry.manifests[REPO.path, child]
        kit.registry.manifests[REPO.path, child] = body, "application/octet-stream"
        await manifest(kit, kit.registry.add_index(REPO.path, None, child))
        assert await media_type(kit, child) == OCI_MANIFEST


@lies
async def test_cached_bytes_overrule_the_media_type_of_an_index(
    tmp_path: Path, lie: dict[str, object]
) -> None:
    """The bytes came through another repository, and the upstream is not asked for this one."""
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, None, b"layer")
    lying = add_index(registry, child, lie, OTHER)
    logged = []
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, child)
        await manifest(kit, lying, OTHER)
    logged += complaints(kit)
    for _ in range(2):
        async with pull_kit(tmp_path, registry=registry) as kit:
            assert await media_type(kit, child, OTHER) == OCI_MANIFEST
            assert await media_type(kit, child) == OCI_MANIFEST
        logged += complaints(kit)
    assert len(logged) == (lie.get("mediaType", OCI_MANIFEST) != OCI_MANIFEST), "logged once"


@pytest.mark.row("HU6-wrong-types")
async def test_index_does_not_overrule_a_wrong_media_type_of_the_upstream(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, None, b"layer")
    registry.manifests[REPO.path, child] = registry.manifests[REPO.path, child][0], OCI_INDEX
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, registry.add_index(REPO.path, None, child))
        for _ in range(2):
            assert await media_type(kit, child) == OCI_INDEX
        layer = Digest.of(b"layer")
        assert await kit.store.index.access_record(REPO, layer, "blob") is None, "nothing learned"


# --- entries of an index that are no manifests ----------------------------------------------------

THING: dict[str, object] = {"mediaType": "application/vnd.example.thing"}


@pytest.mark.row("FB3-buildkit-cache-index")
async def test_entry_of_another_type_is_a_blob_of_the_repository(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    layer = registry.add_blob(REPO.path, b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, add_index(registry, layer, THING))
        assert await blob(kit, layer) == (b"layer", Outcome.MISS)
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry, upstream=upstream(serve_stale=False)) as kit:
        kit.clock[0] += 365 * 86400.0
        assert await blob(kit, layer) == (b"layer", Outcome.HIT), "the index refers to it"


@pytest.mark.row("FB3-buildkit-cache-index")
async def test_entry_that_the_first_release_recorded_as_a_manifest_is_served_as_a_blob(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        layer = kit.registry.add_blob(REPO.path, b"layer")
        recorded = AccessRecord(
            digest=layer,
            kind="manifest",
            media_type="application/vnd.oci.image.layer.v1.tar",
            size=5,
            referrer=Digest.of(b"an index"),
            expires_at=None,
        )
        await kit.store.index.put_access_records(REPO, [recorded])
        assert await blob(kit, layer) == (b"layer", Outcome.MISS)


@pytest.mark.row("FB3-buildkit-cache-index")
async def test_layer_that_an_index_lists_without_a_type_is_served_as_a_blob(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    layer = registry.add_blob(REPO.path, b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, add_index(registry, layer, {}))
        assert await blob(kit, layer) == (b"layer", Outcome.MISS)
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await blob(kit, layer) == (b"layer", Outcome.HIT)


@pytest.mark.row("FB3-buildkit-cache-index")
async def test_manifest_that_an_index_lists_with_another_type_stays_a_manifest(
    tmp_path: Path,
) -> None:
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, None, b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, add_index(registry, child, THING))
        with pytest.raises(BlobUnknown):
            await blob(kit, child)
        assert await media_type(kit, child) == OCI_MANIFEST
        with pytest.raises(BlobUnknown):
            await blob(kit, child)
        await manifest(kit, add_index(registry, child, THING, OTHER))
        with pytest.raises(ManifestUnknown):
            await manifest(kit, child, OTHER)
        assert not complaints(kit)
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await media_type(kit, child) == OCI_MANIFEST


# --- a digest of both kinds -----------------------------------------------------------------------


async def test_manifest_that_an_artifact_lists_as_a_layer_stays_a_manifest(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    image = registry.add_image(REPO.path, TAG.name, b"layer")
    async with pull_kit(tmp_path, registry=registry, upstream=upstream(tag_ttl=0.0)) as kit:
        await manifest(kit)
        await manifest(kit, add_artifact(registry, image))
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry, upstream=upstream(tag_ttl=0.0)) as kit:
        assert await manifest(kit) == (image, Outcome.STALE)
        assert await manifest(kit, image) == (image, Outcome.HIT)
        with pytest.raises(BlobUnknown):
            await blob(kit, image)


@pytest.mark.parametrize(
    ("said", "error"),
    [(OCI_MANIFEST, ManifestInvalid), ("application/vnd.example.thing", ManifestUnknown)],
)
async def test_layer_that_an_index_lists_as_a_manifest_stays_a_blob(
    tmp_path: Path, said: str, error: type[Exception]
) -> None:
    registry = MemoryRegistry()
    image, layer = registry.add_image(REPO.path, TAG.name, b"layer"), Digest.of(b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit)
        await blob(kit, layer)
        await kit.store.idle()
        await manifest(kit, add_index(registry, layer, {"mediaType": said}))
        assert await blob(kit, layer) == (b"layer", Outcome.HIT)
        with pytest.raises(error):  # a request for a manifest does not make it one
            await manifest(kit, layer)
        assert await blob(kit, layer) == (b"layer", Outcome.HIT)
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await blob(kit, layer) == (b"layer", Outcome.HIT)
        assert await manifest(kit) == (image, Outcome.HIT)


@pytest.mark.row("HC6-withdrawn-access")
async def test_refusal_as_a_manifest_does_not_revoke_access_as_a_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, TAG.name, b"layer")
        layer = Digest.of(b"layer")
        await manifest(kit)
        with pytest.raises(ManifestUnknown):
            await manifest(kit, layer)
        assert await blob(kit, layer) == (b"layer", Outcome.MISS)
        await kit.store.idle()
        kit.registry.failure = DOWN
        assert await blob(kit, layer) == (b"layer", Outcome.HIT)


@lies
async def test_parts_of_a_child_are_recovered_after_a_loss_of_the_index(
    tmp_path: Path, lie: dict[str, object]
) -> None:
    registry = MemoryRegistry()
    child = registry.add_image(REPO.path, None, b"layer")
    async with pull_kit(tmp_path, registry=registry) as kit:
        await manifest(kit, add_index(registry, child, lie))
        await manifest(kit, child)
        await blob(kit, Digest.of(b"layer"))
    shutil.rmtree(tmp_path / "index")
    registry.failure = DOWN
    async with pull_kit(tmp_path, registry=registry) as kit:
        assert await media_type(kit, child) == OCI_MANIFEST
        assert await blob(kit, Digest.of(b"layer")) == (b"layer", Outcome.HIT)


@pytest.mark.row("G4-busy-index")
@pytest.mark.parametrize("stated", ["application/vnd.example", OCI_MANIFEST])
async def test_fetched_manifest_has_the_stated_type_although_its_record_is_not_written_yet(
    tmp_path: Path, stated: str
) -> None:
    registry = MemoryRegistry()
    body = b'{"schemaVersion": 2, "config": {}, "layers": []}'
    digest = Digest.of(body)
    registry.manifests[REPO.path, digest] = (body, stated)
    async with pull_kit(tmp_path, registry=registry) as kit:
        table = kit.store.layout.index / "members" / "cache.db"
        other = sqlite3.connect(table, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        request = asyncio.ensure_future(media_type(kit, digest))  # noqa: TID251 - a test
        await until(lambda: registry.calls["get_manifest"] == 1)
        await asyncio.sleep(0.1)  # The body is parsed meanwhile.
        other.execute("ROLLBACK")
        other.close()
        assert await request == stated
