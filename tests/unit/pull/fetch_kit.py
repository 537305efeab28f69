"""Shared parts of the tests of the fetch loop: a registry in memory, and a real ingest file."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mirror.oci.errors import MirrorError, UpstreamUnavailable
from mirror.oci.reference import Digest, Repository
from mirror.pull.connection_budget import ConnectionBudget
from mirror.pull.fetch import Fetch
from mirror.pull.parallel import ParallelReader
from mirror.pull.requests import ContentSource
from mirror.store.ingest import Ingest
from mirror.upstream.api import ContentStream
from tests.unit.pull.kit import REPO, MemoryRegistry, Stream
from tests.unit.store.kit import Kit, random_bytes, read

DATA = random_bytes(400_000, 51)
DIGEST = Digest.of(DATA)
BROKEN = UpstreamUnavailable("connection reset")


@dataclass
class Recording(MemoryRegistry):
    """A registry that records the requests for content."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    def open(self, *arguments: Any, **named: Any) -> Any:
        self.asked.append(named)
        return super().open(*arguments, **named)

    @property
    def offsets(self) -> list[int]:
        return [named["offset"] for named in self.asked]


@dataclass
class FetchEnv:
    """One fetch: what it is given, and what it reports."""

    kit: Kit
    registry: Recording
    ingest: Ingest
    source: ContentSource
    granted: list[ContentStream] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)

    refusals: list[tuple[Repository, MirrorError]] = field(default_factory=list)

    async def fetch(self, *others: ContentSource) -> None:
        def suspect(endpoints: dict[str, str]) -> None:
            assert set(endpoints.values()) == {REPO.upstream}
            self.suspects += endpoints

        emit = self.kit.events.append
        connections = ConnectionBudget(lambda endpoint: 1)
        make_reader = partial(ParallelReader, connections, self.kit.memory, emit)
        fetch = Fetch(self.ingest, self.source, emit, self, make_reader, suspect)
        for other in others:
            fetch.offer(other)
        await fetch.run()

    def on_granted(self, source: ContentSource, stream: ContentStream) -> None:
        self.granted.append(stream)

    async def on_refused(self, source: ContentSource, error: MirrorError) -> None:
        self.refusals.append((source.request.repository, error))

    async def body(self, *others: ContentSource) -> bytes:
        """Run the fetch, and return what a follower reads. Raises the error of the fetch."""
        follower = self.ingest.follow()
        assert follower is not None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fetch(*others))
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


def another(fetch_env: FetchEnv) -> FetchEnv:
    """Make a second fetch of the same content, as another process would start it."""
    ingest = Ingest(fetch_env.kit.ingest_context, fetch_env.ingest.digest, None)
    source = ContentSource(fetch_env.registry, fetch_env.source.request)
    return FetchEnv(fetch_env.kit, fetch_env.registry, ingest, source)


def change(fetch_env: FetchEnv, *changes: dict[str, Any]) -> None:
    """Change attributes of the next responses, one after the other."""
    left = list(changes)

    def apply(stream: Stream) -> None:
        for name, value in (left.pop(0) if left else {}).items():
            setattr(stream, name, value)

    fetch_env.registry.streams.append(apply)
