"""Immutable tags: what is refused, with which words, and who may delete them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.config.settings import Hosted
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import TagImmutable
from mirror.oci.reference import Digest, Tag
from tests.server_kit import Server, running
from tests.unit.access.kit import rule
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    CONFIG_DIGEST,
    PushClient,
    hosted_kit,
    index_of,
    manifest_of,
)


@pytest.mark.parametrize(
    ("rule", "repository", "tag", "is_immutable"),
    [
        ("team/*:v*", "team/app", "v1", True),
        ("team/*:v*", "team/app", "vnext", True),
        ("team/*:v*", "team/app", "1", False),
        ("team/*:v*", "team/app", "20240101", False),
        ("team/*:v*", "team/app", "latest", False),
        ("team/*:v*", "other/app", "v1", False),
        ("team/*", "team/app", "latest", True),
        ("registry.example/team/*:v*", "team/app", "v1", True),
        ("*:>=1.0", "app", "1.2.3", True),
        ("*:>=1.0", "app", "0.9", False),
        ("*:>=1.0", "app", "latest", False),
        ({"tags": "v*"}, "app", "v1", True),
        ({"match": "team/*"}, "app", "v1", False),
    ],
)
def test_rules_match_repository_and_tag(
    rule: object, repository: str, tag: str, *, is_immutable: bool
) -> None:
    keys = {"name": "registry.example", "listen": "127.0.0.1:0", "immutable_tags": [rule]}
    rules = ImmutableTagRules(Hosted.model_validate(keys))
    assert rules.is_immutable(repository, tag) is is_immutable


async def test_immutable_tag_keeps_its_digest_and_may_be_pushed_again(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["*:v*"]) as kit:
        first = await kit.push_image(b"one")
        with pytest.raises(TagImmutable, match=f"v1 is immutable, and names {first}"):
            await kit.push_image(b"two")
        assert await kit.push_image(b"one") == first
        row = await kit.service.manifests.find("app", Tag("v1"))
        assert row.digest == first
        await kit.push_image(b"two", tag="latest")
        await kit.push_image(b"three", tag="latest")


@pytest.mark.parametrize("is_by_digest", [False, True])
async def test_immutable_tag_is_not_deleted_by_tag_or_by_digest(
    tmp_path: Path, *, is_by_digest: bool
) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["*:v*"]) as kit:
        digest = await kit.push_image(b"one")
        reference = digest if is_by_digest else Tag("v1")
        with pytest.raises(TagImmutable, match="only an admin can delete it"):
            await kit.service.manifests.delete("app", reference, actor=ANYBODY)
        await kit.service.manifests.find("app", Tag("v1"))
        await kit.service.manifests.delete(
            "app", reference, may_change_immutable=True, actor=ANYBODY
        )


async def test_immutable_tag_keeps_all_that_its_image_has(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["*:v*"]) as kit:
        child = await kit.push_image(b"layer", tag=None)
        index = index_of(manifest_of(b"layer"))
        await kit.service.manifests.put("app", Tag("v1"), (), index, OCI_INDEX, actor=ANYBODY)
        with pytest.raises(TagImmutable, match="v1 is immutable: only an admin"):
            await kit.service.manifests.delete("app", child, actor=ANYBODY)
        for blob in (CONFIG, b"layer"):
            with pytest.raises(TagImmutable, match="v1 is immutable: only an admin"):
                await kit.service.blobs.delete("app", Digest.of(blob), actor=ANYBODY)
        # What other images have, and the same content in other repositories, is not protected.
        await kit.push_image(b"free", tag="latest")
        await kit.service.blobs.delete("app", Digest.of(b"free"), actor=ANYBODY)
        await kit.push_image(b"layer", repository="other", tag="latest")
        await kit.service.blobs.delete("other", Digest.of(b"layer"), actor=ANYBODY)
        await kit.service.manifests.delete("app", child, may_change_immutable=True, actor=ANYBODY)
        await kit.service.blobs.delete(
            "app", Digest.of(b"layer"), may_change_immutable=True, actor=ANYBODY
        )


async def test_immutable_tag_keeps_bytes_as_what_its_image_has(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["*:v*"]) as kit:
        layer, child = manifest_of(b"layer"), manifest_of(b"child")
        for data in (b"layer", b"child"):
            await kit.push_image(data, tag=None)
            await kit.push_blob(manifest_of(data))
        await kit.push_image(layer, tag="v1")
        await kit.service.manifests.put(
            "app", Tag("v2"), (), index_of(child), OCI_INDEX, actor=ANYBODY
        )
        with pytest.raises(TagImmutable, match="v1 is immutable"):
            await kit.service.blobs.delete("app", Digest.of(layer), actor=ANYBODY)
        await kit.service.manifests.delete("app", Digest.of(layer), actor=ANYBODY)
        with pytest.raises(TagImmutable, match="v2 is immutable"):
            await kit.service.manifests.delete("app", Digest.of(child), actor=ANYBODY)
        await kit.service.blobs.delete("app", Digest.of(child), actor=ANYBODY)


@pytest.mark.parametrize("tag", ["v1", None])
async def test_manifest_of_an_immutable_tag_keeps_its_media_type(
    tmp_path: Path, tag: str | None
) -> None:
    async with hosted_kit(tmp_path, immutable_tags=["*:v*"]) as kit:
        digest = await kit.push_image(b"layer", tag=tag, mediaType=None)
        body = manifest_of(b"layer", mediaType=None)
        if tag is None:
            index = index_of(body)
            await kit.service.manifests.put("app", Tag("v1"), (), index, OCI_INDEX, actor=ANYBODY)
        with pytest.raises(TagImmutable, match="v1 is immutable: this manifest stays"):
            await kit.service.manifests.put(
                "app", digest, (), body, "application/vnd.evil+json", actor=ANYBODY
            )
        assert (await kit.service.manifests.find("app", digest)).media_type == OCI_MANIFEST
        await kit.service.manifests.put("app", digest, (), body, OCI_MANIFEST, actor=ANYBODY)


@pytest.mark.parametrize(
    ("access", "status"),
    [
        (None, 409),
        ({"rules": [rule("**", "anonymous", "pull", "push", "delete")]}, 409),
        ({"rules": [rule("**", "anonymous", "admin")]}, 202),
    ],
    ids=["no rules", "no admin", "admin"],
)
async def test_only_an_admin_deletes_an_immutable_tag_through_the_push_listener(
    tmp_path: Path, access: dict[str, object] | None, status: int
) -> None:
    more = {} if access is None else {"access": access}
    async with running(tmp_path, hosted={"immutable_tags": ["*:v*"]}, more=more) as server:
        await check_listener(server, status)


async def check_listener(server: Server, status: int) -> None:
    client = PushClient(server)
    assert (await client.push_image(b"one")).status == 201
    await client.push(b"two")
    refused = await client.put_manifest(manifest_of(b"two"), "v1")
    assert (refused.status, refused.code) == (409, "DENIED")
    assert b"the tag v1 is immutable" in refused.body
    blob = await client.ask("DELETE", f"{client.base}/blobs/{CONFIG_DIGEST}")
    assert blob.status == status
    deleted = await client.ask("DELETE", f"{client.base}/manifests/v1")
    assert deleted.status == status
