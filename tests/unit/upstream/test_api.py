"""Contract of ``mirror.upstream.api``, for each implementation: over HTTP, and in memory."""

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


class RegistryEnv(Protocol):
    """A registry, and methods that put content into it."""

    registry: Registry

    def blob(self, data: bytes) -> Digest: ...

    def manifest(self, body: bytes, *tags: str) -> Digest: ...

    def referrers(self, subject: Digest, body: bytes) -> None: ...

    def without_referrers(self) -> None: ...

    def breaks(self, digest: Digest, at: int) -> None:
        """Let the next transfer of this blob break after ``at`` bytes."""

    def fails(self, error: type[MirrorError]) -> None:
        """Let every request fail with this error."""


@dataclass
class OverHttp:
    """The implementation over HTTP, in front of a fake registry."""

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
    """The implementation in memory, which the tests of ``mirror.pull`` use."""

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
async def over_http() -> AsyncIterator[RegistryEnv]:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        yield OverHttp(kit.registry, fake)


@asynccontextmanager
async def in_memory() -> AsyncIterator[RegistryEnv]:
    yield InMemory()


@pytest.fixture(params=[over_http, in_memory])
async def env(request: pytest.FixtureRequest) -> AsyncIterator[RegistryEnv]:
    async with request.param() as opened:
        yield opened


async def read(stream: ContentStream, parts: list[bytes] | None = None) -> bytes:
    """Read a stream. ``parts`` has the chunks before an error, too."""
    parts = [] if parts is None else parts
    async for chunk in stream:
        parts.append(chunk)
    return b"".join(parts)


async def get(env: RegistryEnv, digest: Digest, kind: Kind = Kind.BLOB, **how: Any) -> bytes:
    async with env.registry.open(REPO, digest, kind, **how) as stream:
        return await read(stream)


# --- manifests ------------------------------------------------------------------------------------


async def test_head_manifest_returns_digest_type_and_size(env: RegistryEnv) -> None:
    digest = env.manifest(MANIFEST, "latest")
    for reference in (LATEST, digest):
        result = await env.registry.head_manifest(REPO, reference, ())
        assert (result.digest, result.media_type) == (digest, OCI_MANIFEST)
        assert result.size == len(MANIFEST)


async def test_get_manifest_returns_the_unchanged_bytes(env: RegistryEnv) -> None:
    digest = env.manifest(MANIFEST, "latest")
    result = await env.registry.get_manifest(REPO, LATEST, (OCI_MANIFEST,))
    assert (result.digest, result.media_type, result.body) == (digest, OCI_MANIFEST, MANIFEST)


async def test_head_manifest_follows_a_moved_tag(env: RegistryEnv) -> None:
    env.manifest(MANIFEST, "latest")
    await env.registry.head_manifest(REPO, LATEST, ())
    other = env.manifest(MANIFEST + b"\n", "latest")
    assert (await env.registry.head_manifest(REPO, LATEST, ())).digest == other


async def test_open_yields_a_manifest_by_digest(env: RegistryEnv) -> None:
    digest = env.manifest(MANIFEST)
    async with env.registry.open(REPO, digest, Kind.MANIFEST, accept=(OCI_MANIFEST,)) as stream:
        assert (stream.start, stream.total) == (0, len(MANIFEST))
        assert stream.media_type == OCI_MANIFEST
        assert await read(stream) == MANIFEST


# --- blobs ----------------------------------------------------------------------------------------


async def test_open_yields_a_blob(env: RegistryEnv) -> None:
    digest = env.blob(DATA)
    assert await env.registry.head_blob(REPO, digest) == len(DATA)
    async with env.registry.open(REPO, digest, Kind.BLOB) as stream:
        assert (stream.start, stream.total) == (0, len(DATA))
        assert stream.endpoint
        assert await read(stream) == DATA
    assert await get(env, digest, total=len(DATA), avoid=["elsewhere"]) == DATA


async def test_open_yields_an_empty_blob(env: RegistryEnv) -> None:
    digest = env.blob(b"")
    assert await env.registry.head_blob(REPO, digest) == 0
    assert await get(env, digest, total=0) == b""


@pytest.mark.parametrize("offset", [1, 65_536, len(DATA) - 1])
async def test_stream_with_an_offset_begins_at_its_start(env: RegistryEnv, offset: int) -> None:
    digest = env.blob(DATA)
    async with env.registry.open(REPO, digest, Kind.BLOB, offset=offset) as stream:
        assert stream.start in (0, offset)
        assert stream.total == len(DATA)
        assert await read(stream) == DATA[stream.start :]


@pytest.mark.parametrize("at", [1, 50_000, len(DATA) - 1])
async def test_broken_transfer_can_be_resumed_after_the_received_bytes(
    env: RegistryEnv, at: int
) -> None:
    digest = env.blob(DATA)
    env.breaks(digest, at)
    parts: list[bytes] = []
    async with env.registry.open(REPO, digest, Kind.BLOB) as stream:
        with pytest.raises(errors.UpstreamUnavailable):
            await read(stream, parts)
        validator, total = stream.validator, stream.total
    data = b"".join(parts)
    assert data == DATA[:at]
    rest = await get(env, digest, offset=at, validator=validator, total=total)
    assert data + rest == DATA


@pytest.mark.parametrize("how", [{"total": 7}, {"offset": len(DATA)}, {"offset": len(DATA) + 1}])
async def test_open_with_a_wrong_size_or_offset_raises_a_protocol_error(
    env: RegistryEnv, how: dict[str, int]
) -> None:
    digest = env.blob(DATA)
    with pytest.raises(UpstreamProtocolError):
        await get(env, digest, **how)


async def test_reader_may_leave_a_stream_early(env: RegistryEnv) -> None:
    digest = env.blob(DATA)
    async with env.registry.open(REPO, digest, Kind.BLOB) as stream:
        async for _ in stream:
            break
    async with env.registry.open(REPO, digest, Kind.BLOB):
        pass
    assert await get(env, digest) == DATA


# --- lists ----------------------------------------------------------------------------------------


async def test_list_tags_returns_all_tags_in_lexical_order(env: RegistryEnv) -> None:
    env.manifest(MANIFEST, "b", "d", "a", "c")
    assert await env.registry.list_tags(REPO) == "a\nb\nc\nd"


async def test_referrers_returns_an_index(env: RegistryEnv) -> None:
    subject = env.manifest(MANIFEST)
    entry = {"mediaType": OCI_MANIFEST, "digest": str(NOBODY), "size": 5}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    body = json.dumps(document).encode()
    env.referrers(subject, body)
    result = await env.registry.referrers(REPO, subject, None)
    assert result is not None
    assert (result.digest, result.media_type, result.body) == (Digest.of(body), OCI_INDEX, body)
    no_referrers = await env.registry.referrers(REPO, NOBODY, None)
    assert no_referrers is not None
    assert json.loads(no_referrers.body)["manifests"] == []


async def test_referrers_returns_none_without_the_api(env: RegistryEnv) -> None:
    env.without_referrers()
    assert await env.registry.referrers(REPO, NOBODY, None) is None


# --- failures -------------------------------------------------------------------------------------


async def resolve(env: RegistryEnv) -> object:
    """Resolve a tag like the caller does: by ``GET`` where ``HEAD`` does not decide."""
    head = await env.registry.head_manifest(REPO, LATEST, ())
    return head if head.digest else await env.registry.get_manifest(REPO, LATEST, ())


REQUESTS: dict[str, Callable[[RegistryEnv], Awaitable[object]]] = {
    "head tag": resolve,
    "head manifest": lambda env: env.registry.head_manifest(REPO, NOBODY, ()),
    "get tag": lambda env: env.registry.get_manifest(REPO, LATEST, ()),
    "manifest": lambda env: get(env, NOBODY, Kind.MANIFEST),
    "head blob": lambda env: env.registry.head_blob(REPO, NOBODY),
    "blob": lambda env: get(env, NOBODY),
    "tags": lambda env: env.registry.list_tags(EMPTY),
    "referrers": lambda env: env.registry.referrers(REPO, NOBODY, None),
}


@pytest.mark.parametrize(
    ("operation", "error"),
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
async def test_absent_content_raises_not_found_of_its_kind(
    env: RegistryEnv, operation: str, error: type[NotFound]
) -> None:
    with pytest.raises(error):
        await REQUESTS[operation](env)


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize("operation", REQUESTS)
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
async def test_failure_keeps_its_type_and_is_never_not_found(
    env: RegistryEnv, operation: str, error: type[MirrorError]
) -> None:
    env.manifest(MANIFEST, "latest")
    env.fails(error)
    with pytest.raises(error) as caught:
        await REQUESTS[operation](env)
    assert not isinstance(caught.value, NotFound)
    assert isinstance(caught.value, UpstreamError) is issubclass(error, UpstreamError)
