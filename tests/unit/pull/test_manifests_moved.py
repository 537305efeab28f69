"""A tag that has moved: its earlier digest stands in while the new one cannot be fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mirror.config.settings import Upstream
from mirror.observability.events import Outcome
from mirror.oci.descriptor import MANIFEST_LIMIT, OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import (
    ManifestInvalid,
    ManifestUnknown,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Repository
from mirror.store.records import MAX_PREVIOUS_DIGESTS
from mirror.upstream.api import ManifestHead
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    MemoryRegistry,
    PullKit,
    a_pull,
    manifest,
    pull_kit,
    upstream,
)

SETTINGS = upstream(tag_ttl=100.0)
NEVER = upstream(pull_policy="Never")


def move(kit: PullKit, layer: bytes = b"new", repository: Repository = REPO) -> Digest:
    """Move the tag to another image, and let its cached digest expire."""
    kit.clock[0] += 101
    return kit.registry.add_image(repository.path, TAG.name, layer)


def refuse_content(kit: PullKit, patch: pytest.MonkeyPatch) -> None:
    """Answer every ``GET`` with 429 from now on. A ``HEAD`` still succeeds."""

    def refuse(*arguments: object, **options: object) -> None:
        raise UpstreamRateLimited("no more pulls")

    patch.setattr(kit.registry, "open", refuse)


async def moved_on(
    root: Path, registry: MemoryRegistry, patch: pytest.MonkeyPatch, *, head: bool = False
) -> tuple[Digest, Digest]:
    """Return the old digest, which is cached, and the new one, which the upstream names."""
    async with pull_kit(root, registry=registry, upstream=SETTINGS) as kit:
        old = move(kit, b"old")
        await manifest(kit)
        new = move(kit)
        with patch.context() as refused:
            refuse_content(kit, refused)
            if head:
                assert await manifest(kit, head=True) == (new, Outcome.MISS)
            else:
                assert await manifest(kit) == (old, Outcome.STALE)
        record = await kit.store.index.tag(REPO, TAG)
        assert record
        assert record.digests == (new, old)
    return old, new


async def test_old_digest_is_served_stale_while_the_new_one_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path, upstream=SETTINGS) as kit:
        old = move(kit, b"old")
        await manifest(kit)
        new = move(kit)
        with monkeypatch.context() as patch:
            refuse_content(kit, patch)
            for _ in range(3):
                assert await manifest(kit) == (old, Outcome.STALE)
            assert await manifest(kit, head=True) == (new, Outcome.MISS), "the upstream says so"
            assert await manifest(kit) == (old, Outcome.STALE)
        kit.registry.failure = UpstreamUnavailable("down")
        for head in (True, False):
            assert await manifest(kit, head=head) == (old, Outcome.STALE)
        kit.registry.failure = None
        assert await manifest(kit) == (new, Outcome.MISS)
        assert await manifest(kit) == (new, Outcome.HIT)


@pytest.mark.parametrize("head", [True, False], ids=["HEAD", "GET"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SETTINGS, Outcome.STALE),
        (upstream(pull_policy="Always"), Outcome.STALE),
        (upstream(serve_stale=False), UpstreamUnavailable),
        (NEVER, Outcome.STALE),
        (upstream(pull_policy="Never", serve_stale=False), ManifestUnknown),
    ],
    ids=["IfNotPresent", "Always", "not stale", "Never", "Never and not stale"],
)
async def test_old_digest_is_served_after_a_restart_without_upstream_by_policy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Upstream,
    expected: Outcome | type[Exception],
    head: bool,
) -> None:
    registry = MemoryRegistry()
    old, _ = await moved_on(tmp_path, registry, monkeypatch, head=head)
    registry.failure = UpstreamUnavailable("down")
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        if isinstance(expected, Outcome):
            pull = a_pull()
            result = await kit.service.manifest(REPO, TAG, (OCI_MANIFEST,), pull, is_head=False)
            assert (result.digest, pull.outcome) == (old, expected)
            assert pull.warning
        else:
            with pytest.raises(expected):
                await manifest(kit)


async def test_old_digest_is_served_after_a_loss_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = MemoryRegistry()
    old, _ = await moved_on(tmp_path, registry, monkeypatch)
    shutil.rmtree(tmp_path / "index")
    async with pull_kit(tmp_path, registry=registry, upstream=NEVER) as kit:
        assert await manifest(kit) == (old, Outcome.HIT)


@pytest.mark.parametrize("settings", [SETTINGS, NEVER], ids=["IfNotPresent", "Never"])
async def test_old_digest_is_served_stale_after_the_new_one_was_evicted(
    tmp_path: Path, settings: Upstream
) -> None:
    registry = MemoryRegistry()
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        old = move(kit, b"old")
        await manifest(kit)
        new = move(kit)
        assert await manifest(kit) == (new, Outcome.MISS)
        await kit.store.idle()
        kit.store.layout.blob(new).unlink()
    registry.failure = UpstreamUnavailable("down")
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        assert await manifest(kit) == (old, Outcome.STALE)


async def test_cached_digest_stays_in_the_record_however_often_the_tag_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pull_kit(tmp_path, upstream=SETTINGS) as kit:
        old = move(kit, b"old")
        await manifest(kit)
        refuse_content(kit, monkeypatch)
        for number in range(MAX_PREVIOUS_DIGESTS + 3):
            new = move(kit, b"%d" % number)
            assert await manifest(kit, head=True) == (new, Outcome.MISS)
        assert await manifest(kit) == (old, Outcome.STALE)


async def test_old_digest_is_served_by_every_process_that_shares_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, clock = MemoryRegistry(), [1_800_000_000.0]
    async with (
        pull_kit(tmp_path, registry=registry, upstream=SETTINGS, clock=clock) as one,
        pull_kit(tmp_path, registry=registry, upstream=SETTINGS, clock=clock) as two,
    ):
        old = move(one, b"old")
        await manifest(one)
        await one.store.idle()  # the other process finds it once it is published
        new = move(one)
        refuse_content(one, monkeypatch)
        assert await manifest(one, head=True) == (new, Outcome.MISS)
        registry.failure = UpstreamUnavailable("down")
        for kit in (one, two):
            assert await manifest(kit) == (old, Outcome.STALE)


def odd(body: bytes, change: str) -> tuple[bytes, str]:
    """Change a manifest so that it is not understood, or refused. Returns it and its type."""
    match change:
        case "wrong type":
            return body, OCI_INDEX
        case "a key twice":
            return body[:-1] + b', "layers": []}', OCI_MANIFEST
        case "own type":
            return b"\x00\x01", "application/vnd.acme.bin"
        case "too large":
            return body[:-1] + b" " * MANIFEST_LIMIT + b"}", OCI_MANIFEST
        case "too deep":
            return body[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", OCI_MANIFEST
        case _:
            return b"no JSON", OCI_MANIFEST


def move_to_odd(kit: PullKit, change: str) -> Digest:
    """Move the tag to a manifest that is not understood, or refused."""
    image = move(kit)
    body, media_type = odd(kit.registry.manifests[REPO.path, image][0], change)
    digest = Digest.of(body)
    kit.registry.manifests[REPO.path, digest] = body, media_type
    kit.registry.tags[REPO.path, TAG.name] = digest
    return digest


@pytest.mark.row("FB7-tag-moved-to-odd-manifest")
@pytest.mark.parametrize("settings", [SETTINGS, upstream(pull_policy="Always")], ids=["", "Always"])
@pytest.mark.parametrize("change", ["wrong type", "a key twice", "own type"])
async def test_tag_that_moved_to_a_manifest_that_is_not_understood_serves_the_new_bytes(
    tmp_path: Path, settings: Upstream, change: str
) -> None:
    registry = MemoryRegistry()
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        move(kit, b"old")
        await manifest(kit)
        new = move_to_odd(kit, change)
        for head in (False, True, False):
            assert (await manifest(kit, head=head))[0] == new
        result = await kit.service.manifest(REPO, TAG, (), a_pull(), is_head=False)
        assert (result.body, result.media_type) == registry.manifests[REPO.path, new]
    registry.failure = UpstreamUnavailable("down")
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        assert (await manifest(kit))[0] == new


@pytest.mark.row("FB7-tag-moved-to-odd-manifest")
@pytest.mark.parametrize("settings", [SETTINGS, upstream(pull_policy="Always")], ids=["", "Always"])
@pytest.mark.parametrize("change", ["too large", "too deep", "no JSON"])
async def test_tag_that_moved_to_a_refused_manifest_fails_while_the_upstream_can_be_asked(
    tmp_path: Path, settings: Upstream, change: str
) -> None:
    registry = MemoryRegistry()
    async with pull_kit(tmp_path, registry=registry, upstream=settings) as kit:
        old = move(kit, b"old")
        await manifest(kit)
        new = move_to_odd(kit, change)
        for reference in (TAG, new, TAG):
            with pytest.raises(ManifestInvalid):
                await manifest(kit, reference)
        registry.failure = UpstreamUnavailable("down")
        assert await manifest(kit) == (old, Outcome.STALE)
    async with pull_kit(tmp_path, registry=registry, upstream=NEVER) as kit:
        assert await manifest(kit) == (old, Outcome.STALE)


@pytest.mark.row("HC6-withdrawn-access")
async def test_old_digest_with_revoked_access_does_not_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = MemoryRegistry()
    old, _ = await moved_on(tmp_path, registry, monkeypatch)
    async with pull_kit(tmp_path, registry=registry, upstream=SETTINGS) as kit:
        other = kit.registry.add_image(OTHER.path, TAG.name, b"old")
        assert (await manifest(kit, repository=OTHER))[0] == other
        await kit.store.index.revoke_access(REPO, old, "manifest")
        registry.failure = UpstreamUnavailable("down")
        with pytest.raises(UpstreamUnavailable):
            await manifest(kit)
        assert await manifest(kit, repository=OTHER) == (other, Outcome.HIT)


@pytest.mark.row("U13-moving-tag")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "uncached"])
async def test_tag_that_moves_between_head_and_get_is_resolved_by_a_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    async with pull_kit(tmp_path, upstream=SETTINGS) as kit:
        if is_cached:
            move(kit, b"old")
            await manifest(kit)
        gone = ManifestHead(Digest.of(b"gone"), OCI_MANIFEST, 4)

        async def name_the_earlier_one(*arguments: object) -> ManifestHead:
            return gone

        monkeypatch.setattr(kit.registry, "head_manifest", name_the_earlier_one)
        new = move(kit)
        kit.registry.calls.clear()
        for _ in range(2):
            assert (await manifest(kit))[0] == new
        assert kit.registry.calls["get_manifest"] == 2, "by the gone digest, then by the tag"
        kit.clock[0] += 101
        kit.registry.tags.clear()
        with pytest.raises(ManifestUnknown):
            await manifest(kit)
