"""Manifests by digest and by tag: policies, staleness, old clients, recency by image."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import Outcome
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    DOCKER_MANIFEST,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
)
from mirror.oci.errors import (
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.single_flight import SharedTask
from mirror.store.index import Index
from mirror.store.records import AccessRecord, NamedManifest
from mirror.upstream.api import ManifestHead
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    MemoryRegistry,
    PullKit,
    Stream,
    a_pull,
    blob,
    manifest,
    pull_kit,
    upstream,
)
from tests.unit.store.kit import random_bytes

OLD = (OCI_MANIFEST, DOCKER_MANIFEST)
"""Media types that a client accepts which does not support indexes."""


async def by_tag(
    kit: PullKit, accept: tuple[str, ...], head: bool = False
) -> tuple[Digest, Outcome]:
    pull = a_pull()
    result = await kit.service.manifest(REPO, TAG, accept, pull, is_head=head)
    return result.digest, pull.outcome


async def test_freshness_check_of_a_tag_keeps_no_manifest_in_memory(
    tmp_path: Path,
) -> None:
    """Stored responses keep it much longer than a second."""
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        result = await kit.service.manifest(REPO, TAG, (), a_pull(), is_head=True)
        body, is_fresh = result.body, result.is_fresh
        del result
        assert is_fresh()
        kit.service._manifests._results.clear()
        assert sys.getrefcount(body) == 2, "this function, and the call"


# --- policies -----------------------------------------------------------------------------------


async def test_tag_is_served_for_tag_ttl_then_resolved_again(tmp_path: Path) -> None:
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
        assert [entry.digest for entry in record.previous_digests] == [old]


async def test_pull_policy_always_revalidates_by_head_only(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Always")) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        assert await manifest(kit) == (digest, Outcome.MISS)
        for _ in range(3):
            assert await manifest(kit) == (digest, Outcome.REVALIDATED)
        assert kit.registry.calls == {"head_manifest": 4, "get_manifest": 1}


async def test_tag_is_served_stale_for_a_failure_and_not_for_401_403_404(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0, negative_ttl=0.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        kit.registry.failure = UpstreamUnavailable("down")
        assert await manifest(kit) == (digest, Outcome.STALE)
        for error in (ManifestUnknown("404"), Denied("403"), Unauthorized("401")):
            kit.registry.failure = error
            with pytest.raises(type(error)):
                await manifest(kit)


async def test_cached_tag_is_served_stale_when_the_upstream_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.CONFIRM_TIMEOUT_S", 0.1)
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        hung = asyncio.Event()

        async def hang(*arguments: object) -> None:
            await hung.wait()

        monkeypatch.setattr(kit.registry, "head_manifest", hang)
        assert await manifest(kit) == (digest, Outcome.STALE)
        hung.set()


async def test_without_serve_stale_a_tag_fails_with_the_upstreams_error(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0, serve_stale=False)) as kit:
        kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit)
        kit.registry.failure = UpstreamUnavailable("down")
        with pytest.raises(UpstreamUnavailable):
            await manifest(kit)


@pytest.mark.row("FB2-wrong-lengths")
async def test_head_on_a_miss_sends_only_a_head_once_the_upstream_has_stated_a_right_size(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, "first", b"first")
        await manifest(kit, Tag("first"), head=True)
        assert kit.registry.calls.pop("get_manifest") == 1
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        await manifest(kit, head=True)
        await manifest(kit, digest, head=True)
        assert not [call for call in kit.registry.calls if call.startswith("get")]
        kit.registry.calls.clear()
        result = await kit.service.blob(REPO, Digest.of(b"layer"), a_pull(), is_head=True)
        assert (result.size, result.content) == (5, None)
        assert kit.registry.calls == {"head_blob": 1, "get_blob": 1}


@pytest.mark.row("FB2-wrong-lengths")
@pytest.mark.parametrize("stated", [0, 1, 10**9, None])
async def test_head_of_a_manifest_never_has_a_wrong_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: int | None
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        real = kit.registry.head_manifest

        async def wrong_size(*arguments: Any) -> ManifestHead:
            return replace(await real(*arguments), size=stated)

        monkeypatch.setattr(kit.registry, "head_manifest", wrong_size)
        for number in range(3):
            digest = kit.registry.add_image(REPO.path, TAG.name, b"%d" % number)
            body, _ = kit.registry.manifests[REPO.path, digest]
            for reference in (TAG, digest):
                for head in (True, False):
                    result = await kit.service.manifest(REPO, reference, (), a_pull(), is_head=head)
                    assert (result.digest, result.size) == (digest, len(body))


@pytest.mark.row("FB2-wrong-lengths")
async def test_wrong_length_after_right_ones_does_not_reach_the_head_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:
        children = [kit.registry.add_image(REPO.path, None, b"%d" % number) for number in range(2)]
        kit.registry.add_index(REPO.path, TAG.name, *children)
        await manifest(kit)
        await manifest(kit, children[0])
        size = len(kit.registry.manifests[REPO.path, children[1]][0])
        loose = kit.registry.add_blob(REPO.path, b"of no manifest")
        for digest, length in ((Digest.of(b"0"), 1), (loose, 14)):
            result = await kit.service.blob(REPO, digest, a_pull(), is_head=True)
            assert result.size == length

        async def wrong_blob(*arguments: Any) -> int:
            return 7

        async def wrong_manifest(*arguments: Any) -> ManifestHead:
            return ManifestHead(children[1], OCI_MANIFEST, 7)

        monkeypatch.setattr(kit.registry, "head_blob", wrong_blob)
        monkeypatch.setattr(kit.registry, "head_manifest", wrong_manifest)
        other = kit.registry.add_blob(REPO.path, b"another one of no manifest")
        for digest, length in ((Digest.of(b"0"), 1), (other, 26)):
            result = await kit.service.blob(REPO, digest, a_pull(), is_head=True)
            assert result.size == length
        found = await kit.service.manifest(REPO, children[1], (), a_pull(), is_head=True)
        assert found.size == size


@pytest.mark.row("FB2-wrong-lengths")
async def test_head_of_a_tag_has_no_length_if_the_manifest_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker Hub limits the ``GET`` of manifests, and not the ``HEAD``."""
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")

        def limited(*arguments: Any, **more: Any) -> None:
            raise UpstreamRateLimited("429")

        monkeypatch.setattr(kit.registry, "open", limited)
        result = await kit.service.manifest(REPO, TAG, (), a_pull(), is_head=True)
        assert (result.digest, result.size, result.body) == (digest, None, None)
        with pytest.raises(UpstreamRateLimited):
            await kit.service.manifest(REPO, TAG, (), a_pull(), is_head=False)


@pytest.mark.row("HU6-wrong-types")
@pytest.mark.row("FB5-odd-manifests")
async def test_nothing_is_learned_from_an_image_with_the_media_type_of_an_index(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        image = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        body, _ = kit.registry.manifests[REPO.path, image]
        kit.registry.manifests[REPO.path, image] = body, OCI_INDEX
        for _ in range(2):
            result = await kit.service.manifest(REPO, TAG, (), a_pull(), is_head=False)
            assert (result.body, result.media_type) == (body, OCI_INDEX)
        layer = Digest.of(b"layer")
        assert await kit.store.index.access_record(REPO, layer, "blob") is None
        assert await blob(kit, layer) == (b"layer", Outcome.MISS)


async def test_tag_is_resolved_by_get_if_the_head_names_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        real, get = kit.registry.head_manifest, kit.registry.get_manifest
        ruled_out = {"https://busy.example": UpstreamRateLimited("busy", retry_after=60)}

        async def bare(*arguments: object) -> object:
            head = await real(*arguments)  # type: ignore[arg-type] # as given
            return replace(head, digest=None, ruled_out=ruled_out)

        async def get_elsewhere(*arguments: object) -> object:
            assert arguments[-1] == ruled_out, "the GET follows the HEAD"
            return await get(*arguments)  # type: ignore[arg-type] # as given

        monkeypatch.setattr(kit.registry, "head_manifest", bare)
        monkeypatch.setattr(kit.registry, "get_manifest", get_elsewhere)
        assert await manifest(kit) == (digest, Outcome.REVALIDATED), "its body came too"
        assert await manifest(kit) == (digest, Outcome.HIT)


async def test_waiters_for_a_tag_share_one_request_and_some_may_leave(tmp_path: Path) -> None:
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


async def test_serving_a_manifest_refreshes_the_recency_of_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base layer that no node requests any more stays as long as images that refer to it."""
    # The clock of the test moves on by minutes, and that of the memory cache does not.
    monkeypatch.setattr("mirror.pull.manifests.MEMORY_TTL_S", 0.0)
    base = random_bytes(300_000, 1)
    async with pull_kit(tmp_path, storage=Storage(max_size=1_300_000)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, base)
        await manifest(kit)
        await blob(kit, Digest.of(base))
        await kit.store.idle()
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


async def test_tag_whose_new_digest_has_wrong_bytes_serves_the_old_one_stale(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        old = kit.registry.add_image(REPO.path, TAG.name, b"old")
        await manifest(kit)
        kit.registry.add_image(REPO.path, TAG.name, b"new")

        def broken(stream: Stream) -> None:
            stream.data = bytes(len(stream.data))

        kit.registry.streams.append(broken)
        assert await manifest(kit) == (old, Outcome.STALE)


async def test_every_waiter_for_a_tag_gets_the_upstreams_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path) as kit:
        everybody, waiting = asyncio.Event(), []
        join = kit.single_flight.run

        def count(key: Hashable, work: Callable[[], Awaitable[Any]]) -> SharedTask[Any]:
            waiting.append(key)
            if len(waiting) == 30:
                everybody.set()
            return join(key, work)

        async def fail(*arguments: object) -> None:
            kit.registry.calls["head_manifest"] += 1
            await everybody.wait()
            raise UpstreamUnavailable("down")

        monkeypatch.setattr(kit.single_flight, "run", count)
        monkeypatch.setattr(kit.registry, "head_manifest", fail)
        asked = [manifest(kit) for _ in range(30)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(result, UpstreamUnavailable) for result in results)
        assert kit.registry.calls == {"head_manifest": 1}
        assert len(set(waiting)) == 1


async def test_404_for_a_tag_is_remembered(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        for _ in range(3):
            for head in (True, False):
                with pytest.raises(ManifestUnknown):
                    await manifest(kit, head=head)
        assert kit.registry.calls == {"head_manifest": 1}


# --- the Accept header ------------------------------------------------------------------------


async def test_old_and_current_clients_get_the_manifest_of_their_accept_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry sends a client that does not accept indexes one of the manifests of the index."""
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0)) as kit:
        child = kit.registry.add_image(REPO.path, None, b"layer")
        index = kit.registry.add_index(REPO.path, TAG.name, child)
        real = kit.registry.head_manifest

        async def choose(
            repository: Repository, reference: Reference, accept: Sequence[str]
        ) -> ManifestHead:
            if reference == TAG and OCI_INDEX not in accept:
                reference = child
            return await real(repository, reference, accept)

        monkeypatch.setattr(kit.registry, "head_manifest", choose)
        assert await by_tag(kit, DEFAULT_ACCEPT) == (index, Outcome.MISS)
        assert await by_tag(kit, OLD) == (child, Outcome.MISS)
        for _ in range(2):
            assert await by_tag(kit, DEFAULT_ACCEPT) == (index, Outcome.HIT)
            assert await by_tag(kit, OLD) == (child, Outcome.HIT)
        kit.clock[0] += 101
        assert await by_tag(kit, OLD) == (child, Outcome.REVALIDATED)
        assert await by_tag(kit, OLD) == (child, Outcome.HIT)
        assert await by_tag(kit, DEFAULT_ACCEPT) == (index, Outcome.REVALIDATED)


async def test_client_with_few_accepted_types_is_served_a_cached_manifest_that_fits(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        assert await by_tag(kit, ()) == (digest, Outcome.MISS)
        assert await by_tag(kit, OLD) == (digest, Outcome.HIT), "the cached manifest fits"
        kit.clock[0] += 101
        assert await by_tag(kit, OLD) == (digest, Outcome.REVALIDATED)
        assert await by_tag(kit, OLD) == (digest, Outcome.HIT)
        kit.clock[0] += 101
        kit.registry.failure = UpstreamUnavailable("down")
        assert await by_tag(kit, OLD) == (digest, Outcome.STALE)


# --- stored bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_manifest_of_any_type_up_to_4_mib_is_served_byte_for_byte(
    tmp_path: Path, algorithm: str
) -> None:
    """Also with a media type of its own, and with odd whitespace."""
    document = json.dumps({"schemaVersion": 2, "x": ""}, indent=7).encode()
    body = document.replace(b'""', b'"' + b"x" * (MANIFEST_LIMIT - len(document)) + b'"')
    assert len(body) == MANIFEST_LIMIT
    digest = Digest.of(body, algorithm)
    assert digest.hex == hashlib.new(algorithm, body).hexdigest()
    async with pull_kit(tmp_path) as kit:
        kit.registry.manifests[REPO.path, digest] = body, "application/vnd.example.thing"
        for expected in (Outcome.MISS, Outcome.HIT):
            pull = a_pull()
            result = await kit.service.manifest(REPO, digest, OLD, pull, is_head=False)
            assert (result.media_type, pull.outcome) == ("application/vnd.example.thing", expected)
            assert result.body == body
            await kit.store.idle()


async def test_manifest_above_4_mib_is_refused(tmp_path: Path) -> None:
    body = b" " * (MANIFEST_LIMIT + 1)
    async with pull_kit(tmp_path) as kit:
        kit.registry.manifests[REPO.path, Digest.of(body)] = body, "application/vnd.example.thing"
        with pytest.raises(ManifestInvalid):
            await manifest(kit, Digest.of(body))
        assert not list((tmp_path / "blobs" / "sha256").iterdir())


@pytest.mark.parametrize("has_index", [False, True], ids=["image", "index"])
async def test_image_that_another_repository_brought_is_served_whole_while_the_upstream_is_down(
    tmp_path: Path, has_index: bool
) -> None:
    other = Repository("docker.io", "library/other")
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        for repository in (REPO, other):
            image = kit.registry.add_image(repository.path, TAG.name, b"layer")
            if has_index:
                kit.registry.add_index(repository.path, TAG.name, image)
        for repository in (REPO, other):
            await manifest(kit, repository=repository)
            await manifest(kit, image, repository)
        await blob(kit, Digest.of(b"layer"))
        await kit.store.idle()
        names = {named.name for named in await all_names(kit)}
        assert {f"{other}:{TAG}", f"{REPO}:{TAG}"} <= names
        kit.registry.failure = UpstreamUnavailable("down")
        assert (await manifest(kit, repository=other))[1] is Outcome.STALE
        assert (await blob(kit, Digest.of(b"layer"), other)) == (b"layer", Outcome.HIT)


async def test_part_that_was_refused_is_not_granted_again_by_its_cached_manifest(
    tmp_path: Path,
) -> None:
    registry, settings = MemoryRegistry(), upstream(tag_ttl=0.0)
    image = registry.add_image(REPO.path, TAG.name, b"layer")
    parts = [digest for _, digest in registry.blobs]
    for part in parts:
        # A restart: the manifest is not in memory any more.
        async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
            await manifest(kit)
            await manifest(kit, image)
            await kit.store.idle()
            await kit.store.index.revoke_access(REPO, part, "blob")
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        await manifest(kit)
        await manifest(kit, image)
        for part in parts:
            assert await kit.store.index.access_record(REPO, part, "blob") is None


async def test_parts_of_a_manifest_are_recorded_once_however_often_its_tag_is_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, settings = MemoryRegistry(), upstream(tag_ttl=0.0)
    registry.add_image(REPO.path, TAG.name, b"layer")
    recorded: list[str] = []
    put = Index.put_access_records

    async def counted(
        index: Index, repository: Repository, access_records: Iterable[AccessRecord]
    ) -> bool:
        records = list(access_records)
        recorded.extend(record.kind for record in records)
        return await put(index, repository, records)

    monkeypatch.setattr(Index, "put_access_records", counted)
    for _ in range(3):
        async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
            await manifest(kit)
            await kit.store.idle()
    assert recorded.count("blob") == 2


async def all_names(kit: PullKit) -> list[NamedManifest]:
    page = await kit.store.index.names(0)
    assert page is not None
    return [named for manifests in page.names for named in manifests]
