"""Content by digest: access by repository, cached or fetched, and upstreams that fail."""

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
    ContentLost,
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
from mirror.store.reader import Reader
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    PullKit,
    Stream,
    a_pull,
    a_request,
    blob,
    manifest,
    pull_kit,
    upstream,
)
from tests.unit.store.kit import random_bytes, read

LAYER = random_bytes(200_000)
YEAR = 365 * 86400.0
REFUSALS = [BlobUnknown("404"), Denied("403"), Unauthorized("401")]
DOWN = UpstreamUnavailable("down")


async def granted(kit: PullKit, data: bytes = LAYER) -> Digest:
    """A cached blob that ``REPO`` may read only because the upstream granted it."""
    digest = kit.registry.add_blob(REPO.path, data)
    assert await blob(kit, digest) == (data, Outcome.MISS)
    await kit.store.idle()
    return digest


async def head(kit: PullKit, digest: Digest) -> tuple[int | None, Outcome]:
    pull = a_pull()
    result = await kit.service.blob(REPO, digest, pull, is_head=True)
    return result.size, pull.outcome


# --- access by repository -----------------------------------------------------------------------


@pytest.mark.row("HC5-content-of-another-repository")
async def test_content_is_stored_once_and_served_only_in_repositories_that_have_it(
    tmp_path: Path,
) -> None:
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


async def test_follower_from_another_repository_needs_its_own_proof(tmp_path: Path) -> None:
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


async def test_404_of_one_repository_does_not_fail_the_pull_of_another(tmp_path: Path) -> None:
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


async def test_concurrent_clients_that_need_the_same_proof_send_one_head(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.registry.add_blob(OTHER.path, LAYER)
        asked = [blob(kit, digest, OTHER) for _ in range(20)]
        assert await asyncio.gather(*asked) == [(LAYER, Outcome.REVALIDATED)] * 20
        assert kit.registry.calls == {"get_blob": 1, "head_blob": 1}


async def test_client_with_an_old_access_record_does_not_repeat_a_finished_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a client may continue only after another client's check has ended."""
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.registry.add_blob(OTHER.path, LAYER)
        real, has_looked, may_go_on = kit.store.blobs.find, asyncio.Event(), asyncio.Event()

        async def find_slowly(*arguments: Any) -> Any:
            reader = await real(*arguments)
            if not has_looked.is_set():
                has_looked.set()
                await may_go_on.wait()
            return reader

        monkeypatch.setattr(kit.store.blobs, "find", find_slowly)
        async with asyncio.TaskGroup() as group:
            slow = group.create_task(blob(kit, digest, OTHER))
            await has_looked.wait()
            assert await blob(kit, digest, OTHER) == (LAYER, Outcome.REVALIDATED)
            may_go_on.set()
        assert slow.result() == (LAYER, Outcome.REVALIDATED)
        assert kit.registry.calls == {"get_blob": 1, "head_blob": 1}


async def test_cached_blob_requested_as_a_manifest_is_checked_at_the_upstream(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        with pytest.raises(ManifestUnknown):
            await manifest(kit, digest)
        assert kit.registry.calls["head_manifest"] == 1


# --- granted access expires, and is checked again -----------------------------------------------


async def test_granted_access_is_checked_again_after_one_day(tmp_path: Path) -> None:
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
async def test_expired_access_is_served_stale_while_the_upstream_fails(
    tmp_path: Path, jump: float
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += jump
        for error in (DOWN, UpstreamRateLimited("429", retry_after=60)):
            kit.registry.failure = error
            assert await blob(kit, digest) == (LAYER, Outcome.STALE)
            assert await head(kit, digest) == (len(LAYER), Outcome.STALE)
            request = a_request(digest)
            (await kit.content.open(request)).close()
            assert request.pull.warning == error.message
        kit.registry.failure = None
        assert await blob(kit, digest) == (LAYER, Outcome.REVALIDATED)


@pytest.mark.row("K1-wrong-clock")
async def test_access_by_a_manifest_reference_never_expires(tmp_path: Path) -> None:
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
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: error.message)
async def test_404_403_or_401_revokes_granted_access_at_once(
    tmp_path: Path, error: MirrorError
) -> None:
    """Also while the upstream is down afterwards: its last response was a refusal."""
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        kit.clock[0] += YEAR
        kit.registry.failure = error
        with pytest.raises(type(error)):
            await blob(kit, digest)
        assert await kit.store.index.access_record(REPO, digest, "blob") is None
        kit.registry.failure = DOWN
        with pytest.raises((BlobUnknown, UpstreamUnavailable)):
            await blob(kit, digest)


async def test_without_serve_stale_expired_access_fails_with_the_upstreams_error(
    tmp_path: Path,
) -> None:
    async with pull_kit(tmp_path, upstream=upstream(serve_stale=False)) as kit:
        digest = await granted(kit)
        kit.clock[0] += YEAR
        kit.registry.failure = DOWN
        with pytest.raises(UpstreamUnavailable):
            await blob(kit, digest)
        with pytest.raises(UpstreamUnavailable):
            await head(kit, digest)


async def test_expired_access_is_served_stale_when_the_upstream_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.freshness.CONFIRM_TIMEOUT_S", 0.05)
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
async def test_expired_access_is_served_with_policy_never(tmp_path: Path) -> None:
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
async def test_manifest_served_stale_is_not_recorded_as_confirmed(tmp_path: Path) -> None:
    """The content came through one repository. Another one may read it by granted access only."""
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, LAYER)
        await manifest(kit)
        await kit.store.idle()
        kit.registry.manifests[OTHER.path, digest] = kit.registry.manifests[REPO.path, digest]
        pull = a_pull()
        await kit.content.check_access(a_request(digest, Kind.MANIFEST, OTHER))
        kit.clock[0] += YEAR
        kit.registry.failure = DOWN
        for _ in range(2):
            assert await manifest(kit, digest, OTHER, head=True) == (digest, Outcome.STALE)
            assert await manifest(kit, digest, OTHER) == (digest, Outcome.STALE)
        with pytest.raises(UpstreamUnavailable):
            await kit.service.blob(OTHER, Digest.of(LAYER), pull, is_head=False)
        kit.registry.failure = None
        assert await manifest(kit, digest, OTHER) == (digest, Outcome.REVALIDATED)
        assert await manifest(kit, digest, OTHER) == (digest, Outcome.HIT)


# --- negative responses ---------------------------------------------------------------------------


async def test_404_is_remembered_and_401_403_and_failures_are_not(tmp_path: Path) -> None:
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


async def test_manifest_that_a_tag_names_later_is_served_despite_a_remembered_404(
    tmp_path: Path,
) -> None:
    """A client asked for the digest before the upstream had it."""
    async with pull_kit(tmp_path, upstream=upstream(negative_ttl=3600.0)) as kit:
        digest = kit.registry.add_image(REPO.path, TAG.name, LAYER)
        entry = kit.registry.manifests.pop((REPO.path, digest))
        with pytest.raises(ManifestUnknown):
            await manifest(kit, digest)
        kit.registry.manifests[REPO.path, digest] = entry
        assert await manifest(kit) == (digest, Outcome.MISS)
        assert await manifest(kit, digest) == (digest, Outcome.HIT)


# --- hit, join or miss --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["client leaves", "drain", "error"])
async def test_reader_is_closed_if_the_wait_for_the_restored_parts_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = await granted(kit)
        await kit.store.index.revoke_access(REPO, digest, "blob")
        kit.store.index.unrestored_after = 0
        opened: list[Reader] = []
        waiting, ended = asyncio.Event(), asyncio.Event()
        find = kit.store.blobs.find

        async def noted(*arguments: Any) -> Reader | None:
            reader = await find(*arguments)
            assert reader is not None
            opened.append(reader)
            return reader

        async def restore() -> None:
            if how == "error":
                raise OSError("no descriptor")
            waiting.set()
            await ended.wait()

        monkeypatch.setattr(kit.store.blobs, "find", noted)
        monkeypatch.setattr(kit.store, "restore_parts", restore)
        if how == "drain":
            await kit.single_flight.drain(1.0)
        client = asyncio.ensure_future(blob(kit, digest))  # noqa: TID251 - a test
        if how == "client leaves":
            await asyncio.wait_for(waiting.wait(), 20)
            client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        assert client.cancelled() or client.exception() is not None
        (reader,) = opened
        with pytest.raises(ContentLost):
            await reader.wait(0)
        ended.set()  # The end of the kit waits for the restore.


@pytest.mark.row("U6-wrong-bit")
async def test_small_content_with_wrong_bytes_is_fetched_again_before_the_first_byte(
    tmp_path: Path,
) -> None:
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
async def test_blob_larger_than_the_quota_is_served_and_not_stored(tmp_path: Path) -> None:
    layer = random_bytes(2_000_000)
    async with pull_kit(tmp_path, storage=Storage(max_size=1_000_000)) as kit:
        kit.registry.add_blob(REPO.path, layer)
        assert (await blob(kit, Digest.of(layer)))[0] == layer
        await kit.store.idle()
        assert not kit.store.layout.blob(Digest.of(layer)).exists()
        assert [e for e in kit.events if isinstance(e, Uncached)]


@pytest.mark.row("R8-beyond-the-quota")
async def test_100_concurrent_pulls_above_the_quota_are_all_served(tmp_path: Path) -> None:
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
async def test_client_that_comes_while_an_abandoned_fetch_closes_is_served(
    tmp_path: Path, abandoned: Literal["finish", "cancel"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client comes back before the connection to the upstream is closed."""
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
        leaving = await kit.content.open(a_request(digest))
        leaving.close()
        await asyncio.sleep(0)
        coming = await kit.content.open(a_request(digest))
        closing.set()
        kit.registry.gate.set()
        assert await read(coming) == LAYER
        coming.close()
        expected = {"finish": 1, "cancel": 2}[abandoned]
        assert kit.registry.calls["get_blob"] == expected


async def test_no_fetch_is_started_after_draining(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        digest = kit.registry.add_blob(REPO.path, LAYER)
        await kit.single_flight.drain(1.0)
        with pytest.raises(Draining):
            await blob(kit, digest)
        assert not kit.store.active_ingests
        assert not kit.registry.calls


async def test_store_body_stores_only_bytes_that_match_the_digest(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        right, wrong = Digest.of(b"right"), Digest.of(b"wrong")
        await kit.content.store_body(right, b"right")
        await kit.content.store_body(right, b"right")
        await kit.content.store_body(wrong, b"not it")
        reader = await kit.store.blobs.find(right)
        assert reader is not None
        assert await read(reader) == b"right"
        reader.close()
        assert await kit.store.blobs.find(wrong) is None
        assert not kit.store.active_ingests
