"""Rows U: what an upstream does wrong, seen by a client of the whole server."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mirror.config import Limits
from mirror.events import DigestMismatched, Outcome, Resumed, UpstreamAnswered
from mirror.oci.digest import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import QUICK, Server, running
from tests.store_kit import random_bytes

DATA = random_bytes(1_000_000, 21)
MIB = 1024 * 1024


async def fetch(server: Server, digest: Digest) -> bytes:
    status, headers, body = await server.get(server.blob(digest))
    assert status == 200
    assert headers["Docker-Content-Digest"] == str(digest)
    return body


async def whole_answers(server: Server, url: str, tries: int) -> list[bytes]:
    """Bodies that a client would take for whole."""
    bodies = []
    for _ in range(tries):
        try:
            status, _, body = await server.get(url)
        except aiohttp.ClientError:
            continue
        if status == 200:
            bodies.append(body)
    return bodies


@pytest.mark.row("U1")
@pytest.mark.parametrize("at", [0, 1, 65_535, 65_536, 65_537, len(DATA) // 2, len(DATA) - 1])
async def test_a_reset_is_resumed_and_nobody_notices(tmp_path: Path, at: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=at))
        assert await fetch(server, digest) == DATA
        assert fake.count("GET", "blobs/") == 2
        assert [e for e in server.events if isinstance(e, Resumed)]


@pytest.mark.row("U2")
async def test_clean_ends_at_multiples_are_resumed_five_times(tmp_path: Path) -> None:
    data = random_bytes(6 * MIB + 17, 22)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(data)
        fake.fault(f"blobs/{digest}", *(Fault(end_at=MIB) for _ in range(5)))
        assert await fetch(server, digest) == data
        assert fake.count("GET", "blobs/") == 6
        assert fake.bytes_sent <= len(data) * 1.01


@pytest.mark.row("U3")
async def test_a_stall_is_given_up_and_resumed(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=500_000))
        assert await fetch(server, digest) == DATA


@pytest.mark.row("U3")
async def test_a_byte_now_and_then_for_ever_is_given_up(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(drip=0.2, times=None))
        async with asyncio.timeout(40):
            with pytest.raises(aiohttp.ClientError):
                await fetch(server, digest)


@pytest.mark.row("U4")
@pytest.mark.parametrize(
    "second",
    [
        Fault(ignore_range=True),
        Fault(content_range="bytes 1-999999/1000000"),
        Fault(content_range="bytes 500000-999999/1000001"),
        Fault(content_range="nonsense"),
        Fault(status=416),
        Fault(headers={"ETag": '"another"'}),
    ],
    ids=["ignored", "other-start", "other-total", "nonsense", "416", "etag"],
)
async def test_an_answer_to_another_question_is_never_spliced(
    tmp_path: Path, second: Fault
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=500_000), second)
        assert await fetch(server, digest) == DATA


@pytest.mark.row("U5")
@pytest.mark.parametrize(
    ("fault", "served"),
    [
        (Fault(chunked=True, times=None), True),
        (Fault(no_length=True, times=None), True),
        (Fault(http10=True, times=None), True),
        (Fault(extra=b"more", times=None), True),
        (Fault(headers={"Content-Encoding": "gzip"}, times=None), False),
        (Fault(headers={"Content-Length": "999999"}, times=None), False),
        (Fault(headers={"Content-Length": "-5"}, times=None), False),
    ],
    ids=["chunked", "no-length", "http10", "too-long", "gzip", "short-length", "negative"],
)
async def test_odd_framing(tmp_path: Path, fault: Fault, served: bool) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", fault)
        bodies = await whole_answers(server, server.blob(digest), 2)
        assert set(bodies) <= {DATA}
        assert bool(bodies) is served


@pytest.mark.row("U6")
@pytest.mark.parametrize("offset", [0, 500_000, len(DATA) - 1])
async def test_a_wrong_bit_completes_for_nobody(tmp_path: Path, offset: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(flip=offset, times=None))
        results = await asyncio.gather(
            *(whole_answers(server, server.blob(digest), 1) for _ in range(8))
        )
        assert not any(results)
        assert not server.store.layout.blob(digest).exists()
        assert [e for e in server.events if isinstance(e, DigestMismatched)]


@pytest.mark.row("U6")
async def test_after_wrong_bytes_the_next_endpoint_is_tried(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as bad,
        FakeRegistry() as good,
        running(tmp_path, bad.url, good.url) as server,
    ):
        digest = good.add_blob(DATA)
        bad.add_blob(DATA)
        bad.fault(f"blobs/{digest}", Fault(flip=10, times=None))
        assert await whole_answers(server, server.blob(digest), 2)
        assert good.count("GET", "blobs/") == 1


@pytest.mark.row("U7")
async def test_everybody_gets_the_failure(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(status=500, delay=0.2, times=None))

        async def ask() -> tuple[int, float]:
            status, _, _ = await server.get(server.blob(digest))
            return status, time.monotonic()

        answers = await asyncio.gather(*(ask() for _ in range(100)))
        assert {status for status, _ in answers} == {502}
        times = [at for _, at in answers]
        assert max(times) - min(times) < 2.0
        assert fake.count("GET", "blobs/") <= 3


@pytest.mark.row("U8")
async def test_131_first_pulls_at_once(tmp_path: Path) -> None:
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


@pytest.mark.row("U9")
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
async def test_429_is_honoured_and_passed_on(
    tmp_path: Path, header: dict[str, str], passed: int | None
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        fake.fault("manifests/latest", Fault(status=429, headers=header, times=None))
        status, headers, _ = await server.get(server.manifest("latest"))
        assert status == 429
        assert headers.get("Retry-After") == (None if passed is None else str(passed))
        asked = len(fake.requests)
        status, _, _ = await server.get(server.manifest(digest))
        if passed:
            assert status == 429
            assert len(fake.requests) == asked, "it asked for a pause"


@pytest.mark.row("U10")
async def test_50_waiters_one_token(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "secret-token"
        fake.token_delay = 0.1
        blobs = [fake.add_blob(random_bytes(1000, seed)) for seed in range(50)]
        assert len(await asyncio.gather(*(fetch(server, blob) for blob in blobs))) == 50
        assert fake.count("GET", "/token") == 1
        asked = next(seen for seen in fake.requests if seen.path == "/token")
        assert asked.query["scope"] == ["repository:library/app:pull"]


@pytest.mark.row("U10")
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
async def test_token_services(tmp_path: Path, status: int, body: bytes, expected: int) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "t"
        fake.token_status, fake.token_body = status, body
        digest = fake.add_blob(DATA)
        got, _, _ = await server.get(server.blob(digest))
        assert got == expected


@pytest.mark.row("U10")
async def test_a_401_loop_ends_and_a_token_that_ends_is_replaced(tmp_path: Path) -> None:
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


@pytest.mark.row("U10")
async def test_a_token_that_ends_in_mid_blob(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.token = "first"
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(), Fault(stall_at=400_000))

        async def rotate() -> None:
            while fake.bytes_sent < 300_000:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.01)
            fake.token = "second"

        body, _ = await asyncio.gather(fetch(server, digest), rotate())
        assert body == DATA


def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.row("U11")
async def test_dead_endpoints_fail_over_and_then_stale(tmp_path: Path) -> None:
    async with FakeRegistry() as fake:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as black_hole:
            hole = f"http://127.0.0.1:{black_hole.getsockname()[1]}"
            endpoints = (refused(), "http://no-such-host.invalid", hole, fake.url)
            async with running(tmp_path, *endpoints[1:], tag_ttl=0.0) as server:
                digest = fake.add_image(DATA)
                status, _, _ = await server.get(server.manifest("latest"))
                assert status == 200
                await fake.stop()
                status, headers, body = await server.get(server.manifest("latest"))
                assert (status, Digest.of(body)) == (200, digest)
                assert headers["Warning"].startswith('299 - "')
                assert server.pulls[-1].outcome is Outcome.STALE


@pytest.mark.row("U11")
async def test_a_warm_pull_never_waits_for_a_dead_upstream(tmp_path: Path) -> None:
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
        assert not [e for e in server.events if isinstance(e, UpstreamAnswered) and not e.status]


@pytest.mark.row("U12")
async def test_a_flapping_endpoint_is_left_alone_and_found_again(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as bad,
        FakeRegistry() as good,
        running(tmp_path, bad.url, good.url) as server,
    ):
        blobs = [random_bytes(1000, seed) for seed in range(20)]
        for blob in blobs:
            good.add_blob(blob)
            bad.add_blob(blob)
        bad.fault("", Fault(status=503, times=None))
        for blob in blobs:
            assert await fetch(server, Digest.of(blob)) == blob
        assert len(bad.requests) <= 5, "its circuit is open"


@pytest.mark.row("U13")
async def test_a_tag_that_moves_between_head_and_get(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        old = fake.add_image(b"old", tag="latest")
        new = fake.add_image(b"new", tag="other")
        status, headers, _ = await server.get(server.manifest("latest"))
        assert headers["Docker-Content-Digest"] == str(old)
        fake.tags["library/app", "latest"] = str(new)
        status, headers, body = await server.get(server.manifest(old))
        assert (status, Digest.of(body)) == (200, old)


@pytest.mark.row("U13")
async def test_a_digest_header_that_disagrees(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(b"layer")
        wrong = {"Docker-Content-Digest": str(Digest.of(b"something else"))}
        fake.fault("manifests/latest", Fault(headers=wrong, times=None))
        status, _, body = await server.get(server.manifest("latest"))
        assert status != 200
        status, _, body = await server.get(server.manifest(digest))
        assert (status, Digest.of(body)) == (200, digest)


@pytest.mark.row("U15")
async def test_a_404_is_remembered_briefly(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, negative_ttl=0.5) as server:
        for _ in range(5):
            status, _, body = await server.get(server.manifest("latest"))
            assert (status, b"MANIFEST_UNKNOWN" in body) == (404, True)
        assert fake.count("HEAD") == 1
        fake.add_image(b"layer")
        await asyncio.sleep(0.6)
        assert (await server.get(server.manifest("latest")))[0] == 200


@pytest.mark.row("U15")
@pytest.mark.parametrize(
    ("status", "expected"), [(401, 403), (403, 403), (429, 429), (500, 502), (503, 502)]
)
async def test_no_failure_is_remembered_as_or_becomes_a_404(
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
        await asyncio.sleep(2.2)  # the circuit's first pause
        assert (await server.get(server.manifest("latest")))[0] == 200
        assert await fetch(server, Digest.of(DATA)) == DATA


@pytest.mark.row("U16")
async def test_a_slow_client_does_not_slow_the_read_of_the_upstream(tmp_path: Path) -> None:
    data = random_bytes(24 * MIB, 24)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(data)
        async with server.client.get(server.blob(digest)) as slow:
            await slow.content.readexactly(1000)
            for _ in range(500):
                if server.store.layout.blob(digest).exists():
                    break
                await asyncio.sleep(0.02)
            assert server.store.layout.blob(digest).exists(), "it arrived, though nobody read it"
            assert await fetch(server, digest) == data


async def test_the_limits_of_these_tests_are_not_those_of_the_product() -> None:
    defaults: Any = Limits()
    assert (defaults.connect, defaults.headers, defaults.idle) == (5.0, 15.0, 30.0)
    assert QUICK.idle < defaults.idle
