"""Rows HU: an upstream that means harm."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from mirror.config import Credentials
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.digest import Digest
from mirror.upstream.outbound import Allowed, Policy, Purpose, Refused, is_private, judge
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import running
from tests.store_kit import random_bytes
from tests.upstream_kit import rotating_helper

DATA = random_bytes(300_000, 41)
CANARY = "canary-5f2a"
HUB = Policy(URL("https://registry-1.docker.io"), ("auth.docker.io",), {("mirror.internal", 5100)})
REALMS = [
    "https://evil.example/token",
    "https://auth.docker.io.evil.example/token",
    "https://auth.docker.io@evil.example/token",
    "https://user:pass@auth.docker.io/token",
    "http://auth.docker.io/token",
    "http://registry-1.docker.io/token",
    "https://auth.docker.io:8443/token",
    "https://127.0.0.1/token",
    "https://127.1/token",
    "https://2130706433/token",
    "https://0x7f000001/token",
    "https://0177.0.0.1/token",
    "https://0.0.0.0/token",
    "https://[::]/token",
    "https://[::1]/token",
    "https://[::ffff:127.0.0.1]/token",
    "https://localhost/token",
    "https://169.254.169.254/latest/meta-data",
    "https://10.0.0.1/token",
    "ftp://auth.docker.io/token",
    "file:///etc/passwd",
    "gopher://auth.docker.io/",
    "javascript:alert(1)",
    "https:\\\\auth.docker.io\\token",
    "https://auth.docker.io\r\nX-Evil: 1",
    "https://auth.docker.io:99999/token",
    "https://auth.docker.io:443@evil.example/",
    "//evil.example/token",
    "https://mirror.internal:5100/token",
]


@pytest.mark.row("HU1")
@pytest.mark.parametrize("realm", REALMS)
def test_realms_that_get_no_connection(realm: str) -> None:
    verdict = judge(realm, Purpose.REALM, HUB.endpoint, HUB)
    if realm == "https://auth.docker.io:8443/token":
        # The host is trusted by name, on whatever port it has a certificate for.
        assert isinstance(verdict, Allowed)
    else:
        assert isinstance(verdict, Refused), verdict


@pytest.mark.row("HU1")
@pytest.mark.parametrize(
    ("endpoint", "realm"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token"),
        ("https://registry.corp:5000", "https://registry.corp:5000/service/token"),
        ("http://10.1.2.3:5000", "http://10.1.2.3:5000/auth"),
        ("http://127.0.0.1:5000", "/token"),
    ],
)
def test_realms_that_work(endpoint: str, realm: str) -> None:
    policy = Policy(URL(endpoint), ("auth.docker.io",))
    assert isinstance(judge(realm, Purpose.REALM, policy.endpoint, policy), Allowed)


@pytest.mark.row("HU3")
@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("https://cdn.example/blob?X-Amz-Signature=a%2Fb", True),
        ("/v2/other/path", True),
        ("http://cdn.example/blob", False),
        ("https://127.0.0.1/blob", False),
        ("https://[::ffff:10.0.0.1]/blob", False),
        ("https://3232235777/blob", False),
        ("https://localhost/blob", False),
        ("https://user@cdn.example/blob", False),
        ("https://mirror.internal:5100/v2/", False),
        ("ftp://cdn.example/blob", False),
    ],
)
def test_redirect_targets(target: str, allowed: bool) -> None:
    verdict = judge(target, Purpose.REDIRECT, URL("https://registry-1.docker.io/v2/x"), HUB)
    assert isinstance(verdict, Allowed) is allowed
    if isinstance(verdict, Allowed) and "Signature" in target:
        assert str(verdict.url).endswith("a%2Fb"), "what is signed stays as it was written"


def test_private_addresses_in_every_notation() -> None:
    for host in (
        "127.0.0.1",
        "10.0.0.1",
        "::1",
        "[::1]",
        "::ffff:10.1.1.1",
        "0x7f.1",
        "fe80::1%lo",
    ):
        assert is_private(host), host
    for host in ("registry-1.docker.io", "8.8.8.8", "2606:4700::1111"):
        assert not is_private(host), host


@contextmanager
def listening() -> Iterator[tuple[int, list[object]]]:
    """A port on which nobody must call."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        calls: list[object] = []
        yield listener.getsockname()[1], calls
        while True:
            try:
                calls.append(listener.accept())
            except BlockingIOError:
                break


@pytest.mark.row("HU1")
async def test_a_foreign_realm_is_never_called(tmp_path: Path) -> None:
    with listening() as (port, calls):
        async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
            fake.token = "t"
            fake.challenge = f'Bearer realm="http://127.0.0.1:{port}/token",service="x"'
            digest = fake.add_blob(DATA)
            status, _, _ = await server.get(server.blob(digest))
            assert status == 502
    assert not calls


@pytest.mark.row("HU2")
async def test_a_token_service_that_redirects(tmp_path: Path) -> None:
    with listening() as (port, calls):
        async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
            fake.token = "t"
            digest = fake.add_blob(DATA)
            fault = Fault(status=307, headers={"Location": f"http://127.0.0.1:{port}/"}, times=None)
            fake.fault("/token", fault)
            status, _, _ = await server.get(server.blob(digest))
            assert status == 502
    assert not calls


@pytest.mark.row("HU3")
async def test_a_redirect_to_another_origin_gets_no_credentials(tmp_path: Path) -> None:
    credentials = Credentials(username="user", password=CANARY)
    async with (
        FakeRegistry() as fake,
        FakeRegistry() as cdn,
        running(tmp_path, fake.url, credentials=credentials) as server,
    ):
        fake.token = "t"
        digest = fake.add_blob(DATA)
        cdn.add_blob(DATA)
        target = f"{cdn.url}/v2/library/app/blobs/{digest}?signature=1"
        redirect = Fault(status=307, headers={"Location": target}, times=None)
        fake.fault(f"blobs/{digest}", Fault(), redirect)
        status, headers, body = await server.get(server.blob(digest))
        assert (status, body == DATA) == (200, True)
        assert "Location" not in headers
        assert cdn.requests
        assert all("authorization" not in seen.headers for seen in cdn.requests)


@pytest.mark.row("HU3")
@pytest.mark.parametrize("target", ["self", "loop", "ftp://127.0.0.1/x"])
async def test_redirects_that_lead_nowhere(tmp_path: Path, target: str) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        location = {"self": f"{server.url}/v2/", "loop": f"/v2/library/app/blobs/{digest}"}
        headers = {"Location": location.get(target, target)}
        fake.fault(f"blobs/{digest}", Fault(status=302, headers=headers, times=None))
        status, _, _ = await server.get(server.blob(digest))
        assert status == 502
        assert len(fake.requests) <= 24


@pytest.mark.row("HU4")
@pytest.mark.row("HC14")
async def test_one_credential_never_mints_for_another_and_no_secret_leaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(CANARY + "\n")
    credentials = Credentials(username="user", password=f"file:{secret}")
    async with (
        FakeRegistry() as fake,
        running(tmp_path / "data", fake.url, credentials=credentials) as server,
    ):
        fake.token = "token-" + CANARY
        digest = fake.add_blob(DATA)
        assert (await server.get(server.blob(digest)))[0] == 200
        basic = [s.headers["authorization"] for s in fake.requests if s.path == "/token"]
        assert [value.split()[0] for value in basic] == ["Basic"]
        assert all(
            value.startswith("Bearer ")
            for seen in fake.requests
            if seen.path != "/token" and (value := seen.headers.get("authorization", "Bearer "))
        )
        fake.token_status = 500
        fake.token = "other-" + CANARY
        _, headers, body = await server.get(server.blob(fake.add_blob(DATA[1:])))
        _, _, metrics = await server.get(f"{server.url}/metrics")
        shown = [str(headers), body.decode(), metrics.decode(), repr(server.events)]
        assert CANARY not in "".join(shown)
    assert CANARY not in repr(credentials)
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    found = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert not [path for path in found if CANARY.encode() in path.read_bytes()]


@pytest.mark.row("HU4")
async def test_a_helper_is_run_once_for_many_and_a_rotated_secret_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = rotating_helper(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with FakeRegistry() as fake:
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"credHelpers": {f"127.0.0.1:{fake.port}": "test"}}))
        credentials = Credentials(docker_config=str(config))
        async with running(tmp_path / "data", fake.url, credentials=credentials) as server:
            for secret, runs in (("old", 1), ("new", 2)):
                (tmp_path / "secret").write_text(secret)
                fake.basic = "Basic " + base64.b64encode(f"u:{secret}".encode()).decode()
                blobs = [fake.add_blob(DATA[:n] + secret.encode()) for n in range(40)]
                answers = await asyncio.gather(*(server.get(server.blob(b)) for b in blobs))
                assert {status for status, _, _ in answers} == {200}
                assert log.read_text().count("get") == runs


@pytest.mark.row("HU5")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b" " * (5 * 1024 * 1024), times=None),
        Fault(headers={"Content-Length": str(2**30)}, times=None),
        Fault(body=b"x" * (6 * 1024 * 1024), chunked=True, times=None),
        Fault(body=b"[" * 100_000, times=None),
        Fault(body=b'{"schemaVersion":NaN}', times=None),
        Fault(body=b'{"mediaType":"\\ud800"}', times=None),
        Fault(body=b"", times=None),
        Fault(body=b"null", times=None),
    ],
)
async def test_manifests_that_are_none(tmp_path: Path, fault: Fault) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        body = fault.body if fault.body is not None else b"{}"
        digest = fake.add_manifest(body, tag="latest")
        fake.fault(f"manifests/{digest}", fault)
        async with asyncio.timeout(20):
            status, _, answer = await server.get(server.manifest(digest))
        assert status == 502
        assert b'"errors"' in answer
        assert (await server.get(f"{server.url}/healthz"))[0] == 200


@pytest.mark.row("HU6")
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
async def test_type_confusion_and_impossible_sizes(
    tmp_path: Path, change: dict[str, object]
) -> None:
    config = {"mediaType": "x/y", "digest": "sha256:" + "a" * 64, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    body = json.dumps({**document, **change}).encode()
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_manifest(body, tag="latest")
        for reference in (digest, "latest"):
            status, _, answer = await server.get(server.manifest(reference))
            assert (status, b"MANIFEST_INVALID" in answer) == (502, True)


@pytest.mark.row("HU8")
async def test_urls_of_descriptors_are_never_fetched(tmp_path: Path) -> None:
    with listening() as (port, calls):
        async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
            layer = {
                "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                "digest": str(Digest.of(DATA)),
                "size": len(DATA),
                "urls": [f"http://127.0.0.1:{port}/layer"],
            }
            config = {"mediaType": "x/y", "digest": str(fake.add_blob(b"{}")), "size": 2}
            body = json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": OCI_MANIFEST,
                    "config": config,
                    "layers": [layer],
                }
            ).encode()
            fake.add_manifest(body, tag="latest")
            assert (await server.get(server.manifest("latest")))[0] == 200
            assert (await server.get(server.blob(Digest.of(DATA))))[0] == 404
    assert not calls


@pytest.mark.row("HU10")
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Bomb": "x" * 200_000},
        {f"X-{n}": "y" for n in range(5000)},
        {"X-Nul": "a\x00b"},
        {"Docker-Content-Digest": "sha256:" + "z" * 64},
        {"Content-Type": "text/html\x0b; evil"},
    ],
)
async def test_header_bombs(tmp_path: Path, headers: dict[str, str]) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA)
        fake.fault("manifests/latest", Fault(headers=headers, times=None))
        status, got, _ = await server.get(server.manifest("latest"))
        assert status in (200, 502)
        assert not {name.lower() for name in got if name.lower().startswith("x-")} - {
            "x-request-id"
        }
        assert (await server.get(f"{server.url}/healthz"))[0] == 200


@pytest.mark.row("HU11")
async def test_an_encoding_nobody_asked_for_is_not_unpacked(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA)
        for encoding in ("gzip", "br", "zstd", "deflate"):
            fake.faults.clear()
            headers = {"Content-Encoding": encoding}
            fake.fault(f"blobs/{Digest.of(DATA)}", Fault(headers=headers, times=None))
            assert (await server.get(server.blob(Digest.of(DATA))))[0] == 502
        assert {seen.headers["accept-encoding"] for seen in fake.requests} == {"identity"}


@pytest.mark.row("HU12")
async def test_cookies_and_alternatives_are_ignored(tmp_path: Path) -> None:
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


@pytest.mark.row("HU13")
@pytest.mark.parametrize(
    "link",
    [
        '</v2/library/app/tags/list?n=1>; rel="next"',
        '<http://127.0.0.1:1/v2/library/app/tags/list>; rel="next"',
        '<//evil.example/v2/>; rel="next"',
        "<" * 50_000,
    ],
)
async def test_links_to_elsewhere_and_in_circles(tmp_path: Path, link: str) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(DATA, tag="a")
        fake.fault("tags/list", Fault(headers={"Link": link}, times=None))
        async with asyncio.timeout(20):
            status, _, _ = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert status in (200, 502)
        assert len(fake.requests) < 10


@pytest.mark.row("HU13")
async def test_a_million_tags(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        tags = [f"t{n:07}" for n in range(400_000)]
        body = json.dumps({"name": "library/app", "tags": tags}).encode()
        fake.add_image(DATA)
        fake.fault("tags/list", Fault(body=body, times=None))
        async with asyncio.timeout(30):
            status, _, answer = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert len(json.loads(answer)["tags"]) <= 10_000
        fake.faults.clear()
        fake.fault("tags/list", Fault(body=b'["x",' * 10_000_000, times=None))
        url = f"{server.url}/v2/library/app/tags/list?n=5"
        assert (await server.get(url))[0] == 502
        assert (status, (await server.get(f"{server.url}/healthz"))[0]) == (200, 200)


@pytest.mark.row("HU14")
async def test_a_hundred_thousand_referrers(tmp_path: Path) -> None:
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


@pytest.mark.row("HU15")
async def test_what_an_error_body_says_is_shown_to_nobody(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        body = json.dumps(
            {"errors": [{"code": "DENIED", "message": f"\x1b[31m{CANARY}\r\nX-Evil: 1"}]}
        ).encode()
        for status in (400, 401, 403, 404, 429, 500):
            fake.faults.clear()
            fake.fault("manifests/latest", Fault(status=status, body=body, times=None))
            _, headers, answer = await server.get(server.manifest("latest"))
            assert CANARY not in answer.decode() + str(headers)
            assert "X-Evil" not in headers
        assert CANARY not in repr(server.events)


async def test_a_client_error_is_no_crash(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        with pytest.raises(aiohttp.ClientError):
            await server.client.get("http://127.0.0.1:1/")
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
