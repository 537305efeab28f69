"""Content by digest: who may read it, hit, join or miss, and what an upstream's silence means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import DigestMismatched, Kind, Outcome, Uncached
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    Draining,
    ManifestUnknown,
    MirrorError,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Repository
from mirror.pull.freshness import ACCESS_TTL_S
from mirror.upstream.api import ContentStream
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
from tests.unit.store.kit import random_bytes, read

LAYER = random_bytes(200_000)
YEAR = 365 * 86400.0
NOES = [BlobUnknown("404"), Denied("403"), Unauthorized("401")]
DOWN = UpstreamUnavailable("down")


async def granted(kit: PullKit, data: bytes = LAYER) -> Digest:
    """A blob that is here, and in ``REPO`` by nothing but the upstream's word."""
    digest = kit.registry.add_blob(REPO.path, data)
    assert await blob(kit, digest) == (data, Outcome.MISS)
    await kit.store.idle()
    return digest


async def head(kit: PullKit, digest: Digest) -> tuple[int | None, Outcome]:
    pull = a_pull()
    answer = await kit.service.blob(REPO, digest, pull, head=True)
    return answer.size, pull.outcome


# --- who may read -------------------------------------------------------------------------------


@pytest.mark.row("HC5-content-of-another-repository")
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


async def test_many_that_need_the_same_proof_ask_once(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.registry.add_blob(OTHER.path, LAYER)
        asked = [blob(kit, digest, OTHER) for _ in range(20)]
        assert await asyncio.gather(*asked) == [(LAYER, Outcome.REVALIDATED)] * 20
        assert kit.registry.calls == {"get_blob": 1, "head_blob": 1}


async def test_a_blob_asked_for_as_a_manifest_is_asked_of_the_upstream(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        with pytest.raises(ManifestUnknown):
            await manifest(kit, digest)
        assert kit.registry.calls["head_manifest"] == 1


# --- the upstream's word ends, and is asked for again -------------------------------------------


async def test_the_upstreams_word_is_renewed_after_a_day(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += ACCESS_TTL_S
        assert await blob(kit, digest) == (LAYER, Outcome.HIT)
        assert "head_blob" not in kit.registry.calls
        kit.clock[0] += 1
        assert await blob(kit, digest) == (LAYER, Outcome.REVALIDATED)
        assert await blob(kit, digest) == (LAYER, Outcome.HIT)
        assert await head(kit, digest) == (len(LAYER), Outcome.HIT)
        assert kit.registry.calls["head_blob"] == 1


@pytest.mark.row("K1-wrong-clock")
@pytest.mark.parametrize("jump", [ACCESS_TTL_S + 1, YEAR, -YEAR], ids=["day", "year", "back"])
async def test_an_upstream_that_cannot_be_asked_takes_nothing_away(
    tmp_path: Path, jump: float
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += jump
        for error in (DOWN, UpstreamRateLimited("429", retry_after=60)):
            kit.registry.failure = error
            assert await blob(kit, digest) == (LAYER, Outcome.STALE)
            assert await head(kit, digest) == (len(LAYER), Outcome.STALE)
            pull = a_pull()
            (await kit.content.open(REPO, digest, Kind.BLOB, pull)).close()
            assert pull.warning == error.message
        kit.registry.failure = None
        assert await blob(kit, digest) == (LAYER, Outcome.REVALIDATED)


@pytest.mark.row("K1-wrong-clock")
async def test_what_a_manifest_refers_to_needs_no_word_in_any_year(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, LAYER)
        await manifest(kit)
        await blob(kit, Digest.of(LAYER))
        await kit.store.idle()
        kit.registry.failure = DOWN
        for jump in (YEAR, -3 * YEAR):
            kit.clock[0] += jump
            assert await manifest(kit, digest) == (digest, Outcome.HIT)
            assert await blob(kit, Digest.of(LAYER)) == (LAYER, Outcome.HIT)


@pytest.mark.row("HC6-withdrawn-access")
@pytest.mark.parametrize("error", NOES, ids=lambda error: error.message)
async def test_a_no_withdraws_the_word_at_once(tmp_path: Path, error: MirrorError) -> None:
    """Also where the upstream is down afterwards: its last word was no."""
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += YEAR
        kit.registry.failure = error
        with pytest.raises(type(error)):
            await blob(kit, digest)
        assert await kit.content.access_record(REPO, digest, Kind.BLOB) is None
        kit.registry.failure = DOWN
        with pytest.raises((BlobUnknown, UpstreamUnavailable)):
            await blob(kit, digest)


async def test_without_serve_stale_the_failure_is_the_answer(tmp_path: Path) -> None:
    async with pull_kit(tmp_path, upstream=upstream(serve_stale=False)) as kit:
        digest = await granted(kit)
        kit.clock[0] += YEAR
        kit.registry.failure = DOWN
        with pytest.raises(UpstreamUnavailable):
            await blob(kit, digest)
        with pytest.raises(UpstreamUnavailable):
            await head(kit, digest)


async def test_a_hung_upstream_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.PATIENCE", 0.05)
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += YEAR
        hung = asyncio.Event()

        async def hang(*arguments: object) -> None:
            await hung.wait()

        monkeypatch.setattr(kit.registry, "head_blob", hang)
        assert await blob(kit, digest) == (LAYER, Outcome.STALE)
        hung.set()


@pytest.mark.row("K1-wrong-clock")
async def test_where_nothing_may_be_asked_the_word_holds(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
    async with pull_kit(tmp_path, upstream=upstream(pull_policy="Never")) as kit:
        kit.clock[0] += YEAR
        assert await blob(kit, digest) == (LAYER, Outcome.HIT)
        assert await head(kit, digest) == (len(LAYER), Outcome.HIT)
        with pytest.raises(BlobUnknown):
            await blob(kit, digest, OTHER)
        assert not kit.registry.calls


@pytest.mark.row("K1-wrong-clock")
async def test_a_manifest_that_is_served_stale_is_not_confirmed_by_it(tmp_path: Path) -> None:
    """Content came through one repository; another one had it by the upstream's word only."""
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, LAYER)
        await manifest(kit)
        await kit.store.idle()
        kit.registry.manifests[OTHER.path, digest] = kit.registry.manifests[REPO.path, digest]
        pull = a_pull()
        await kit.content.check_access(OTHER, digest, Kind.MANIFEST)
        kit.clock[0] += YEAR
        kit.registry.failure = DOWN
        for _ in range(2):
            assert await manifest(kit, digest, OTHER, head=True) == (digest, Outcome.STALE)
            assert await manifest(kit, digest, OTHER) == (digest, Outcome.STALE)
        with pytest.raises(UpstreamUnavailable):
            await kit.service.blob(OTHER, Digest.of(LAYER), pull, head=False)
        kit.registry.failure = None
        assert await manifest(kit, digest, OTHER) == (digest, Outcome.REVALIDATED)
        assert await manifest(kit, digest, OTHER) == (digest, Outcome.HIT)


# --- negative answers ---------------------------------------------------------------------------


async def test_a_404_is_remembered_and_other_refusals_are_not(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        absent = Digest.of(b"absent")
        for _ in range(3):
            with pytest.raises(BlobUnknown):
                await blob(kit, absent)
            with pytest.raises(BlobUnknown):
                await head(kit, absent)
        assert kit.registry.calls == {"get_blob": 1}
        for error in (Denied("403"), Unauthorized("401"), DOWN):
            kit.registry.failure = error
            kit.registry.calls.clear()
            for _ in range(2):
                with pytest.raises(type(error)):
                    await blob(kit, Digest.of(b"other"))
            assert kit.registry.calls == {"get_blob": 2}


async def test_what_was_learned_later_outweighs_a_404(tmp_path: Path) -> None:
    """A digest that was asked for too early is served as soon as a tag is known to be it."""
    async with pull_kit(tmp_path, upstream=upstream(negative_ttl=3600.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, LAYER)
        held = kit.registry.manifests.pop((REPO.path, digest))
        with pytest.raises(ManifestUnknown):
            await manifest(kit, digest)
        kit.registry.manifests[REPO.path, digest] = held
        assert await manifest(kit) == (digest, Outcome.MISS)
        assert await manifest(kit, digest) == (digest, Outcome.HIT)


# --- hit, join or miss --------------------------------------------------------------------------


@pytest.mark.row("U6-wrong-bit")
async def test_small_wrong_content_is_fetched_again_before_a_byte_is_out(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        layer = b"a small layer"
        kit.registry.add_image(REPO.path, TAG.name, layer)
        await manifest(kit)
        wrong = [True]

        def change(stream: Stream) -> None:
            if wrong:
                wrong.pop()
                stream.data = b"a smell layer"

        kit.registry.streams.append(change)
        assert (await blob(kit, Digest.of(layer)))[0] == layer
        assert [e.where for e in kit.events if isinstance(e, DigestMismatched)] == ["upstream"]


@pytest.mark.row("R8-beyond-the-quota")
async def test_a_blob_larger_than_the_quota_is_served_and_not_kept(tmp_path: Path) -> None:
    layer = random_bytes(2_000_000)
    async with pull_kit(tmp_path, storage=Storage(max_size=1_000_000)) as kit:
        kit.registry.add_blob(REPO.path, layer)
        assert (await blob(kit, Digest.of(layer)))[0] == layer
        await kit.store.idle()
        assert not kit.store.layout.blob(Digest.of(layer)).exists()
        assert [e for e in kit.events if isinstance(e, Uncached)]


@pytest.mark.row("R8-beyond-the-quota")
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


@pytest.mark.row("L1-client-that-leaves")
@pytest.mark.parametrize("abandoned", ["finish", "cancel"])
async def test_who_comes_while_a_fetch_is_given_up_is_served(
    tmp_path: Path, abandoned: Literal["finish", "cancel"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that left comes back at once, before the connection to the upstream is closed."""
    async with pull_kit(tmp_path, abandoned=abandoned) as kit:
        digest = kit.registry.add_blob(REPO.path, LAYER)
        kit.registry.gate = asyncio.Event()
        closing = asyncio.Event()
        real = kit.registry.open

        @asynccontextmanager
        async def slow_to_close(*arguments: Any, **named: Any) -> AsyncIterator[ContentStream]:
            async with real(*arguments, **named) as stream:
                try:
                    yield stream
                finally:
                    await closing.wait()

        monkeypatch.setattr(kit.registry, "open", slow_to_close)
        leaving = await kit.content.open(REPO, digest, Kind.BLOB, a_pull())
        leaving.close()
        await asyncio.sleep(0)
        coming = await kit.content.open(REPO, digest, Kind.BLOB, a_pull())
        closing.set()
        kit.registry.gate.set()
        assert await read(coming) == LAYER
        coming.close()
        expected = {"finish": 1, "cancel": 2}[abandoned]
        assert kit.registry.calls["get_blob"] == expected


async def test_nothing_new_is_begun_while_draining(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_blob(REPO.path, LAYER)
        await kit.single_flight.drain(1.0)
        with pytest.raises(Draining):
            await blob(kit, digest)
        assert not kit.store.active_ingests
        assert not kit.registry.calls


async def test_small_content_is_kept_if_it_is_what_it_says(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        right, wrong = Digest.of(b"right"), Digest.of(b"wrong")
        await kit.content.keep(right, b"right")
        await kit.content.keep(right, b"right")
        await kit.content.keep(wrong, b"not it")
        reader = await kit.store.blobs.find(right)
        assert reader is not None
        assert await read(reader) == b"right"
        reader.close()
        assert await kit.store.blobs.find(wrong) is None
        assert not kit.store.active_ingests
