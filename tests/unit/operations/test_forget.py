"""Forgetting what is known of an image: which records go, and which stay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.composition import Mirror
from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.descriptor import DEFAULT_ACCEPT, OCI_MANIFEST
from mirror.oci.errors import Denied, MirrorError, NotFound, StorageUnavailable
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Reference, Tag
from mirror.operations.forget import ForgetReport, forget
from mirror.operations.warm import WarmOptions, warm
from mirror.store.marks import Freeze, Lease, Marks, Pin
from tests.fakes.registry import FakeRegistry
from tests.unit.operations.kit import add_index, add_referrer, image, on_disk, opened

APP = image("app:v1")
NONE = Marks()


@asynccontextmanager
async def filled(root: Path, registry: FakeRegistry, *names: str) -> AsyncIterator[Mirror]:
    """Open a mirror that has fetched images."""
    async with opened(root, registry) as mirror:
        await warm(mirror, [image(name) for name in names], WarmOptions(), lambda event: None)
        registry.requests.clear()
        yield mirror


async def pull(mirror: Mirror, name: ImageName, reference: Reference | None = None) -> Outcome:
    """Pull a manifest as a client that comes to another process: without this one's memory."""
    record = RequestRecord("", "GET", "")
    wanted = reference or name.reference
    assert wanted is not None
    _clear_memory(mirror)
    await mirror.service.manifest(name.repository, wanted, DEFAULT_ACCEPT, record, is_head=False)
    return record.outcome


async def pull_blob(mirror: Mirror, name: ImageName, data: bytes) -> Outcome:
    record = RequestRecord("", "GET", "")
    _clear_memory(mirror)
    result = await mirror.service.blob(name.repository, Digest.of(data), record, is_head=True)
    assert result.size == len(data)
    return record.outcome


def _clear_memory(mirror: Mirror) -> None:
    """What a second does."""
    service: Any = mirror.service
    service._small_blobs.clear()
    service._manifests._results.clear()
    service._manifests._records.clear()


def counts(report: ForgetReport) -> tuple[tuple[str, ...], int, int, int]:
    return report.tags, report.manifests, report.blobs, report.negatives


async def test_next_pull_of_a_forgotten_tag_asks_the_upstream_and_keeps_the_bytes(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", b"two", tag="v1")
        async with filled(tmp_path, registry, "app:v1") as mirror:
            before = on_disk(tmp_path)
            report = await forget(mirror.store, APP, NONE)
            assert counts(report) == (("v1",), 1, 3, 0)
            assert on_disk(tmp_path) == before

            await pull(mirror, APP)
            await pull_blob(mirror, APP, b"one")
            # The manifest is read from the disk, and grants access to its parts again.
            assert registry.count("HEAD", "manifests/v1") == 1
            assert registry.count("GET") == 0


async def test_content_that_another_tag_needs_stays_readable(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        first = registry.add_image(b"base", b"one", tag="v1")
        registry.add_image(b"base", b"two", tag="v2")
        async with filled(tmp_path, registry, "app:v1", "app:v2") as mirror:
            report = await forget(mirror.store, APP, NONE)
            assert counts(report) == (("v1",), 1, 2, 0)  # The layer, and the config.

            await registry.stop()
            assert await pull(mirror, image("app:v2")) is Outcome.HIT
            assert await pull_blob(mirror, APP, b"base") is Outcome.HIT
            assert await pull_blob(mirror, APP, b"two") is Outcome.HIT
            with pytest.raises(MirrorError):
                await pull_blob(mirror, APP, b"one")
            with pytest.raises(MirrorError):
                await pull(mirror, APP, first)


async def test_all_platforms_of_an_index_are_forgotten(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        add_index(registry, "linux/amd64", "linux/arm64")
        async with filled(tmp_path, registry, "app:v1") as mirror:
            report = await forget(mirror.store, APP, NONE)

    assert counts(report) == (("v1",), 3, 4, 0)


async def test_earlier_digests_and_records_of_old_clients_go_with_a_tag(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        async with filled(tmp_path, registry, "app:v1") as mirror:
            registry.add_image(b"two", tag="v1")
            await mirror.service.manifest(
                APP.repository,
                Tag("v1"),
                DEFAULT_ACCEPT,
                RequestRecord("", "GET", ""),
                is_head=False,
                is_refresh=True,
            )
            await mirror.service.manifest(
                APP.repository,
                Tag("v1"),
                (OCI_MANIFEST,),
                RequestRecord("", "GET", ""),
                is_head=False,
                is_refresh=True,
            )
            report = await forget(mirror.store, APP, NONE)
            found = await mirror.store.index.name_records.tags(APP.repository)

    assert report.manifests == 2
    assert found == {}


async def test_remembered_404_is_forgotten(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        with pytest.raises(NotFound):
            await pull(mirror, APP)
        registry.add_image(b"one", tag="v1")
        with pytest.raises(NotFound):
            await pull(mirror, APP)
        report = await forget(mirror.store, APP, NONE)
        assert counts(report) == ((), 0, 0, 1)
        assert await pull(mirror, APP) is Outcome.MISS


async def test_remembered_404_of_a_digest_is_forgotten(tmp_path: Path) -> None:
    digest = Digest.of(b"layer")
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        with pytest.raises(NotFound):
            await pull_blob(mirror, APP, b"layer")
        registry.add_blob(b"layer")
        with pytest.raises(NotFound):
            await pull_blob(mirror, APP, b"layer")
        whole = ImageName(APP.repository, None)
        assert (await forget(mirror.store, whole, NONE)).negatives == 1
        assert await pull_blob(mirror, APP, b"layer") is Outcome.MISS
        assert not (await forget(mirror.store, image(f"app@{digest}"), NONE)).has_changed


async def test_whole_repository_is_forgotten_and_others_stay(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        for repository in ("library/app", "library/app2"):
            registry.add_image(b"one", repository=repository, tag="v1")
            registry.add_image(b"two", repository=repository, tag="v2")
        names = ("app:v1", "app:v2", "app2:v1", "app2:v2")
        async with filled(tmp_path, registry, *names) as mirror:
            report = await forget(mirror.store, ImageName(APP.repository, None), NONE)
            assert report.tags == ("v1", "v2")
            assert (report.manifests, report.blobs) == (2, 4)
            await registry.stop()
            assert await pull(mirror, image("app2:v1")) is Outcome.HIT
            with pytest.raises(MirrorError):
                await pull(mirror, image("app:v2"))


async def test_unknown_name_changes_nothing(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        report = await forget(mirror.store, APP, NONE)
    assert not report.has_changed


async def test_pinned_and_frozen_names_are_refused_with_the_remedy(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        registry.add_image(b"two", tag="v2")
        pinned = Marks(pins={str(APP): Pin(str(APP), digest, 0.0)})
        frozen = Marks(freezes={str(APP): Freeze(str(APP), digest, 0.0)})
        whole, by_digest = ImageName(APP.repository, None), image(f"app@{digest}")
        async with filled(tmp_path, registry, "app:v1", "app:v2") as mirror:
            for name in (APP, whole, by_digest):
                with pytest.raises(Denied, match="pinned: run `oci-mirror unpin docker"):
                    await forget(mirror.store, name, pinned)
                with pytest.raises(Denied, match="frozen: run `oci-mirror unfreeze docker"):
                    await forget(mirror.store, name, frozen)
            report = await forget(mirror.store, image("app:v2"), pinned)
            assert report.tags == ("v2",)
            assert await pull(mirror, APP) is Outcome.HIT


async def test_content_of_a_pin_stays_readable_if_another_name_is_forgotten(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        pin = Pin(f"{APP.repository}@{digest}", digest, 0.0)
        async with filled(tmp_path, registry, "app:v1") as mirror:
            report = await forget(mirror.store, APP, Marks(pins={pin.name: pin}))
            assert counts(report) == (("v1",), 0, 0, 0)
            await registry.stop()
            assert await pull(mirror, APP, digest) is Outcome.HIT


@pytest.mark.parametrize("reference", ["tag", "digest", "whole", "platform"])
async def test_image_that_a_node_uses_is_not_forgotten(tmp_path: Path, reference: str) -> None:
    async with FakeRegistry() as registry:
        digests = add_index(registry, "linux/amd64")
        async with filled(tmp_path, registry, "app:v1") as mirror:
            lease = Lease(digests["linux/amd64"], mirror.store.now() + 60.0, "pods")
            leased = Marks(leases={lease.digest: lease})
            name = {
                "tag": APP,
                "digest": image(f"app@{digests['']}"),
                "whole": ImageName(APP.repository, None),
                "platform": image(f"app@{lease.digest}"),
            }[reference]
            with pytest.raises(Denied, match="a node uses it"):
                await forget(mirror.store, name, leased)
            await registry.stop()
            assert await pull(mirror, APP) is Outcome.HIT
            assert await pull_blob(mirror, APP, b"shared layer") is Outcome.HIT
            ended = Marks(leases={lease.digest: replace(lease, until=mirror.store.now() - 1.0)})
            assert (await forget(mirror.store, APP, ended)).has_changed


async def test_signature_of_a_pinned_image_is_not_forgotten(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        name = f"app:sha256-{digest.hex}.sig"
        add_referrer(registry, b"signed", name.rpartition(":")[2])
        async with filled(tmp_path, registry, "app:v1", name) as mirror:
            pinned = Marks(pins={str(APP): Pin(str(APP), digest, 0.0)})
            with pytest.raises(Denied, match="it belongs to an image that is pinned"):
                await forget(mirror.store, image(name), pinned)
            assert (await forget(mirror.store, image(name), NONE)).has_changed


async def test_index_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(work: object, otherwise: Any) -> Any:
        return otherwise

    async with FakeRegistry() as registry, opened(tmp_path, registry) as mirror:
        monkeypatch.setattr(mirror.store.index._rows, "read", fail)
        with pytest.raises(StorageUnavailable, match="index"):
            await forget(mirror.store, APP, NONE)
        monkeypatch.undo()
