"""Initial requests that fail because of further connections of another fetch, and wrong ranges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirror.oci.errors import DigestMismatch, MirrorError, UpstreamRateLimited, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.fetch import Fetch
from mirror.pull.parallel import ParallelReader
from mirror.pull.requests import ContentSource
from mirror.store.ingest import Ingest
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import REPO, MemoryRegistry, a_request
from tests.unit.pull.test_parallel_cancelled import Callbacks
from tests.unit.store.kit import kit, random_bytes, read

DATA = random_bytes(300_000, 7)
DIGEST = Digest.of(DATA)
ENDPOINT = "memory"


@dataclass
class LimitedRegistry(MemoryRegistry):
    """An upstream that refuses initial requests while there are further connections to it."""

    error: MirrorError = field(default_factory=lambda: UpstreamRateLimited("429", retry_after=60.0))
    connections: ConnectionBudget = field(
        default_factory=lambda: ConnectionBudget(lambda endpoint: 1)
    )
    refused: int = 0
    is_limited: bool = True

    @asynccontextmanager
    async def open(self, *arguments: Any, **named: Any) -> AsyncIterator[ContentStream]:
        if self.is_limited:
            self.refused += 1
            named["reclaim"](ENDPOINT)
            raise self.error
        async with super().open(*arguments, **named) as stream:
            yield stream


async def run(registry: LimitedRegistry, path: Path) -> bytes:
    """Fetch, and return what a follower reads. Raises the error of the fetch."""
    registry.add_blob(REPO.path, DATA)
    with kit(path) as parts:
        ingest = Ingest(parts.ingest_context, DIGEST, None)
        make_reader = partial(
            ParallelReader, registry.connections, parts.memory, parts.events.append
        )
        fetch = Fetch(
            ingest,
            ContentSource(registry, a_request(DIGEST)),
            parts.events.append,
            Callbacks(),
            make_reader,
            lambda endpoints: None,
            registry.connections.reclaim,
        )
        follower = ingest.follow()
        assert follower
        try:
            async with asyncio.timeout(10):
                await fetch.run()
            return await read(follower)
        finally:
            follower.close()


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    "error",
    [UpstreamRateLimited("429", retry_after=60.0), UpstreamUnavailable("connection reset")],
    ids=["429", "reset"],
)
async def test_initial_request_that_fails_beside_further_connections_is_sent_again_after_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: MirrorError
) -> None:
    registry, pauses = LimitedRegistry(error=error), list[tuple[float, float]]()
    registry.connections.hold("another fetch", ENDPOINT, 3)

    def end_them(least: float, most: float) -> float:
        pauses.append((least, most))
        assert registry.connections.is_reclaimed(ENDPOINT)
        registry.is_limited = False
        return 0.0

    monkeypatch.setattr("mirror.pull.fetch.random", SimpleNamespace(uniform=end_them))
    assert await run(registry, tmp_path) == DATA
    assert (registry.refused, pauses) == (1, [(1.0, 2.0)])


async def test_initial_request_that_fails_without_further_connections_is_not_sent_again(
    tmp_path: Path,
) -> None:
    registry = LimitedRegistry()
    with pytest.raises(UpstreamRateLimited):
        await run(registry, tmp_path)
    assert registry.refused == 1


async def test_initial_request_that_always_fails_beside_further_connections_is_sent_4_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = LimitedRegistry()
    registry.connections.hold("another fetch", ENDPOINT, 3)
    monkeypatch.setattr("mirror.pull.fetch.random", SimpleNamespace(uniform=lambda *_: 0.0))
    with pytest.raises(UpstreamRateLimited):
        await run(registry, tmp_path)
    assert registry.refused == 4


async def test_endpoint_whose_ranges_may_have_been_wrong_gets_no_further_connection(
    tmp_path: Path,
) -> None:
    """For other blobs, too: otherwise each one of the image would be cut off once."""
    registry = LimitedRegistry(is_limited=False)
    with kit(tmp_path) as parts:
        reader = ParallelReader(
            registry.connections, parts.memory, parts.events.append, a_request(DIGEST).pull
        )
        reader.endpoints.add(ENDPOINT)
        wrong = Digest.of(b"other")
        registry.blobs[REPO.path, wrong] = DATA
        ingest = Ingest(parts.ingest_context, wrong, None)
        source = ContentSource(registry, a_request(wrong))
        fetch = Fetch(
            ingest, source, parts.events.append, Callbacks(), lambda pull: reader, lambda used: None
        )
        fetch._reader = reader
        assert registry.connections.may_add(ENDPOINT)
        follower = ingest.follow()
        assert follower
        await fetch.run()
        with pytest.raises(DigestMismatch):
            await read(follower)
        follower.close()
        assert not registry.connections.may_add(ENDPOINT)
