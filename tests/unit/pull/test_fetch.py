"""The fetch loop: broken transfers, unexpected responses, wrong bytes, and other processes.

The registry is in memory, and the ingest file is real.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.observability.events import DigestMismatched, Kind, Resumed
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    DigestMismatch,
    ManifestInvalid,
    MirrorError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.pull.requests import ContentRequest, ContentSource
from mirror.pull.running_fetches import RunningFetches
from mirror.single_flight import SingleFlight
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.records import AccessRecord
from tests.unit.pull.fetch_kit import BROKEN, DATA, DIGEST, FetchEnv, another, change
from tests.unit.pull.kit import REPO, a_pull
from tests.unit.store.kit import opened, read

# --- without faults -----------------------------------------------------------------------------


async def test_content_is_fetched_verified_and_published(fetch_env: FetchEnv) -> None:
    assert await fetch_env.body() == DATA
    assert fetch_env.registry.offsets == [0]
    assert fetch_env.kit.layout.blob(DIGEST).read_bytes() == DATA
    assert len(fetch_env.granted) == 1
    assert fetch_env.ingest.released.is_set()


async def test_size_that_the_upstream_does_not_state_is_taken_from_the_access_record(
    fetch_env: FetchEnv,
) -> None:
    access_record = AccessRecord(
        digest=DIGEST,
        kind="blob",
        media_type="a/b",
        size=len(DATA),
        referrer=None,
        expires_at=None,
    )
    fetch_env.source = replace(fetch_env.source, access_record=access_record, avoid=("bad",))
    change(fetch_env, {"total": None})
    assert await fetch_env.body() == DATA
    assert fetch_env.ingest.size == len(DATA)
    assert fetch_env.registry.asked[0]["avoid"] == ("bad",)


# --- breaks -------------------------------------------------------------------------------------


async def test_broken_transfer_is_resumed_at_its_offset(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_000, BROKEN), (250_000, UpstreamTimeout("silence"))]
    assert await fetch_env.body() == DATA
    assert fetch_env.registry.offsets == [0, 100_000, 250_000]
    assert [named["validator"] for named in fetch_env.registry.asked] == [None, '"tag"', '"tag"']
    assert [named["total"] for named in fetch_env.registry.asked] == [None, len(DATA), len(DATA)]
    assert [(e.offset, e.is_restart) for e in fetch_env.happened(Resumed)] == [
        (100_000, False),
        (250_000, False),
    ]
    assert len(fetch_env.granted) == 1, "the first response is the proof"


async def test_full_response_to_a_resume_is_skipped_up_to_the_offset(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_001, BROKEN)]
    change(fetch_env, {}, {"start": 0})
    assert await fetch_env.body() == DATA
    assert fetch_env.registry.offsets == [0, 100_001]


async def test_full_response_that_ends_before_the_offset_is_retried(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_000, BROKEN)]
    change(fetch_env, {}, {"start": 0, "data": DATA[:50_000]})
    assert await fetch_env.body() == DATA
    assert fetch_env.registry.offsets == [0, 100_000, 100_000]


async def test_response_after_the_requested_offset_is_not_appended(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_000, BROKEN)]
    change(fetch_env, {}, {"start": 150_000})
    assert await fetch_env.body() == DATA
    assert [e.is_restart for e in fetch_env.happened(Resumed)] == [False, True]
    # the validator may not belong to the bytes that are here
    assert [named["validator"] for named in fetch_env.registry.asked] == [None, '"tag"', None]


async def test_fetch_fails_after_6_broken_transfers_without_progress(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_000, BROKEN)] + [(100_100 + n, BROKEN) for n in range(20)]
    with pytest.raises(UpstreamUnavailable, match="connection reset"):
        await fetch_env.body()
    assert len(fetch_env.happened(Resumed)) == 5
    assert not fetch_env.kit.layout.blob(DIGEST).exists()


async def test_endpoint_that_broke_without_progress_is_asked_last(
    fetch_env: FetchEnv,
) -> None:
    fetch_env.source = replace(fetch_env.source, avoid=("wrong",))
    fetch_env.registry.breaks = [(100_000, BROKEN), *((100_000 + n, BROKEN) for n in (1, 2, 3))]
    change(fetch_env, *({"endpoint": name} for name in ("one", "one", "two", "one", "two")))
    assert await fetch_env.body() == DATA
    assert [named["avoid"] for named in fetch_env.registry.asked] == [
        ("wrong",),
        ("wrong",),
        ("one", "wrong"),
        ("one", "two", "wrong"),
        ("two", "one", "wrong"),
    ]


async def test_endpoint_named_by_a_protocol_error_is_asked_last(fetch_env: FetchEnv) -> None:
    useless = UpstreamProtocolError("another range")
    useless.endpoint = "two"
    fetch_env.registry.breaks = [(1000, BROKEN), (1000, useless)]
    change(fetch_env, *({"endpoint": "one"} for _ in range(3)))
    assert await fetch_env.body() == DATA
    assert [named["avoid"] for named in fetch_env.registry.asked] == [(), ("one",), ("one", "two")]


async def test_progress_resets_the_count_of_failed_transfers(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(66_000 * n, BROKEN) for n in range(1, 7)]
    assert await fetch_env.body() == DATA
    assert len(fetch_env.happened(Resumed)) == 6


async def test_next_fetch_resumes_after_the_bytes_of_a_failed_one(fetch_env: FetchEnv) -> None:
    fetch_env.registry.breaks = [(100_000, BROKEN)] * 6
    # A failure drops what is not written.
    change(fetch_env, {"may_break": lambda: fetch_env.ingest.on_disk == 100_000})
    with pytest.raises(UpstreamUnavailable):
        await fetch_env.body()
    again = another(fetch_env)
    assert await again.body() == DATA
    assert fetch_env.registry.offsets[-1] == 100_000


@pytest.mark.parametrize("error", [BROKEN, BlobUnknown("404"), Denied("403")])
async def test_failure_before_the_first_response_is_final(
    fetch_env: FetchEnv, error: MirrorError
) -> None:
    """The registry has retried and failed over before."""
    fetch_env.registry.failure = error
    with pytest.raises(type(error), match=error.message):
        await fetch_env.body()
    assert len(fetch_env.registry.asked) == 1
    assert not fetch_env.granted
    assert not list(fetch_env.kit.layout.ingest(DIGEST).parent.iterdir()), (
        "nothing to resume is left"
    )


# --- wrong content ------------------------------------------------------------------------------


@pytest.mark.parametrize(("resumed", "where"), [(False, "upstream"), (True, "resume")])
async def test_wrong_bytes_are_reported_with_every_endpoint_that_sent_some(
    fetch_env: FetchEnv, resumed: bool, where: str
) -> None:
    wrong = {"data": DATA[:-1] + bytes([DATA[-1] ^ 1]), "endpoint": "http://bad"}
    if resumed:
        fetch_env.registry.breaks = [(100_000, BROKEN)]
    change(fetch_env, *([{}] if resumed else []), wrong)
    with pytest.raises(DigestMismatch):
        await fetch_env.body()
    assert [event.where for event in fetch_env.happened(DigestMismatched)] == [where]
    # Every endpoint that sent some of the bytes, the latest one last.
    assert fetch_env.suspects == [*(["memory"] if resumed else []), "http://bad"]
    assert not fetch_env.kit.layout.blob(DIGEST).exists()
    assert await another(fetch_env).body() == DATA
    assert fetch_env.registry.offsets[-1] == 0, "wrong bytes are not resumed"


async def test_more_bytes_than_announced_fail_the_fetch(fetch_env: FetchEnv) -> None:
    change(fetch_env, *({"data": DATA + b"more", "total": len(DATA)} for _ in range(9)))
    with pytest.raises(UpstreamProtocolError):
        await fetch_env.body()


@pytest.mark.row("HU5-huge-manifests")
@pytest.mark.parametrize("announced", [True, False])
async def test_manifest_above_4_mib_fails_the_fetch(fetch_env: FetchEnv, announced: bool) -> None:
    body = b" " * (MANIFEST_LIMIT + 1)
    digest = Digest.of(body)
    fetch_env.registry.manifests[REPO.path, digest] = body, "application/vnd.example.thing"
    fetch_env.ingest = Ingest(fetch_env.kit.ingest_context, digest, None)
    request = ContentRequest(REPO, digest, Kind.MANIFEST, a_pull(), accept=("a/b",))
    fetch_env.source = ContentSource(fetch_env.registry, request)
    change(fetch_env, {} if announced else {"total": None})
    with pytest.raises(ManifestInvalid):
        await fetch_env.body()
    assert fetch_env.ingest.position <= MANIFEST_LIMIT + 65_536
    assert (fetch_env.ingest.position == 0) is announced
    assert fetch_env.registry.asked[0]["accept"] == ("a/b",)
    assert not fetch_env.kit.layout.blob(digest).exists()


# --- other processes ----------------------------------------------------------------------------


async def test_fetch_of_another_process_is_followed_without_a_request(fetch_env: FetchEnv) -> None:
    other = Ingest(fetch_env.kit.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.LEADER
    await other.declare(len(DATA))
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(fetch_env.body())
        await other.feed(DATA)
        await other.finish()
        other.release()
    assert reading.result() == DATA
    assert not fetch_env.registry.asked
    assert not fetch_env.granted


@pytest.mark.row("C7-sigkill-of-the-fetcher")
async def test_fetch_of_a_process_that_ended_is_resumed_by_this_one(fetch_env: FetchEnv) -> None:
    other = Ingest(fetch_env.kit.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.LEADER
    await other.declare(len(DATA))
    follower = other.follow()
    assert follower is not None
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(fetch_env.body())
        await other.feed(DATA[:100_000])
        while await follower.wait(99_999) is None:
            pass
        other.release()
    follower.close()
    assert reading.result() == DATA
    assert fetch_env.registry.offsets == [100_000]
    assert len(fetch_env.granted) == 1


# --- cancellation -------------------------------------------------------------------------------


async def test_cancelled_fetch_fails_its_followers_and_releases_the_ingest(
    fetch_env: FetchEnv,
) -> None:
    fetch_env.registry.gate = asyncio.Event()
    follower = fetch_env.ingest.follow()
    assert follower is not None
    async with asyncio.TaskGroup() as group:
        fetching = group.create_task(fetch_env.fetch())
        assert await follower.wait(0, 1) is not None
        fetching.cancel()
    with pytest.raises(UpstreamUnavailable, match="given up"):
        await read(follower, 399_999)
    follower.close()
    assert fetch_env.ingest.released.is_set()
    fetch_env.registry.gate.set()
    assert await another(fetch_env).body() == DATA


async def test_fetch_that_a_drain_cancels_before_its_first_step_fails_its_followers(
    fetch_env: FetchEnv, tmp_path: Path
) -> None:
    async with opened(tmp_path / "store") as store, SingleFlight() as single_flight:
        fetches = RunningFetches(
            store, single_flight, fetch_env.kit.events.append, fetch_env, may_finish_abandoned=True
        )
        _, follower, _ = fetches.join_or_start(fetch_env.source)
        await single_flight.drain(0.0)
        async with asyncio.timeout(5):
            with pytest.raises(UpstreamUnavailable, match="given up"):
                await follower.wait(0)
        follower.close()
        assert not store.active_ingests
    assert not fetch_env.registry.asked


async def test_os_error_fails_the_fetch_as_upstream_unavailable(
    fetch_env: FetchEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(fetch_env.ingest, "try_lead", refuse)
    with pytest.raises(UpstreamUnavailable, match="Too many open files"):
        await fetch_env.body()
