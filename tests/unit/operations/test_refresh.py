"""Asking the upstream now for a tag."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.observability.events import RequestRecord
from mirror.oci.descriptor import DEFAULT_ACCEPT, OCI_MANIFEST
from mirror.oci.errors import (
    Denied,
    ManifestUnknown,
    NameUnknown,
    TagInvalid,
    UpstreamError,
)
from mirror.oci.reference import Digest, Tag
from mirror.operations.refresh import refresh
from mirror.pull.admission import Restrictions
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import image, on_disk, opened

APP = image("app:v1")


async def test_tag_that_is_fresh_is_asked_for_and_has_moved(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        first = registry.add_image(b"one", tag="v1")
        new = await refresh(mirror, APP)
        same = await refresh(mirror, APP)
        second = registry.add_image(b"two", tag="v1")
        moved = await refresh(mirror, APP)
        served = await mirror.service.manifest(
            APP.repository, Tag("v1"), DEFAULT_ACCEPT, RequestRecord("", "GET", ""), is_head=False
        )

    assert (new.previous, new.digest, new.has_moved) == (None, first, False)
    assert (same.previous, same.digest, same.has_moved) == (first, first, False)
    assert same.previous_confirmed is not None
    assert (moved.previous, moved.digest, moved.has_moved) == (first, second, True)
    assert served.digest == second
    assert {str(first), str(second)} <= on_disk(tmp_path)
    assert str(Digest.of(b"two")) not in on_disk(tmp_path)


async def test_remembered_404_is_not_believed(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        with pytest.raises(ManifestUnknown):
            await refresh(mirror, APP)
        digest = registry.add_image(b"one", tag="v1")
        assert (await refresh(mirror, APP)).digest == digest


async def test_failing_upstream_is_an_error_although_the_tag_is_cached(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        digest = registry.add_image(b"one", tag="v1")
        await refresh(mirror, APP)
        await registry.stop()
        with pytest.raises(UpstreamError):
            await refresh(mirror, APP)
        record = await mirror.store.index.tag(APP.repository, Tag("v1"))

    assert record is not None
    assert record.digest == digest


async def test_record_of_an_old_client_is_confirmed_again(tmp_path: Path) -> None:
    old_client = (OCI_MANIFEST,)
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        registry.add_image(b"one", tag="v1")
        record = RequestRecord("", "GET", "")
        await mirror.service.manifest(APP.repository, Tag("v1"), old_client, record, is_head=False)
        await refresh(mirror, APP)
        found = await mirror.store.index.name_records.tags(APP.repository, Tag("v1"))

    assert found is not None
    assert sorted(record.confirmed > 0 for record in found.values()) == [False, True]


async def test_refresh_is_refused_with_the_reason(tmp_path: Path) -> None:
    never = {"docker.io": {"endpoints": ["http://127.0.0.1:9"], "pull_policy": "Never"}}
    digest = Digest.of(b"x")
    async with FakeRegistry() as registry:
        async with opened(tmp_path, registry) as mirror:
            with pytest.raises(TagInvalid, match="never changes"):
                await refresh(mirror, image(f"app@{digest}"))
            with pytest.raises(NameUnknown, match="not one of upstreams"):
                await refresh(mirror, image("quay.io/o/app:v1"))
            frozen = {(APP.repository, Tag("v1")): (digest,)}
            mirror.service.restrict(Restrictions(frozen=frozen))
            with pytest.raises(Denied, match=r"oci-mirror unfreeze docker\.io/library/app:v1"):
                await refresh(mirror, APP)
        async with opened(tmp_path, registry, more={"upstreams": never}) as mirror:
            with pytest.raises(Denied, match="Never"):
                await refresh(mirror, APP)
        assert registry.requests == []
