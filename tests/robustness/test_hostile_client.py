"""Rows HC: hostile clients: smuggling, traversal, foreign content, floods."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mirror.config.settings import Log
from mirror.observability.events import Kind
from mirror.observability.library_logs import configure_logging
from mirror.oci.reference import Digest
from tests.extent import Extent
from tests.fakes.registry import FakeRegistry
from tests.real.clients import NOWHERE
from tests.real.process import wait_until
from tests.real.server import Mirror
from tests.robustness.kit import CLOSE, NetworkLog, blob_path, send_raw, statuses, strace
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(2_000_000, 31)


@pytest.mark.row("HC1-smuggling")
@pytest.mark.parametrize(
    "probe",
    [
        (
            b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
        ),
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /v2/ HTTP/2.0\r\nHost: x\r\n\r\n",
        f"GET /v2/#fragment HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_smuggling_probes_are_refused(tmp_path: Path, probe: bytes) -> None:
    async with running(tmp_path) as server:
        response = await send_raw(server, probe)
        assert statuses(response) == [400]


@pytest.mark.row("HC2-malformed-requests")
@pytest.mark.parametrize(
    "count", [2_000, pytest.param(10_000, marks=pytest.mark.long)], ids=["some", "all"]
)
async def test_malformed_requests_leave_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int, extent: Extent
) -> None:
    count = extent.of(count)
    configure_logging(Log())
    rng = random.Random(7)
    async with running(tmp_path) as server:

        async def malformed() -> None:
            for _ in range(count // 20):
                await send_raw(
                    server, rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n", read=False
                )

        await asyncio.gather(*(malformed() for _ in range(20)))
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert len((out + err).splitlines()) < 100
    extent.tried(count)


TRAVERSALS = [
    "/v2/../../etc/passwd",
    "/v2/library/../../../etc/passwd/manifests/latest",
    "/v2/library/app/blobs/sha256:../../../etc/passwd",
    "/v2/library/app/blobs/..%2f..%2f..%2fetc%2fpasswd",
    "/v2/library/app/manifests/..%2f..%2fetc%2fpasswd",
    "/v2/library/app/manifests/%2e%2e",
    "/v2/%2e%2e/app/manifests/latest",
    "/v2/library/app/manifests/a%00b",
    "/v2/library/app/blobs/sha256:" + "A" * 64,
    "/v2/library/app/blobs/sha256:baddigeststring",
    "/v2/library/app/blobs/md5:" + "a" * 32,
    "/v2//manifests/latest",
    "/v2/UPPER/manifests/latest",
    "/v2/library/app/manifests/.hidden",
    "/v2/library/app/manifests/" + "a" * 129,
    "/v2/" + "a/" * 200 + "manifests/latest",
    "/v2/library\\app/manifests/latest",
]


@pytest.mark.row("HC3-traversal")
@pytest.mark.row("HU9-digest-strings")
async def test_paths_outside_the_grammar_are_refused_and_not_sent_upstream(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for path in TRAVERSALS:
            response = await send_raw(server, f"GET {path} HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode())
            assert statuses(response)[0] in (400, 404), path
            assert b'"errors"' in response, path
        assert not fake.requests
        tried(len(TRAVERSALS))


NAMESPACES = [
    "evil.example", "127.0.0.1", "127.0.0.1:22", "localhost", "[::1]", "0.0.0.0", "2130706433",
    "0x7f000001", "docker.io.evil.example", "docker.io:80", "docker.io.", "DOCKER.IO",
    "docker.io@evil.example", "user:pass@docker.io", "docker.io/evil", "docker.io%2fevil",
    "%64ocker.io.evil", "docker.io#evil", "docker.io?evil", "file:///etc/passwd", "..", "",
    "docker.io%00", "docker.io%0d%0aX-Evil:1", "ghcr.io", "169.254.169.254", "metadata",
    "http://docker.io", "docker%E3%80%82io", "*",
]  # fmt: skip


@pytest.mark.row("HC3-traversal")
def test_nothing_is_opened_outside_the_data_directory(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    """strace has seen every file that the server opened while it was asked for such paths."""
    log = tmp_path / "opened"
    data = tmp_path / "data"
    calls = "open,openat,creat,unlink,unlinkat,rename,mkdir,link,symlink,readlink,readlinkat"
    with Mirror({"docker.io": NOWHERE}, data_dir=data, prefix=strace(calls, log=log)) as mirror:
        # Requests of each kind load their modules before the recording starts.
        for path in ("/v2/", "/v2/library/app/manifests/latest", "/v2/nonsense"):
            mirror.ask(path)
        before = len(log.read_text().splitlines())
        for path in TRAVERSALS:
            with socket.create_connection(("127.0.0.1", mirror.port), 20) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode())
                assert connection.recv(1000).startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")), path
        # The file of this digest marks how far the log of strace has come.
        mirror.ask(blob_path(f"sha256:{'a' * 64}"))
        wait_until(lambda: "a" * 64 in log.read_text(), "the search is in the log", 10)
        touched = log.read_text().splitlines()[before:]
    # The C library reads it when a new thread gets memory for the first time.
    own = "/sys/devices/system/cpu/online"
    assert not [line for line in touched if f'"{data}' not in line and own not in line]
    tried(len(TRAVERSALS))


@pytest.mark.row("HC4-namespaces")
async def test_unconfigured_namespaces_are_refused_without_a_connection(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    """No name is looked up, and no connection is made but to the server itself."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        with NetworkLog().watched() as network:
            for form in NAMESPACES:
                path = f"/v2/library/app/manifests/latest?ns={form}"
                response = await send_raw(
                    server, f"GET {path} HTTP/1.1\r\n{CLOSE}\r\n\r\n".encode()
                )
                assert statuses(response)[0] in (400, 404), form
                assert b'"errors"' in response, form
        assert not fake.requests
        assert network.hosts <= {"127.0.0.1"}
        assert network.ports == {int(server.url.rpartition(":")[2])}
        tried(len(NAMESPACES))


@pytest.mark.row("HC5-content-of-another-repository")
async def test_content_of_another_repository_looks_like_missing_content(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        secret = random_bytes(50_000, 33)
        manifest = fake.add_image(secret, repository="library/private")
        fake.add_image(b"public", repository="library/app")
        await server.get(server.manifest("latest", "library/private"))
        await server.get(server.blob(Digest.of(secret), "library/private"))
        held, absent = Digest.of(secret), Digest.of(b"never existed")

        def shape(headers: object) -> list[str]:
            assert hasattr(headers, "keys")
            return sorted(set(headers.keys()) - {"Date", "X-Request-Id", "Server-Timing"})

        for extra in ({}, {"Range": "bytes=0-9"}, {"If-None-Match": f'"{held}"'}):
            for method in ("GET", "HEAD"):
                responses = []
                for digest in (held, absent):
                    async with server.client.request(
                        method, server.blob(digest), headers=extra
                    ) as response:
                        body = (await response.read()).replace(str(digest).encode(), b"<digest>")
                        responses.append((response.status, shape(response.headers), body))
                assert responses[0] == responses[1]
                assert responses[0][0] == 404
        assert (await server.get(server.manifest(manifest)))[0] == 404
        assert (await server.get(server.manifest(manifest, "library/private")))[0] == 200


@pytest.mark.row("HC6-withdrawn-access")
async def test_access_ends_when_the_upstream_withdraws_it(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, negative_ttl=0.0) as server:
        digest = fake.add_blob(DATA, "library/one")
        fake.add_blob(DATA, "library/two")
        assert (await server.get(server.blob(digest, "library/one")))[0] == 200
        assert (await server.get(server.blob(digest, "library/two")))[0] == 200
        await server.store.idle()
        server.store.layout.blob(digest).unlink()
        del fake.blobs["library/one", str(digest)]
        assert (await server.get(server.blob(digest, "library/one")))[0] == 404
        assert (await server.get(server.blob(digest, "library/two")))[0] == 200
        assert (await server.get(server.blob(digest, "library/one")))[0] == 404


@pytest.mark.row("HC9-random-names")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "count", [500, pytest.param(10_000, marks=pytest.mark.long)], ids=["some", "all"]
)
async def test_random_names_are_404_and_leave_bounded_traces(
    tmp_path: Path, count: int, extent: Extent
) -> None:
    count = extent.of(count)
    async with (
        FakeRegistry() as fake,
        running(tmp_path, fake.url, negative_ttl=0.2) as server,
    ):
        _, _, before = await server.get(f"{server.url}/metrics")
        rng = random.Random(11)
        urls = [
            server.manifest(f"t{rng.getrandbits(40):x}", f"r{rng.getrandbits(40):x}")
            if n % 2
            else server.blob(f"sha256:{rng.getrandbits(256):064x}", f"r{rng.getrandbits(40):x}")
            for n in range(count)
        ]
        semaphore = asyncio.Semaphore(50)

        async def ask(url: str) -> int:
            async with semaphore:
                return (await server.get(url))[0]

        assert set(await asyncio.gather(*(ask(url) for url in urls))) == {404}
        _, _, after = await server.get(f"{server.url}/metrics")
        names = [{line.split(b"}")[0] for line in text.splitlines()} for text in (before, after)]
        grown = names[1] - names[0]
        assert not [name for name in grown if re.search(rb"\"[rt][0-9a-f]{6,}\"", name)]
        # Two histograms for each kind of content: they begin with their first request.
        assert len(grown) < 120
        await server.store.idle()
        assert not list((tmp_path / "ingest" / "sha256").iterdir())
        extent.tried(count)


@pytest.mark.row("HC12-other-methods")
@pytest.mark.parametrize(
    "method", ["PUT", "POST", "PATCH", "DELETE", "TRACE", "OPTIONS", "CONNECT", "PROPFIND"]
)
async def test_write_methods_are_unsupported(tmp_path: Path, method: str) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for path in ("/v2/library/app/manifests/latest", "/v2/library/app/blobs/uploads/", "/v2/"):
            target = "evil:443" if method == "CONNECT" else path
            request = f"{method} {target} HTTP/1.1\r\n{CLOSE}\r\nContent-Length: 0\r\n\r\n"
            response = await send_raw(server, request.encode())
            assert statuses(response)[0] in (400, 405)
            if method != "CONNECT":
                assert statuses(response)[0] == 405
                assert b'"UNSUPPORTED"' in response
        headers = "Host: x\r\nConnection: upgrade, close\r\nUpgrade: websocket"
        upgrade = await send_raw(server, f"GET /v2/ HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        assert statuses(upgrade) == [200], "the connection stays HTTP/1.1"
        assert not fake.requests


@pytest.mark.row("HC14-secrets-in-output")
async def test_each_request_has_exactly_one_outcome_in_the_metrics(tmp_path: Path) -> None:
    """No metric has a value that a client chose, either."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(b"layer")
        urls = [
            f"{server.url}/v2/", f"{server.url}/healthz", f"{server.url}/nonsense",
            server.manifest("latest"), server.manifest("latest"), server.manifest("absent"),
            server.blob(Digest.of(b"layer")), server.blob(Digest.of(b"layer")),
            server.blob("sha256:bad"), server.manifest("latest", query="?ns=canary.example"),
            f"{server.url}/v2/library/app/tags/list", f"{server.url}/v2/library/app/tags/list?n=x",
        ]  # fmt: skip
        for url in urls:
            await server.get(url)
        _, _, text = await server.get(f"{server.url}/metrics")
        counts = re.findall(rb"oci_mirror_requests_total\{[^}]*\} (\S+)", text)
        assert sum(map(float, counts)) == len(urls)
        assert b"canary" not in text
        assert {pull.kind for pull in server.pulls} >= {Kind.PING, Kind.MANIFEST, Kind.INVALID}
