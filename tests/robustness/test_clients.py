"""Rows L: unusual, but honest clients: leaving, resetting, ranges, pipelining."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import pytest

from mirror.observability.events import Outcome
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.robustness.kit import CLOSE, send_raw, statuses
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(2_000_000, 31)
_RESET = struct.pack("ii", 1, 0)


async def add_slow_blob(fake: FakeRegistry, rate: int = 4_000_000) -> Digest:
    """Add a blob that takes half a second to arrive. Returns its digest."""
    digest = fake.add_blob(DATA)
    fake.fault(f"blobs/{digest}", Fault(rate=rate))
    return digest


@pytest.mark.row("L1-client-that-leaves")
@pytest.mark.parametrize("followers", [0, 3])
async def test_followers_get_the_blob_when_the_first_client_leaves(
    tmp_path: Path, followers: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = await add_slow_blob(fake)
        leading = await server.client.get(server.blob(digest))
        await leading.content.readexactly(100_000)
        waiting = [server.get(server.blob(digest)) for _ in range(followers)]
        tasks = asyncio.gather(*waiting)
        while len(server.store.active_ingests[digest].followers) <= followers:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        leading.close()
        assert [body for _, _, body in await tasks] == [DATA] * followers
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA
        assert fake.count("GET", "blobs/") == 1


@pytest.mark.row("L1-client-that-leaves")
async def test_abandoned_fetch_is_cancelled_if_configured_and_made_again_later(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, abandoned="cancel") as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=1_000_000))
        leading = await server.client.get(server.blob(digest))
        await leading.content.readexactly(300_000)
        leading.close()
        async with asyncio.timeout(10):
            await server.store.idle()
        assert not server.store.layout.blob(digest).exists(), "it was given up"
        _, _, body = await server.get(server.blob(digest))
        assert body == DATA


@pytest.mark.row("L2-clients-that-reset")
async def test_1000_resetting_clients_cost_one_fetch_and_leave_nothing_open(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = await add_slow_blob(fake)
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
            if len(os.listdir("/proc/self/fd")) <= before + 12 and not server.store.active_ingests:
                break
            await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) <= before + 12
        assert not server.store.active_ingests
        tried(1000)


@pytest.mark.row("L8-odd-requests")
@pytest.mark.parametrize(
    ("line", "headers", "body"),
    [
        ("GET {} HTTP/1.0", "", ""),
        ("HEAD {} HTTP/1.1", CLOSE, ""),
        ("GET {} HTTP/1.1", f"{CLOSE}\r\nContent-Length: 4", "body"),
        ("GET {} HTTP/1.1", f"{CLOSE}\r\nTransfer-Encoding: chunked", "4\r\nbody\r\n0\r\n\r\n"),
        # the server does not wait for the announced body
        ("GET {} HTTP/1.1", f"{CLOSE}\r\nContent-Length: 4\r\nExpect: 100-continue", ""),
    ],
    ids=["1.0", "head", "body", "chunked", "expect"],
)
async def test_unusual_but_legal_requests_are_served(
    tmp_path: Path, line: str, headers: str, body: str
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        path = f"/v2/library/app/blobs/{fake.add_blob(b'small blob')}"
        request = f"{line.format(path)}\r\n{headers}\r\n\r\n{body}"
        response = await send_raw(server, request.encode())
        assert statuses(response) == [200]
        assert b"Content-Length: 10\r\n" in response
        assert response.endswith(b"\r\n\r\n" if "HEAD" in line else b"small blob")


@pytest.mark.row("L8-odd-requests")
async def test_100_pipelined_requests_are_answered_in_order(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        line = f"GET /v2/library/app/blobs/{fake.add_blob(b'small blob')} HTTP/1.1\r\n"
        last = f"{line}{CLOSE}\r\n\r\n"
        response = await send_raw(server, (f"{line}Host: x\r\n\r\n" * 99 + last).encode())
        assert statuses(response) == [200] * 100
        assert response.count(b"small blob") == 100
        tried(100)


@pytest.mark.row("L9-rush-after-a-start")
async def test_500_clients_right_after_a_start_are_served_from_disk(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake:
        digest = fake.add_blob(random_bytes(10_000, 32))
        async with running(tmp_path, fake.url) as server:
            await server.get(server.blob(digest))
            # a client has its body before the content is published
            await server.store.idle()
        async with running(tmp_path, fake.url) as server:
            responses = await asyncio.gather(*(server.get(server.blob(digest)) for _ in range(500)))
            assert {(status, Digest.of(body)) for status, _, body in responses} == {(200, digest)}
        assert fake.count("GET", "blobs/") == 1
        tried(500)


@pytest.mark.row("L11-open-ended-ranges")
@pytest.mark.parametrize("growing", [True, False], ids=["growing", "hit"])
async def test_open_ended_ranges_that_hang_up_cost_one_fetch_and_no_error(
    tmp_path: Path, growing: bool, tried: Callable[[int], None]
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
        while len(server.pulls) < 20 + (not growing):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
        tried(20)
        assert not [p for p in server.pulls if p.outcome is Outcome.ERROR]


async def test_error_after_the_headers_aborts_the_connection(tmp_path: Path) -> None:
    """An HTTP/1.0 body without a length ends with its connection. So an error must be a reset."""
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


async def test_tag_lists_are_paged_with_links_to_the_mirror(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        for n in range(25):
            fake.add_image(b"layer", repository="org/app", tag=f"v{n:02}")
        url: str | None = f"{server.url}/v2/org/app/tags/list?n=10&ns=docker.io"
        seen: list[str] = []
        while url:
            async with server.client.get(url) as response:
                assert response.headers["OCI-Namespace"] == "docker.io"
                seen += json.loads(await response.read())["tags"]
                link = response.headers.get("Link")
            match = re.match(r'<([^>]*)>; rel="next"', link) if link else None
            url = urljoin(url, match[1]) if match else None
        assert seen == [f"v{n:02}" for n in range(25)]
        _, headers, body = await server.get(f"{server.url}/v2/org/app/tags/list?n=0")
        assert json.loads(body)["tags"] == []
        assert "Link" not in headers
