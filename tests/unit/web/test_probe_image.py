"""The probe image: whole, served without an upstream, never mixed with the content of one."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from mirror.observability.events import Kind
from mirror.oci.errors import BlobUnknown, ManifestUnknown
from mirror.oci.reference import Digest, Tag
from mirror.web.probe_image import PROBE_REPOSITORY, ProbeImage, probe_index
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running

NONCE = "0123456789abcdef" * 2


def test_every_platform_has_a_config_and_a_layer_whose_digests_are_right() -> None:
    image = ProbeImage()
    listed = json.loads(image.manifest(Tag(NONCE)).body)
    assert {entry["platform"]["architecture"] for entry in listed["manifests"]} >= {
        "amd64",
        "arm64",
    }
    for entry in listed["manifests"]:
        manifest = image.manifest(Digest.parse(entry["digest"]))
        assert (manifest.media_type, len(manifest.body)) == (entry["mediaType"], entry["size"])
        parts = json.loads(manifest.body)
        config = image.blob(Digest.parse(parts["config"]["digest"]))
        (layer,) = parts["layers"]
        held = image.blob(Digest.parse(layer["digest"]))
        for content in (manifest, config, held):
            assert content.digest == Digest.of(content.body)
        assert (len(config.body), len(held.body)) == (parts["config"]["size"], layer["size"])
        described = json.loads(config.body)
        assert described["architecture"] == entry["platform"]["architecture"]
        raw = hashlib.sha256(gzip.decompress(held.body)).hexdigest()
        assert described["rootfs"]["diff_ids"] == [f"sha256:{raw}"]
        assert len(held.body) + len(config.body) + len(manifest.body) < 2000


def test_tag_that_is_no_nonce_and_unknown_digest_are_refused() -> None:
    image = ProbeImage()
    with pytest.raises(ManifestUnknown):
        image.manifest(Tag("latest"))
    with pytest.raises(ManifestUnknown):
        image.manifest(Digest.of(b"other"))
    with pytest.raises(BlobUnknown):
        image.blob(probe_index().digest)
    assert image.pulled_nonces() == []


def test_nonces_are_listed_for_10_minutes_and_at_most_256() -> None:
    now = 0.0
    image = ProbeImage(lambda: now)
    image.manifest(Tag(NONCE))
    now = 599.0
    assert image.pulled_nonces() == [NONCE]
    now = 601.0
    assert image.pulled_nonces() == []
    for number in range(300):
        image.manifest(Tag(f"{number:032x}"))
    assert image.pulled_nonces() == [f"{number:032x}" for number in range(44, 300)]


async def test_server_answers_for_each_upstream_and_asks_none(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, running(tmp_path, registry.url, deny=["*"]) as server:
        for query in ("", "?ns=other.io"):
            url = server.manifest(NONCE, PROBE_REPOSITORY, query)
            status, headers, body = await server.get(url)
            assert (status, body) == (200, probe_index().body)
            assert headers["Docker-Content-Digest"] == str(probe_index().digest)
            assert headers["Content-Type"] == probe_index().media_type
            status, headers, body = await server.ask("HEAD", url)
            assert (status, body) == (200, b"")
            assert headers["Content-Length"] == str(len(probe_index().body))
        entry = json.loads(probe_index().body)["manifests"][0]
        url = server.manifest(entry["digest"], PROBE_REPOSITORY)
        status, _, manifest = await server.get(url)
        assert status == 200
        layer = json.loads(manifest)["layers"][0]["digest"]
        status, _, body = await server.get(server.blob(layer, PROBE_REPOSITORY))
        assert (status, str(Digest.of(body))) == (200, layer)
        status, _, body = await server.get(f"{server.url}/v2/{PROBE_REPOSITORY}/tags/list")
        assert (status, json.loads(body)["tags"]) == (200, [NONCE])
        status, _, _ = await server.get(f"{server.url}/v2/{PROBE_REPOSITORY}/referrers/{layer}")
        assert status == 404
        assert {pull.kind for pull in await server.records()} == {Kind.PING}
        assert not list((tmp_path / "blobs/sha256").iterdir())
        assert registry.requests == []


async def test_upstream_that_is_not_configured_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        url = server.manifest(NONCE, PROBE_REPOSITORY, "?ns=unknown.example")
        assert (await server.get(url))[0] == 404
