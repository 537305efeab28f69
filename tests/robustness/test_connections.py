"""Rows FD4 to FD8: endpoints with a path, addresses of connections, hanging names, TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Upstream
from mirror.oci.reference import Digest
from mirror.upstream import outbound
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.server_kit import running
from tests.unit.store.kit import random_bytes
from tests.unit.upstream.kit import tls_server

DATA = random_bytes(200_000, 51)


@contextmanager
def names(**addresses: list[str]) -> Iterator[list[str]]:
    """Resolve names as given (``_`` for a dot). Yields the names that were looked up."""
    real, asked = socket.getaddrinfo, []
    known = {name.replace("_", "."): found for name, found in addresses.items()}

    def look_up(host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(host)
        if host not in known:
            return real(host, port, *arguments, **named)
        return [
            entry
            for address in known[host]
            for entry in real(address, port, *arguments, **{**named, "flags": 0})
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        yield asked


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 127.0.0.1 for a public address, and 127.0.0.2 for what it is: ours."""
    parse = outbound._parse_address

    def parse_address(host: str) -> Any:
        return ipaddress.IPv4Address("8.8.8.8") if host == "127.0.0.1" else parse(host)

    monkeypatch.setattr(outbound, "_parse_address", parse_address)


def redirect(fake: FakeRegistry, digest: Digest, host: str) -> None:
    """Let ``fake`` redirect from a blob to the same path at ``host``."""
    target = f"http://{host}/v2/library/app/blobs/{digest}"
    fault = Fault(status=307, headers={"Location": target}, times=None)
    fake.fault(f"/v2/library/app/blobs/{digest}", fault)


# --- private addresses ----------------------------------------------------------------------------


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("address", ["127.0.0.2", "169.254.169.254", "::127.0.0.2", "10.0.0.1"])
async def test_redirect_by_name_to_a_private_address_is_refused_and_names_the_key(
    tmp_path: Path, address: str
) -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry(host="127.0.0.2") as inside,
        running(tmp_path, fake.url) as server,
    ):
        digest = fake.add_blob(DATA)
        inside.add_blob(DATA)
        redirect(fake, digest, f"storage.example:{inside.port}")
        with names(storage_example=[address]):
            status, _, body = await server.get(server.blob(digest))
        assert status == 502
        message = json.loads(body)["errors"][0]["message"]
        assert f"storage.example:{inside.port}: {address} is" in message
        key = "upstreams.docker.io.redirect_hosts"
        assert (key in message) is not address.startswith("169.254.")
        assert not inside.requests


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.usefixtures("public")
async def test_one_private_answer_opens_no_private_address_for_later_connections(
    tmp_path: Path,
) -> None:
    """The endpoint itself once has a private address, as after a poisoned answer of DNS."""
    async with (
        FakeRegistry() as fake,
        FakeRegistry(host="127.0.0.2") as inside,
    ):
        fake_at = f"registry.example:{fake.port}"
        digest = fake.add_blob(DATA)
        async with running(tmp_path, f"http://{fake_at}", fake.url) as server:
            with names(registry_example=["127.0.0.2"]):
                # Nobody listens on this port of 127.0.0.2, so the second endpoint responds.
                other = fake.add_blob(DATA[1:])
                assert (await server.get(server.blob(other)))[0] == 200
            inside.add_blob(DATA)
            redirect(fake, digest, f"storage.example:{inside.port}")
            with names(registry_example=["127.0.0.1"], storage_example=["127.0.0.2"]):
                assert (await server.get(server.blob(digest)))[0] == 502
        assert not inside.requests


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.usefixtures("public")
async def test_name_with_a_public_and_a_private_address_is_connected_to_at_the_public_one(
    tmp_path: Path,
) -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry() as storage,
        running(tmp_path, fake.url) as server,
    ):
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        redirect(fake, digest, f"storage.example:{storage.port}")
        with names(storage_example=["127.0.0.2", "127.0.0.1"]):
            status, _, body = await server.get(server.blob(digest))
        assert (status, body == DATA) == (200, True)


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.usefixtures("public")
async def test_public_storage_of_a_private_registry_may_not_redirect_back_inside(
    tmp_path: Path,
) -> None:
    async with (
        FakeRegistry(host="127.0.0.2") as fake,
        FakeRegistry() as storage,
        FakeRegistry(host="127.0.0.2") as inside,
        running(tmp_path, fake.url) as server,
    ):
        digest = fake.add_blob(DATA)
        redirect(fake, digest, f"127.0.0.1:{storage.port}")
        redirect(storage, digest, f"127.0.0.2:{inside.port}")
        assert (await server.get(server.blob(digest)))[0] == 502
        assert storage.requests
        assert not inside.requests


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.usefixtures("public")
async def test_private_storage_of_a_public_registry_may_not_redirect_to_an_unlisted_host(
    tmp_path: Path,
) -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry(host="127.0.0.2") as storage,
        FakeRegistry(host="127.0.0.3") as inside,
        running(tmp_path, fake.url, redirect_hosts=("127.0.0.2",)) as server,
    ):
        digest = fake.add_blob(DATA)
        inside.add_blob(DATA)
        redirect(fake, digest, f"127.0.0.2:{storage.port}")
        redirect(storage, digest, f"127.0.0.3:{inside.port}")
        assert (await server.get(server.blob(digest)))[0] == 502
        assert storage.requests
        assert not inside.requests


@pytest.mark.row("FD5-private-redirect-targets")
@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    "entry", ["storage.example", "storage.example:{port}", "*.example", "127.0.0.0/8", "127.0.0.2"]
)
async def test_redirect_hosts_allow_a_private_storage_of_a_public_registry(
    tmp_path: Path, entry: str
) -> None:
    async with FakeRegistry() as fake, FakeRegistry(host="127.0.0.2") as storage:
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        redirect(fake, digest, f"storage.example:{storage.port}")
        hosts = (entry.format(port=storage.port),)
        async with running(tmp_path, fake.url, redirect_hosts=hosts) as server:
            with names(storage_example=["127.0.0.2"]):
                status, _, body = await server.get(server.blob(digest))
            assert (status, body == DATA) == (200, True)
            with names(storage_example=["169.254.169.254"]):
                other = fake.add_blob(DATA[1:])
                redirect(fake, other, "storage.example:80")
                assert (await server.get(server.blob(other)))[0] == 502
        assert all("authorization" not in seen.headers for seen in storage.requests)


@pytest.mark.row("FD5-private-redirect-targets")
async def test_private_registry_may_redirect_to_its_private_storage_without_a_key(
    tmp_path: Path,
) -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry(host="127.0.0.2") as storage,
        running(tmp_path, fake.url) as server,
    ):
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        redirect(fake, digest, f"storage.example:{storage.port}")
        with names(storage_example=["127.0.0.2"]):
            assert (await server.get(server.blob(digest)))[0] == 200


@pytest.mark.row("HU3-redirects")
async def test_redirect_by_name_to_the_mirror_itself_is_refused(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        redirect(fake, digest, f"cache.example:{server.port}")
        with names(cache_example=["127.0.0.1"]):
            status, _, body = await server.get(server.blob(digest))
        assert status == 502
        assert b"127.0.0.1 is an address of this mirror" in body
        assert len(server.pulls) <= 1


# --- endpoints with a path ------------------------------------------------------------------------


@pytest.mark.row("FD4-endpoint-with-a-path")
async def test_endpoint_with_a_path_has_its_repositories_below_it(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, f"{fake.url}/hub-proxy/") as server:
        fake.token = "t"
        repository = "hub-proxy/library/app"
        fake.add_image(DATA, repository=repository, tag="latest")
        for number in range(1500):
            fake.tags[repository, f"v{number:04}"] = "sha256:0"
        assert (await server.get(server.manifest("latest")))[0] == 200
        assert (await server.get(server.blob(Digest.of(DATA))))[2] == DATA
        status, headers, body = await server.get(f"{server.url}/v2/library/app/tags/list?n=1200")
        assert (status, len(json.loads(body)["tags"])) == (200, 1200)
        assert json.loads(body)["name"] == "library/app"
        assert "hub-proxy" not in headers["Link"]
        scopes = {seen.query["scope"][0] for seen in fake.requests if seen.path == "/token"}
        assert scopes == {"repository:hub-proxy/library/app:pull"}
        paths = {seen.path for seen in fake.requests if seen.path != "/token"}
        assert all(path.startswith("/v2/hub-proxy/library/app/") for path in paths)


@pytest.mark.row("FD4-endpoint-with-a-path")
@pytest.mark.parametrize("prefix", ["", "/hub-proxy"])
async def test_registry_behind_a_path_that_it_does_not_know_is_paged_to_the_end(
    tmp_path: Path, prefix: str
) -> None:
    """Its links lack the path of the front: ``/v2/library/app/tags/list?last=...``."""
    endpoint = f"/artifactory/api/docker/hub/v2{prefix}"
    async with FakeRegistry() as fake, running(tmp_path, f"{fake.url}{endpoint}") as server:
        fake.base = "/artifactory/api/docker/hub"
        repository = f"{prefix}/library/app".lstrip("/")
        fake.add_image(DATA, repository=repository, tag="latest")
        for number in range(1500):
            fake.tags[repository, f"v{number:04}"] = "sha256:0"
        assert (await server.get(server.manifest("latest")))[0] == 200
        _, _, body = await server.get(f"{server.url}/v2/library/app/tags/list")
        assert len(json.loads(body)["tags"]) == 1501
        assert all(seen.path.startswith(fake.base) for seen in fake.requests)


@pytest.mark.row("FD4-endpoint-with-a-path")
async def test_redirect_within_the_origin_of_an_endpoint_with_a_path_keeps_the_credentials(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, f"{fake.url}/hub") as server:
        fake.token = "t"
        digest = fake.add_blob(DATA, "elsewhere/app")
        location = {"Location": f"/v2/elsewhere/app/blobs/{digest}"}
        fault = Fault(status=307, headers=location, times=None)
        fake.fault(f"/v2/hub/library/app/blobs/{digest}", Fault(), fault)
        assert (await server.get(server.blob(digest)))[0] == 200
        assert fake.requests[-1].headers["authorization"] == "Bearer t"


# --- names that hang ------------------------------------------------------------------------------


@pytest.mark.row("FD7-hanging-dns")
async def test_hanging_names_of_other_upstreams_delay_no_tls_client_and_no_metrics(
    tmp_path: Path,
) -> None:
    gate = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: Any, *arguments: Any, **named: Any) -> Any:
        if str(host).startswith("dead"):
            gate.wait(30)
            raise socket.gaierror(socket.EAI_NONAME, "not found")
        return resolve(host, *arguments, **named)

    more = {
        f"dead{number}.example": Upstream(endpoints=(f"http://dead{number}.example",))
        for number in range(8)
    }
    certificate = Certificate.make(tmp_path)
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        async with running(tmp_path, fake.url, others=more, certificate=certificate) as server:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket, "getaddrinfo", hang)
                # Different content, since fetches of the same content are one.
                urls = [
                    server.blob(f"sha256:{number:064x}", "org/app", f"?ns={name}")
                    for number, name in enumerate(more)
                ]
                asked = asyncio.gather(*map(server.get, urls), return_exceptions=True)
                try:
                    await asyncio.sleep(0.2)
                    async with asyncio.timeout(5):
                        for _ in range(2):  # cold, and then cached
                            assert (await server.get(server.blob(digest)))[2] == DATA
                        assert (await server.get(f"{server.url}/metrics"))[0] == 200
                finally:
                    gate.set()
                    await asked


# --- TLS of upstreams -----------------------------------------------------------------------------


@pytest.fixture
def client_certificate(tmp_path: Path) -> Certificate:
    return Certificate.make(tmp_path, "mirror-client")


def demanding(server: Certificate, client: Certificate) -> ssl.SSLContext:
    """Return the TLS context of a registry that wants the certificate of ``client``."""
    context = tls_server(server)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=client.cert_file)
    return context


@pytest.mark.row("FD8-upstream-tls")
@pytest.mark.parametrize("files", ["two", "one"])
async def test_client_certificate_opens_a_registry_that_wants_one(
    tmp_path: Path, client_certificate: Certificate, files: str
) -> None:
    certificate = Certificate.make(tmp_path)
    keys = {
        "ca": str(certificate.cert_file),
        "client_certificate": str(client_certificate.cert_file),
        "client_key": str(client_certificate.key_file),
    }
    if files == "one":
        both = tmp_path / "both.pem"
        both.write_bytes(
            client_certificate.cert_file.read_bytes() + client_certificate.key_file.read_bytes()
        )
        keys = {"ca": keys["ca"], "client_certificate": str(both)}
    async with FakeRegistry(demanding(certificate, client_certificate)) as fake:
        digest = fake.add_blob(DATA)
        async with running(tmp_path / "with", fake.url, **keys) as server:
            assert (await server.get(server.blob(digest)))[2] == DATA
        async with running(tmp_path / "without", fake.url, ca=keys["ca"]) as server:
            assert (await server.get(server.blob(digest)))[0] == 502


@pytest.mark.row("FD8-upstream-tls")
async def test_client_certificate_is_not_shown_to_the_storage_of_a_redirect(
    tmp_path: Path, client_certificate: Certificate
) -> None:
    certificate = Certificate.make(tmp_path)
    async with (
        FakeRegistry(tls_server(certificate)) as fake,
        FakeRegistry(demanding(certificate, client_certificate)) as storage,
    ):
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        target = f"{storage.url}/v2/library/app/blobs/{digest}"
        fault = Fault(status=307, headers={"Location": target}, times=None)
        fake.fault(f"blobs/{digest}", fault)
        async with running(
            tmp_path,
            fake.url,
            ca=str(certificate.cert_file),
            client_certificate=str(client_certificate.cert_file),
            client_key=str(client_certificate.key_file),
        ) as server:
            assert (await server.get(server.blob(digest)))[0] == 502
        assert not storage.requests


@pytest.mark.row("FD8-upstream-tls")
async def test_insecure_upstream_accepts_any_certificate_and_others_do_not(tmp_path: Path) -> None:
    expired = Certificate.make(tmp_path, "other.example", first_day=-9, last_day=-2)
    async with FakeRegistry(tls_server(expired)) as fake:
        digest = fake.add_blob(DATA)
        other = Upstream(endpoints=(fake.url,))
        async with running(tmp_path, fake.url, insecure=True, other=other) as server:
            assert (await server.get(server.blob(digest)))[2] == DATA
            status, _, _ = await server.get(server.blob(digest, query="?ns=other.io"))
            assert status == 502
