"""Helpers of the tests of ``mirror.pull``: a registry in memory that counts, and the real store."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mirror.config.settings import Parallel, Settings, Storage, Upstream
from mirror.observability.events import Event, Kind, Outcome, RequestRecord
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import (
    BlobUnknown,
    ManifestUnknown,
    MirrorError,
    NameUnknown,
    UpstreamProtocolError,
)
from mirror.oci.reference import Digest, Reference, Repository, Tag
from mirror.pull.content import ContentService
from mirror.pull.requests import ContentRequest
from mirror.pull.service import PullService
from mirror.single_flight import SingleFlight
from mirror.store.reader import Reader
from mirror.store.store import Store
from mirror.upstream.api import (
    ContentStream,
    ManifestBody,
    ManifestHead,
    ReclaimConnections,
    keep_connections,
)
from tests.unit.store.kit import read

REPO = Repository("docker.io", "library/app")
OTHER = Repository("docker.io", "library/other")
TAG = Tag("1.0")


@dataclass
class Stream:
    """A response body in memory. A test may break it at an offset."""

    data: bytes
    start: int
    total: int | None
    media_type: str = "application/x"
    break_at: int | None = None
    error: MirrorError | None = None
    gate: asyncio.Event | None = None
    before: asyncio.Event | None = None
    """The first byte waits for this event."""
    may_break: Callable[[], bool] = lambda: True
    """The error waits until this is true."""
    validator: str | None = '"tag"'
    endpoint: str = "memory"
    piece: int = 65_536
    pace: float = 0.0
    """Seconds between two chunks."""
    unread: int = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        position = self.start
        if self.before is not None:
            await self.before.wait()
        while position < len(self.data):
            stop = min(position + self.piece, len(self.data))
            if self.break_at is not None and stop >= self.break_at:
                yield self.data[position : self.break_at]
                assert self.error is not None
                while not self.may_break():  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.001)
                raise self.error
            yield self.data[position:stop]
            position = stop
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.pace)

    def close(self) -> None:
        """Do nothing. The reader reads no further."""

    @asynccontextmanager
    async def open_range(self, start: int, stop: int) -> AsyncIterator[Stream]:
        """Yield a part of the body, which nothing breaks."""
        data, pace = self.data[:stop], self.pace
        yield Stream(data, start, self.total, gate=self.gate, piece=self.piece, pace=pace)


@dataclass
class MemoryRegistry:
    """A registry in memory (see :class:`mirror.upstream.api.Registry`)."""

    blobs: dict[tuple[str, Digest], bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, Digest], tuple[bytes, str]] = field(default_factory=dict)
    tags: dict[tuple[str, str], Digest] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    failure: MirrorError | None = None
    breaks: list[tuple[int, MirrorError]] = field(default_factory=list)
    streams: list[Callable[[Stream], None]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    part_gate: asyncio.Event | None = None
    """The first byte of a part waits for this event."""
    part_failure: MirrorError | None = None
    """The error of each request for a part."""
    refused_validator: MirrorError | None = None
    """The error of each request for a part with a validator."""
    referring: dict[Digest, bytes] = field(default_factory=dict)
    api: bool = True
    idle: float = 30.0
    min_rate: int = 1024
    parallel: Parallel = field(default_factory=Parallel)

    # --- content, for the tests---------------------------------------------------------------

    def add_blob(self, path: str, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.blobs[path, digest] = data
        return digest

    def add_manifest(
        self, path: str, document: dict[str, object], tag: str | None = None
    ) -> Digest:
        body = json.dumps(document).encode()
        digest = Digest.of(body)
        media_type = document.get("mediaType", OCI_MANIFEST)
        assert isinstance(media_type, str)
        self.manifests[path, digest] = body, media_type
        if tag is not None:
            self.tags[path, tag] = digest
        return digest

    def add_image(self, path: str, tag: str | None, *layers: bytes) -> Digest:
        config = self.add_blob(path, json.dumps({"layers": len(layers), "tag": tag}).encode())
        document: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._descriptor(path, config, "application/vnd.oci.image.config.v1+json"),
            "layers": [
                self._descriptor(
                    path,
                    self.add_blob(path, layer),
                    "application/vnd.oci.image.layer.v1.tar",
                )
                for layer in layers
            ],
        }
        return self.add_manifest(path, document, tag)

    def add_index(self, path: str, tag: str | None, *children: Digest) -> Digest:
        document: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                {
                    "mediaType": OCI_MANIFEST,
                    "digest": str(child),
                    "size": len(self.manifests[path, child][0]),
                }
                for child in children
            ],
        }
        return self.add_manifest(path, document, tag)

    def _descriptor(self, path: str, digest: Digest, media_type: str) -> dict[str, object]:
        size = len(self.blobs[path, digest])
        return {"mediaType": media_type, "digest": str(digest), "size": size}

    # --- requests of the mirror ---------------------------------------------------------------

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        if self.failure is not None:
            raise self.failure

    async def head_manifest(
        self, repository: Repository, reference: Reference, accept: Sequence[str]
    ) -> ManifestHead:
        await asyncio.sleep(0)
        self._call("head_manifest")
        digest = (
            self.tags.get((repository.path, reference.name))
            if isinstance(reference, Tag)
            else reference
        )
        if digest is None or (repository.path, digest) not in self.manifests:
            raise ManifestUnknown("no such manifest")
        body, media_type = self.manifests[repository.path, digest]
        return ManifestHead(digest, media_type, len(body))

    async def get_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: Sequence[str],
        ruled_out: Mapping[str, MirrorError] | None = None,
    ) -> ManifestBody:
        self._call("get_manifest")
        digest = (
            self.tags.get((repository.path, reference.name))
            if isinstance(reference, Tag)
            else reference
        )
        if digest is None or (repository.path, digest) not in self.manifests:
            raise ManifestUnknown("no such manifest")
        body, media_type = self.manifests[repository.path, digest]
        return ManifestBody(digest, media_type, body)

    async def head_blob(self, repository: Repository, digest: Digest) -> int | None:
        await asyncio.sleep(0)
        self._call("head_blob")
        data = self.blobs.get((repository.path, digest))
        if data is None:
            raise BlobUnknown("no such blob")
        return len(data)

    @asynccontextmanager
    async def open(
        self,
        repository: Repository,
        digest: Digest,
        kind: Kind,
        *,
        accept: Sequence[str] = (),
        offset: int = 0,
        stop: int | None = None,
        validator: str | None = None,
        total: int | None = None,
        avoid: Collection[str] = (),
        ruled_out: Mapping[str, MirrorError] | None = None,
        reclaim: ReclaimConnections = keep_connections,
    ) -> AsyncIterator[ContentStream]:
        await asyncio.sleep(0)
        self._call(f"get_{kind.value}")
        if kind is Kind.MANIFEST:
            found = self.manifests.get((repository.path, digest))
            if found is None:
                raise ManifestUnknown("no such manifest")
            data, media_type = found
        else:
            data, media_type = self.blobs.get((repository.path, digest), b""), "application/x"
            if (repository.path, digest) not in self.blobs:
                raise BlobUnknown("no such blob")
        if offset and offset >= len(data):
            raise UpstreamProtocolError("fewer bytes than are asked for")
        if total not in (None, len(data)):
            raise UpstreamProtocolError("another size")
        stream = Stream(data[:stop], offset, len(data), media_type, gate=self.gate)
        if stop is not None:
            self._call("get_part")
            stream.gate, stream.before = None, self.part_gate
            error = self.part_failure or (self.refused_validator if validator else None)
            if error is not None:
                raise error
        if self.breaks:
            stream.break_at, stream.error = self.breaks.pop(0)
        for change in self.streams:
            change(stream)
        yield stream

    async def list_tags(self, repository: Repository) -> str:
        self._call("list_tags")
        names = sorted(tag for path, tag in self.tags if path == repository.path)
        if not names:
            raise NameUnknown("no such repository")
        return "\n".join(names)

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str | None
    ) -> ManifestBody | None:
        self._call("referrers")
        if not self.api:
            return None
        body = self.referring.get(
            digest, b'{"schemaVersion":2,"mediaType":"' + OCI_INDEX.encode() + b'","manifests":[]}'
        )
        return ManifestBody(Digest.of(body), OCI_INDEX, body)


@dataclass
class PullKit:
    """A pull service over a real store and a registry in memory."""

    registry: MemoryRegistry
    store: Store
    content: ContentService
    service: PullService
    single_flight: SingleFlight
    events: list[Event]
    clock: list[float]


@asynccontextmanager
async def pull_kit(
    root: Path,
    *,
    registry: MemoryRegistry | None = None,
    upstream: Upstream | None = None,
    storage: Storage | None = None,
    clock: list[float] | None = None,
    abandoned: Literal["finish", "cancel"] = "finish",
    other: MemoryRegistry | None = None,
) -> AsyncIterator[PullKit]:
    """Open the layers below ``mirror.web``. ``other`` is the registry of ``other.io``."""
    registry = registry or MemoryRegistry()
    upstream = upstream or Upstream(endpoints=("http://memory",))
    settings = Settings(
        data_dir=str(root),
        storage=storage or Storage(),
        abandoned=abandoned,
        default_upstream="docker.io",
        upstreams={"docker.io": upstream, "other.io": upstream},
    )
    events: list[Event] = []
    times = clock if clock is not None else [1_800_000_000.0]
    store = await Store.open(str(root), settings.storage, events.append, lambda: times[0])
    try:
        async with SingleFlight() as single_flight:
            content = ContentService(
                settings,
                store,
                {"docker.io": registry, "other.io": other or registry},
                single_flight,
                events.append,
                lambda: times[0],
            )
            service = PullService(content)
            yield PullKit(registry, store, content, service, single_flight, events, times)
            await single_flight.drain(5.0)
    finally:
        await store.close()


def a_pull() -> RequestRecord:
    """Make the record of a client's request."""
    return RequestRecord("test", "GET", "/")


def a_request(
    digest: Digest, kind: Kind = Kind.BLOB, repository: Repository = REPO
) -> ContentRequest:
    """Make a request for content, with a record of its own."""
    return ContentRequest(repository, digest, kind, a_pull())


def upstream(**changes: object) -> Upstream:
    """Make the settings of an upstream in memory."""
    return Upstream.model_validate({"endpoints": ("http://memory",), **changes})


async def manifest(
    kit: PullKit, reference: Reference = TAG, repository: Repository = REPO, head: bool = False
) -> tuple[Digest, Outcome]:
    """Request a manifest. Returns its digest and the outcome."""
    pull = a_pull()
    result = await kit.service.manifest(repository, reference, (), pull, is_head=head)
    return result.digest, pull.outcome


async def blob(
    kit: PullKit, digest: Digest, repository: Repository = REPO
) -> tuple[bytes, Outcome]:
    """Request a blob. Returns its bytes and the outcome."""
    pull = a_pull()
    result = await kit.service.blob(repository, digest, pull, is_head=False)
    return await read_source(result.content), pull.outcome


async def read_source(source: Reader | bytes | None) -> bytes:
    """Return the bytes of a blob, and close its reader."""
    assert source is not None
    if isinstance(source, bytes):
        return source
    with closing(source):
        return await read(source)


class Cancelled(Awaitable[bool]):
    """Await ``work`` and cancel it at its ``number``-th wait. True if it got that far."""

    def __init__(self, work: Coroutine[Any, Any, object], number: int) -> None:
        self._work = work
        self._number = number

    def __await__(self) -> Generator[Any, None, bool]:
        waits = 0
        try:
            while True:
                waiting = self._work.send(None)
                if waits == self._number:
                    break
                waits += 1
                yield waiting
        except StopIteration:
            return False
        try:
            waiting = self._work.throw(asyncio.CancelledError())
            while True:
                yield waiting
                waiting = self._work.send(None)
        except (StopIteration, asyncio.CancelledError):
            return True
