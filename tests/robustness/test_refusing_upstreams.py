"""Rows FA1 to FA7, FB11, FD1, FD2: upstreams that refuse or delay one thing and not another."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest

from mirror.config.settings import Credentials
from mirror.oci.reference import Digest
from tests.fakes.access import AccessRules, own_scope
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import LIMITS, Server, running

CANARY = "canary-91de"
CLOSED, OPEN = "closed/app", "open/app"


async def pull(server: Server, repository: str = "library/app", tag: str = "latest") -> list[int]:
    """Pull an image like a client. Returns the status of each response."""
    status, headers, _ = await server.ask("HEAD", server.manifest(tag, repository))
    found = [status]
    if status == 200:
        url = server.manifest(headers["Docker-Content-Digest"], repository)
        status, _, body = await server.get(url)
        found.append(status)
        document = json.loads(body)
        for part in (document["config"], *document["layers"]) if status == 200 else ():
            status, _, body = await server.get(server.blob(part["digest"], repository))
            found.append(status)
            assert status != 200 or str(Digest.of(body)) == part["digest"]
    return found


@pytest.mark.row("FA1-refused-token-beside-open-repository")
@pytest.mark.parametrize("status", [401, 403])
async def test_refused_repository_fails_neither_open_images_nor_expired_tags(
    tmp_path: Path, status: int, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0) as server:
        for name in (CLOSED, OPEN, "library/app"):
            fake.add_image(name.encode(), repository=name)
        needs = {name: own_scope(name) for name in (CLOSED, "library/app")}
        AccessRules(fake, needs, refuses={own_scope(n): status for n in (CLOSED, OPEN)})
        for _ in range(3):
            assert await pull(server, CLOSED) == [403]
            assert await pull(server, OPEN) == [200] * 4
            assert await pull(server) == [200] * 4, "its tag is confirmed each time"
        tried(9)


@pytest.mark.row("FD1-second-endpoint-has-it")
@pytest.mark.parametrize("status", [404, 401, 403])
async def test_image_of_the_second_endpoint_is_pulled_and_an_absent_one_is_refused(
    tmp_path: Path, status: int
) -> None:
    async with FakeRegistry() as cache, FakeRegistry() as hub:
        hub.add_image(b"layer", b"another")
        cache.fault("", Fault(status=status, times=None))
        async with running(tmp_path, cache.url, hub.url, tag_ttl=0, negative_ttl=0) as server:
            assert await pull(server) == [200] * 5
            expected = 404 if status == 404 else 403
            assert await pull(server, tag="absent") == [expected]
            await hub.stop()
            assert await pull(server) == [200] * 5, "stale"
            assert await pull(server, tag="absent") == [502]
        async with running(tmp_path / "other", hub.url, cache.url, negative_ttl=0) as server:
            assert await pull(server, tag="absent") == [502], "the first one cannot be asked"


@pytest.mark.row("FD2-limits-of-one-project")
async def test_limit_of_manifests_stops_no_layers_of_a_cached_manifest(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0) as server:
        digest = fake.add_image(b"layer")
        fake.add_image(b"layer", repository=OPEN)
        assert (await server.get(server.manifest(digest)))[0] == 200
        limit = Fault(status=429, headers={"Retry-After": "120"}, times=None, method="GET")
        fake.fault("library/app/manifests/other", limit)
        fake.tags["library/app", "other"] = str(fake.add_manifest(b"{}"))
        fake.fault(f"library/app/manifests/{fake.tags['library/app', 'other']}", limit)
        status, headers, _ = await server.get(server.manifest("other"))
        assert (status, headers["Retry-After"]) == (429, "120")
        assert await pull(server) == [200] * 4
        assert await pull(server, OPEN) == [200] * 4


@pytest.mark.row("FB11-late-first-byte")
async def test_slow_layers_of_one_image_stop_no_pull_of_another(tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"connect": 1.0, "first_byte": 4.0})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        layers = [b"slow %d" % number for number in range(5)]
        fake.add_image(*layers, repository=CLOSED)
        for layer in layers:
            fake.fault(f"blobs/{Digest.of(layer)}", Fault(delay=3600, times=None))
        for number in range(20):
            fake.add_image(b"%d" % number, repository=f"library/app-{number}")

        async def slow(layer: bytes) -> int:
            return (await server.get(server.blob(Digest.of(layer), CLOSED)))[0]

        assert await asyncio.gather(*(slow(layer) for layer in layers)) == [504] * 5
        pulls = await asyncio.gather(*(pull(server, f"library/app-{n}") for n in range(20)))
        assert pulls == [[200] * 4] * 20


@pytest.mark.row("FA5-credentials-of-the-first-host")
@pytest.mark.row("FA6-causes-of-missing-credentials")
@pytest.mark.row("HC14-secrets-in-output")
async def test_no_secret_is_shown_or_sent_to_another_host_whatever_refuses_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    credentials = Credentials(username="user", password=CANARY)
    secrets = [CANARY, b64encode(f"user:{CANARY}".encode()).decode()]
    async with (
        FakeRegistry() as one,
        FakeRegistry() as two,
        FakeRegistry() as outside,
        running(
            tmp_path / "data", one.url, two.url, credentials=credentials, negative_ttl=0
        ) as server,
    ):
        digest = one.add_blob(b"layer")
        basic, bearer = 'Basic realm="x"', f'Bearer realm="{one.url}/token",service="x"'
        foreign = f'Bearer realm="{outside.url}/token"'
        one.basic = two.basic = "Basic x"
        texts = []
        for challenge in (basic, bearer, foreign, f"{foreign}, {bearer}, {basic}"):
            one.challenge = two.challenge = challenge
            for status in (200, 401, 403, 500):
                one.token_status = status
                code, headers, body = await server.get(server.blob(digest))
                assert code in (403, 502)
                texts += [str(headers), body.decode()]
        _, _, metrics = await server.get(f"{server.url}/metrics")
        texts += [metrics.decode(), repr(server.events), *capfd.readouterr()]
        assert any(secrets[1] in s.headers.get("authorization", "") for s in one.requests)
        assert two.requests
        assert not outside.requests
        sent = "".join(f"{s.headers}{s.target}{s.body!r}" for s in two.requests)
        assert not [secret for secret in secrets if secret in sent + "".join(texts)]
