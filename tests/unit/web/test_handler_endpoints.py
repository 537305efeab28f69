"""Every endpoint over HTTP: status, header fields and body of its responses.

The conformance tests follow the program of the distribution specification, in read-only mode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest

from mirror.config.settings import Upstream
from mirror.observability.events import Kind, Outcome
from mirror.oci.descriptor import (
    DEFAULT_ACCEPT,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1_SIGNED,
    OCI_INDEX,
    OCI_MANIFEST,
    referrers_tag,
)
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

LAYER = random_bytes(10_000, 62)
DIGEST = Digest.of(LAYER)
ABSENT = Digest.of(b"absent")
SBOM, SIGNATURE = "application/vnd.example.sbom", "application/vnd.example.signature"


def referrers_index(digest: Digest, *kinds: str) -> bytes:
    """An image index with one referrer of each artifact type."""
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 5, "artifactType": kind}
        for kind in kinds
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def code(body: bytes) -> str:
    """The error code in an OCI error body."""
    (error,) = json.loads(body)["errors"]
    assert error["message"]
    return str(error["code"])


def has_common_headers(headers: Mapping[str, str]) -> bool:
    """True if the header fields of every response are there."""
    return headers["Docker-Distribution-Api-Version"] == "registry/2.0" and bool(
        re.fullmatch(r"[0-9a-f]{16}", headers["X-Request-Id"])
    )


async def warm(server: Server) -> None:
    """Pull the tag and its layer, and wait until both are stored."""
    assert (await server.get(server.manifest("latest")))[0] == 200
    assert (await server.get(server.blob(DIGEST)))[0] == 200
    await server.store.idle()


@pytest.mark.row("FF6-upstream-by-host-name")
async def test_host_of_a_request_chooses_the_upstream(tmp_path: Path) -> None:
    async with FakeRegistry() as fake:
        other = Upstream(endpoints=(fake.url,), hosts=("hub.mirror.internal", "[fd00::1]"))
        async with running(tmp_path, other=other) as server:
            fake.add_image(LAYER)
            path = f"{server.url}/v2/library/app/manifests/latest"
            name = "hub.mirror.internal"
            for host in (name, f"{name.upper()}:5100", "[fd00::1]:5100", f"{name}.", f"{name}.:80"):
                assert (await server.get(path, headers={"Host": host}))[0] == 200, host
            assert (await server.get(path))[0] == 502, "the endpoint of docker.io is down"
            # The whole path is the repository, also if it begins with the name of an upstream.
            path = f"{server.url}/v2/other.io/library/app/manifests/latest"
            assert (await server.get(path))[0] == 200
            host = {"Host": "hub.mirror.internal"}
            assert (await server.get(path, headers=host))[0] == 404


# --- ping and metrics ---------------------------------------------------------------------------


async def test_ping_is_200_without_a_challenge_or_an_upstream_request(tmp_path: Path) -> None:
    """Podman accepts 200 and 401, and would send credentials after a challenge."""
    async with running(tmp_path) as server:
        for path in ("/v2/", "/v2", "/v2/?ns=docker.io"):
            status, headers, body = await server.get(f"{server.url}{path}")
            assert (status, json.loads(body)) == (200, {})
            assert has_common_headers(headers)
            assert "WWW-Authenticate" not in headers
            assert headers["Content-Type"] == "application/json"
        status, headers, body = await server.ask("HEAD", f"{server.url}/v2/")
        assert (status, body) == (200, b"")


async def test_metrics_are_in_the_prometheus_text_format(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        status, headers, body = await server.get(f"{server.url}/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain")
        assert b"\noci_mirror_requests_total{" in body
        status, _, body = await server.ask("HEAD", f"{server.url}/metrics")
        assert (status, body) == (200, b"")


# --- manifests and blobs ------------------------------------------------------------------------


async def test_every_response_has_the_common_headers_and_echoes_ns(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(LAYER)
        lists = f"{server.url}/v2/library/app"
        for _ in ("cold", "warm"):
            for url in (
                server.manifest("latest"),
                server.manifest(manifest),
                server.blob(DIGEST),
                f"{lists}/tags/list",
                f"{lists}/referrers/{manifest}",
            ):
                for method in ("HEAD", "GET"):
                    status, headers, _ = await server.ask(method, f"{url}?ns=docker.io")
                    assert status == 200
                    assert has_common_headers(headers)
                    assert headers["OCI-Namespace"] == "docker.io"
                    assert re.search(r"(^|, )total;dur=\d+\.\d\d", headers["Server-Timing"])
                    status, headers, _ = await server.ask(method, url)
                    assert "OCI-Namespace" not in headers
                    assert "Warning" not in headers


async def test_upstream_may_be_named_by_path_prefix_or_ns(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(LAYER)
        for repository, query in [
            ("docker.io/library/app", ""),
            ("docker.io/app", ""),
            ("app", "?ns=docker.io"),
            ("other.io/library/app", ""),
            ("library/app", "?ns=other.io"),
        ]:
            status, headers, _ = await server.get(server.manifest("latest", repository, query))
            assert (status, headers["Docker-Content-Digest"]) == (200, str(digest))
        upstreams = [pull.upstream for pull in await server.records()]
        assert upstreams == ["docker.io"] * 3 + ["other.io"] * 2


async def test_head_of_uncached_content_sends_head_upstream_and_stores_nothing(
    tmp_path: Path,
) -> None:
    """Once it has stated the right size of a manifest. The length of a blob is that of a GET."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(b"first", tag="first")
        await server.ask("HEAD", server.manifest("first"))
        await server.store.idle()
        fake.requests.clear()
        stored = set((tmp_path / "blobs" / "sha256").iterdir())
        manifest = fake.add_image(LAYER)
        size = len(fake.manifests["library/app", str(manifest)][0])
        for url, digest, length in [
            (server.manifest("latest"), manifest, size),
            (server.manifest(manifest, "library/app"), manifest, size),
            (server.blob(DIGEST), DIGEST, len(LAYER)),
        ]:
            status, headers, body = await server.ask("HEAD", url)
            assert (status, body) == (200, b"")
            assert headers["Docker-Content-Digest"] == str(digest)
            assert headers["Content-Length"] == str(length)
        assert (fake.count("GET", "manifests/"), fake.count("GET", "blobs/")) == (0, 1)
        assert fake.count("HEAD") >= 2
        assert set((tmp_path / "blobs" / "sha256").iterdir()) == stored


async def test_head_of_unknown_length_never_has_content_length_0(tmp_path: Path) -> None:
    """Clients take the length of a ``HEAD`` response for the size of the content."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(LAYER)
        body = fake.manifests["library/app", str(manifest)][0]
        for path in ("latest", str(manifest), str(DIGEST)):
            fake.fault(path, Fault(chunked=True, times=None))
        for reference in ("latest", manifest):
            _, headers, _ = await server.ask("HEAD", server.manifest(reference))
            assert headers["Content-Length"] == str(len(body)), "the manifest is fetched"
        status, headers, _ = await server.ask("HEAD", server.blob(DIGEST))
        assert status == 200
        assert headers.get("Content-Length", str(len(LAYER))) == str(len(LAYER))


async def test_manifest_by_digest_keeps_its_type_and_bytes_for_every_accept(tmp_path: Path) -> None:
    """The bytes are not parsed and written again: white space stays, too."""
    config = {"mediaType": "a/b", "digest": str(DIGEST), "size": len(LAYER)}
    image: dict[str, Any] = {"schemaVersion": 2, "config": config, "layers": []}
    first: dict[str, Any] = {"schemaVersion": 1, "fsLayers": [], "signatures": []}
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for number, (media_type, document) in enumerate(
            [(OCI_MANIFEST, image), (DOCKER_MANIFEST, image), (DOCKER_SCHEMA1_SIGNED, first)]
        ):
            body = json.dumps(document, indent=5 + number).encode() + b"\n\n"
            digest = fake.add_manifest(body, media_type=media_type)
            for accept in (media_type, "*/*", OCI_INDEX, "text/html"):
                status, headers, got = await server.get(server.manifest(digest), {"Accept": accept})
                assert (status, got) == (200, body)
                assert headers["Content-Type"] == media_type


async def test_all_accept_fields_are_sent_upstream_in_one_order(tmp_path: Path) -> None:
    """Sorted, so that clients that send them in another order share one upstream request."""
    own = "application/vnd.example.manifest+json"
    lines = [OCI_INDEX, OCI_MANIFEST, f"{DOCKER_LIST}, {DOCKER_MANIFEST}", own]
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(LAYER)
        for some in (lines, lines[::-1]):
            headers = [("Accept", line) for line in some]
            async with server.client.get(server.manifest("latest"), headers=headers) as response:
                assert response.status == 200
        first, again = (seen for seen in fake.requests if seen.method == "HEAD")
        wanted = first.headers["accept"].split(", ")
        assert set(wanted) == {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, own}
        assert again.headers["accept"] == first.headers["accept"]
        (fetched,) = (seen for seen in fake.requests if seen.method == "GET")
        assert set(fetched.headers["accept"].split(", ")) >= {own, *DEFAULT_ACCEPT}
        other = fake.add_manifest(json.dumps({"schemaVersion": 2}).encode(), media_type=own)
        for method in ("HEAD", "GET"):
            fake.requests.clear()
            assert (await server.ask(method, server.manifest(other), {"Accept": own}))[0] == 200
            assert [seen.method for seen in fake.requests] == [method]
            assert own in fake.requests[0].headers["accept"].split(", ")
        assert digest != other


async def test_digest_of_a_manifest_is_404_as_a_blob(tmp_path: Path) -> None:
    """A client would take it for an octet stream, and containerd asks for it after a failure."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(LAYER)
        await warm(server)
        for method in ("HEAD", "GET"):
            assert (await server.ask(method, server.blob(manifest)))[0] == 404


async def test_stale_response_has_a_warning(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(LAYER)
        lists = f"{server.url}/v2/library/app/tags/list"
        await warm(server)
        await server.get(lists)
        await fake.stop()
        for url in (server.manifest("latest"), lists):
            for method in ("HEAD", "GET"):
                status, headers, _ = await server.ask(method, url)
                assert status == 200
                assert re.fullmatch(r'299 - "[^"\\]+"', headers["Warning"])
                assert (await server.records())[-1].outcome is Outcome.STALE
        for url in (server.manifest(digest), server.blob(DIGEST)):
            assert "Warning" not in (await server.get(url))[1], "a digest is never stale"


@pytest.mark.row("K1-wrong-clock")
async def test_blob_with_expired_access_record_is_served_stale_if_the_upstream_is_down(
    tmp_path: Path,
) -> None:
    now = [1_900_000_000.0]
    async with (
        FakeRegistry() as fake,
        running(tmp_path, fake.url, clock=lambda: now[0]) as server,
    ):
        fake.add_blob(LAYER)
        assert (await server.get(server.blob(DIGEST)))[2] == LAYER
        await server.store.idle()
        await fake.stop()
        now[0] += 365 * 86400
        for method, expected in (("GET", LAYER), ("HEAD", b"")):
            status, headers, body = await server.ask(method, server.blob(DIGEST))
            assert (status, body) == (200, expected)
            assert headers["Warning"].startswith('299 - "served from the cache: ')
            assert headers["Content-Length"] == str(len(LAYER))
            assert (await server.records())[-1].outcome is Outcome.STALE
        status, headers, body = await server.get(server.blob(DIGEST), {"Range": "bytes=0-9"})
        assert (status, body) == (206, LAYER[:10])
        assert "Warning" in headers


# --- lists --------------------------------------------------------------------------------------


@pytest.mark.row("FC3-links-behind-a-prefix")
@pytest.mark.parametrize(
    ("path", "query", "name"),
    [
        ("library/app", {}, "library/app"),
        ("app", {}, "library/app"),
        ("docker.io/library/app", {}, "docker.io/library/app"),
        ("library/app", {"ns": "docker.io"}, "library/app"),
    ],
)
async def test_link_leads_to_the_next_page_on_this_mirror(
    tmp_path: Path, path: str, query: dict[str, str], name: str
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for n in range(5):
            fake.add_image(LAYER, tag=f"v{n}")
        url = f"{server.url}/v2/{path}/tags/list?" + "&".join(
            f"{key}={value}" for key, value in {"n": "2", **query}.items()
        )
        pages = []
        while True:
            status, headers, body = await server.get(url)
            assert (status, headers["Content-Type"]) == (200, "application/json")
            assert headers["Content-Length"] == str(len(body))
            assert json.loads(body)["name"] == name
            pages.append(json.loads(body)["tags"])
            if "Link" not in headers:
                break
            link = re.fullmatch(r'<([^>]+)>; rel="next"', headers["Link"])
            assert link
            parts = urlsplit(link[1])
            assert (parts.scheme, parts.netloc, parts.path) == ("", "", "list")
            wanted = {"n": ["2"], "last": [pages[-1][-1]], **{k: [v] for k, v in query.items()}}
            assert parse_qs(parts.query) == wanted
            url = urljoin(url, link[1])
        assert pages == [["v0", "v1"], ["v2", "v3"], ["v4"]]


async def test_request_without_n_gets_up_to_4_mib_and_then_a_link_to_an_absolute_path(
    tmp_path: Path,
) -> None:
    """skopeo and podman send no ``n``, and follow a ``Link`` only if it is an absolute path."""
    # The default limits: a busy machine takes seconds to collect the list.
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(LAYER)
        names = [f"{'v' * 100}{number:06}" for number in range(20_000)]
        fake.tags = {("library/app", name): str(digest) for name in names}
        path, seen = "/v2/app/tags/list", []
        for is_last in (False, True):
            status, headers, body = await server.get(server.url + path)
            assert (status, headers["Content-Length"]) == (200, str(len(body)))
            assert len(body) < 4 * 1024 * 1024
            seen += json.loads(body)["tags"]
            assert ("Link" in headers) is not is_last
            path = headers.get("Link", "").removeprefix("<").partition(">")[0]
            assert is_last or path == f"/v2/library/app/tags/list?last={seen[-1]}"
        assert seen == names
        record = (await server.records())[-1]
        assert (record.bytes_sent, record.is_complete) == (len(body), True)
        _, headers, body = await server.get(f"{server.url}/v2/app/tags/list?n=20000")
        assert (len(json.loads(body)["tags"]), "Link" in headers) == (10_000, True)


async def test_head_of_a_list_has_the_length_and_no_body(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(LAYER)
        for path in ("tags/list", f"referrers/{digest}"):
            url = f"{server.url}/v2/library/app/{path}"
            _, _, body = await server.get(url)
            status, headers, nothing = await server.ask("HEAD", url)
            assert (status, nothing) == (200, b"")
            assert headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize("api", [True, False], ids=["api", "tag schema"])
async def test_referrers_are_served_whole_and_filtered_by_artifact_type(
    tmp_path: Path, api: bool
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(LAYER)
        listed = referrers_index(digest, SBOM, SIGNATURE)
        fake.referrers_api = api
        if api:
            fake.referring[str(digest)] = listed
        else:
            fake.add_manifest(listed, tag=referrers_tag(digest), media_type=OCI_INDEX)
        url = f"{server.url}/v2/library/app/referrers/{digest}"
        status, headers, body = await server.get(url)
        assert (status, body) == (200, listed)
        assert headers["Content-Type"] == OCI_INDEX
        assert "OCI-Filters-Applied" not in headers
        status, headers, body = await server.get(f"{url}?artifactType={SBOM}")
        assert [entry["artifactType"] for entry in json.loads(body)["manifests"]] == [SBOM]
        assert headers["OCI-Filters-Applied"] == "artifactType"
        assert headers["Content-Length"] == str(len(body))
        _, _, body = await server.get(f"{url}?artifactType=application/x.none")
        assert json.loads(body)["manifests"] == []
        assert {pull.kind for pull in await server.records()} == {Kind.REFERRERS}


# --- conformance, read-only -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["library/app", "docker.io/library/app"])
async def test_unknown_content_is_404_and_malformed_names_are_400(
    tmp_path: Path, path: str
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(LAYER)
        base = f"{server.url}/v2/{path}"
        for url, expected, error in [
            (f"{base}/manifests/{ABSENT}", {404}, "MANIFEST_UNKNOWN"),
            (f"{base}/manifests/.INVALID_MANIFEST_NAME", {400, 404}, "TAG_INVALID"),
            (f"{base}/manifests/no-such-tag", {404}, "MANIFEST_UNKNOWN"),
            (f"{base}/manifests/sha256:baddigeststring", {400, 404}, "DIGEST_INVALID"),
            (f"{base}/blobs/{ABSENT}", {404}, "BLOB_UNKNOWN"),
            (f"{base}/blobs/sha256:baddigeststring", {400, 404}, "DIGEST_INVALID"),
            (f"{base}/referrers/sha256:baddigeststring", {400}, "DIGEST_INVALID"),
            (f"{server.url}/v2/library/nothing/tags/list", {404}, "NAME_UNKNOWN"),
            (f"{server.url}/v2/app/tags/list?ns=ghcr.io", {404}, "NAME_UNKNOWN"),
            (f"{server.url}/v2/_catalog", {404}, "UNKNOWN"),
            (f"{server.url}/nothing", {404}, "UNKNOWN"),
        ]:
            status, headers, body = await server.get(url)
            assert status in expected, url
            assert code(body) == error, url
            assert headers["Content-Type"] == "application/json"
            assert headers["Content-Length"] == str(len(body))
            assert has_common_headers(headers)
            status, headers, nothing = await server.ask("HEAD", url)
            assert (status in expected, nothing) == (True, b"")
            assert has_common_headers(headers)
        # An unknown subject has no referrers. That is an empty index, not an error.
        status, headers, body = await server.get(f"{base}/referrers/{ABSENT}")
        assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
        assert json.loads(body) == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        assert (await server.get(f"{base}/manifests/{manifest}"))[0] == 200


async def test_malformed_pagination_is_400_without_an_upstream_request(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for query in ("n=-1", "n=many", "last=../x"):
            status, _, body = await server.get(f"{server.url}/v2/library/app/tags/list?{query}")
            assert (status, code(body)) == (400, "PAGINATION_NUMBER_INVALID")
        assert not fake.requests


async def test_error_response_echoes_a_configured_ns_only(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for url in (server.blob(ABSENT), server.manifest("absent"), server.manifest(ABSENT)):
            for method in ("GET", "HEAD"):
                status, headers, _ = await server.ask(method, f"{url}?ns=docker.io")
                assert status == 404
                assert headers["OCI-Namespace"] == "docker.io"
        _, headers, _ = await server.get(server.manifest("latest", query="?ns=evil.example"))
        assert "OCI-Namespace" not in headers, "a name that is not configured is never echoed"
