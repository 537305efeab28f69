"""Row R5: no callback blocks the event loop for more than 100 ms (``slow_callbacks.py``).

A fixture of ``conftest.py`` checks this in every other test, too.
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
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry, Fault
from tests.robustness.kit import fill
from tests.server_kit import running
from tests.slow_callbacks import Watch


def spin(seconds: float) -> None:
    """Use this many seconds of processor time."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


@pytest.mark.row("R5-slow-callbacks")
async def test_slow_callback_is_detected() -> None:
    """Waiting, and the work of the test itself, are not reported."""
    watch = Watch(limit=0.02)
    loop = asyncio.get_running_loop()
    with watch.installed():
        await run_in_thread(spin, 0.03)
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


def largest_document(document: dict[str, object], name: str, padding: int = 0) -> bytes:
    """Return a document with as many descriptors as fit below 4 MiB."""
    count = MANIFEST_LIMIT // len(json.dumps(descriptors(100_000, padding)[-1:])) - 10
    body = json.dumps({**document, name: descriptors(count, padding)}).encode()
    assert MANIFEST_LIMIT * 0.9 < len(body) < MANIFEST_LIMIT
    return body


@pytest.mark.row("R5-slow-callbacks")
@pytest.mark.parametrize(
    "padding", [2000, pytest.param(0, marks=pytest.mark.long)], ids=["few", "many"]
)
async def test_manifests_of_the_largest_size_do_not_block_the_loop(
    tmp_path: Path, padding: int
) -> None:
    """With 2,000 parts or with 20,000."""
    index: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptors(1)[0],
    }
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        for tag, media_type, body in (
            ("image", OCI_MANIFEST, largest_document(manifest, "layers", padding)),
            ("index", OCI_INDEX, largest_document(index, "manifests", padding)),
        ):
            digest = fake.add_manifest(body, tag=tag, media_type=media_type)
            for reference in (tag, digest, tag):
                status, _, got = await server.get(server.manifest(reference))
                assert (status, got == body) == (200, True)
            await server.store.idle()


@pytest.mark.row("R5-slow-callbacks")
async def test_lists_of_the_largest_size_do_not_block_the_loop(tmp_path: Path) -> None:
    """100,000 referrers are more than one response may have."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        body = b'{"tags":["%b"]}' % await run_in_thread(
            lambda: b'","'.join(b"v%07d" % n for n in range(1_000_000))
        )
        fake.fault("tags/list", Fault(body=body))
        for query in ("", "?n=10000", "?n=10000&last=v0500000"):
            _, _, got = await server.get(f"{server.url}/v2/library/app/tags/list{query}")
            assert got.count(b'"v0') == (10_000 if query else 2_000_000 // 9)
        index: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_INDEX}
        url = f"{server.url}/v2/library/app/referrers"
        most = fake.referring[str(digest)] = largest_document(index, "manifests")
        for query in ("", "?artifactType=a/b"):
            status, _, got = await server.get(f"{url}/{digest}{query}")
            assert (status, query != "" or got == most) == (200, True)
        other = Digest.of(b"other")
        fake.referring[str(other)] = json.dumps(
            {**index, "manifests": descriptors(100_000)}
        ).encode()
        assert (await server.get(f"{url}/{other}"))[0] == 502


@pytest.mark.row("R5-slow-callbacks")
async def test_start_and_eviction_with_many_contents_do_not_block_the_loop(tmp_path: Path) -> None:
    held = fill(Layout(tmp_path), 5_000)
    size = sum(size for _, size in held)
    storage = Storage(max_size=size, high_water=0.99, low_water=0.1)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, storage=storage) as server:
        digest = fake.add_blob(bytes(size // 20))
        assert (await server.get(server.blob(digest)))[0] == 200
        await server.store.idle()
        await server.store.evictor.wait_until_idle()
        gone = sum(event.count for event in server.events if isinstance(event, Evicted))
        assert gone > 4_000
