"""Content is sent as a response: whole, in part, over TLS, and while it is being fetched.

Every form of ``Range``, and the conditions on a blob, are in the rows L4 and L6.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiofiles.base import wrap

from mirror.config.settings import Storage
from mirror.observability.events import Outcome
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.web import streaming
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes
from tests.waiting import until

DATA = random_bytes(1_000_000, 61)
DIGEST = Digest.of(DATA)
LARGE = random_bytes(8_000_000, 65)
"""Sent without a length, the newest batch is withheld, because it may be the last. So half of the
content must be several batches."""
STEPS = [("bytes=0-9", 0, 10), ("bytes=-10", len(DATA) - 10, len(DATA)), ("bytes=7-", 7, len(DATA))]


def parts_of(headers: Mapping[str, str], body: bytes) -> list[tuple[str, bytes]]:
    """``Content-Range`` and bytes of each part of a multipart response."""
    boundary = headers["Content-Type"].partition("boundary=")[2].encode()
    assert boundary
    found = []
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        stated = re.search(rb"Content-Range: (.*)", head)
        assert stated
        found.append((stated[1].decode().strip(), data.removesuffix(b"\r\n")))
    return found


def describes(headers: Mapping[str, str], digest: Digest, media_type: str) -> bool:
    """True if the header fields of a response describe this content."""
    return (
        headers["Docker-Content-Digest"] == str(digest)
        and headers["ETag"] == f'"{digest}"'
        and headers["Accept-Ranges"] == "bytes"
        and headers["Content-Type"] == media_type
    )


@asynccontextmanager
async def half_fetched(
    root: Path,
    data: bytes = DATA,
    *,
    certificate: Certificate | None = None,
    chunked: bool = False,
    flip: int | None = None,
    storage: Storage | None = None,
) -> AsyncIterator[tuple[FakeRegistry, Server, asyncio.Event]]:
    """A blob of which the upstream sends half, and the rest once the event is set."""
    async with (
        FakeRegistry() as fake,
        running(root, fake.url, certificate=certificate, storage=storage) as server,
    ):
        rest = asyncio.Event()
        fault = Fault(stall_at=len(data) // 2, gate=rest, chunked=chunked, flip=flip)
        fake.fault(f"blobs/{fake.add_blob(data)}", fault)
        yield fake, server, rest


# --- header fields ------------------------------------------------------------------------------


async def test_response_describes_its_content(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        manifest = fake.add_image(DATA)
        body = fake.manifests["library/app", str(manifest)][0]
        contents = [
            (server.manifest("latest"), manifest, OCI_MANIFEST, body),
            (server.manifest(manifest), manifest, OCI_MANIFEST, body),
            (server.blob(DIGEST), DIGEST, "application/octet-stream", DATA),
        ]
        for _ in ("cold", "warm"):
            for url, digest, media_type, expected in contents:
                for method in ("HEAD", "GET"):
                    status, headers, got = await server.ask(method, url)
                    assert status == 200
                    assert describes(headers, digest, media_type)
                    assert headers["Content-Length"] == str(len(expected))
                    assert "Content-Encoding" not in headers
                    assert got == (expected if method == "GET" else b"")
            await server.store.idle()


async def test_206_and_304_describe_the_content(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        status, headers, body = await server.get(server.blob(DIGEST), {"Range": "bytes=5-9"})
        assert (status, body) == (206, DATA[5:10])
        assert describes(headers, DIGEST, "application/octet-stream")
        assert headers["Content-Range"] == f"bytes 5-9/{len(DATA)}"
        assert headers["Content-Length"] == "5"
        status, headers, body = await server.get(
            server.blob(DIGEST), {"If-None-Match": f'"{DIGEST}"'}
        )
        assert (status, body) == (304, b"")
        assert headers["ETag"] == f'"{DIGEST}"'
        assert headers["Docker-Content-Digest"] == str(DIGEST)


async def test_response_is_never_content_encoded(tmp_path: Path) -> None:
    """containerd sends ``Accept-Encoding``, and would decode the response."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        offer = {"Accept-Encoding": "zstd, gzip, deflate"}
        _, headers, body = await server.get(server.blob(DIGEST), offer)
        assert body == DATA
        assert "Content-Encoding" not in headers


async def test_empty_blob_is_200_also_for_a_range(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        empty = fake.add_blob(b"")
        for _ in ("cold", "warm"):
            status, headers, body = await server.get(server.blob(empty))
            assert (status, body, headers["Content-Length"]) == (200, b"", "0")
            # No part of an empty content can be described, so the range is ignored.
            status, _, body = await server.get(server.blob(empty), {"Range": "bytes=0-"})
            assert (status, body) == (200, b"")
            await server.store.idle()


# --- manifests ----------------------------------------------------------------------------------


@pytest.mark.row("L4-ranges")
async def test_ranges_of_a_manifest_are_206_or_416(tmp_path: Path) -> None:
    """A version of containerd sends ``bytes=0-`` for manifests, too."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_image(DATA)
        body = fake.manifests["library/app", str(digest)][0]
        size = len(body)
        for reference in ("latest", digest):
            url = server.manifest(reference)
            for value, start, stop in [
                ("bytes=0-", 0, size),
                ("bytes=3-5", 3, 6),
                ("bytes=-4", size - 4, size),
                (f"bytes=2-{2**63}", 2, size),
            ]:
                status, headers, got = await server.get(url, {"Range": value})
                assert (status, got) == (206, body[start:stop])
                assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
                assert describes(headers, digest, OCI_MANIFEST)
            status, headers, got = await server.get(url, {"Range": "bytes=0-1,4-5"})
            assert status == 206
            assert parts_of(headers, got) == [
                (f"bytes 0-1/{size}", body[:2]),
                (f"bytes 4-5/{size}", body[4:6]),
            ]
            status, headers, got = await server.get(url, {"Range": f"bytes={size}-"})
            assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
            assert json.loads(got)["errors"][0]["code"] == "SIZE_INVALID"
            other = {"Range": "bytes=0-1", "If-Range": f'"{DIGEST}"'}
            assert (await server.get(url, other))[::2] == (200, body)


# --- while it is fetched ------------------------------------------------------------------------


@pytest.mark.row("L5-range-far-ahead")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_ranges_of_arrived_bytes_are_served_before_the_fetch_ends(
    tmp_path: Path, tls: bool
) -> None:
    certificate = Certificate.make(tmp_path) if tls else None
    async with (
        half_fetched(tmp_path / "data", certificate=certificate) as (fake, server, rest),
        server.client.get(server.blob(DIGEST)) as leading,
    ):
        assert await leading.content.readexactly(1000) == DATA[:1000]
        assert leading.headers["Content-Length"] == str(len(DATA))
        for value, start, stop in [("bytes=0-9", 0, 10), ("bytes=1000-1999", 1000, 2000)]:
            status, headers, body = await server.get(server.blob(DIGEST), {"Range": value})
            assert (status, body) == (206, DATA[start:stop])
            assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
        several = {"Range": "bytes=0-9,300000-300009"}
        _, headers, body = await server.get(server.blob(DIGEST), several)
        assert [data for _, data in parts_of(headers, body)] == [DATA[:10], DATA[300000:300010]]
        status, headers, body = await server.get(
            server.blob(DIGEST), {"Range": f"bytes={len(DATA)}-"}
        )
        assert (status, headers["Content-Range"]) == (416, f"bytes */{len(DATA)}")
        rest.set()
        assert await leading.content.read() == DATA[1000:]
        assert fake.count("GET", "blobs/") == 1


async def test_range_of_missing_bytes_waits_until_they_arrive(tmp_path: Path) -> None:
    async with half_fetched(tmp_path) as (fake, server, rest), asyncio.TaskGroup() as group:
        asked = [
            group.create_task(server.get(server.blob(DIGEST), {"Range": value}))
            for value, _, _ in STEPS
        ]
        assert (await asked[0])[2] == DATA[:10]
        assert not asked[1].done()
        assert not asked[2].done()
        rest.set()
        for task, (value, start, stop) in zip(asked, STEPS, strict=True):
            status, _, body = await task
            assert (status, body == DATA[start:stop]) == (206, True), value
        assert fake.count("GET", "blobs/") == 1


async def test_unknown_length_is_200_for_an_open_range_and_206_once_complete(
    tmp_path: Path,
) -> None:
    digest = Digest.of(LARGE)
    async with (
        half_fetched(tmp_path, LARGE, chunked=True) as (_, server, rest),
        asyncio.TaskGroup() as group,
    ):
        everything = {"Range": "bytes=0-"}
        async with server.client.get(server.blob(digest), headers=everything) as first:
            assert first.status == 200
            assert "Content-Length" not in first.headers
            assert await first.content.readexactly(1000) == LARGE[:1000]
            last = group.create_task(server.get(server.blob(digest), {"Range": "bytes=-3"}))
            rest.set()
            assert await first.content.read() == LARGE[1000:]
        status, headers, body = await last
        assert (status, body) == (206, LARGE[-3:])
        assert headers["Content-Range"].endswith(f"/{len(LARGE)}")
        await server.store.idle()
        status, headers, _ = await server.get(server.blob(digest), everything)
        assert (status, headers["Content-Length"]) == (206, str(len(LARGE)))


@pytest.mark.parametrize("is_full", [True, False], ids=["full-disk", "disk-that-fills-in-mid-blob"])
async def test_range_is_ignored_if_the_length_is_unknown_and_the_disk_does_not_take_the_content(
    tmp_path: Path, is_full: bool
) -> None:
    """The bytes would have left memory when the length is known."""
    digest, storage = Digest.of(LARGE), Storage(max_size=100_000) if is_full else None
    values = ("bytes=100-200", "bytes=-51", "bytes=5-", "bytes=0-1,7-9", f"bytes={len(LARGE)}-")
    async with (
        half_fetched(tmp_path, LARGE, chunked=True, storage=storage) as (fake, server, rest),
        asyncio.TaskGroup() as group,
    ):
        asked = [
            group.create_task(server.get(server.blob(digest), {"Range": value})) for value in values
        ]
        await fake.stalled.wait()
        if not is_full:
            ingest = server.store.active_ingests[digest]
            await until(lambda: len(ingest.followers) == len(values))
            ingest.continue_in_memory("full")
        rest.set()
        for task in asked:
            status, headers, body = await task
            assert (status, body == LARGE) == (200, True)
            assert "Content-Range" not in headers


# --- TLS ----------------------------------------------------------------------------------------


async def test_tls_client_gets_the_same_bodies_and_ranges(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    async with (
        FakeRegistry() as fake,
        running(tmp_path / "data", fake.url, certificate=certificate) as server,
    ):
        fake.add_image(DATA)
        for _ in ("cold", "warm"):
            responses = await asyncio.gather(*(server.get(server.blob(DIGEST)) for _ in range(4)))
            assert all(body == DATA for _, _, body in responses)
            for value, start, stop in STEPS:
                status, headers, body = await server.get(server.blob(DIGEST), {"Range": value})
                assert (status, body == DATA[start:stop]) == (206, True), value
                assert headers["Content-Length"] == str(stop - start)
            several = {"Range": "bytes=0-0,500000-600000,-1"}
            _, headers, body = await server.get(server.blob(DIGEST), several)
            assert int(headers["Content-Length"]) == len(body)
            assert b"".join(data for _, data in parts_of(headers, body)) == (
                DATA[:1] + DATA[500000:600001] + DATA[-1:]
            )
            head = await server.ask("HEAD", server.blob(DIGEST))
            assert (head[1]["Content-Length"], head[2]) == (str(len(DATA)), b"")
            await server.store.idle()
        assert (await server.get(server.manifest("latest")))[0] == 200
        assert fake.count("GET", f"blobs/{DIGEST}") == 1


@pytest.mark.row("U6-wrong-bit")
async def test_aborted_response_over_tls_has_no_clean_end(tmp_path: Path) -> None:
    """An HTTP/1.0 body without a length ends with the connection, so TLS must send no close."""
    made = Certificate.make(tmp_path)
    digest, wrong = Digest.of(LARGE), len(LARGE) - 1
    async with half_fetched(
        tmp_path / "data", LARGE, certificate=made, chunked=True, flip=wrong
    ) as (
        _,
        server,
        rest,
    ):
        port = int(server.url.rpartition(":")[2])
        trust = ssl.create_default_context(cafile=made.cert_file)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
        writer.write(f"GET /v2/library/app/blobs/{digest} HTTP/1.0\r\n\r\n".encode())
        assert b" 200 OK\r\n" in await reader.readuntil(b"\r\n\r\n")
        async with server.client.get(server.blob(digest)) as response:
            assert response.status == 200
            rest.set()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await reader.read(-1)
        writer.transport.abort()


# --- records ------------------------------------------------------------------------------------


async def test_record_has_outcome_status_and_bytes_sent(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        await server.get(server.blob(DIGEST))
        await server.store.idle()
        await server.get(server.blob(DIGEST), {"Range": "bytes=10-19"})
        await server.ask("HEAD", server.blob(DIGEST))
        cold, part, head = await server.records()
        assert (cold.outcome, cold.status, cold.bytes_sent) == (Outcome.MISS, 200, len(DATA))
        assert (part.outcome, part.status, part.bytes_sent) == (Outcome.HIT, 206, 10)
        assert (head.outcome, head.status, head.bytes_sent) == (Outcome.HIT, 200, 0)
        assert cold.is_complete
        assert part.is_complete
        assert 0 < cold.first_byte <= cold.duration
        assert {"index", "wait", "send"} <= {name for name, _ in cold.stages}


async def test_client_that_leaves_is_recorded_without_an_error_outcome(tmp_path: Path) -> None:
    async with half_fetched(tmp_path) as (_, server, rest):
        leaving = await server.client.get(server.blob(DIGEST))
        await leaving.content.readexactly(1000)
        leaving.close()
        rest.set()
        assert (await server.get(server.blob(DIGEST)))[2] == DATA
        aborted = next(pull for pull in await server.records() if not pull.is_complete)
        assert aborted.error == "client left"
        assert aborted.outcome is not Outcome.ERROR
        assert 1000 <= aborted.bytes_sent < len(DATA)


async def test_range_is_ignored_for_head(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(b"x" * 1000)
        for value in ("bytes=0-9", "bytes=0-1,5-6", "bytes=5000-"):
            status, headers, body = await server.ask("HEAD", server.blob(digest), {"Range": value})
            assert (status, headers["Content-Length"], body) == (200, "1000", b"")
            assert "Content-Range" not in headers


@asynccontextmanager
async def cached_over_tls(root: Path) -> AsyncIterator[Server]:
    """A server with TLS that has ``DATA``."""
    certificate = Certificate.make(root)
    async with (
        FakeRegistry() as fake,
        running(root / "data", fake.url, certificate=certificate) as server,
    ):
        fake.add_blob(DATA)
        await server.get(server.blob(DIGEST))
        await server.store.idle()
        yield server


async def test_tls_bodies_are_read_while_the_threads_of_the_event_loop_hang(
    tmp_path: Path,
) -> None:
    hanging, loop = threading.Event(), asyncio.get_running_loop()
    async with cached_over_tls(tmp_path) as server:
        pool = ThreadPoolExecutor(1)
        loop.set_default_executor(pool)
        pool.submit(hanging.wait, 30)
        try:
            async with asyncio.timeout(10):
                assert (await server.get(server.blob(DIGEST)))[2] == DATA
        finally:
            hanging.set()


@pytest.mark.parametrize("call", range(3))
async def test_tls_client_that_leaves_during_a_read_leaves_no_descriptor(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reads goes on: it cannot be cancelled."""
    reading, leave = asyncio.Event(), threading.Event()
    loop, calls = asyncio.get_running_loop(), iter(range(100))

    def hang(fd: int, length: int, offset: int) -> bytes:
        if next(calls) == call:
            loop.call_soon_threadsafe(reading.set)
            leave.wait(30)
        return os.pread(fd, length, offset)

    def content_is_open() -> bool:
        links = Path("/proc/self/fd").iterdir()
        return any(DIGEST.hex in os.readlink(link) for link in links if link.is_symlink())

    async with cached_over_tls(tmp_path) as server:
        monkeypatch.setattr(streaming, "_pread", wrap(hang))
        try:
            response = await server.client.get(server.blob(DIGEST))
            await reading.wait()
            assert content_is_open()
            response.close()
            await until(lambda: not content_is_open(), 10)
        finally:
            leave.set()
        monkeypatch.undo()
        assert (await server.get(server.blob(DIGEST)))[2] == DATA
