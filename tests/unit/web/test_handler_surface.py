"""What load balancers, proxies, caches and browsers send and expect, over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mirror.config.settings import Upstream
from mirror.observability.events import ConnectionRefused, Kind, Outcome
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.real import tokens
from tests.robustness.kit import CLOSE, send_raw, statuses
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

LAYER = random_bytes(10_000, 71)
DIGEST = Digest.of(LAYER)
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
LARGE = random_bytes(600_000, 72)


# --- probes -------------------------------------------------------------------------------------


@pytest.mark.row("FE10-load-balancer-probes")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/?probe=1", "/healthz", "/readyz", "/metrics", "/v2/"])
async def test_probe_is_200_and_counts_as_ping(tmp_path: Path, path: str, method: str) -> None:
    async with running(tmp_path) as server:
        status, headers, body = await server.ask(method, server.url + path)
        assert (status, bool(body)) == (200, method == "GET")
        (pull,) = await server.records()
        assert (pull.kind, pull.error) == (Kind.PING, "")
        assert int(headers["Content-Length"]) > 0


@pytest.mark.row("FE10-load-balancer-probes")
async def test_root_is_a_line_of_text(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        _, headers, body = await server.get(f"{server.url}/")
        assert body == b"oci-mirror: a pull-through mirror for container registries\n"
        assert headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.row("FE10-load-balancer-probes")
async def test_probe_with_http_1_0_and_without_host_is_200(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for path in ("/", "/healthz"):
            assert statuses(await send_raw(server, f"GET {path} HTTP/1.0\r\n\r\n".encode())) == [
                200
            ]


# --- targets in absolute-form -------------------------------------------------------------------


async def test_absolute_form_is_served_as_its_path(tmp_path: Path) -> None:
    """RFC 9112, section 3.2.2: a server must accept it in every request."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(LAYER)
        for target, expected in [
            ("http://mirror:5100/v2/library/app/manifests/latest?ns=docker.io", 200),
            ("HTTP://mirror/healthz", 200),
            ("http://mirror", 200),
            ("http://mirror/v2/library/app/blobs/nothing", 400),
            ("ftp://mirror/v2/", 400),
        ]:
            raw = await send_raw(server, f"GET {target} HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode())
            assert statuses(raw)[:1] == [expected], target
        first, *_ = await server.records()
        assert (first.repository, first.ns) == ("library/app", "docker.io")


# --- caches between the client and the mirror -----------------------------------------------------


async def test_tag_varies_by_accept_and_content_by_digest_is_immutable(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(LAYER)
        for _ in ("cold", "warm"):
            for method in ("HEAD", "GET"):
                _, headers, _ = await server.ask(method, server.manifest("latest"))
                assert (headers.get("Vary"), headers.get("Cache-Control")) == ("Accept", None)
                for url in (server.manifest(manifest), server.blob(DIGEST)):
                    _, headers, _ = await server.ask(method, url)
                    immutable = "public, max-age=31536000, immutable"
                    assert (headers.get("Vary"), headers["Cache-Control"]) == (None, immutable)
        status, headers, _ = await server.get(server.blob(DIGEST), {"Range": "bytes=1-2"})
        assert (status, "immutable" in headers["Cache-Control"]) == (206, True)
        tagged = {"If-None-Match": f'"{manifest}"'}
        status, headers, _ = await server.get(server.manifest("latest"), tagged)
        assert (status, headers["Vary"]) == (304, "Accept")


async def test_error_about_a_digest_is_not_cacheable(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for url in (server.blob(DIGEST), server.manifest(DIGEST)):
            status, headers, _ = await server.get(url)
            assert (status, "Cache-Control" in headers) == (404, False)


# --- draining -----------------------------------------------------------------------------------


@pytest.mark.row("G9-stop-in-time")
async def test_refusal_while_draining_names_a_time_and_closes_the_connection(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as server:
        server.running_server.health.is_draining = True
        for url in (server.blob(DIGEST), server.manifest("latest"), f"{server.url}/v2/_catalog"):
            status, headers, _ = await server.get(url)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert headers["Connection"] == "close"


@pytest.mark.row("G9-stop-in-time")
async def test_small_response_during_which_draining_begins_closes_the_connection(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        fake.add_image(LAYER)
        await server.get(server.manifest("latest"))
        gate = asyncio.Event()
        held = asyncio.Event()
        service = server.running_server.mirror.service
        answer = service.manifest

        async def slow(*arguments: object, **named: object) -> object:
            result = await answer(*arguments, **named)  # type: ignore[arg-type] # passed on as they came
            held.set()
            await gate.wait()
            return result

        service.manifest = slow  # type: ignore[method-assign, assignment] # to hold it back
        request = asyncio.gather(server.get(server.manifest("latest")))
        await held.wait()
        server.running_server.health.is_draining = True
        gate.set()
        ((status, headers, _),) = await request
        assert (status, headers.get("Connection")) == (200, "close")
        (_, pull) = await server.records()
        assert pull.is_sent_in_one_write


@pytest.mark.row("G9-stop-in-time")
@pytest.mark.parametrize("tls", [False, True])
async def test_abort_cuts_off_every_client_and_says_why(tmp_path: Path, tls: bool) -> None:
    certificate = tokens.Certificate.make(tmp_path) if tls else None
    async with (
        FakeRegistry() as fake,
        running(tmp_path / "data", fake.url, certificate=certificate) as server,
    ):
        digest = fake.add_blob(LARGE)
        fake.fault(f"blobs/{digest}", Fault(stall_at=300_000))
        responses = [await server.client.get(server.blob(digest)) for _ in range(3)]
        assert server.running_server.handler.abort_all() == 3
        async with asyncio.timeout(5):
            records = await server.records()
        assert {pull.outcome for pull in records} == {Outcome.ERROR}
        assert {pull.error for pull in records} == {"cut off at the end of drain_timeout"}
        for response in responses:
            response.close()


# --- proxies and limits -------------------------------------------------------------------------


@pytest.mark.row("FE11-trusted-proxies")
async def test_record_names_the_client_that_a_trusted_proxy_names(tmp_path: Path) -> None:
    more = {"trusted_proxies": ["127.0.0.0/8"]}
    async with running(tmp_path, more=more) as server:
        await server.get(f"{server.url}/v2/", {"X-Forwarded-For": "203.0.113.9, 192.0.2.7"})
        await server.get(f"{server.url}/v2/", {"Forwarded": "for=192.0.2.8"})
        await server.get(f"{server.url}/v2/")
        clients = [pull.client for pull in await server.records()]
        assert clients == ["192.0.2.7", "192.0.2.8", "127.0.0.1"]


@pytest.mark.row("FE11-trusted-proxies")
async def test_forwarded_fields_are_ignored_without_trusted_proxies(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        await server.get(f"{server.url}/v2/", {"X-Forwarded-For": "192.0.2.7"})
        assert [pull.client for pull in await server.records()] == ["127.0.0.1"]


async def open_idle(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


@pytest.mark.row("HC8-connection-limits")
async def test_connection_above_the_limit_gets_429_until_another_one_ends(tmp_path: Path) -> None:
    """An idle connection counts, too."""
    async with running(tmp_path, more={"max_client_connections": 2}) as server:
        idle = [await open_idle(server) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await send_raw(server, b"")
        assert statuses(refused) == [429]
        assert [e.client for e in server.events if isinstance(e, ConnectionRefused)] == [
            "127.0.0.1"
        ]
        assert b"\r\nRetry-After: 1\r\n" in refused
        assert b"\r\nX-Content-Type-Options: nosniff\r\n" in refused
        assert (
            json.loads(refused.partition(b"\r\n\r\n")[2])["errors"][0]["code"] == "TOOMANYREQUESTS"
        )
        idle[0][1].close()
        await idle[0][1].wait_closed()
        await asyncio.sleep(0.05)
        assert statuses(await send_raw(server, f"GET / HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode())) == [
            200
        ]
        idle[1][1].close()


@pytest.mark.row("HC8-connection-limits")
async def test_limit_counts_requests_of_the_clients_behind_a_trusted_proxy(tmp_path: Path) -> None:
    more = {"trusted_proxies": ["127.0.0.1"], "max_client_connections": 1}
    async with FakeRegistry() as fake, running(tmp_path, fake.url, more=more) as server:
        digest = fake.add_blob(LARGE)
        rest = asyncio.Event()
        fake.fault(f"blobs/{digest}", Fault(stall_at=300_000, gate=rest))
        one, two = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
        async with server.client.get(server.blob(digest), headers=one) as response:
            status, headers, body = await server.get(f"{server.url}/v2/", one)
            assert (status, headers["Retry-After"]) == (429, "1")
            assert json.loads(body)["errors"][0]["code"] == "TOOMANYREQUESTS"
            assert [pull.outcome for pull in server.pulls] == [Outcome.DENIED]
            # Another client, and the proxy's own probes.
            assert (await server.get(f"{server.url}/v2/", two))[0] == 200
            assert (await server.get(f"{server.url}/healthz"))[0] == 200
            rest.set()
            assert await response.read() == LARGE
        assert (await server.get(f"{server.url}/v2/", one))[0] == 200


# --- the catalogue ------------------------------------------------------------------------------


async def pull_images(fake: FakeRegistry, server: Server, *names: str) -> None:
    """Pull the tag ``latest`` of each, named ``upstream/repository``."""
    for name in names:
        repository = name.partition("/")[2]
        config = {"mediaType": OCI_CONFIG, "digest": str(DIGEST), "size": len(LAYER)}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
        body = json.dumps({**document, "annotations": {"name": name}}).encode()
        fake.add_manifest(body, repository, "latest", OCI_MANIFEST)
        status, _, _ = await server.get(server.manifest("latest", name))
        assert status == 200
    await server.store.idle()
    await server.store.measure()


async def names(server: Server, query: str = "") -> tuple[list[str], str | None]:
    status, headers, body = await server.get(f"{server.url}/v2/_catalog{query}")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return json.loads(body)["repositories"], headers.get("Link")


async def test_catalog_is_404_and_names_its_key_unless_it_is_switched_on(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        status, _, body = await server.get(f"{server.url}/v2/_catalog")
        assert (status, "catalog" in json.loads(body)["errors"][0]["message"]) == (404, True)


@pytest.mark.row("FC3-links-behind-a-prefix")
async def test_catalog_lists_each_repository_once_in_order_and_by_pages(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as fake,
        running(tmp_path, fake.url, more={"catalog": True}) as server,
    ):
        await pull_images(
            fake,
            server,
            "docker.io/org/b",
            "other.io/org/c",
            "docker.io/org/a",
            "docker.io/library/z",
        )
        everything = ["docker.io/library/z", "docker.io/org/a", "docker.io/org/b", "other.io/org/c"]
        assert await names(server) == (everything, None)
        paged: list[str] = []
        query: str | None = "?n=3"
        while query is not None:
            page, link = await names(server, query)
            paged += page
            # Relative, so that a proxy may add a prefix.
            assert link is None or link.startswith("<_catalog?")
            query = link and "?" + link.partition("?")[2].partition(">")[0]
        assert paged == everything
        assert await names(server, "?ns=docker.io") == (["library/z", "org/a", "org/b"], None)
        assert (await names(server, "?ns=docker.io&n=1&last=library/z"))[0] == ["org/a"]
        assert await names(server, "?ns=other.io") == (["org/c"], None)
        assert await names(server, "?n=0") == ([], None)
        assert await names(server, "?last=other.io/org/c") == ([], None)
        assert {pull.kind for pull in await server.records()} == {Kind.MANIFEST, Kind.CATALOG}


async def test_catalog_leaves_out_repositories_that_are_denied_or_not_on_disk(
    tmp_path: Path,
) -> None:
    more = {"catalog": True}
    async with FakeRegistry() as fake:
        async with running(tmp_path, fake.url) as server:
            await pull_images(fake, server, "docker.io/org/secret", "docker.io/org/a")
            await pull_images(fake, server, "docker.io/org/evicted")
            page = await server.store.index.names(0)
            assert page is not None
            evicted = next(
                one.digest
                for row in page.names
                for one in row
                if one.repository.path == "org/evicted"
            )
        (tmp_path / "blobs" / evicted.algorithm / evicted.hex).unlink()
        other = Upstream(endpoints=(fake.url,))
        async with running(
            tmp_path, fake.url, more=more, other=other, deny=("org/secret",)
        ) as server:
            await server.store.measure()
            assert await names(server) == (["docker.io/org/a"], None)
