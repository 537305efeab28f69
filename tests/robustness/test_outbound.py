"""Rows HU1 to HU4, HU8: an upstream that sends us to other hosts, or wants our credentials."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from yarl import URL

from mirror.config.settings import Credentials, Upstream
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.upstream.outbound import Allowed, Policy, Refused, UrlSource, Zone, check_url, zone_of
from tests.fakes.registry import FakeRegistry, Fault
from tests.robustness.kit import NetworkLog
from tests.server_kit import running
from tests.unit.store.kit import random_bytes
from tests.unit.upstream.kit import rotating_helper

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


@pytest.mark.row("HU1-token-realms")
@pytest.mark.parametrize("realm", REALMS)
def test_untrusted_realms_are_refused(realm: str) -> None:
    verdict = check_url(realm, UrlSource.REALM, HUB.endpoint, HUB)
    if realm == "https://auth.docker.io:8443/token":
        # The host is trusted by its name, on every port for which it has a certificate.
        assert isinstance(verdict, Allowed)
    else:
        assert isinstance(verdict, Refused), verdict


@pytest.mark.row("HU1-token-realms")
@pytest.mark.parametrize(
    ("endpoint", "realm"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token"),
        ("https://registry.corp:5000", "https://registry.corp:5000/service/token"),
        ("http://10.1.2.3:5000", "http://10.1.2.3:5000/auth"),
        ("http://127.0.0.1:5000", "/token"),
    ],
)
def test_trusted_realms_are_accepted(endpoint: str, realm: str) -> None:
    policy = Policy(URL(endpoint), ("auth.docker.io",))
    assert isinstance(check_url(realm, UrlSource.REALM, policy.endpoint, policy), Allowed)


@pytest.mark.row("HU3-redirects")
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
def test_redirect_targets_are_accepted_or_refused_by_origin_and_address(
    target: str, allowed: bool
) -> None:
    verdict = check_url(target, UrlSource.REDIRECT, URL("https://registry-1.docker.io/v2/x"), HUB)
    assert isinstance(verdict, Allowed) is allowed
    if isinstance(verdict, Allowed) and "Signature" in target:
        assert str(verdict.url).endswith("a%2Fb"), "a signed URL stays unchanged"


def test_private_addresses_are_refused_in_every_notation() -> None:
    for host in (
        "127.0.0.1",
        "10.0.0.1",
        "::1",
        "[::1]",
        "::ffff:10.1.1.1",
        "0x7f.1",
        "fe80::1%lo",
    ):
        assert zone_of(host) not in (None, Zone.PUBLIC), host
    for host in ("registry-1.docker.io", "8.8.8.8", "2606:4700::1111"):
        assert zone_of(host) in (None, Zone.PUBLIC), host


@contextmanager
def listening() -> Iterator[tuple[int, list[object]]]:
    """Listen on a port that must get no connection. Yields the port and the calls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        calls: list[object] = []
        yield listener.getsockname()[1], calls
        while True:
            try:
                calls.append(listener.accept())
            except BlockingIOError:
                break


@pytest.mark.row("HU1-token-realms")
async def test_untrusted_realm_gets_no_lookup_and_no_connection(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    """No other name is looked up, and no port is connected to but that of the registry."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        with listening() as (port, calls), NetworkLog().watched() as network:
            fake.token = "t"
            realms = [*REALMS, f"http://127.0.0.1:{port}/token", f"http://localhost:{fake.port}/t"]
            for number, realm in enumerate(realms):
                # A header cannot have a line break. The test above checks that realm.
                fake.challenge = f'Bearer realm="{realm.splitlines()[0]}",service="x"'
                digest = fake.add_blob(b"%d" % number)
                status, _, _ = await server.get(server.blob(digest, query="?ns=other.io"))
                assert status == 502, realm
            fake.challenge = ""
            # The first request ends the cached challenge, the second one gets the new challenge.
            await server.get(server.blob(digest, query="?ns=other.io"))
            assert (await server.get(server.blob(digest, query="?ns=other.io")))[0] == 200
        assert not calls
        assert network.hosts <= {"127.0.0.1"}
        assert network.ports == {fake.port, int(server.url.rpartition(":")[2])}
        tried(len(realms))


@pytest.mark.row("HU2-redirecting-token-service")
async def test_redirects_of_a_token_service_are_not_followed(tmp_path: Path) -> None:
    with listening() as (port, calls):
        async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
            fake.token = "t"
            digest = fake.add_blob(DATA)
            fault = Fault(status=307, headers={"Location": f"http://127.0.0.1:{port}/"}, times=None)
            fake.fault("/token", fault)
            status, _, _ = await server.get(server.blob(digest))
            assert status == 502
    assert not calls


@pytest.mark.row("HU3-redirects")
async def test_redirect_to_another_origin_gets_no_credentials(tmp_path: Path) -> None:
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


@pytest.mark.row("HU3-redirects")
@pytest.mark.parametrize("target", ["self", "loop", "ftp://127.0.0.1/x"])
async def test_redirects_in_circles_or_to_the_mirror_are_refused(
    tmp_path: Path, target: str
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        location = {"self": f"{server.url}/v2/", "loop": f"/v2/library/app/blobs/{digest}"}
        headers = {"Location": location.get(target, target)}
        fake.fault(f"blobs/{digest}", Fault(status=302, headers=headers, times=None))
        status, _, _ = await server.get(server.blob(digest))
        assert status == 502
        assert len(fake.requests) <= 24


@pytest.mark.row("HU4-credentials-of-another")
@pytest.mark.row("HC14-secrets-in-output")
async def test_one_credential_never_gets_tokens_for_another_and_no_secret_leaks(
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


@pytest.mark.row("HU4-credentials-of-another")
async def test_two_credentials_at_one_token_service_have_separate_tokens(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake:
        fake.token = "t"
        ann = Upstream(endpoints=(fake.url,), credentials=Credentials(username="ann", password="x"))
        joe = Credentials(username="joe", password="y")
        async with running(tmp_path, fake.url, credentials=joe, other=ann) as server:
            for number in range(6):
                digest = fake.add_blob(b"%d" % number)
                query = f"?ns={'docker.io' if number % 2 else 'other.io'}"
                assert (await server.get(server.blob(digest, query=query)))[0] == 200
            asked = [s.headers["authorization"] for s in fake.requests if s.path == "/token"]
            assert asked == [f"Basic {b64encode(pair).decode()}" for pair in (b"ann:x", b"joe:y")]


@pytest.mark.row("HU4-credentials-of-another")
async def test_helper_runs_once_for_many_requests_and_a_rotated_secret_is_used_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = rotating_helper(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with FakeRegistry() as fake:
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"credHelpers": {f"127.0.0.1:{fake.port}": "test"}}))
        credentials = Credentials(docker_config=str(config))
        # The default limits: a busy machine takes seconds to start the helper.
        async with running(tmp_path / "data", fake.url, credentials=credentials) as server:
            for secret, runs in (("old", 1), ("new", 2)):
                (tmp_path / "secret").write_text(secret)
                fake.basic = "Basic " + b64encode(f"u:{secret}".encode()).decode()
                blobs = [fake.add_blob(DATA[:n] + secret.encode()) for n in range(40)]
                responses = await asyncio.gather(*(server.get(server.blob(b)) for b in blobs))
                assert {status for status, _, _ in responses} == {200}
                assert log.read_text().count("get") == runs


@pytest.mark.row("HU8-descriptor-urls")
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
