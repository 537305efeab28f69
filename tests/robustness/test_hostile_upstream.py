"""Rows HU5 to HU15: hostile responses of an upstream: huge, malformed, endless, with secrets."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Repository
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(300_000, 41)
CANARY = "canary-5f2a"
MIB = 1 << 20


@pytest.mark.row("HU5-huge-manifests")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b" " * (5 * 1024 * 1024), times=None),
        Fault(headers={"Content-Length": str(2**30)}, endless=True, times=None),
        Fault(body=b"{", endless=True, chunked=True, times=None),
        Fault(body=b"{", endless=True, no_length=True, times=None),
        Fault(body=b"[" * 100_000, times=None),
        Fault(body=b'{"x":' * 100_000, times=None),
        Fault(body=b"", times=None),
        Fault(body=b"null", times=None),
    ],
)
async def test_malformed_manifests_are_refused_and_not_read_to_the_end(
    tmp_path: Path, fault: Fault
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        body = fault.body if fault.body is not None else b"{}"
        digest = fake.add_manifest(body, tag="latest")
        fake.fault(f"manifests/{digest}", fault)
        async with asyncio.timeout(20):
            status, _, response = await server.get(server.manifest(digest))
        assert status == 502
        assert b'"errors"' in response
        assert fake.bytes_sent < 100 * MIB, "the body was not read to its end"
        assert (await server.get(f"{server.url}/healthz"))[0] == 200


@pytest.mark.row("HU6-wrong-types")
@pytest.mark.row("FB5-odd-manifests")
@pytest.mark.parametrize(
    "change",
    [
        {"mediaType": OCI_INDEX},
        {"manifests": []},
        {"layers": [{"mediaType": "x/y", "digest": "sha256:" + "a" * 64, "size": -1}]},
        {"layers": [{"mediaType": "x/y", "digest": "sha256:" + "a" * 64, "size": 2**63}]},
        {"layers": [{"mediaType": "x/y", "digest": "../../etc/passwd", "size": 1}]},
        {"config": {"mediaType": "x/y", "digest": "sha256:" + "a" * 64, "size": True}},
    ],
)
async def test_nothing_is_learned_from_wrong_types_and_impossible_sizes(
    tmp_path: Path, change: dict[str, object]
) -> None:
    config = {"mediaType": "x/y", "digest": "sha256:" + "a" * 64, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    body = json.dumps({**document, **change}).encode()
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_manifest(body, tag="latest")
        for reference in (digest, "latest"):
            status, headers, response = await server.get(server.manifest(reference))
            assert (status, response) == (200, body)
            assert headers["Content-Type"] == OCI_MANIFEST
            await until_recorded(server, digest)
        repository = Repository("docker.io", "library/app")
        learned = Digest.parse("sha256:" + "a" * 64)
        assert await server.store.index.access_record(repository, learned, "blob") is None


async def until_recorded(server: Server, digest: Digest) -> None:
    """Wait until the type that the upstream stated is in the index."""
    repository = Repository("docker.io", "library/app")
    for _ in range(1000):
        if await server.store.index.access_record(repository, digest, "manifest") is not None:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("no record")


@pytest.mark.row("HU10-header-bombs")
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Bomb": "x" * 200_000},
        {f"X-{n}": "y" for n in range(5000)},
        {"X-Nul": "a\x00b"},
        {"X-Return": "a\rb"},
        {"X-Lines": "a\r\n b"},
        {"Docker-Content-Digest": "sha256:" + "z" * 64},
        {"Content-Type": "text/html\x0b; evil"},
    ],
)
async def test_header_bombs_are_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA)
        fake.fault("manifests/latest", Fault(headers=headers, times=None))
        status, got, _ = await server.get(server.manifest("latest"))
        assert status in (200, 502)
        assert not {name.lower() for name in got if name.lower().startswith("x-")} - {
            "x-request-id",
            "x-content-type-options",
        }
        assert (await server.get(f"{server.url}/healthz"))[0] == 200


@pytest.mark.row("HU11-compression-bombs")
async def test_unrequested_encoding_is_not_decompressed(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    """A bomb of 200 MiB in each kind of response."""
    bomb = gzip.compress(bytes(200 * MIB), 1)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        urls = {
            f"blobs/{Digest.of(DATA)}": server.blob(Digest.of(DATA)),
            f"manifests/{digest}": server.manifest(digest),
            "tags/list": f"{server.url}/v2/library/app/tags/list",
        }
        for encoding in ("gzip", "br", "zstd", "deflate"):
            headers = {"Content-Encoding": encoding}
            for path, url in urls.items():
                fake.faults.clear()
                fake.fault(path, Fault(headers=headers, body=bomb, times=None))
                assert (await server.get(url))[0] == 502, (encoding, path)
                tried(1)
        assert {seen.headers["accept-encoding"] for seen in fake.requests} == {"identity"}


@pytest.mark.row("HU12-cookies")
async def test_cookies_and_alt_svc_are_ignored(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        headers = {
            "Set-Cookie": "a=b; Path=/",
            "Alt-Svc": 'h3=":1"',
            "Strict-Transport-Security": "1",
        }
        fake.fault("manifests/latest", Fault(headers=headers, times=None))
        fake.fault(f"manifests/{digest}", Fault(headers=headers, times=None))
        _, got, _ = await server.get(server.manifest("latest"))
        await server.get(server.blob(Digest.of(DATA)))
        assert not [seen for seen in fake.requests if "cookie" in seen.headers]
        assert not {"Set-Cookie", "Alt-Svc"} & set(got)


@pytest.mark.row("HU13-endless-lists")
@pytest.mark.parametrize(
    "link",
    [
        '</v2/library/app/tags/list?n=1>; rel="next"',
        '<http://127.0.0.1:1/v2/library/app/tags/list>; rel="next"',
        '<//evil.example/v2/>; rel="next"',
        "<" * 50_000,
    ],
)
async def test_links_to_another_host_or_in_a_circle_cost_few_requests(
    tmp_path: Path, link: str
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA, tag="a")
        fake.fault("tags/list", Fault(headers={"Link": link}, times=None))
        async with asyncio.timeout(20):
            status, _, _ = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert status in (200, 502)
        assert len(fake.requests) < 10


@pytest.mark.row("HU13-endless-lists")
@pytest.mark.parametrize(("count", "expected"), [(1_000_000, 200), (1_600_000, 502)])
async def test_tag_lists_are_bounded(tmp_path: Path, count: int, expected: int) -> None:
    """An upstream that ignores ``n`` may send 16 MiB in one response. It is whole, or an error."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        tags = [f"t{n:07}" for n in range(count)]
        body = json.dumps({"tags": tags}, separators=(",", ":")).encode()
        fake.add_image(DATA)
        fake.fault("tags/list", Fault(body=body, times=None))
        status, _, response = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert status == expected
        assert expected == 502 or json.loads(response)["tags"] == tags[: 2_000_000 // 9]
        assert (await server.get(f"{server.url}/healthz"))[0] == 200


@pytest.mark.row("HU13-endless-lists")
async def test_endless_list_is_refused(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA)
        fake.fault("tags/list", Fault(body=b'["x",', endless=True, chunked=True, times=None))
        url = f"{server.url}/v2/library/app/tags/list?n=5"
        assert (await server.get(url))[0] == 502
        assert fake.bytes_sent < 100 * MIB


@pytest.mark.row("HU14-many-referrers")
async def test_100000_referrers_give_a_bounded_response(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        entry = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 5}
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] * 100_000}
        fake.referring[str(digest)] = json.dumps(document).encode()
        async with asyncio.timeout(20):
            url = f"{server.url}/v2/library/app/referrers/{digest}"
            status, _, body = await server.get(url)
        assert status in (200, 502)
        assert len(body) <= 4 * 1024 * 1024


@pytest.mark.row("HU15-hostile-error-bodies")
async def test_error_body_is_not_shown_to_clients_or_in_logs(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        body = json.dumps(
            {"errors": [{"code": "DENIED", "message": f"\x1b[31m{CANARY}\r\nX-Evil: 1"}]}
        ).encode()
        for status in (400, 401, 403, 404, 429, 500):
            fake.faults.clear()
            fake.fault("manifests/latest", Fault(status=status, body=body, times=None))
            _, headers, response = await server.get(server.manifest("latest"))
            assert CANARY not in response.decode() + str(headers)
            assert "X-Evil" not in headers
        assert CANARY not in repr(server.events)


async def test_refused_connection_of_a_client_leaves_the_server_running(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        with pytest.raises(aiohttp.ClientError):
            await server.client.get("http://127.0.0.1:1/")
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
