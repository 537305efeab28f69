"""One fetch with several sources: each is asked in turn, and each client gets its own error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest

from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    MirrorError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull import fetch
from mirror.pull.fetch import Fetch
from mirror.pull.requests import ContentSource
from mirror.store.ingest import Ingest
from mirror.store.records import AccessRecord
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import (
    OTHER,
    REPO,
    TAG,
    MemoryRegistry,
    PullKit,
    a_request,
    blob,
    manifest,
    pull_kit,
)
from tests.unit.store.kit import random_bytes

DATA = random_bytes(400_000, 57)
DIGEST = Digest.of(DATA)
THEIRS = Repository("other.io", "their/app")
DOWN = UpstreamUnavailable("down")


@dataclass
class Slow(MemoryRegistry):
    """A registry that sends no content before ``let`` is set, and records the requested offsets."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    let: asyncio.Event = field(default_factory=asyncio.Event)
    offsets: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, *arguments: Any, **named: Any) -> AsyncIterator[ContentStream]:
        self.offsets.append(named["offset"])
        self.asked.set()
        await self.let.wait()
        async with super().open(*arguments, **named) as stream:
            yield stream


async def outcome(kit: PullKit, repository: Repository) -> tuple[bytes, Outcome] | MirrorError:
    """Request the blob through ``repository``. Returns the error instead of raising it."""
    try:
        return await blob(kit, DIGEST, repository)
    except MirrorError as error:
        return error


async def both(kit: PullKit, ours: Slow) -> tuple[Any, Any]:
    """Run two clients, of whom the second joins the fetch of the first. Returns their outcomes."""
    async with asyncio.TaskGroup() as group:
        first, second = await joined(kit, ours, group)
        ours.let.set()
    return first.result(), second.result()


async def joined(
    kit: PullKit, ours: Slow, group: asyncio.TaskGroup
) -> tuple[asyncio.Task[Any], asyncio.Task[Any]]:
    """Start two clients that follow one fetch, which waits for our upstream."""
    first = group.create_task(outcome(kit, REPO))
    await ours.asked.wait()
    second = group.create_task(outcome(kit, THEIRS))
    while not any(len(g.followers) == 2 for g in kit.store.active_ingests.values()):  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.001)
    return first, second


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses take no time."""
    monkeypatch.setattr("mirror.pull.attempts.random", SimpleNamespace(uniform=lambda *_: 0.0))


@pytest.mark.row("U1-reset-at-a-byte")
async def test_fetch_whose_source_is_given_up_resumes_from_the_followers_source(
    tmp_path: Path,
) -> None:
    ours, theirs = Slow(), Slow()
    theirs.let.set()
    ours.add_blob(REPO.path, DATA)
    theirs.add_blob(THEIRS.path, DATA)
    ours.breaks = [(150_000, DOWN)] * 20
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        first, second = await both(kit, ours)
        assert first == (DATA, Outcome.MISS)
        assert second == (DATA, Outcome.JOIN)
        assert theirs.offsets == [150_000]
        await kit.store.idle()
        assert await blob(kit, DIGEST, THEIRS) == (DATA, Outcome.HIT)
        assert await blob(kit, DIGEST) == (DATA, Outcome.HIT)


@pytest.mark.row("U9-rate-limits")
async def test_repository_of_the_same_upstream_takes_over_while_another_one_pauses(
    tmp_path: Path,
) -> None:
    ours = MemoryRegistry()
    paused = UpstreamRateLimited("a pause", retry_after=20.0)
    paused.next_request_in, paused.is_wait = 20.0, True
    ours.breaks = [(150_000, DOWN), *[(150_000, paused)] * 20]
    for path in (REPO.path, OTHER.path):
        ours.add_blob(path, DATA)
    open_ = ours.open
    asked, is_paused = [], asyncio.Event()

    def open_and_record(repository: Repository, *arguments: Any, **named: Any) -> Any:
        asked.append((repository, named["offset"]))
        if len(asked) == 2:
            is_paused.set()
        if repository == OTHER:
            ours.breaks.clear()
        return open_(repository, *arguments, **named)

    async with pull_kit(tmp_path, registry=ours) as kit, asyncio.timeout(10):
        with patch.object(ours, "open", open_and_record):
            async with asyncio.TaskGroup() as group:
                first = group.create_task(outcome(kit, REPO))
                await is_paused.wait()
                assert await outcome(kit, OTHER) == (DATA, Outcome.JOIN)
        assert first.result() == (DATA, Outcome.MISS)
    assert asked == [(REPO, 0), (REPO, 150_000), (OTHER, 150_000)]


@pytest.mark.row("U11-connect-faults")
@pytest.mark.parametrize("failure", [DOWN, UpstreamRateLimited("later", retry_after=9.0)])
async def test_upstream_that_is_down_fails_only_its_own_clients(
    tmp_path: Path, failure: MirrorError
) -> None:
    ours, theirs = Slow(), MemoryRegistry()
    theirs.add_blob(THEIRS.path, DATA)
    ours.failure = failure
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        first, second = await both(kit, ours)
        assert first is failure
        assert second == (DATA, Outcome.JOIN)
        assert theirs.calls == {"get_blob": 1}


@pytest.mark.row("HC5-content-of-another-repository")
@pytest.mark.parametrize("failure", [BlobUnknown("no such blob"), Denied("not for us")])
async def test_refusal_revokes_access_of_one_repository_only(
    tmp_path: Path, failure: MirrorError
) -> None:
    ours, theirs = Slow(), MemoryRegistry()
    theirs.add_blob(THEIRS.path, DATA)
    ours.failure = failure
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        first, second = await both(kit, ours)
        assert isinstance(first, type(failure))
        assert second == (DATA, Outcome.JOIN)
        assert await kit.store.index.access_record(THEIRS, DIGEST, "blob")
        assert await kit.store.index.access_record(REPO, DIGEST, "blob") is None


@pytest.mark.row("U15-negative-answers")
async def test_each_client_gets_the_error_of_its_own_upstream(tmp_path: Path) -> None:
    ours, theirs = Slow(), MemoryRegistry()
    ours.failure = DOWN
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        first, second = await both(kit, ours)
        assert first is DOWN, "another upstream's 404 is not returned"
        assert isinstance(second, BlobUnknown)
        again = await outcome(kit, REPO)
        assert again is DOWN


@pytest.mark.row("U11-connect-faults")
async def test_hung_upstream_is_preempted_while_another_one_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PREEMPT_AFTER_S", 0.05)
    ours, theirs = Slow(), MemoryRegistry()
    theirs.add_blob(THEIRS.path, DATA)
    ours.add_blob(REPO.path, DATA)
    async with asyncio.timeout(30), pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(outcome(kit, REPO))
            await ours.asked.wait()
            assert await outcome(kit, THEIRS) == (DATA, Outcome.JOIN)
        # a HEAD to its own upstream, which does not hang, is its proof
        assert first.result() == (DATA, Outcome.MISS)
        assert ours.calls["head_blob"] == 1


async def test_upstream_that_has_responded_is_not_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PREEMPT_AFTER_S", 0.02)
    ours, theirs = Slow(gate=asyncio.Event()), MemoryRegistry()
    for registry, path in ((ours, REPO.path), (theirs, THEIRS.path)):
        registry.add_blob(path, DATA)
    ours.let.set()
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(outcome(kit, REPO))
            await ours.asked.wait()
            second = group.create_task(outcome(kit, THEIRS))
            await asyncio.sleep(0.2)
            assert ours.gate
            ours.gate.set()
        assert first.result() == (DATA, Outcome.MISS)
        assert second.result() == (DATA, Outcome.JOIN)
        assert (ours.calls["get_blob"], theirs.calls["get_blob"]) == (1, 0)
        assert theirs.calls["head_blob"] == 1, "its own proof"


@pytest.mark.row("C7-sigkill-of-the-fetcher")
async def test_failure_of_another_process_leads_to_a_request_to_our_upstream(
    tmp_path: Path,
) -> None:
    ours = MemoryRegistry()
    ours.add_blob(REPO.path, DATA)
    async with pull_kit(tmp_path, registry=ours) as kit:
        other = Ingest(kit.store._ingest_context, DIGEST, None)
        await other.try_lead()
        await other.declare(len(DATA))
        async with asyncio.TaskGroup() as group:
            ask = group.create_task(outcome(kit, REPO))
            await other.feed(DATA[:100_000])
            while not any(g.head for g in kit.store.active_ingests.values()):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            await other.fail(UpstreamTimeout("silence, at another upstream"))
            other.release()
        assert ask.result() == (DATA, Outcome.MISS)
        assert ours.calls["get_blob"] == 1


def take(sources: Fetch) -> ContentSource | None:
    attempts = sources.next_source()
    return attempts.source if attempts is not None else None


async def test_only_a_source_on_another_upstream_takes_the_place_of_a_slow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "PREEMPT_AFTER_S", 0.05)
    registry, loop = MemoryRegistry(), asyncio.get_running_loop()
    ours, same, theirs, more = (
        ContentSource(registry, a_request(DIGEST, repository=repository))
        for repository in (REPO, OTHER, THEIRS, Repository("third.io", "app"))
    )
    sources = Fetch(Mock(), ours, Mock(), Mock(), Mock(), Mock())
    assert take(sources) is ours
    async with sources._preemptible():
        for source in (ours, same, same):
            sources.offer(source)
        await asyncio.sleep(0.1)
    assert sources.alternative_at(1.0) is None

    async def is_slow(*offered: ContentSource) -> None:
        async with sources._preemptible():
            for source in offered:
                sources.offer(source)
            await asyncio.Event().wait()

    begun = loop.time()
    with pytest.raises(fetch.Preempted):
        await is_slow(theirs, more)
    assert loop.time() - begun >= 0.04
    assert sources.alternative_at(1.0) == 1.0
    with pytest.raises(fetch.Preempted):
        await is_slow()  # They were queued before.
    assert [take(sources) for _ in range(4)] == [same, theirs, more, None]
    sources.offer(same)
    assert take(sources) is None, "it was asked before"


# --- proofs of access ---------------------------------------------------------------------------


@pytest.mark.row("HC5-content-of-another-repository")
async def test_blob_that_looks_like_a_manifest_proves_no_access_to_its_parts(
    tmp_path: Path,
) -> None:
    secret = random_bytes(5_000)
    private, evil = Repository("docker.io", "library/private"), Repository("docker.io", "evil/app")
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(private.path, TAG.name, secret)
        await manifest(kit, TAG, private)
        await blob(kit, Digest.of(secret), private)
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "a/b", "digest": str(Digest.of(secret)), "size": len(secret)},
            "layers": [],
        }
        lure = kit.registry.add_blob(evil.path, json.dumps(document).encode())
        asked, told = await asyncio.gather(
            blob(kit, lure, evil), manifest(kit, lure, evil), return_exceptions=True
        )
        assert not isinstance(asked, BaseException)
        assert isinstance(told, ManifestUnknown)
        with pytest.raises(BlobUnknown):
            await blob(kit, Digest.of(secret), evil)


@pytest.mark.row("HC5-content-of-another-repository")
@pytest.mark.parametrize(
    ("place", "more"), [("blobs", {}), ("layers", {"urls": ["https://layers.example/1"]})]
)
async def test_part_that_the_registry_does_not_check_gives_no_access(
    tmp_path: Path, place: str, more: dict[str, Any]
) -> None:
    """Registries ignore ``blobs`` in an image, and need not have a layer with ``urls``."""
    secret = random_bytes(5_000)
    private, evil = Repository("docker.io", "library/private"), Repository("docker.io", "evil/app")
    part = {"mediaType": "a/b", "digest": str(Digest.of(secret)), "size": len(secret), **more}
    lure: dict[str, object] = {"mediaType": OCI_MANIFEST, "layers": [], place: [part]}
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(private.path, TAG.name, secret)
        await blob(kit, Digest.of(secret), private)
        await kit.store.idle()
        for tag in ("one", "two"):
            kit.registry.add_manifest(evil.path, {**lure, "annotations": {"tag": tag}}, tag)
            await manifest(kit, Tag(tag), evil)
            with pytest.raises(BlobUnknown):
                await blob(kit, Digest.of(secret), evil)
        kit.registry.add_blob(evil.path, secret)
        kit.clock[0] += 60
        assert await blob(kit, Digest.of(secret), evil) == (secret, Outcome.REVALIDATED)
        assert await blob(kit, Digest.of(secret), evil) == (secret, Outcome.HIT)


@pytest.mark.row("HC6-withdrawn-access")
async def test_layer_requested_as_a_manifest_stays_available_as_a_blob(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_image(REPO.path, TAG.name, DATA)
        await manifest(kit)
        for asks in ((blob, manifest), (manifest, blob)):
            await kit.store.idle()
            kit.store.layout.blob(DIGEST).unlink(missing_ok=True)
            kit.clock[0] += 3600
            got = dict(
                zip(
                    asks,
                    await asyncio.gather(
                        *(ask(kit, DIGEST) for ask in asks), return_exceptions=True
                    ),
                    strict=True,
                )
            )
            assert isinstance(got[manifest], ManifestUnknown)
            assert not isinstance(got[blob], BaseException)
            assert got[blob][0] == DATA
        kit.clock[0] += 10 * 86400
        assert (await blob(kit, DIGEST))[0] == DATA


async def test_refusal_by_the_own_upstream_ends_the_wait_at_once_and_is_recorded(
    tmp_path: Path,
) -> None:
    ours, theirs = Slow(), Slow()
    ours.failure = Denied("not for us")
    theirs.add_blob(THEIRS.path, DATA)
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        known = AccessRecord(
            digest=DIGEST,
            kind="blob",
            media_type="a/b",
            size=len(DATA),
            referrer=None,
            expires_at=None,
        )
        await kit.store.index.put_access_records(REPO, [known])
        async with asyncio.TaskGroup() as group:
            first, second = await joined(kit, ours, group)
            ours.let.set()
            assert isinstance(await first, Denied), "while the other one still hangs"
            theirs.let.set()
        assert second.result() == (DATA, Outcome.JOIN)
        assert await kit.store.index.access_record(REPO, DIGEST, "blob") is None


async def test_preempted_source_is_asked_again_after_the_others_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PREEMPT_AFTER_S", 0.05)
    ours, theirs = Slow(), Slow()
    theirs.let.set()
    ours.add_blob(REPO.path, DATA)
    async with asyncio.timeout(30), pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(outcome(kit, REPO))
            await ours.asked.wait()
            assert isinstance(await outcome(kit, THEIRS), BlobUnknown)
            ours.let.set()
        assert first.result() == (DATA, Outcome.MISS)


@pytest.mark.row("U6-wrong-bit")
async def test_wrong_bytes_of_one_upstream_do_not_prevent_a_fetch_from_another(
    tmp_path: Path,
) -> None:
    ours, theirs = Slow(), MemoryRegistry()
    ours.blobs[REPO.path, DIGEST] = b"wrong"
    ours.add_blob(THEIRS.path, DATA)
    theirs.add_blob(THEIRS.path, DATA)
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        _, second = await both(kit, ours)
        assert isinstance(second, tuple)
        assert second[0] == DATA
        assert theirs.calls["get_blob"] == 1


async def test_size_announced_without_any_bytes_does_not_bind_the_next_source(
    tmp_path: Path,
) -> None:
    ours, theirs = Slow(), MemoryRegistry()
    ours.blobs[REPO.path, DIGEST] = b"short"
    ours.breaks = [(0, DOWN)] * 20
    theirs.add_blob(THEIRS.path, DATA)
    async with pull_kit(tmp_path, registry=ours, other=theirs) as kit:
        _, second = await both(kit, ours)
        assert second == (DATA, Outcome.JOIN)


async def test_response_to_a_resume_proves_access_before_its_first_byte(tmp_path: Path) -> None:
    async with pull_kit(tmp_path) as kit:
        kit.registry.add_blob(REPO.path, DATA)
        kit.registry.breaks = [(200_000, Denied("no more"))] * 2
        with pytest.raises(Denied):
            await blob(kit, DIGEST)
        await kit.store.idle()
        assert (await blob(kit, DIGEST))[0] == DATA
        assert not kit.registry.calls["head_blob"]


@pytest.mark.row("M1-many-workers")
async def test_proof_of_another_process_is_used_without_a_request(tmp_path: Path) -> None:
    rest = asyncio.Event()
    registry = Slow()
    registry.add_blob(REPO.path, DATA)
    registry.streams.append(lambda stream: setattr(stream, "before", rest))
    async with (
        asyncio.timeout(30),
        pull_kit(tmp_path, registry=registry) as kit,
        pull_kit(tmp_path, registry=registry) as other,
    ):
        async with asyncio.TaskGroup() as group:
            leads = group.create_task(outcome(kit, REPO))
            await registry.asked.wait()
            follows = group.create_task(outcome(other, REPO))
            while DIGEST not in other.store.active_ingests:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.001)
            registry.let.set()
            while await kit.store.index.access_record(REPO, DIGEST, "blob") is None:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            rest.set()
        assert leads.result() == follows.result() == (DATA, Outcome.MISS)
        assert registry.calls == {"get_blob": 1}
