"""Rows FB3, FB4, FB5, FB8, FB12: each odd image is pulled directly and through the mirror.

Both pulls are compared request by request: by tag and by digest, with ``HEAD`` and ``GET``, cold,
warm, with the upstream gone, and after a restart without it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from mirror.observability.events import DigestMismatched, Event
from mirror.oci.descriptor import DEFAULT_ACCEPT, DOCKER_SCHEMA1_SIGNED, MANIFEST_TYPES
from mirror.oci.headers import OCTET_STREAM, manifest_type_of
from mirror.oci.reference import Digest
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.fakes.shapes import SHAPES, Shape, ShapedManifest
from tests.real.clients import Containerd, Skopeo
from tests.robustness.table import ROWS
from tests.server_kit import Server, running

SKOPEO = (*sorted(MANIFEST_TYPES), "*/*")
"""``Accept`` of a client that takes every manifest type, as skopeo does."""
CRANE = DEFAULT_ACCEPT
"""``Accept`` of a client that takes current types, as crane does."""

Ask: TypeAlias = tuple[str, str, tuple[str, ...]]
"""Method, path below the repository, ``Accept``."""


@dataclass(frozen=True)
class Got:
    """What a client sees of a response."""

    status: int
    body: bytes
    content_type: str
    digest: str
    length: str


def row_of(shape: Shape) -> str:
    """Return the id and the slug of the shape's row."""
    return f"{shape.row}-{ROWS[shape.row].slug}"


REPORTED = 9
"""The first shapes were met in the field."""


def each_shape(*, every: int) -> pytest.MarkDecorator:
    """Return all shapes. Of those that were not reported, short runs take each ``every``-th."""

    def marks_of(number: int, shape: Shape) -> list[pytest.MarkDecorator]:
        marks = [pytest.mark.row(row_of(shape))]
        return marks if number < REPORTED or number % every == 0 else [*marks, pytest.mark.long]

    shapes = enumerate(SHAPES)
    found = [pytest.param(one, id=one.name, marks=marks_of(number, one)) for number, one in shapes]
    return pytest.mark.parametrize("shape", found)


def asks_of(shape: Shape) -> Iterator[Ask]:
    """Yield the requests of skopeo (GET by tag) and crane (HEAD, then GET), and of all parts."""
    for manifest in shape.manifests:
        if manifest.tag is not None:
            yield "GET", f"manifests/{manifest.tag}", SKOPEO
            yield "HEAD", f"manifests/{manifest.tag}", CRANE
            yield "GET", f"manifests/{manifest.tag}", CRANE
        for method in ("HEAD", "GET"):
            yield method, f"manifests/{manifest.name}", CRANE
        yield "GET", f"blobs/{manifest.name}", ()
    for kind, digest in shape.parts():
        for method in ("GET", "HEAD"):
            yield method, f"{kind}/{digest}", CRANE if kind == "manifests" else ()


async def send(server: Server, root: str, ask: Ask) -> Got:
    method, path, accept = ask
    headers = {"Accept": ", ".join(accept)} if accept else {}
    status, got, body = await server.ask(method, f"{root}/{path}", headers)
    names = ("Content-Type", "Docker-Content-Digest", "Content-Length")
    return Got(status, body, *(got.get(name, "") for name in names))


def expect(shape: Shape, ask: Ask, direct: Got) -> Got:
    """Return the mirror's response to a request that the upstream answers with ``direct``."""
    kind, _, reference = ask[1].partition("/")
    if direct.status != 200:
        return direct
    if kind == "blobs":
        return Got(200, direct.body, OCTET_STREAM, reference, direct.length)
    (manifest,) = (m for m in shape.manifests if reference in (m.tag, str(m.name)))
    content_type = expected_type(manifest)
    return Got(200, direct.body, content_type, str(manifest.name), str(len(manifest.body)))


def expected_type(manifest: ShapedManifest) -> str:
    """Return the upstream's type, else that of the manifest, else ``application/octet-stream``."""
    stated = manifest_type_of(manifest.content_type)
    if stated != OCTET_STREAM:
        return stated
    if manifest.digest is not None:
        return DOCKER_SCHEMA1_SIGNED
    return manifest_type_of(json.loads(manifest.body).get("mediaType"))


def compare(ask: Ask, direct: Got, mirrored: Got, when: str) -> None:
    algorithm = ask[1].partition("/")[2].partition(":")[0]
    if direct.status == 200:
        assert mirrored == direct, (when, ask)
    elif algorithm in ("sha256", "sha512"):
        assert mirrored.status == direct.status == 404, (when, ask)
    else:
        assert mirrored.status == 400, (when, ask)
        assert ask[0] == "HEAD" or b"cannot verify" in mirrored.body


async def compare_all(server: Server, root: str, pairs: list[tuple[Ask, Got]], when: str) -> None:
    """Send all requests at once: without its upstream, the mirror tries each tag for a while."""
    mirrored = await asyncio.gather(*(send(server, root, ask) for ask, _ in pairs))
    for (ask, direct), got in zip(pairs, mirrored, strict=True):
        compare(ask, direct, got, when)


@each_shape(every=3)
async def test_image_is_pulled_through_the_mirror_as_directly(
    tmp_path: Path, shape: Shape, tried: Callable[[int], None]
) -> None:
    asks = list(asks_of(shape))
    events: list[Event] = []
    settings: dict[str, Any] = {"tag_ttl": 0.0, "negative_ttl": 0.01}
    async with FakeRegistry() as fake:
        shape.add_to(fake)
        async with running(tmp_path, fake.url, **settings) as server:
            mirror = f"{server.url}/v2/docker.io/{shape.repository}"
            pairs = []
            for ask in asks:
                direct = await send(server, f"{fake.url}/v2/{shape.repository}", ask)
                pairs.append((ask, expect(shape, ask, direct)))
                compare(*pairs[-1], await send(server, mirror, ask), "cold")
            await server.store.idle()
            for ask, direct in pairs:
                compare(ask, direct, await send(server, mirror, ask), "warm")
            await fake.stop()
            await compare_all(server, mirror, pairs, "upstream gone")
            events += server.events
        async with running(tmp_path, fake.url, **settings) as server:
            mirror = f"{server.url}/v2/docker.io/{shape.repository}"
            await compare_all(server, mirror, pairs, "restarted")
            events += server.events
    assert not [event for event in events if isinstance(event, DigestMismatched)], "no alarm"
    tried(4 * len(asks))


@dataclass(frozen=True)
class Copied:
    """What skopeo gets of an image: its manifest, and all files of a copy with its exit code."""

    manifest: bytes
    code: int
    files: dict[str, bytes]


def copy_with_skopeo(reference: str) -> Copied:
    """Copy an image with all its platforms, every byte as it is."""
    source = f"docker://{reference}"
    flags = ("--quiet", "--all", "--preserve-digests", "--src-tls-verify=false")
    with Skopeo() as skopeo:
        manifest = skopeo.inspect_raw(reference)
        target = skopeo.dir / "copy"
        done = skopeo.skopeo("copy", *flags, source, f"dir:{target}", check=False)
        # What is there after a failure depends on the order of its requests.
        found = target.iterdir() if done.returncode == 0 else iter(())
        return Copied(manifest, done.returncode, {path.name: path.read_bytes() for path in found})


@each_shape(every=10)
async def test_skopeo_copies_the_same_image_through_the_mirror(
    tmp_path: Path, shape: Shape, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        shape.add_to(fake)
        # With the type that it names itself, skopeo copies what it refuses as "text/plain".
        types = [manifest_type_of(manifest.content_type) for manifest in shape.manifests]
        may_be_mended = OCTET_STREAM in types
        cold = {}
        for manifest in (manifest for manifest in shape.manifests if manifest.tag is not None):
            name = f"{shape.repository}:{manifest.tag}"
            mirrored = f"127.0.0.1:{server.port}/docker.io/{name}"
            copied = await run_in_thread(copy_with_skopeo, f"127.0.0.1:{fake.port}/{name}")
            assert copied.manifest == manifest.body
            cold[mirrored] = await run_in_thread(copy_with_skopeo, mirrored)
            if copied.code != 0 and may_be_mended:
                assert cold[mirrored].manifest == manifest.body
            else:
                assert cold[mirrored] == copied
        await server.store.idle()
        await fake.stop()
        for mirrored, copied in cold.items():
            assert await run_in_thread(copy_with_skopeo, mirrored) == copied, "upstream gone"
        tried(2 * len(cold))


def _fetch_with_containerd(server: Server, reference: str) -> dict[str, bytes]:
    """Return the content that a new containerd fetches through the mirror, by digest."""
    with Containerd() as containerd:
        containerd.use("docker.io", server.url)
        containerd.fetch(f"docker.io/{reference}")
        return containerd.held()


@pytest.mark.row("FB3-buildkit-cache-index")
@pytest.mark.parametrize("name", ["buildkit-cache-docker", "index-of-octet-streams"])
async def test_containerd_fetches_every_entry_of_an_index_of_blobs(
    tmp_path: Path, name: str
) -> None:
    """BuildKit imports its registry cache with the same library of containerd."""
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    contents = {str(Digest.of(data)): data for data in (shape.manifests[0].body, *shape.blobs)}
    reference = f"{shape.repository}:{shape.manifests[0].tag}"
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        shape.add_to(fake)
        held = await run_in_thread(_fetch_with_containerd, server, reference)
        assert contents.items() <= held.items(), "cold"
        await fake.stop()
        held = await run_in_thread(_fetch_with_containerd, server, reference)
        assert contents.items() <= held.items(), "with the upstream gone"
