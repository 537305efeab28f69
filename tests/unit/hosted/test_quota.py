"""The quota of hosted repositories: which changes it refuses, and which it lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import QuotaExceeded
from mirror.oci.reference import Digest, Tag
from tests.unit.hosted.kit import ANYBODY, CONFIG, CONFIG_DIGEST, hosted_kit, index_of, manifest_of
from tests.unit.store.kit import random_bytes

LAYER = random_bytes(200_000, 1)


@pytest.mark.parametrize("quota", ["max_size", "max_repository_size"])
async def test_tags_move_and_come_back_above_the_quota(tmp_path: Path, quota: str) -> None:
    body = manifest_of(LAYER)
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        await kit.push_image(LAYER, tag="v2", annotations={"a": "b"})
    async with hosted_kit(tmp_path, **{quota: "100kB"}) as kit:
        put = kit.service.manifests.put
        await put("app", Tag("v2"), (), body, OCI_MANIFEST, actor=ANYBODY)
        await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        await put("app", Tag("v1"), (), body, OCI_MANIFEST, actor=ANYBODY)
        await put("app", Digest.of(body), (Tag("v3"),), body, OCI_MANIFEST, actor=ANYBODY)
        with pytest.raises(QuotaExceeded):
            await put(
                "app",
                Tag("v4"),
                (),
                index_of(body),
                "application/vnd.oci.image.index.v1+json",
                actor=ANYBODY,
            )
        tags, _ = await kit.service.lists.tags("app", None, None)
        assert tags == ["v1", "v2", "v3"]


async def test_blob_that_is_there_is_mounted_above_the_quota_and_no_upload_begins(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
    async with hosted_kit(tmp_path, max_size="100kB") as kit:
        assert await kit.service.blobs.mount("app", "other", Digest.of(LAYER), actor=ANYBODY)
        with pytest.raises(QuotaExceeded):
            await kit.service.uploads.begin("app", "", None)


async def test_mount_above_the_quota_of_its_repository_is_refused(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, max_repository_size="250kB") as kit:
        await kit.push_blob(LAYER)
        await kit.push_blob(CONFIG, "other")
        await kit.push_blob(random_bytes(100_000, 2), "other")
        with pytest.raises(QuotaExceeded):
            await kit.service.blobs.mount("app", "other", Digest.of(LAYER), actor=ANYBODY)
        assert await kit.service.blobs.mount("other", "app", CONFIG_DIGEST, actor=ANYBODY)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 2**63, 2**64, 10**30])
async def test_length_beyond_all_numbers_is_refused_by_the_quota(tmp_path: Path, size: int) -> None:
    async with hosted_kit(tmp_path) as kit:
        uploads = kit.service.uploads
        with pytest.raises(QuotaExceeded):
            await uploads.begin("app", "", size)
        upload_id = await uploads.begin("app", "", None)
        with pytest.raises(QuotaExceeded):
            await uploads.open(upload_id, "app", "", size=size)
