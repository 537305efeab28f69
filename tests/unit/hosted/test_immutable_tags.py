"""Immutable tags: what is refused, with which words, and who may delete them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.config.settings import Hosted
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.oci.errors import Denied, TagImmutable
from mirror.oci.reference import Tag
from mirror.web.hosted_access import AccessAction, AccessAttempt
from tests.server_kit import Server, running
from tests.unit.hosted.kit import PushClient, hosted_kit, manifest_of


@pytest.mark.parametrize(
    ("rule", "repository", "tag", "is_immutable"),
    [
        ("team/*:v*", "team/app", "v1", True),
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
        row = await kit.service.find_manifest("app", Tag("v1"))
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
            await kit.service.delete_manifest("app", reference)
        await kit.service.find_manifest("app", Tag("v1"))
        await kit.service.delete_manifest("app", reference, may_change_immutable=True)


async def allow_all(attempt: AccessAttempt) -> str:
    return "root"


async def allow_no_admin(attempt: AccessAttempt) -> str:
    if attempt.action is AccessAction.ADMIN:
        raise Denied("no")
    return "ci"


@pytest.mark.parametrize(("authorize", "status"), [(allow_all, 202), (allow_no_admin, 409)])
async def test_only_an_admin_deletes_an_immutable_tag_through_the_door(
    tmp_path: Path, authorize: object, status: int
) -> None:
    hosted = {"immutable_tags": ["*:v*"]}
    async with running(tmp_path, hosted=hosted, authorize=authorize) as server:
        await check_door(server, status)


async def check_door(server: Server, status: int) -> None:
    client = PushClient(server)
    assert (await client.push_image(b"one")).status == 201
    await client.push(b"two")
    refused = await client.put_manifest(manifest_of(b"two"), "v1")
    assert (refused.status, refused.code) == (409, "DENIED")
    assert b"the tag v1 is immutable" in refused.body
    deleted = await client.ask("DELETE", f"{client.base}/manifests/v1")
    assert deleted.status == status
