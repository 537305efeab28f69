"""The fetch loop: one content brought to its end, through breaks, odd answers and other processes.

The registry is in memory and the growing file is real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirror.observability.events import DigestMismatched, Kind, Resumed
from mirror.oci.descriptor import MANIFEST_LIMIT
from mirror.oci.errors import (
    AllCircuitsOpen,
    BlobUnknown,
    Denied,
    DigestMismatch,
    ManifestInvalid,
    MirrorError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Repository
from mirror.pull.fetch import fetch
from mirror.pull.sources import Source, Sources
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.records import AccessRecord
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import REPO, MemoryRegistry, Stream
from tests.unit.store.kit import Kit, kit, random_bytes, read

DATA = random_bytes(400_000, 51)
DIGEST = Digest.of(DATA)
BROKEN = UpstreamUnavailable("connection reset")


@dataclass
class Recording(MemoryRegistry):
    """Knows how it was asked for content."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    def open(self, *arguments: Any, **named: Any) -> Any:
        self.asked.append(named)
        return super().open(*arguments, **named)

    @property
    def offsets(self) -> list[int]:
        return [named["offset"] for named in self.asked]


@dataclass
class Bench:
    """What one fetch needs, and what it reports."""

    kit: Kit
    registry: Recording
    ingest: Ingest
    source: Source
    answered: list[ContentStream] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)

    refusals: list[tuple[Repository, MirrorError]] = field(default_factory=list)

    async def fetch(self, *others: Source) -> None:
        sources = Sources(self.source)
        for other in others:
            sources.offer(other)

        def suspect(endpoint: str, upstream: str) -> None:
            assert upstream == REPO.upstream
            self.suspects.append(endpoint)

        await fetch(self.ingest, sources, self.kit.events.append, self, suspect)

    def on_granted(self, source: Source, stream: ContentStream) -> None:
        self.answered.append(stream)

    async def on_refused(self, source: Source, error: MirrorError) -> None:
        self.refusals.append((source.repository, error))

    async def body(self) -> bytes:
        """What a follower gets while it runs; raises what the fetch has met."""
        follower = self.ingest.follow()
        assert follower is not None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fetch())
                reading = group.create_task(read_or_error(follower))
            result = reading.result()
            if isinstance(result, MirrorError):
                raise result
            return result
        finally:
            follower.close()

    def happened(self, kind: type) -> list[Any]:
        return [event for event in self.kit.events if isinstance(event, kind)]


async def read_or_error(follower: Any) -> bytes | MirrorError:
    try:
        return await read(follower)
    except MirrorError as error:
        return error


def another(bench: Bench, **changes: Any) -> Bench:
    """A second fetch of the same content, as another process would begin it."""
    ingest = Ingest(bench.kit.ingest_context, bench.ingest.digest, None)
    source = Source(bench.registry, REPO, bench.ingest.digest, bench.source.kind, **changes)
    return Bench(bench.kit, bench.registry, ingest, source)


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A blob that is upstream, and pauses that take no time."""
    monkeypatch.setattr("mirror.pull.fetch.random", SimpleNamespace(uniform=lambda *_: 0.0))
    with kit(tmp_path) as parts:
        registry = Recording()
        registry.add_blob(REPO.path, DATA)
        source = Source(registry, REPO, DIGEST, Kind.BLOB)
        yield Bench(parts, registry, Ingest(parts.ingest_context, DIGEST, None), source)


def change(bench: Bench, *changes: dict[str, Any]) -> None:
    """Let the next answers differ, one after the other."""
    left = list(changes)

    def apply(stream: Stream) -> None:
        for name, value in (left.pop(0) if left else {}).items():
            setattr(stream, name, value)

    bench.registry.streams.append(apply)


# --- the usual way ------------------------------------------------------------------------------


async def test_content_is_fetched_verified_and_published(bench: Bench) -> None:
    assert await bench.body() == DATA
    assert bench.registry.offsets == [0]
    assert bench.kit.layout.blob(DIGEST).read_bytes() == DATA
    assert len(bench.answered) == 1
    assert bench.ingest.released.is_set()


async def test_a_size_the_upstream_does_not_give_is_the_manifests(bench: Bench) -> None:
    known = AccessRecord(DIGEST, "blob", "a/b", len(DATA), None, None)
    bench.source = Source(bench.registry, REPO, DIGEST, Kind.BLOB, known=known, avoid=("bad",))
    change(bench, {"total": None})
    assert await bench.body() == DATA
    assert bench.ingest.size == len(DATA)
    assert bench.registry.asked[0]["avoid"] == ("bad",)


# --- breaks -------------------------------------------------------------------------------------


async def test_a_break_is_resumed_where_it_was(bench: Bench) -> None:
    bench.registry.breaks = [(100_000, BROKEN), (250_000, UpstreamTimeout("silence"))]
    assert await bench.body() == DATA
    assert bench.registry.offsets == [0, 100_000, 250_000]
    assert [named["validator"] for named in bench.registry.asked] == [None, '"tag"', '"tag"']
    assert [named["total"] for named in bench.registry.asked] == [None, len(DATA), len(DATA)]
    assert [(e.offset, e.restarted) for e in bench.happened(Resumed)] == [
        (100_000, False),
        (250_000, False),
    ]
    assert len(bench.answered) == 1, "the first answer was proof enough"


async def test_a_server_that_cannot_resume_is_skipped_through(bench: Bench) -> None:
    bench.registry.breaks = [(100_001, BROKEN)]
    change(bench, {}, {"start": 0})
    assert await bench.body() == DATA
    assert bench.registry.offsets == [0, 100_001]


async def test_a_second_answer_shorter_than_the_first_break_is_a_break(bench: Bench) -> None:
    bench.registry.breaks = [(100_000, BROKEN)]
    change(bench, {}, {"start": 0, "data": DATA[:50_000]})
    assert await bench.body() == DATA
    assert bench.registry.offsets == [0, 100_000, 100_000]


async def test_an_answer_to_another_question_is_not_spliced(bench: Bench) -> None:
    bench.registry.breaks = [(100_000, BROKEN)]
    change(bench, {}, {"start": 150_000})
    assert await bench.body() == DATA
    assert [e.restarted for e in bench.happened(Resumed)] == [False, True]
    # what the validator stood for is in doubt
    assert [named["validator"] for named in bench.registry.asked] == [None, '"tag"', None]


async def test_breaks_without_progress_come_to_an_end(bench: Bench) -> None:
    bench.registry.breaks = [(100_000, BROKEN)] + [(100_100 + n, BROKEN) for n in range(20)]
    with pytest.raises(UpstreamUnavailable, match="connection reset"):
        await bench.body()
    assert len(bench.happened(Resumed)) == 5
    assert not bench.kit.layout.blob(DIGEST).exists()


async def test_after_a_break_without_progress_another_endpoint_is_asked_first(
    bench: Bench,
) -> None:
    bench.source = Source(bench.registry, REPO, DIGEST, Kind.BLOB, avoid=("wrong",))
    bench.registry.breaks = [(100_000, BROKEN), *((100_000 + n, BROKEN) for n in (1, 2, 3))]
    change(bench, *({"endpoint": name} for name in ("one", "one", "two", "one", "two")))
    assert await bench.body() == DATA
    assert [named["avoid"] for named in bench.registry.asked] == [
        ("wrong",),
        ("wrong",),
        ("one", "wrong"),
        ("one", "two", "wrong"),
        ("two", "one", "wrong"),
    ]


async def test_an_endpoint_whose_answer_was_no_use_is_asked_last(bench: Bench) -> None:
    useless = UpstreamProtocolError("another range")
    useless.endpoint = "two"
    bench.registry.breaks = [(1000, BROKEN), (1000, useless)]
    change(bench, *({"endpoint": "one"} for _ in range(3)))
    assert await bench.body() == DATA
    assert [named["avoid"] for named in bench.registry.asked] == [(), ("one",), ("one", "two")]


async def test_while_nobody_may_be_asked_no_attempt_is_lost(bench: Bench) -> None:
    waiting = AllCircuitsOpen("not asked again yet")
    bench.registry.breaks = [(1000, BROKEN), *((1000, waiting) for _ in range(20))]
    assert await bench.body() == DATA
    assert len(bench.happened(Resumed)) == 1
    assert bench.registry.asked[-1]["avoid"] == ("memory",)


async def test_progress_earns_new_attempts(bench: Bench) -> None:
    bench.registry.breaks = [(66_000 * n, BROKEN) for n in range(1, 7)]
    assert await bench.body() == DATA
    assert len(bench.happened(Resumed)) == 6


async def test_what_came_before_the_end_is_resumed_by_the_next_fetch(bench: Bench) -> None:
    bench.registry.breaks = [(100_000, BROKEN)] * 6
    with pytest.raises(UpstreamUnavailable):
        await bench.body()
    again = another(bench)
    assert await again.body() == DATA
    assert bench.registry.offsets[-1] == 100_000


@pytest.mark.parametrize("error", [BROKEN, BlobUnknown("404"), Denied("403")])
async def test_before_the_first_answer_a_failure_is_final(bench: Bench, error: MirrorError) -> None:
    """The registry has retried and failed over already."""
    bench.registry.failure = error
    with pytest.raises(type(error), match=error.message):
        await bench.body()
    assert len(bench.registry.asked) == 1
    assert not bench.answered
    assert not list(bench.kit.layout.ingest(DIGEST).parent.iterdir()), "nothing to resume is left"


# --- wrong content ------------------------------------------------------------------------------


@pytest.mark.parametrize(("resumed", "where"), [(False, "upstream"), (True, "resume")])
async def test_wrong_bytes_are_counted_and_their_endpoint_is_suspected(
    bench: Bench, resumed: bool, where: str
) -> None:
    wrong = {"data": DATA[:-1] + bytes([DATA[-1] ^ 1]), "endpoint": "http://bad"}
    if resumed:
        bench.registry.breaks = [(100_000, BROKEN)]
    change(bench, *([{}] if resumed else []), wrong)
    with pytest.raises(DigestMismatch):
        await bench.body()
    assert [event.where for event in bench.happened(DigestMismatched)] == [where]
    # Whoever had a part in it, and the latest is asked last.
    assert bench.suspects == [*(["memory"] if resumed else []), "http://bad"]
    assert not bench.kit.layout.blob(DIGEST).exists()
    assert await another(bench).body() == DATA
    assert bench.registry.offsets[-1] == 0, "of wrong bytes, none is resumed"


async def test_bytes_beyond_the_announced_length_are_refused(bench: Bench) -> None:
    change(bench, *({"data": DATA + b"more", "total": len(DATA)} for _ in range(9)))
    with pytest.raises(UpstreamProtocolError):
        await bench.body()


@pytest.mark.row("HU5-huge-manifests")
@pytest.mark.parametrize("announced", [True, False])
async def test_a_manifest_above_the_limit_is_given_up(bench: Bench, announced: bool) -> None:
    body = b" " * (MANIFEST_LIMIT + 1)
    digest = Digest.of(body)
    bench.registry.manifests[REPO.path, digest] = body, "application/vnd.example.thing"
    bench.ingest = Ingest(bench.kit.ingest_context, digest, None)
    bench.source = Source(bench.registry, REPO, digest, Kind.MANIFEST, accept=("a/b",))
    change(bench, {} if announced else {"total": None})
    with pytest.raises(ManifestInvalid):
        await bench.body()
    assert bench.ingest.position <= MANIFEST_LIMIT + 65_536
    assert (bench.ingest.position == 0) is announced
    assert bench.registry.asked[0]["accept"] == ("a/b",)
    assert not bench.kit.layout.blob(digest).exists()


# --- other processes ----------------------------------------------------------------------------


async def test_what_another_process_fetches_is_followed_and_not_asked_for(bench: Bench) -> None:
    other = Ingest(bench.kit.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.LEADER
    await other.declare(len(DATA))
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(bench.body())
        await other.feed(DATA)
        await other.finish()
        other.release()
    assert reading.result() == DATA
    assert not bench.registry.asked
    assert not bench.answered


@pytest.mark.row("C7-sigkill-of-the-fetcher")
async def test_where_another_process_ends_this_one_goes_on(bench: Bench) -> None:
    other = Ingest(bench.kit.ingest_context, DIGEST, None)
    assert await other.try_lead() is Role.LEADER
    await other.declare(len(DATA))
    follower = other.follow()
    assert follower is not None
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(bench.body())
        await other.feed(DATA[:100_000])
        while await follower.wait(99_999) is None:
            pass
        other.release()
    follower.close()
    assert reading.result() == DATA
    assert bench.registry.offsets == [100_000]
    assert len(bench.answered) == 1


# --- the end ------------------------------------------------------------------------------------


async def test_a_fetch_that_is_cancelled_lets_go_and_tells_its_followers(bench: Bench) -> None:
    bench.registry.gate = asyncio.Event()
    follower = bench.ingest.follow()
    assert follower is not None
    async with asyncio.TaskGroup() as group:
        fetching = group.create_task(bench.fetch())
        assert await follower.wait(0, 1) is not None
        fetching.cancel()
    with pytest.raises(UpstreamUnavailable, match="given up"):
        await read(follower, 399_999)
    follower.close()
    assert bench.ingest.released.is_set()
    bench.registry.gate.set()
    assert await another(bench).body() == DATA


async def test_an_error_of_the_system_is_an_upstream_that_cannot_be_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(bench.ingest, "try_lead", refuse)
    with pytest.raises(UpstreamUnavailable, match="Too many open files"):
        await bench.body()
