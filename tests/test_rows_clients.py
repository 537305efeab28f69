"""Rows L and HC: what clients do, in good faith and in bad."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import socket
import struct
from pathlib import Path

import aiohttp
import pytest

from mirror.config import Storage
from mirror.events import Kind, Outcome
from mirror.oci.digest import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import Server, running
from tests.store_kit import random_bytes

DATA = random_bytes(2_000_000, 31)
_RESET = struct.pack("ii", 1, 0)
LAST = "Host: x\r\nConnection: close"


async def raw(server: Server, request: bytes, *, read: bool = True) -> bytes:
    """Bytes as they are, and all that comes back until the server closes or falls silent."""
    port = int(server.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(request)
        await writer.drain()
        while read:
            async with asyncio.timeout(1.5):
                data = await reader.read(65_536)
            if not data:
                break
            answer += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]


async def cold(fake: FakeRegistry, rate: int = 4_000_000) -> Digest:
    """A blob that takes half a second to arrive."""
    digest = fake.add_blob(DATA)
    fake.fault(f"blobs/{digest}", Fault(rate=rate))
    return digest


@pytest.mark.row("L1")
@pytest.mark.parametrize("followers", [0, 3])
async def test_the_leading_client_leaves(tmp_path: Path, followers: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = await cold(fake)
        leading = await server.client.get(server.blob(digest))
        await leading.content.readexactly(100_000)
        waiting = [server.get(server.blob(digest)) for _ in range(followers)]
        tasks = asyncio.gather(*waiting)
        await asyncio.sleep(0.05)
        leading.close()
        assert [body for _, _, body in await tasks] == [DATA] * followers
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA
        assert fake.count("GET", "blobs/") == 1


@pytest.mark.row("L1")
async def test_a_fetch_nobody_wants_can_be_given_up_and_goes_on_later(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, abandoned="cancel") as server:
        digest = await cold(fake, 1_000_000)
        leading = await server.client.get(server.blob(digest))
        await leading.content.readexactly(300_000)
        leading.close()
        await asyncio.sleep(0.5)
        sent = fake.bytes_sent
        await asyncio.sleep(0.3)
        assert fake.bytes_sent == sent, "it was given up"
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA


@pytest.mark.row("L2")
async def test_a_thousand_ask_and_reset(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = await cold(fake)
        port = int(server.url.rpartition(":")[2])
        request = f"GET /v2/library/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        before = len(os.listdir("/proc/self/fd"))

        async def ask_and_reset() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await writer.drain()
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

        for _ in range(10):
            await asyncio.gather(*(ask_and_reset() for _ in range(100)))
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA
        assert fake.count("GET", "blobs/") == 1
        for _ in range(50):
            if len(os.listdir("/proc/self/fd")) <= before + 12 and not server.store.growing:
                break
            await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before + 12
        assert not server.store.growing


FORMS = [
    ("bytes=0-0", 206, DATA[:1]),
    ("bytes=0-", 206, DATA),
    ("bytes=5-9", 206, DATA[5:10]),
    ("bytes=-7", 206, DATA[-7:]),
    (f"bytes={len(DATA) - 1}-", 206, DATA[-1:]),
    ("bytes=1999990-9223372036854775808", 206, DATA[1999990:]),
    (f"bytes=-{2**63}", 206, DATA),
    (f"bytes={len(DATA)}-", 416, b""),
    (f"bytes={2**63}-", 416, b""),
    ("bytes=-0", 416, b""),
    ("bytes=9-5", 200, DATA),
    ("bytes=", 200, DATA),
    ("bytes=a-b", 200, DATA),
    ("lines=1-2", 200, DATA),
    ("bytes=1-2,", 206, DATA[1:3]),
]


@pytest.mark.row("L4")
@pytest.mark.parametrize("growing", [True, False], ids=["growing", "hit"])
async def test_every_form_of_range(tmp_path: Path, growing: bool) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        else:
            fake.fault(f"blobs/{digest}", Fault(rate=8_000_000))
        answers = await asyncio.gather(
            *(server.get(server.blob(digest), {"Range": form}) for form, _, _ in FORMS)
        )
        for (form, status, expected), (got, headers, body) in zip(FORMS, answers, strict=True):
            assert got == status, form
            if status == 416:
                assert headers["Content-Range"] == f"bytes */{len(DATA)}"
                assert b"errors" in body
            else:
                assert body == expected, form
            if status == 206:
                start = DATA.index(expected[:64]) if len(expected) > 8 else None
                stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers["Content-Range"])
                assert stated
                assert int(stated[3]) == len(DATA)
                assert int(stated[2]) - int(stated[1]) + 1 == len(expected)
                assert start is None or int(stated[1]) == start
        assert fake.count("GET", "blobs/") == 1


@pytest.mark.row("L4")
@pytest.mark.parametrize("growing", [True, False], ids=["growing", "hit"])
async def test_several_ranges_as_partial_pulls_send_them(tmp_path: Path, growing: bool) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        header = {"Range": "bytes=0-9,100-199,1999990-"}
        status, headers, body = await server.get(server.blob(digest), header)
        assert status == 206
        boundary = headers["Content-Type"].partition("boundary=")[2].encode()
        parts = [
            p.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for p in body.split(b"--" + boundary)
        ]
        assert parts[1:4] == [DATA[:10], DATA[100:200], DATA[1999990:]]
        assert int(headers["Content-Length"]) == len(body)
        overlapping = ",".join(f"{n}-{n + 5000}" for n in range(0, 1_000_000, 1000))
        status, _, body = await server.get(server.blob(digest), {"Range": f"bytes={overlapping}"})
        assert (status, body == DATA) in [(200, True), (400, False)] or status == 206


@pytest.mark.row("L6")
async def test_conditional_requests(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        manifest = fake.add_image(DATA)
        await server.get(server.manifest("latest"))
        for url, etag, body in (
            (server.blob(digest), f'"{digest}"', DATA),
            (server.manifest(manifest), f'"{manifest}"', None),
            (server.manifest("latest"), f'"{manifest}"', None),
        ):
            for value in (etag, f"W/{etag}", f'"other", {etag}', "*"):
                status, headers, got = await server.get(url, {"If-None-Match": value})
                assert (status, got) == (304, b"")
                assert headers["ETag"] == etag
            status, _, got = await server.get(url, {"If-None-Match": '"other"'})
            assert status == 200
            status, _, got = await server.get(url, {"Range": "bytes=0-3", "If-Range": etag})
            assert (status, len(got)) == (206, 4)
            status, _, got = await server.get(url, {"Range": "bytes=0-3", "If-Range": '"other"'})
            assert status == 200
            assert body is None or got == body


@pytest.mark.row("L8")
async def test_unusual_but_legal(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(b"small blob")
        path = f"/v2/library/app/blobs/{digest}"
        answer = await raw(server, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert answer.endswith(b"small blob")
        answer = await raw(
            server,
            f"GET {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody".encode(),
        )
        assert statuses(answer)[0] == 200
        one = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        answer = await raw(server, one * 100)
        assert statuses(answer) == [200] * 100
        assert answer.count(b"small blob") == 100
        head = await raw(server, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"Content-Length: 10\r\n" in head
        assert head.endswith(b"\r\n\r\n")


@pytest.mark.row("L9")
async def test_500_clients_right_after_a_start(tmp_path: Path) -> None:
    async with FakeRegistry() as fake:
        digest = fake.add_blob(random_bytes(10_000, 32))
        async with running(tmp_path, fake.url) as server:
            await server.get(server.blob(digest))
            # a client is done before the content is published
            await server.store.idle()
        async with running(tmp_path, fake.url) as server:
            answers = await asyncio.gather(*(server.get(server.blob(digest)) for _ in range(500)))
            assert {(status, Digest.of(body)) for status, _, body in answers} == {(200, digest)}
        assert fake.count("GET", "blobs/") == 1


@pytest.mark.row("L11")
@pytest.mark.parametrize("growing", [True, False], ids=["growing", "hit"])
async def test_open_ended_ranges_that_hang_up_after_their_part(
    tmp_path: Path, growing: bool
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        else:
            fake.fault(f"blobs/{digest}", Fault(rate=6_000_000))
        quarter = len(DATA) // 4

        async def part(index: int) -> bytes:
            header = {"Range": f"bytes={index * quarter}-"}
            async with server.client.get(server.blob(digest), headers=header) as response:
                assert response.status == 206
                data = await response.content.readexactly(quarter)
                response.close()
                return data

        for _ in range(5):
            parts = await asyncio.gather(*(part(index) for index in range(4)))
            assert b"".join(parts) == DATA
        assert fake.count("GET", "blobs/") == 1
        assert fake.bytes_sent == len(DATA)
        await asyncio.sleep(0.1)
        assert not [p for p in server.pulls if p.outcome is Outcome.ERROR]


@pytest.mark.row("HC1")
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
        b"GET http://evil/v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2/#fragment HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_smuggling_probes_are_refused(tmp_path: Path, probe: bytes) -> None:
    async with running(tmp_path) as server:
        answer = await raw(server, probe)
        assert all(status == 400 for status in statuses(answer)[:1])
        assert b"200 OK" not in answer
        assert len(statuses(answer)) <= 1


@pytest.mark.row("HC2")
async def test_malformed_requests_leave_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mirror.config import Log
    from mirror.logs import configure_logging

    configure_logging(Log())
    rng = random.Random(7)
    async with running(tmp_path) as server:

        async def malformed(count: int) -> None:
            for _ in range(count):
                await raw(server, rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n", read=False)

        await asyncio.gather(*(malformed(100) for _ in range(20)))
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert len((out + err).splitlines()) < 100


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


@pytest.mark.row("HC3")
@pytest.mark.row("HU9")
async def test_paths_outside_the_grammar(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for path in TRAVERSALS:
            answer = await raw(server, f"GET {path} HTTP/1.1\r\n{LAST}\r\n\r\n".encode())
            assert statuses(answer)[0] in (400, 404), path
            assert b'"errors"' in answer, path
        assert not fake.requests


@pytest.mark.row("HC4")
async def test_namespaces_that_are_not_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    real = socket.getaddrinfo

    def spy(host: object, *arguments: object, **named: object) -> object:
        asked.append(host)
        return real(host, *arguments, **named)  # type: ignore[call-overload,arg-type] # passed on

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    forms = [
        "evil.example", "127.0.0.1", "127.0.0.1:22", "localhost", "[::1]", "0.0.0.0", "2130706433",
        "0x7f000001", "docker.io.evil.example", "docker.io:80", "docker.io.", "DOCKER.IO",
        "docker.io@evil.example", "user:pass@docker.io", "docker.io/evil", "docker.io%2fevil",
        "%64ocker.io.evil", "docker.io#evil", "docker.io?evil", "file:///etc/passwd", "..", "",
        "docker.io%00", "docker.io%0d%0aX-Evil:1", "ghcr.io", "169.254.169.254", "metadata",
        "http://docker.io", "docker%E3%80%82io", "*",
    ]  # fmt: skip
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for form in forms:
            request = f"GET /v2/library/app/manifests/latest?ns={form} HTTP/1.1\r\n{LAST}\r\n\r\n"
            answer = await raw(server, request.encode())
            assert statuses(answer)[0] in (400, 404), form
            assert b'"errors"' in answer, form
        assert not fake.requests
        assert not [host for host in asked if host not in ("127.0.0.1", None)]


@pytest.mark.row("HC5")
async def test_another_repositorys_content_looks_like_none(tmp_path: Path) -> None:
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
                answers = []
                for digest in (held, absent):
                    async with server.client.request(
                        method, server.blob(digest), headers=extra
                    ) as response:
                        answers.append(
                            (response.status, shape(response.headers), await response.read())
                        )
                assert answers[0] == answers[1]
                assert answers[0][0] == 404
        assert (await server.get(server.manifest(manifest)))[0] == 404
        assert (await server.get(server.manifest(manifest, "library/private")))[0] == 200


@pytest.mark.row("HC6")
async def test_membership_ends_when_it_is_withdrawn(tmp_path: Path) -> None:
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


@pytest.mark.row("HC7")
async def test_slow_headers_do_not_hold_a_connection_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.server.KEEPALIVE", 1.0)
    async with running(tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        for beginning in (
            b"",
            b"GET /v2/ HTTP/1.1\r\n",
            b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            async with asyncio.timeout(6):
                while await reader.read(1000):
                    pass
            writer.close()


@pytest.mark.row("HC9")
async def test_random_names_leave_bounded_traces(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, negative_ttl=0.2) as server:
        _, _, before = await server.get(f"{server.url}/metrics")
        rng = random.Random(11)
        urls = [
            server.manifest(f"t{rng.getrandbits(40):x}", f"r{rng.getrandbits(40):x}")
            if n % 2
            else server.blob(f"sha256:{rng.getrandbits(256):064x}", f"r{rng.getrandbits(40):x}")
            for n in range(1000)
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
        assert len(grown) < 100
        await server.store.idle()
        assert not list((tmp_path / "ingest" / "sha256").iterdir())


@pytest.mark.row("HC12")
@pytest.mark.parametrize(
    "method", ["PUT", "POST", "PATCH", "DELETE", "TRACE", "OPTIONS", "CONNECT", "PROPFIND"]
)
async def test_writes_are_unsupported(tmp_path: Path, method: str) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for path in ("/v2/library/app/manifests/latest", "/v2/library/app/blobs/uploads/", "/v2/"):
            target = "evil:443" if method == "CONNECT" else path
            request = f"{method} {target} HTTP/1.1\r\n{LAST}\r\nContent-Length: 0\r\n\r\n"
            answer = await raw(server, request.encode())
            assert statuses(answer)[0] in (400, 405)
            if method != "CONNECT":
                assert statuses(answer)[0] == 405
                assert b'"UNSUPPORTED"' in answer
        upgrade = (
            b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert statuses(await raw(server, upgrade))[0] == 200
        assert not fake.requests


@pytest.mark.row("HC14")
async def test_requests_add_up_in_the_metrics(tmp_path: Path) -> None:
    """Every request has exactly one outcome (and a canary is in no metric)."""
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


@pytest.mark.row("L3")
async def test_slow_clients_hold_no_memory(tmp_path: Path) -> None:
    """60 clients that read slowly, and one that does not, on one large blob."""
    data = random_bytes(64 * 1024 * 1024, 34)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(data)
        port = int(server.url.rpartition(":")[2])
        request = f"GET /v2/library/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        for connection in slow:
            connection.sendall(request)
        async with server.client.get(server.blob(digest)) as response:
            hashed = hashlib.sha256()
            async for chunk in response.content.iter_any():
                hashed.update(chunk)
        assert hashed.hexdigest() == digest.hex
        assert fake.count("GET", "blobs/") == 1
        status = Path("/proc/self/status").read_text()  # noqa: ASYNC240 - procfs is no disk
        resident = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024
        # The content itself is twice in this process, which is also the upstream.
        assert resident < 2 * len(data) + 400 * 1024 * 1024
        for connection in slow:
            connection.close()


async def test_a_cut_answer_is_never_a_clean_end(tmp_path: Path) -> None:
    """HTTP/1.0 without a length ends with the connection, so there an error is a reset."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
        digest = Digest.of(DATA)
        fake.blobs["library/app", str(digest)] = wrong
        fake.fault(f"blobs/{digest}", Fault(chunked=True, times=None))
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v2/library/app/blobs/{digest} HTTP/1.0\r\n\r\n".encode())
        try:
            got = await reader.read(-1)
        except ConnectionResetError:
            got = b""
        assert wrong not in got
        writer.close()
        try:
            status, _, _ = await server.get(server.blob(digest))
        except aiohttp.ClientError:
            status = 0
        assert status in (0, 502)


async def test_lists_are_paged_with_links_to_us(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for n in range(25):
            fake.add_image(b"layer", repository="org/app", tag=f"v{n:02}")
        url: str | None = f"{server.url}/v2/docker.io/org/app/tags/list?n=10&ns=docker.io"
        url = f"{server.url}/v2/org/app/tags/list?n=10&ns=docker.io"
        seen: list[str] = []
        while url:
            async with server.client.get(url) as response:
                assert response.headers["OCI-Namespace"] == "docker.io"
                seen += json.loads(await response.read())["tags"]
                link = response.headers.get("Link")
            match = re.match(r'<(/v2/[^>]*)>; rel="next"', link) if link else None
            url = f"{server.url}{match[1]}" if match else None
        assert seen == [f"v{n:02}" for n in range(25)]
        _, headers, body = await server.get(f"{server.url}/v2/org/app/tags/list?n=0")
        assert json.loads(body)["tags"] == []
        assert "Link" not in headers


async def test_storage_settings_of_these_tests_are_the_defaults() -> None:
    assert Storage().reverify == 86400


@pytest.mark.row("D10")
async def test_a_sendfile_that_fails_cuts_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        await server.get(server.blob(digest))
        working, sent = os.sendfile, []

        def breaks(target: int, file: int, offset: int, count: int) -> int:
            if sent:
                raise OSError(5, "Input/output error")
            sent.append(working(target, file, offset, min(count, 1000)))
            return sent[0]

        with monkeypatch.context() as patch:
            patch.setattr(os, "sendfile", breaks)
            with pytest.raises(aiohttp.ClientError):
                await server.get(server.blob(digest))
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA
