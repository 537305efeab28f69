"""Row R5: nothing keeps the event loop busy (``slow_callbacks.py``), whatever the work.

The same is asked of every test of the suite by a fixture of ``conftest.py``.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from mirror.config.settings import Storage
from mirror.observability.events import Evicted
from mirror.oci.descriptor import MANIFEST_LIMIT, OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from tests.fakes.registry import FakeRegistry
from tests.robustness.kit import fill
from tests.server_kit import running
from tests.slow_callbacks import Watch


def spin(seconds: float) -> None:
    """Use so much processor time."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


@pytest.mark.row("R5-slow-callbacks")
async def test_a_callback_that_takes_long_is_found() -> None:
    """The watch can fail; what waits, and what a test does itself, is not what it looks for."""
    watch = Watch(limit=0.02)
    loop = asyncio.get_running_loop()
    with watch.installed():
        await asyncio.to_thread(spin, 0.03)
        await asyncio.sleep(0.03)
        spin(0.03)
        await asyncio.sleep(0)
        assert not watch.slow
        loop.call_soon(spin, 0.03)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(watch.slow) == 1
    assert "spin" in watch.slow[0]


def descriptors(count: int, padding: int = 0) -> list[dict[str, object]]:
    return [
        {
            "mediaType": OCI_MANIFEST,
            "digest": f"sha256:{number:064x}",
            "size": number + 1,
            "annotations": {"padding": "x" * padding},
        }
        for number in range(count)
    ]


def as_large_as_may_be(document: dict[str, object], name: str, padding: int = 0) -> bytes:
    """With so many descriptors that it has just less than 4 MiB."""
    count = MANIFEST_LIMIT // len(json.dumps(descriptors(100_000, padding)[-1:])) - 10
    body = json.dumps({**document, name: descriptors(count, padding)}).encode()
    assert MANIFEST_LIMIT * 0.9 < len(body) < MANIFEST_LIMIT
    return body


@pytest.mark.row("R5-slow-callbacks")
@pytest.mark.parametrize(
    "padding", [2000, pytest.param(0, marks=pytest.mark.long)], ids=["few", "many"]
)
async def test_manifests_as_large_as_may_be(tmp_path: Path, padding: int) -> None:
    """Of 2,000 parts or of 20,000."""
    index: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptors(1)[0],
    }
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        for tag, media_type, body in (
            ("image", OCI_MANIFEST, as_large_as_may_be(manifest, "layers", padding)),
            ("index", OCI_INDEX, as_large_as_may_be(index, "manifests", padding)),
        ):
            digest = fake.add_manifest(body, tag=tag, media_type=media_type)
            for reference in (tag, digest, tag):
                status, _, got = await server.get(server.manifest(reference))
                assert (status, got == body) == (200, True)
            await server.store.idle()


@pytest.mark.row("R5-slow-callbacks")
async def test_lists_as_long_as_may_be(tmp_path: Path) -> None:
    """10,000 tags are a page; 100,000 referrers are more than one answer may hold."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        for number in range(10_000):
            fake.tags["library/app", f"v{number:05}"] = str(digest)
        _, _, got = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert len(json.loads(got)["tags"]) == 10_000
        index: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_INDEX}
        url = f"{server.url}/v2/library/app/referrers"
        most = fake.referring[str(digest)] = as_large_as_may_be(index, "manifests")
        for query in ("", "?artifactType=a/b"):
            status, _, got = await server.get(f"{url}/{digest}{query}")
            assert (status, query != "" or got == most) == (200, True)
        other = Digest.of(b"other")
        fake.referring[str(other)] = json.dumps(
            {**index, "manifests": descriptors(100_000)}
        ).encode()
        assert (await server.get(f"{url}/{other}"))[0] == 502


@pytest.mark.row("R5-slow-callbacks")
async def test_a_start_with_many_contents_and_an_eviction_of_most(tmp_path: Path) -> None:
    held = fill(Layout(tmp_path), 5_000)
    size = sum(size for _, size in held)
    storage = Storage(max_size=size, high_water=0.99, low_water=0.1)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, storage=storage) as server:
        digest = fake.add_blob(bytes(size // 20))
        assert (await server.get(server.blob(digest)))[0] == 200
        await server.store.idle()
        gone = sum(event.count for event in server.events if isinstance(event, Evicted))
        assert gone > 4_000
