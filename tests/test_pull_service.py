"""The pull service: hit, join, miss, stale, refused, over the real store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mirror.config import Storage, Upstream
from mirror.events import DigestMismatched, Outcome, Uncached
from mirror.oci.descriptor import OCI_INDEX, referrers_tag
from mirror.oci.digest import Digest
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    Unauthorized,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository, Tag
from tests.pull_kit import PullKit, a_pull, pull_kit
from tests.store_kit import random_bytes, read

REPO = Repository("docker.io", "library/app")
OTHER = Repository("docker.io", "library/other")
TAG = Tag("1.0")


def upstream(**changes: object) -> Upstream:
    return Upstream.model_validate({"endpoints": ("http://memory",), **changes})


async def manifest(
    kit: PullKit, reference: Tag | Digest = TAG, repository: Repository = REPO, head: bool = False
) -> tuple[Digest, Outcome]:
    pull = a_pull()
    answer = await kit.service.manifest(repository, reference, (), pull, head=head)
    return answer.digest, pull.outcome


async def blob(
    kit: PullKit, digest: Digest, repository: Repository = REPO
) -> tuple[bytes, Outcome]:
    pull = a_pull()
    answer = await kit.service.blob(repository, digest, pull, head=False)
    assert answer.reader
    try:
        return await read(answer.reader), pull.outcome
    finally:
        answer.reader.close()


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


@pytest.mark.row("C12")
async def test_a_lost_index_is_made_anew_from_the_image_layout(tmp_path: Path) -> None:
    import shutil

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


async def test_policies_and_times(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0)) as kit:
        old = kit.registry.add_image(REPO.path, TAG.name, b"old")
        assert await manifest(kit) == (old, Outcome.MISS)
        new = kit.registry.add_image(REPO.path, TAG.name, b"new")
        assert await manifest(kit) == (old, Outcome.HIT)
        kit.clock[0] += 101
        assert await manifest(kit) == (new, Outcome.MISS)
        kit.clock[0] += 101
        assert await manifest(kit) == (new, Outcome.REVALIDATED)
        record = await kit.store.index.tag(REPO, TAG)
        assert record
        assert [entry.digest for entry in record.ledger] == [old]


async def test_always_asks_and_head_is_all_it_asks(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Always")) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        assert await manifest(kit) == (digest, Outcome.MISS)
        for _ in range(3):
            assert await manifest(kit) == (digest, Outcome.REVALIDATED)
        assert kit.registry.calls == {"head_manifest": 4, "get_manifest": 1}


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


async def test_stale_when_it_cannot_be_asked_and_not_when_it_says_no(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0, negative_ttl=0.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        kit.registry.failure = UpstreamUnavailable("down")
        assert await manifest(kit) == (digest, Outcome.STALE)
        for error in (ManifestUnknown("404"), Denied("403"), Unauthorized("401")):
            kit.registry.failure = error
            with pytest.raises(type(error)):
                await manifest(kit)


async def test_a_hung_upstream_is_not_waited_for_where_something_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.manifests._PATIENCE", 0.1)
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        hung = asyncio.Event()

        async def hang(*arguments: object) -> None:
            await hung.wait()

        monkeypatch.setattr(kit.registry, "head_manifest", hang)
        assert await manifest(kit) == (digest, Outcome.STALE)
        hung.set()


async def test_serve_stale_can_be_off(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0, serve_stale=False)) as kit:
        kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        kit.registry.failure = UpstreamUnavailable("down")
        with pytest.raises(UpstreamUnavailable):
            await manifest(kit)


async def test_a_head_on_a_miss_stays_a_head(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit, head=True)
        await manifest(kit, digest, head=True)
        pull = a_pull()
        answer = await kit.service.blob(REPO, Digest.of(b"layer"), pull, head=True)
        assert (answer.size, answer.reader) == (5, None)
        assert not [call for call in kit.registry.calls if call.startswith("get")]
        assert not list((tmp_path / "blobs" / "sha256").iterdir())


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


@pytest.mark.row("HC5")
async def test_content_is_stored_once_and_served_only_where_it_belongs(tmp_path: Path) -> None:
    layer = random_bytes(200_000)
    digest = Digest.of(layer)
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, TAG.name, layer)
        await manifest(kit)
        assert await blob(kit, digest) == (layer, Outcome.MISS)
        await kit.store.idle()
        with pytest.raises(BlobUnknown):
            await blob(kit, digest, OTHER)
        kit.registry.add_blob("library/third", layer)
        third = Repository("docker.io", "library/third")
        assert await blob(kit, digest, third) == (layer, Outcome.REVALIDATED)
        assert await blob(kit, digest, third) == (layer, Outcome.HIT)
        assert kit.registry.calls["get_blob"] == 1


async def test_joining_through_another_repository_needs_its_own_proof(tmp_path: Path) -> None:
    layer = random_bytes(400_000)
    digest = Digest.of(layer)
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_blob(REPO.path, layer)
        kit.registry.gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(blob(kit, digest))
            await asyncio.sleep(0.05)
            same = group.create_task(blob(kit, digest))
            with pytest.raises(BlobUnknown):
                await blob(kit, digest, OTHER)
            kit.registry.gate.set()
        assert first.result() == (layer, Outcome.MISS)
        assert same.result() == (layer, Outcome.JOIN)
        assert kit.registry.calls["get_blob"] == 1


async def test_a_no_to_one_repository_is_none_to_another(tmp_path: Path) -> None:
    layer = random_bytes(100_000)
    digest = Digest.of(layer)
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_blob(REPO.path, layer)
        wrong, right = await asyncio.gather(
            blob(kit, digest, OTHER), blob(kit, digest), return_exceptions=True
        )
        assert isinstance(wrong, BlobUnknown)
        assert not isinstance(right, BaseException)
        assert right[0] == layer


async def test_a_manifests_digest_is_no_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        with pytest.raises(BlobUnknown):
            await blob(kit, digest)


@pytest.mark.row("HU6")
async def test_type_confusion_is_refused(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        image = kit.registry.add_image(REPO.path, None, b"layer")
        body, _ = kit.registry.manifests[REPO.path, image]
        kit.registry.manifests[REPO.path, image] = body, OCI_INDEX
        kit.registry.tags[REPO.path, TAG.name] = image
        for _ in range(2):
            with pytest.raises(ManifestInvalid):
                await manifest(kit)


async def test_a_registry_whose_head_names_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        real = kit.registry.head_manifest

        async def bare(*arguments: object) -> object:
            from dataclasses import replace

            return replace(await real(*arguments), digest=None)  # type: ignore[arg-type] # as given

        monkeypatch.setattr(kit.registry, "head_manifest", bare)
        assert await manifest(kit) == (digest, Outcome.REVALIDATED), "it came with the answer"
        assert await manifest(kit) == (digest, Outcome.HIT)


@pytest.mark.row("U6")
async def test_small_wrong_content_is_fetched_again_before_a_byte_is_out(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        layer = b"a small layer"
        kit.registry.add_image(REPO.path, TAG.name, layer)
        await manifest(kit)
        wrong = [True]

        def change(stream: object) -> None:
            if wrong:
                wrong.pop()
                stream.data = b"a smell layer"  # type: ignore[attr-defined] # a Stream

        kit.registry.streams.append(change)
        assert (await blob(kit, Digest.of(layer)))[0] == layer
        assert [e.where for e in kit.events if isinstance(e, DigestMismatched)] == ["upstream"]


@pytest.mark.row("R8")
async def test_a_blob_larger_than_the_quota_is_served_and_not_kept(tmp_path: Path) -> None:
    layer = random_bytes(2_000_000)
    async with pull_kit(tmp_path, storage=Storage(max_size=1_000_000)) as kit:
        kit.registry.add_blob(REPO.path, layer)
        assert (await blob(kit, Digest.of(layer)))[0] == layer
        await kit.store.idle()
        assert not kit.store.layout.blob(Digest.of(layer)).exists()
        assert [e for e in kit.events if isinstance(e, Uncached)]


@pytest.mark.row("R8")
async def test_a_hundred_pulls_that_together_exceed_the_quota(tmp_path: Path) -> None:
    blobs = [random_bytes(100_000, seed) for seed in range(100)]
    async with pull_kit(tmp_path, storage=Storage(max_size=2_000_000)) as kit:
        for data in blobs:
            kit.registry.add_blob(REPO.path, data)
        results = await asyncio.gather(*(blob(kit, Digest.of(data)) for data in blobs))
        assert [data for data, _ in results] == blobs
        await kit.store.idle()
        kept = sum(path.stat().st_size for path in (tmp_path / "blobs" / "sha256").iterdir())
        assert 0 < kept <= 2_000_000


async def test_recency_is_about_images(tmp_path: Path) -> None:
    """A base layer that no node asks for any more lives as long as images that refer to it."""
    base = random_bytes(300_000, 1)
    async with pull_kit(tmp_path, storage=Storage(max_size=1_300_000)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, base)
        await manifest(kit)
        await blob(kit, Digest.of(base))
        for seed in range(2, 8):
            kit.clock[0] += 120
            assert (await manifest(kit, digest))[1] is Outcome.HIT
            await kit.store.idle()
            filler = random_bytes(300_000, seed)
            kit.registry.add_blob(OTHER.path, filler)
            await blob(kit, Digest.of(filler), OTHER)
            await kit.store.idle()
        assert kit.store.layout.blob(Digest.of(base)).exists()
        assert kit.store.layout.blob(digest).exists()


async def test_tags_and_referrers(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0, negative_ttl=0.0)) as kit:
        for name in ("b", "a", "c"):
            digest = kit.registry.add_image(REPO.path, name, name.encode())
        first = await kit.service.tags(REPO, 2, None, a_pull())
        assert (first.tags, first.more) == (("a", "b"), True)
        assert (await kit.service.tags(REPO, 2, "b", a_pull())).tags == ("c",)
        assert (await kit.service.tags(REPO, 0, None, a_pull())).tags == ()
        kit.registry.failure = UpstreamUnavailable("down")
        kit.clock[0] += 1000
        pull = a_pull()
        assert (await kit.service.tags(REPO, 2, None, pull)).tags == ("a", "b")
        assert pull.outcome is Outcome.STALE
        kit.registry.failure = None
        kit.registry.api = False
        empty = json.loads(await kit.service.referrers(REPO, digest, None, a_pull()))
        assert empty["manifests"] == []
        signature = kit.registry.add_manifest(
            REPO.path,
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [
                    {
                        "mediaType": "application/vnd.oci.image.manifest.v1+json",
                        "digest": str(digest),
                        "size": 5,
                        "artifactType": artifact,
                    }
                    for artifact in ("application/x.sbom", "application/x.signature")
                ],
            },
            referrers_tag(digest),
        )
        kit.clock[0] += 1000
        found = await kit.service.referrers(REPO, digest, None, a_pull())
        assert Digest.of(found) == signature
        filtered = await kit.service.referrers(REPO, digest, "application/x.sbom", a_pull())
        assert [entry["artifactType"] for entry in json.loads(filtered)["manifests"]] == [
            "application/x.sbom"
        ]


async def test_every_waiter_gets_the_answer_and_some_leave(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        tasks = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(manifest(kit)) for _ in range(60)]
            await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
        assert all(t.result()[0] == digest for t in tasks if not t.cancelled())
        assert kit.registry.calls == {"head_manifest": 1, "get_manifest": 1}
