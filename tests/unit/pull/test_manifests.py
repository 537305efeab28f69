"""Manifests by digest and by tag: policies, staleness, old clients, recency by image."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Hashable, Sequence
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
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Reference, Repository
from mirror.pull.manifests import accepts, variant_of
from mirror.single_flight import SharedTask
from mirror.upstream.api import ManifestHead
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
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
"""What a client accepts that knows of no index."""


async def by_tag(
    kit: PullKit, accept: tuple[str, ...], head: bool = False
) -> tuple[Digest, Outcome]:
    pull = a_pull()
    answer = await kit.service.manifest(REPO, TAG, accept, pull, head=head)
    return answer.digest, pull.outcome


# --- policies -----------------------------------------------------------------------------------


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
        assert [entry.digest for entry in record.previous_digests] == [old]


async def test_always_asks_and_head_is_all_it_asks(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Always")) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        assert await manifest(kit) == (digest, Outcome.MISS)
        for _ in range(3):
            assert await manifest(kit) == (digest, Outcome.REVALIDATED)
        assert kit.registry.calls == {"head_manifest": 4, "get_manifest": 1}


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
    monkeypatch.setattr("mirror.pull.freshness.PATIENCE", 0.1)
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


@pytest.mark.row("HU6-wrong-types")
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
            return replace(await real(*arguments), digest=None)  # type: ignore[arg-type] # as given

        monkeypatch.setattr(kit.registry, "head_manifest", bare)
        assert await manifest(kit) == (digest, Outcome.REVALIDATED), "it came with the answer"
        assert await manifest(kit) == (digest, Outcome.HIT)


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


async def test_a_tag_whose_new_content_cannot_be_had_stays_what_it_was(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=0.0)) as kit:
        old = kit.registry.add_image(REPO.path, TAG.name, b"old")
        await manifest(kit)
        kit.registry.add_image(REPO.path, TAG.name, b"new")

        def broken(stream: Stream) -> None:
            stream.data = bytes(len(stream.data))

        kit.registry.streams.append(broken)
        assert await manifest(kit) == (old, Outcome.STALE)


async def test_every_waiter_gets_the_failure(
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


async def test_a_tag_that_does_not_exist_is_asked_for_once(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        for _ in range(3):
            for head in (True, False):
                with pytest.raises(ManifestUnknown):
                    await manifest(kit, head=head)
        assert kit.registry.calls == {"head_manifest": 1}


# --- what clients accept ------------------------------------------------------------------------


async def test_old_and_current_clients_each_get_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry answers a client without indexes with one of the index's manifests."""
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


async def test_a_narrow_client_asks_as_seldom_as_any_other(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(tag_ttl=100.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, b"layer")
        assert await by_tag(kit, ()) == (digest, Outcome.MISS)
        assert await by_tag(kit, OLD) == (digest, Outcome.HIT), "what is held will do"
        kit.clock[0] += 101
        assert await by_tag(kit, OLD) == (digest, Outcome.REVALIDATED)
        assert await by_tag(kit, OLD) == (digest, Outcome.HIT)
        kit.clock[0] += 101
        kit.registry.failure = UpstreamUnavailable("down")
        assert await by_tag(kit, OLD) == (digest, Outcome.STALE)


@pytest.mark.parametrize(
    ("accept", "everything"),
    [
        ((), True),
        (("*/*",), True),
        (DEFAULT_ACCEPT, True),
        ((*DEFAULT_ACCEPT, "application/vnd.docker.distribution.manifest.v1+json"), True),
        (OLD, False),
        ((OCI_MANIFEST, "*/*"), False),
    ],
)
def test_who_takes_every_manifest(accept: tuple[str, ...], everything: bool) -> None:
    assert (variant_of(accept) == "") is everything
    assert variant_of(accept) == variant_of(tuple(reversed(accept)))


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        ((), True),
        (("*/*",), True),
        (("application/*",), True),
        ((OCI_MANIFEST,), True),
        ((f"{OCI_MANIFEST.upper()};q=0.5",), True),
        (("text/*", OCI_INDEX), False),
    ],
)
def test_what_a_client_takes(accept: tuple[str, ...], taken: bool) -> None:
    assert accepts(accept, OCI_MANIFEST) is taken


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_exact_bytes_of_any_type_up_to_four_mebibytes(tmp_path: Path, algorithm: str) -> None:
    """An artifact's own media type, odd whitespace and all."""
    document = json.dumps({"schemaVersion": 2, "x": ""}, indent=7).encode()
    body = document.replace(b'""', b'"' + b"x" * (MANIFEST_LIMIT - len(document)) + b'"')
    assert len(body) == MANIFEST_LIMIT
    digest = Digest.of(body, algorithm)
    assert digest.hex == hashlib.new(algorithm, body).hexdigest()
    async with pull_kit(tmp_path) as kit:
        kit.registry.manifests[REPO.path, digest] = body, "application/vnd.example.thing"
        for expected in (Outcome.MISS, Outcome.HIT):
            pull = a_pull()
            answer = await kit.service.manifest(REPO, digest, OLD, pull, head=False)
            assert (answer.media_type, pull.outcome) == ("application/vnd.example.thing", expected)
            assert answer.body == body
            await kit.store.idle()


async def test_a_manifest_above_the_limit_is_refused(tmp_path: Path) -> None:
    body = b" " * (MANIFEST_LIMIT + 1)
    async with pull_kit(tmp_path) as kit:
        kit.registry.manifests[REPO.path, Digest.of(body)] = body, "application/vnd.example.thing"
        with pytest.raises(ManifestInvalid):
            await manifest(kit, Digest.of(body))
        assert not list((tmp_path / "blobs" / "sha256").iterdir())
