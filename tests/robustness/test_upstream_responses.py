"""Rows U7 to U15: wrong or missing responses of an upstream, seen by clients of the server."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from mirror.observability.events import ExchangeEnded, Outcome
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.server_kit import QUICK, Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(1_000_000, 21)
MIB = 1024 * 1024


async def fetch(server: Server, digest: Digest) -> bytes:
    status, _, body = await server.get(server.blob(digest))
    assert status == 200
    return body


async def wait_until_served(server: Server, url: str) -> None:
    """Wait until a URL is served. An open circuit breaker lets a request through after 2 s."""
    async with asyncio.timeout(20):
        while (await server.get(url))[0] != 200:  # noqa: ASYNC110 - the request waits
            await asyncio.sleep(0.1)


@pytest.mark.row("U7-waiters-of-a-failing-fetch")
async def test_failing_fetch_fails_all_its_clients_with_few_requests(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=500, delay=0.2, times=None))

        async def ask() -> tuple[int, float]:
            status, _, _ = await server.get(server.blob(digest))
            return status, time.monotonic()

        responses = await asyncio.gather(*(ask() for _ in range(100)))
        assert {status for status, _ in responses} == {502}
        times = [at for _, at in responses]
        assert max(times) - min(times) < 2.0
        assert fake.count("GET", "blobs/") <= 3
        tried(100)


@pytest.mark.row("U8-first-pulls-at-once")
async def test_131_first_pulls_at_once_cost_one_request_per_content(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        layer = random_bytes(20_000, 23)
        digest = fake.add_image(layer)

        async def pull() -> bytes:
            _, _, body = await server.get(server.manifest("latest"))
            assert Digest.of(body) == digest
            return await fetch(server, Digest.of(layer))

        assert await asyncio.gather(*(pull() for _ in range(131))) == [layer] * 131
        assert fake.count("GET", "manifests/") == 1
        assert fake.count("GET", f"blobs/{Digest.of(layer)}") == 1
        tried(131)


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    ("header", "passed"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, None),
        ({"Retry-After": "99999999999"}, 86400),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
async def test_429_pauses_requests_and_is_passed_on(
    tmp_path: Path, header: dict[str, str], passed: int | None
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        fake.fault("manifests/latest", Fault(status=429, headers=header, times=None))
        status, headers, _ = await server.get(server.manifest("latest"))
        assert status == 429
        assert headers.get("Retry-After") == (None if passed is None else str(passed))
        asked = len(fake.requests)
        status, _, _ = await server.get(server.manifest("latest"))
        if passed:
            assert status == 429
            assert len(fake.requests) == asked, "the upstream demanded a pause"
        status, _, _ = await server.get(server.manifest(digest))
        # Without a time, the GET of the tag was tried as well, and its 429 pauses other GETs.
        is_paused = header.get("Retry-After") in (None, "-5", "soon")
        assert status == (429 if is_paused else 200), "it was demanded for HEAD only"


@pytest.mark.row("U9-rate-limits")
async def test_retry_after_date_is_passed_on_in_seconds(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        headers = {"Retry-After": formatdate(time.time() + 600, usegmt=True)}
        fake.fault("manifests/latest", Fault(status=429, headers=headers, times=None))
        status, got, _ = await server.get(server.manifest("latest"))
        assert status == 429
        assert 500 < int(got["Retry-After"]) <= 600


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize("header", [{}, {"Retry-After": "0"}, {"Retry-After": "1"}])
@pytest.mark.parametrize("times", [1, 3])
async def test_429_for_a_fetch_that_resumes_is_waited_for(
    tmp_path: Path, header: dict[str, str], times: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        limit = Fault(status=429, headers=header, times=times)
        fake.fault(f"blobs/{digest}", Fault(reset_at=len(DATA) // 2), limit)
        assert await fetch(server, digest) == DATA
        asked = [seen for seen in fake.requests if "blobs/" in seen.path]
        assert len(asked) == 2 + times
        assert all("range" in seen.headers for seen in asked[1:]), "a 429 does not concern ranges"


@pytest.mark.row("U10-failing-token-services")
async def test_50_clients_cost_one_token_request(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "secret-token"
        fake.token_delay = 0.1
        blobs = [fake.add_blob(random_bytes(1000, seed)) for seed in range(50)]
        assert len(await asyncio.gather(*(fetch(server, blob) for blob in blobs))) == 50
        assert fake.count("GET", "/token") == 1
        asked = next(seen for seen in fake.requests if seen.path == "/token")
        assert asked.query["scope"] == ["repository:library/app:pull"]
        tried(50)


@pytest.mark.row("U10-failing-token-services")
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b'{"token":"t"}', 200),
        (200, b'{"access_token":"t"}', 200),
        (200, b'{"token":"t","expires_in":0}', 200),
        (200, b'{"token":"t","expires_in":-1}', 200),
        (200, b'{"token":"t","expires_in":1000000000000}', 200),
        (200, b'{"token":"t","expires_in":"soon"}', 200),
        (200, b"{}", 502),
        (200, b"no json", 502),
        (200, b'{"token":"' + b"x" * 2 * MIB + b'"}', 502),
        (200, b'{"token":"a\\r\\nX-Evil: 1"}', 502),
        (500, b"", 502),
        (503, b"", 502),
        (401, b"", 403),
        (403, b"", 403),
        (302, b"", 502),
    ],
)
async def test_token_responses_are_used_or_fail_the_pull(
    tmp_path: Path, status: int, body: bytes, expected: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "t"
        fake.token_status, fake.token_body = status, body
        digest = fake.add_blob(DATA)
        got, _, _ = await server.get(server.blob(digest))
        assert got == expected


@pytest.mark.row("U10-failing-token-services")
async def test_slow_token_service_fails_the_pull(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=QUICK) as server:
        fake.token = "t"
        fake.token_delay = 3600
        digest = fake.add_blob(DATA)
        assert (await server.get(server.blob(digest)))[0] == 504
        fake.token_delay = 0.0
        assert await fetch(server, digest) == DATA


@pytest.mark.row("U10-failing-token-services")
async def test_401_loop_ends_and_an_expired_token_is_replaced(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "good"
        fake.token_body = b'{"token":"bad"}'
        digest = fake.add_blob(DATA)
        status, _, _ = await server.get(server.blob(digest))
        assert status == 403
        assert len(fake.requests) < 12
        fake.token_body = None
        assert await fetch(server, digest) == DATA
        other = fake.add_blob(DATA[1:])
        fake.token = "rotated"
        fake.fault(f"blobs/{other}", Fault(reset_at=0))
        assert await fetch(server, other) == DATA[1:]


@pytest.mark.row("U10-failing-token-services")
async def test_token_that_expires_in_mid_blob_is_replaced(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=QUICK) as server:
        fake.token = "first"
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(), Fault(stall_at=400_000))

        async def rotate() -> None:
            await fake.stalled.wait()
            fake.token = "second"

        body, _ = await asyncio.gather(fetch(server, digest), rotate())
        assert body == DATA


@contextmanager
def dead(how: str) -> Iterator[str]:
    """Yield the URL of an endpoint that does not respond."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        match how:
            case "refused":
                listener.close()
            case "full":
                # A full backlog ignores further connections.
                for _ in range(4):
                    waiting = stack.enter_context(socket.socket())
                    waiting.setblocking(False)
                    waiting.connect_ex(("127.0.0.1", port))
        yield {
            "name": "http://no-such-host.invalid",
            "no-tls": "https://{port}",
        }.get(how, "http://{port}").format(port=f"127.0.0.1:{port}")


@pytest.mark.row("U11-connect-faults")
@pytest.mark.parametrize("how", ["refused", "name", "silent", "full"])
async def test_dead_endpoint_fails_over_and_without_another_a_stale_tag_is_served(
    tmp_path: Path, how: str
) -> None:
    with dead(how) as endpoint:
        await _failed_over(tmp_path, endpoint)


@pytest.mark.row("U11-connect-faults")
@pytest.mark.parametrize("how", ["plain", "stranger"])
async def test_endpoint_with_bad_tls_fails_over_and_without_another_a_stale_tag_is_served(
    tmp_path: Path, how: str
) -> None:
    """An endpoint without TLS, and one whose certificate has an unknown authority."""
    context = None
    if how == "stranger":
        made = Certificate.make(tmp_path, "stranger")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.cert_file, made.key_file)
    wrong = await asyncio.start_server(_say_400, "127.0.0.1", 0, ssl=context)
    async with wrong:
        port = wrong.sockets[0].getsockname()[1]
        await _failed_over(tmp_path / "data", f"https://127.0.0.1:{port}")


async def _say_400(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    writer.close()


async def _failed_over(root: Path, endpoint: str) -> None:
    async with (
        FakeRegistry() as fake,
        running(root, endpoint, fake.url, limits=QUICK, tag_ttl=0.0) as server,
    ):
        digest = fake.add_image(DATA)
        status, _, _ = await server.get(server.manifest("latest"))
        assert status == 200
        await fake.stop()
        status, headers, body = await server.get(server.manifest("latest"))
        assert (status, Digest.of(body)) == (200, digest)
        assert headers["Warning"].startswith('299 - "')
        assert server.pulls[-1].outcome is Outcome.STALE


@pytest.mark.row("U11-connect-faults")
async def test_warm_pull_never_waits_for_a_dead_upstream(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        await server.get(server.manifest("latest"))
        await fetch(server, Digest.of(DATA))
        await fake.stop()
        asked = len(fake.requests)
        for _ in range(3):
            assert (await server.get(server.manifest("latest")))[0] == 200
            assert (await server.get(server.manifest(digest)))[0] == 200
            assert await fetch(server, Digest.of(DATA)) == DATA
        assert len(fake.requests) == asked
        assert not [e for e in server.events if isinstance(e, ExchangeEnded) and not e.status]


@pytest.mark.row("U12-flapping-endpoint")
async def test_flapping_endpoint_is_skipped_and_used_again_after_recovery(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as bad,
        FakeRegistry() as good,
        # no request of this test waits for a time limit
        running(tmp_path, bad.url, good.url) as server,
    ):
        blobs = [random_bytes(1000, seed) for seed in range(20)]
        for blob in blobs:
            good.add_blob(blob)
            bad.add_blob(blob)
        bad.fault("", Fault(status=503, times=None))
        for blob in blobs:
            assert await fetch(server, Digest.of(blob)) == blob
        assert len(bad.requests) <= 5, "the circuit breaker is open"
        bad.faults.clear()
        asked = len(bad.requests)
        more = iter(range(20, 1000))
        async with asyncio.timeout(20):
            while len(bad.requests) == asked:
                await asyncio.sleep(0.1)
                blob = random_bytes(1000, next(more))
                good.add_blob(blob)
                bad.add_blob(blob)
                assert await fetch(server, Digest.of(blob)) == blob
        blob = random_bytes(1000, next(more))
        bad.add_blob(blob)
        assert await fetch(server, Digest.of(blob)) == blob, "the endpoint is used first again"
        assert good.count("GET", f"blobs/{Digest.of(blob)}") == 0


@pytest.mark.row("U12-flapping-endpoint")
@pytest.mark.parametrize("status", [500, 503])
async def test_failing_image_does_not_fail_another(tmp_path: Path, status: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for number in range(4):
            fake.add_image(b"layer", tag=f"good-{number}")
        fake.fault("manifests/bad", Fault(status=status, times=None))
        for number in range(4):
            assert (await server.get(server.manifest("bad")))[0] == 502
            assert (await server.get(server.manifest(f"good-{number}")))[0] == 200


@pytest.mark.row("U13-moving-tag")
async def test_digest_is_served_after_its_tag_moved_between_head_and_get(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        old = fake.add_image(b"old", tag="latest")
        new = fake.add_image(b"new", tag="other")
        status, headers, _ = await server.get(server.manifest("latest"))
        assert headers["Docker-Content-Digest"] == str(old)
        fake.tags["library/app", "latest"] = str(new)
        status, headers, body = await server.get(server.manifest(old))
        assert (status, Digest.of(body)) == (200, old)


@pytest.mark.row("U13-moving-tag")
async def test_wrong_digest_header_fails_the_tag_and_not_the_digest(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        wrong = {"Docker-Content-Digest": str(Digest.of(b"something else"))}
        fake.fault("manifests/latest", Fault(headers=wrong, times=None))
        status, _, body = await server.get(server.manifest("latest"))
        assert status != 200
        status, _, body = await server.get(server.manifest(digest))
        assert (status, Digest.of(body)) == (200, digest)


@pytest.mark.row("U15-negative-answers")
async def test_404_is_cached_briefly(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, negative_ttl=0.5) as server:
        for _ in range(5):
            status, _, body = await server.get(server.manifest("latest"))
            assert (status, b"MANIFEST_UNKNOWN" in body) == (404, True)
        assert fake.count("HEAD") == 1
        fake.add_image(b"layer")
        await asyncio.sleep(0.6)
        assert (await server.get(server.manifest("latest")))[0] == 200


@pytest.mark.row("U15-negative-answers")
@pytest.mark.parametrize(
    ("status", "expected"), [(401, 403), (403, 403), (429, 429), (500, 502), (503, 502)]
)
async def test_failures_are_never_cached_as_or_turned_into_a_404(
    tmp_path: Path, status: int, expected: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        for path, url in (
            ("manifests/latest", server.manifest("latest")),
            (f"manifests/{digest}", server.manifest(digest)),
            (f"blobs/{Digest.of(DATA)}", server.blob(Digest.of(DATA))),
        ):
            fake.fault(path, Fault(status=status, times=None))
            assert (await server.get(url))[0] == expected
        fake.faults.clear()
        # A pause after a 429 is that of one kind of request.
        await wait_until_served(server, server.manifest("latest"))
        await wait_until_served(server, server.blob(Digest.of(DATA)))
        assert await fetch(server, Digest.of(DATA)) == DATA
