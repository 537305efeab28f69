"""The protocol of a registry, held against everything that keeps it: over HTTP, and in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import MirrorError, NotFound, UpstreamError, UpstreamProtocolError
from mirror.oci.reference import Digest, Repository, Tag
from mirror.upstream.api import ContentStream, Registry
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.pull.kit import MemoryRegistry
from tests.unit.upstream.kit import DATA, REPO, upstream_kit

LATEST = Tag("latest")
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
NOBODY = Digest.of(b"nobody has this")
EMPTY = Repository("docker.io", "library/empty")


class Bench(Protocol):
    """A registry, and what a test puts into it."""

    registry: Registry

    def blob(self, data: bytes) -> Digest: ...

    def manifest(self, body: bytes, *tags: str) -> Digest: ...

    def referrers(self, subject: Digest, body: bytes) -> None: ...

    def without_referrers(self) -> None: ...

    def breaks(self, digest: Digest, at: int) -> None:
        """The next transfer of this blob breaks."""

    def fails(self, error: type[MirrorError]) -> None:
        """Every question fails in this way."""


@dataclass
class OverHttp:
    """Over HTTP: the implementation that is served from."""

    registry: Registry
    fake: FakeRegistry

    def blob(self, data: bytes) -> Digest:
        return self.fake.add_blob(data)

    def manifest(self, body: bytes, *tags: str) -> Digest:
        for tag in tags:
            self.fake.add_manifest(body, tag=tag)
        return self.fake.add_manifest(body)

    def referrers(self, subject: Digest, body: bytes) -> None:
        self.fake.referring[str(subject)] = body

    def without_referrers(self) -> None:
        self.fake.referrers_api = False

    def breaks(self, digest: Digest, at: int) -> None:
        self.fake.fault(f"blobs/{digest}", Fault(end_at=at))

    def fails(self, error: type[MirrorError]) -> None:
        statuses: dict[type[MirrorError], int] = {
            errors.Unauthorized: 401,
            errors.Denied: 403,
            errors.UpstreamRateLimited: 429,
            errors.UpstreamUnavailable: 503,
            errors.UpstreamProtocolError: 410,
        }
        self.fake.fault("", Fault(status=statuses[error], times=None))


@dataclass
class InMemory:
    """In memory: the one that the tests of the pull room are built on."""

    registry: MemoryRegistry = field(default_factory=MemoryRegistry)

    def blob(self, data: bytes) -> Digest:
        return self.registry.add_blob(REPO.path, data)

    def manifest(self, body: bytes, *tags: str) -> Digest:
        digest = Digest.of(body)
        self.registry.manifests[REPO.path, digest] = body, OCI_MANIFEST
        self.registry.tags.update({(REPO.path, tag): digest for tag in tags})
        return digest

    def referrers(self, subject: Digest, body: bytes) -> None:
        self.registry.referring[subject] = body

    def without_referrers(self) -> None:
        self.registry.api = False

    def breaks(self, digest: Digest, at: int) -> None:
        self.registry.breaks.append((at, errors.UpstreamUnavailable("broke off")))

    def fails(self, error: type[MirrorError]) -> None:
        self.registry.failure = error("no")


@asynccontextmanager
async def over_http() -> AsyncIterator[Bench]:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        yield OverHttp(kit.registry, fake)


@asynccontextmanager
async def in_memory() -> AsyncIterator[Bench]:
    yield InMemory()


@pytest.fixture(params=[over_http, in_memory])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    async with request.param() as made:
        yield made


async def read(stream: ContentStream, parts: list[bytes] | None = None) -> bytes:
    """All that comes; what came before an error is in ``parts``."""
    parts = [] if parts is None else parts
    async for chunk in stream:
        parts.append(chunk)
    return b"".join(parts)


async def get(bench: Bench, digest: Digest, kind: Kind = Kind.BLOB, **how: Any) -> bytes:
    async with bench.registry.open(REPO, digest, kind, **how) as stream:
        return await read(stream)


# --- manifests ------------------------------------------------------------------------------------


async def test_a_head_names_digest_type_and_size(bench: Bench) -> None:
    digest = bench.manifest(MANIFEST, "latest")
    for reference in (LATEST, digest):
        found = await bench.registry.head_manifest(REPO, reference, ())
        assert (found.digest, found.media_type) == (digest, OCI_MANIFEST)
        assert found.size == len(MANIFEST)


async def test_a_manifest_by_tag_is_its_bytes(bench: Bench) -> None:
    digest = bench.manifest(MANIFEST, "latest")
    found = await bench.registry.get_manifest(REPO, LATEST, (OCI_MANIFEST,))
    assert (found.digest, found.media_type, found.body) == (digest, OCI_MANIFEST, MANIFEST)


async def test_a_tag_that_moves_is_another_digest(bench: Bench) -> None:
    bench.manifest(MANIFEST, "latest")
    await bench.registry.head_manifest(REPO, LATEST, ())
    other = bench.manifest(MANIFEST + b"\n", "latest")
    assert (await bench.registry.head_manifest(REPO, LATEST, ())).digest == other


async def test_a_manifest_by_digest_is_content(bench: Bench) -> None:
    digest = bench.manifest(MANIFEST)
    async with bench.registry.open(REPO, digest, Kind.MANIFEST, accept=(OCI_MANIFEST,)) as stream:
        assert (stream.start, stream.total) == (0, len(MANIFEST))
        assert stream.media_type == OCI_MANIFEST
        assert await read(stream) == MANIFEST


# --- blobs ----------------------------------------------------------------------------------------


async def test_a_blob_is_content(bench: Bench) -> None:
    digest = bench.blob(DATA)
    assert await bench.registry.head_blob(REPO, digest) == len(DATA)
    async with bench.registry.open(REPO, digest, Kind.BLOB) as stream:
        assert (stream.start, stream.total) == (0, len(DATA))
        assert stream.endpoint
        assert await read(stream) == DATA
    assert await get(bench, digest, total=len(DATA), avoid=["elsewhere"]) == DATA


async def test_an_empty_blob_is_content(bench: Bench) -> None:
    digest = bench.blob(b"")
    assert await bench.registry.head_blob(REPO, digest) == 0
    assert await get(bench, digest, total=0) == b""


@pytest.mark.parametrize("offset", [1, 65_536, len(DATA) - 1])
async def test_a_part_begins_where_it_says(bench: Bench, offset: int) -> None:
    digest = bench.blob(DATA)
    async with bench.registry.open(REPO, digest, Kind.BLOB, offset=offset) as stream:
        assert stream.start in (0, offset)
        assert stream.total == len(DATA)
        assert await read(stream) == DATA[stream.start :]


@pytest.mark.parametrize("at", [1, 50_000, len(DATA) - 1])
async def test_what_came_before_a_break_is_good_and_the_rest_can_be_had(
    bench: Bench, at: int
) -> None:
    digest = bench.blob(DATA)
    bench.breaks(digest, at)
    parts: list[bytes] = []
    async with bench.registry.open(REPO, digest, Kind.BLOB) as stream:
        with pytest.raises(errors.UpstreamUnavailable):
            await read(stream, parts)
        validator, total = stream.validator, stream.total
    data = b"".join(parts)
    assert data == DATA[:at]
    rest = await get(bench, digest, offset=at, validator=validator, total=total)
    assert data + rest == DATA


@pytest.mark.parametrize("how", [{"total": 7}, {"offset": len(DATA)}, {"offset": len(DATA) + 1}])
async def test_a_size_that_disagrees_is_an_error(bench: Bench, how: dict[str, int]) -> None:
    digest = bench.blob(DATA)
    with pytest.raises(UpstreamProtocolError):
        await get(bench, digest, **how)


async def test_a_reader_may_leave(bench: Bench) -> None:
    digest = bench.blob(DATA)
    async with bench.registry.open(REPO, digest, Kind.BLOB) as stream:
        async for _ in stream:
            break
    async with bench.registry.open(REPO, digest, Kind.BLOB):
        pass
    assert await get(bench, digest) == DATA


# --- lists ----------------------------------------------------------------------------------------


async def test_tags_come_sorted_in_pages_after_the_last_one(bench: Bench) -> None:
    bench.manifest(MANIFEST, "b", "d", "a", "c")
    for count, last, tags, more in (
        (None, None, "abcd", False),
        (4, None, "abcd", False),
        (10, None, "abcd", False),
        (3, None, "abc", True),
        (1, "a", "b", True),
        (2, "b", "cd", False),
        (2, "bb", "cd", False),
        (None, "d", "", False),
        (5, "z", "", False),
    ):
        page = await bench.registry.list_tags(REPO, count, last)
        assert (page.tags, page.more) == (tuple(tags), more), (count, last)


async def test_referrers_are_an_index(bench: Bench) -> None:
    subject = bench.manifest(MANIFEST)
    entry = {"mediaType": OCI_MANIFEST, "digest": str(NOBODY), "size": 5}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    body = json.dumps(document).encode()
    bench.referrers(subject, body)
    found = await bench.registry.referrers(REPO, subject, None)
    assert found is not None
    assert (found.digest, found.media_type, found.body) == (Digest.of(body), OCI_INDEX, body)
    nothing = await bench.registry.referrers(REPO, NOBODY, None)
    assert nothing is not None
    assert json.loads(nothing.body)["manifests"] == []


async def test_referrers_without_an_api(bench: Bench) -> None:
    bench.without_referrers()
    assert await bench.registry.referrers(REPO, NOBODY, None) is None


# --- what goes wrong ------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Bench], Awaitable[object]]] = {
    "head tag": lambda bench: bench.registry.head_manifest(REPO, LATEST, ()),
    "head manifest": lambda bench: bench.registry.head_manifest(REPO, NOBODY, ()),
    "get tag": lambda bench: bench.registry.get_manifest(REPO, LATEST, ()),
    "manifest": lambda bench: get(bench, NOBODY, Kind.MANIFEST),
    "head blob": lambda bench: bench.registry.head_blob(REPO, NOBODY),
    "blob": lambda bench: get(bench, NOBODY),
    "tags": lambda bench: bench.registry.list_tags(EMPTY, None, None),
    "referrers": lambda bench: bench.registry.referrers(REPO, NOBODY, None),
}


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("head tag", errors.ManifestUnknown),
        ("head manifest", errors.ManifestUnknown),
        ("get tag", errors.ManifestUnknown),
        ("manifest", errors.ManifestUnknown),
        ("head blob", errors.BlobUnknown),
        ("blob", errors.BlobUnknown),
        ("tags", errors.NameUnknown),
    ],
)
async def test_what_is_not_there(bench: Bench, question: str, error: type[NotFound]) -> None:
    with pytest.raises(error):
        await QUESTIONS[question](bench)


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "error",
    [
        errors.Unauthorized,
        errors.Denied,
        errors.UpstreamRateLimited,
        errors.UpstreamUnavailable,
        errors.UpstreamProtocolError,
    ],
)
async def test_a_failure_keeps_its_kind_and_is_never_a_404(
    bench: Bench, question: str, error: type[MirrorError]
) -> None:
    bench.manifest(MANIFEST, "latest")
    bench.fails(error)
    with pytest.raises(error) as caught:
        await QUESTIONS[question](bench)
    assert not isinstance(caught.value, NotFound)
    assert isinstance(caught.value, UpstreamError) is issubclass(error, UpstreamError)


async def test_closing_twice_is_closing(bench: Bench) -> None:
    await bench.registry.close()
    await bench.registry.close()
