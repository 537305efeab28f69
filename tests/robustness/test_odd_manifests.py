"""Rows FB4, FB6, FB7, FB8: content types of pages, log-in pages, refused manifests, schema 1."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import DigestMismatched, LogMessage
from mirror.oci.descriptor import (
    DOCKER_SCHEMA1_SIGNED,
    MANIFEST_LIMIT,
    OCI_MANIFEST,
)
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.fakes.shapes import SCHEMA1, Shape, ShapedManifest, image, signed, text
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(200_000, 51)
PAGE = b"<!doctype html><title>Log in</title><script>alert(1)</script>"
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}

# --- log-in pages ---------------------------------------------------------------------------------

pages = pytest.mark.parametrize(
    ("content_type", "page"),
    [
        ("text/html; charset=utf-8", PAGE),
        ("application/xhtml+xml", PAGE),
        ("text/plain", b"Please log in."),
        ("application/json", b'{"error": "login required"}'),
        ("text/html", b'{"errors": [{"code": "UNAUTHORIZED"}]}'),
        (OCI_MANIFEST, PAGE),
        ("", PAGE),
        ("", b""),
    ],
)


def log_in_page(content_type: str, page: bytes) -> Fault:
    headers = {"Content-Type": content_type} if content_type else {}
    return Fault(status=200, headers=headers, body=page, times=None)


@pytest.mark.row("FB6-login-page")
@pages
async def test_log_in_page_for_an_uncached_tag_is_502(
    tmp_path: Path, content_type: str, page: bytes
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        fake.fault("manifests/latest", log_in_page(content_type, page))
        for method in ("GET", "HEAD", "GET"):
            status, headers, body = await server.ask(method, server.manifest("latest"))
            assert (status, headers["Content-Type"]) == (502, "application/json")
            assert method == "HEAD" or b"log-in page" in body
        names = await server.store.index.names(0)
        assert names is not None
        assert not names.names, "no tag is recorded"
        assert not list((tmp_path / "blobs" / "sha256").iterdir()), "the page is not kept"
        fake.faults.clear()
        _, headers, _ = await server.get(server.manifest("latest"))
        assert headers["Docker-Content-Digest"] == str(digest)


@pytest.mark.row("FB6-login-page")
@pages
async def test_log_in_page_for_a_cached_tag_serves_the_tag_stale(
    tmp_path: Path, content_type: str, page: bytes
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(DATA)
        _, _, cached = await server.get(server.manifest("latest"))
        fake.fault("manifests/latest", log_in_page(content_type, page))
        for _ in range(2):
            status, headers, body = await server.get(server.manifest("latest"))
            assert (status, headers["Docker-Content-Digest"]) == (200, str(digest))
            assert body == cached
            assert "Warning" in headers


@pytest.mark.row("FB6-login-page")
@pytest.mark.parametrize("kind", ["manifests", "blobs"])
async def test_log_in_page_for_a_digest_grants_no_access(tmp_path: Path, kind: str) -> None:
    """The content is cached, and belongs to another repository."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        await server.get(server.manifest("latest"))
        await server.get(server.blob(Digest.of(DATA)))
        await server.store.idle()
        wanted = digest if kind == "manifests" else Digest.of(DATA)
        path = f"/v2/library/other/{kind}/{wanted}"
        fake.fault(path, log_in_page("text/html", PAGE))
        for method in ("HEAD", "GET", "HEAD"):
            status, _, body = await server.ask(method, f"{server.url}{path}")
            assert (status, DATA in body) == (502, False)
        if kind == "manifests":
            assert not [e for e in server.events if isinstance(e, DigestMismatched)], "no alarm"


# --- tags that move -------------------------------------------------------------------------------


@pytest.mark.row("FB7-tag-moved-to-odd-manifest")
@pytest.mark.parametrize("pull_policy", ["IfNotPresent", "Always"])
async def test_tag_that_moves_is_never_hidden_by_the_old_image_while_the_upstream_is_up(
    tmp_path: Path, pull_policy: str
) -> None:
    settings: dict[str, Any] = {"tag_ttl": 0.0, "pull_policy": pull_policy}
    async with FakeRegistry() as fake, running(tmp_path, fake.url, **settings) as server:
        fake.add_image(DATA)
        _, _, old = await server.get(server.manifest("latest"))
        odd = old[:-1] + b', "layers": []}'
        fake.add_manifest(odd, tag="latest")
        status, _, body = await server.get(server.manifest("latest"))
        assert (status, body) == (200, odd)
        fake.add_manifest(odd[:-1] + b" " * MANIFEST_LIMIT + b"}", tag="latest")
        status, _, body = await server.get(server.manifest("latest"))
        assert (status, b"MANIFEST_INVALID" in body) == (502, True)
        await fake.stop()
        status, headers, body = await server.get(server.manifest("latest"))
        assert (status, body) == (200, odd), "the newest one that can be served"
        assert "Warning" in headers


# --- content types --------------------------------------------------------------------------------


@pytest.mark.row("FB4-content-types-of-static-registries")
@pytest.mark.parametrize("content_type", ["text/html", "text/plain", ""])
async def test_static_registry_without_digest_headers_is_served(
    tmp_path: Path, content_type: str
) -> None:
    body = text(image(mediaType=OCI_MANIFEST))
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_manifest(body, tag="latest", media_type=content_type)
        fake.fault("", Fault(drop_headers=("Docker-Content-Digest",), times=None))
        expected = (200, OCI_MANIFEST, str(digest), str(len(body)))
        for reference in (digest, "latest"):
            for method in ("HEAD", "GET"):
                status, headers, _ = await server.ask(method, server.manifest(reference))
                names = ("Content-Type", "Docker-Content-Digest", "Content-Length")
                assert (status, *(headers[name] for name in names)) == expected


@pytest.mark.row("FB4-content-types-of-static-registries")
async def test_type_of_a_get_replaces_the_generic_type_of_a_head(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_manifest(text(image()), tag="latest")
        fake.fault("", Fault(headers={"Content-Type": "text/html"}, method="HEAD", times=None))
        for method in ("HEAD", "GET", "HEAD"):
            status, headers, _ = await server.ask(method, server.manifest("latest"))
            assert (status, headers["Content-Type"]) == (200, OCI_MANIFEST)


@pytest.mark.row("FB4-content-types-of-static-registries")
async def test_generic_type_of_the_upstream_does_not_replace_that_of_an_index(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        child = fake.add_manifest(text(image()), media_type="text/plain")
        entries = [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 5}]
        fake.add_manifest(text({"manifests": entries}), tag="latest", media_type="text/plain")
        _, headers, _ = await server.get(server.manifest("latest"))
        assert headers["Content-Type"] == OCTET_STREAM, "nobody names one"
        _, headers, _ = await server.get(server.manifest(child))
        assert headers["Content-Type"] == OCI_MANIFEST


@pytest.mark.row("FB4-content-types-of-static-registries")
async def test_no_response_can_run_as_a_page_of_the_server(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA)
        page = fake.add_blob(PAGE)
        fake.fault(f"blobs/{page}", Fault(headers={"Content-Type": "text/html"}, times=None))
        own = {"If-None-Match": f'"{page}"'}
        part = {"Range": "bytes=0-3"}
        base = f"{server.url}/v2/library/app"
        for status, url, headers in (
            (200, server.manifest("latest"), {}),
            (200, server.manifest("latest"), {}),
            (200, server.blob(Digest.of(DATA)), {}),
            (200, server.blob(page), {}),
            (206, server.blob(page), part),
            (304, server.blob(page), own),
            (404, server.manifest("nothing"), {"Accept": "text/html"}),
            (200, f"{base}/tags/list", {}),
            (200, f"{base}/referrers/{page}", {}),
            *((200, f"{server.url}/{path}", {}) for path in ("v2/", "healthz", "metrics")),
            (400, f"{server.url}/v2/UPPER/<script>/tags/list", {}),
        ):
            for method in ("GET", "HEAD"):
                got = await server.ask(method, url, headers)
                assert got[0] in (status, 200 if status == 206 else status, 405), url
                assert {name: got[1].get(name) for name in SAFE} == SAFE, (method, url)
                assert "html" not in got[1]["Content-Type"]


# --- schema 1 -------------------------------------------------------------------------------------


async def pull_schema1(server: Server, reference: object) -> tuple[int, str, str, bytes]:
    status, headers, body = await server.get(server.manifest(reference))
    digest = headers.get("Docker-Content-Digest", "")
    return status, headers["Content-Type"], digest, body


@pytest.mark.row("FB8-schema-1")
@pytest.mark.parametrize("content_type", [DOCKER_SCHEMA1_SIGNED, "application/json", ""])
async def test_signed_manifest_without_a_digest_header_is_named_by_its_payload(
    tmp_path: Path, content_type: str
) -> None:
    body, digest = signed(SCHEMA1), Digest.of(SCHEMA1)
    shape = Shape("app", "FB8", (ShapedManifest(body, content_type, digest=digest),))
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        shape.add_to(fake)
        fake.fault("", Fault(drop_headers=("Docker-Content-Digest",), times=None))
        expected = (200, DOCKER_SCHEMA1_SIGNED, str(digest), body)
        url = f"{server.url}/v2/{shape.repository}/manifests"
        for _ in range(2):
            status, headers, got = await server.get(f"{url}/v1")
            names = ("Content-Type", "Docker-Content-Digest")
            assert (status, *(headers[name] for name in names), got) == expected
        await fake.stop()
        for reference in ("v1", digest):
            assert (await server.get(f"{url}/{reference}"))[2] == body


@pytest.mark.row("FB8-schema-1")
async def test_clients_of_a_signed_manifest_share_one_request(tmp_path: Path) -> None:
    digest = Digest.of(SCHEMA1)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        stored = signed(SCHEMA1), DOCKER_SCHEMA1_SIGNED
        fake.manifests["library/app", str(digest)] = stored
        fake.fault("manifests", Fault(delay=1.5))  # Until then, all clients have come.
        results = await asyncio.gather(*(pull_schema1(server, digest) for _ in range(20)))
        assert set(results) == {(200, DOCKER_SCHEMA1_SIGNED, str(digest), stored[0])}
        assert fake.count("GET") <= 3


@pytest.mark.row("FB8-schema-1")
async def test_signed_manifest_with_another_payload_is_refused(tmp_path: Path) -> None:
    digest, other = Digest.of(SCHEMA1), SCHEMA1.replace(b"amd64", b"arm64")
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.manifests["library/app", str(digest)] = signed(other), DOCKER_SCHEMA1_SIGNED
        fake.tags["library/app", "latest"] = str(digest)
        for reference in (digest, "latest"):
            status, _, _, body = await pull_schema1(server, reference)
            assert (status, b"does not match its digest" in body) == (502, True)
        alarms = [e for e in server.events if isinstance(e, DigestMismatched | LogMessage)]
        assert not alarms


@pytest.mark.row("FB8-schema-1")
async def test_payload_counts_for_no_manifest_of_another_type(tmp_path: Path) -> None:
    """Its bytes do not have the digest, and its clients take it for a current manifest."""
    body, digest = signed(SCHEMA1), Digest.of(SCHEMA1)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.manifests["library/app", str(digest)] = body, OCI_MANIFEST
        path = f"manifests/{digest}"
        fake.fault(path, Fault(headers={"Content-Type": "text/plain"}))
        status, _, _ = await server.get(server.manifest(digest))
        assert status == 502
        assert fake.count("GET", path) > 1
