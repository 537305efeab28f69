"""Rows L4, L5, L6: ranges of complete and of growing content, and conditional requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import running
from tests.slow_callbacks import Watch
from tests.unit.store.kit import random_bytes

DATA = random_bytes(2_000_000, 31)
STATES = pytest.mark.parametrize("growing", [True, False], ids=["growing", "hit"])
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
    ("bytes=9-5", 416, b""),
    ("bytes=", 200, DATA),
    ("bytes=a-b", 200, DATA),
    ("lines=1-2", 200, DATA),
    ("bytes=1-2,", 206, DATA[1:3]),
]


@pytest.mark.row("L4-ranges")
@STATES
async def test_each_form_of_range_gets_its_part(
    tmp_path: Path, growing: bool, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        else:
            fake.fault(f"blobs/{digest}", Fault(rate=8_000_000))
        responses = await asyncio.gather(
            *(server.get(server.blob(digest), {"Range": form}) for form, _, _ in FORMS)
        )
        for (form, status, expected), (got, headers, body) in zip(FORMS, responses, strict=True):
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
        assert fake.count_to_end() == 1
        # Parts that are ahead of a slow fetch may be requested by themselves: each one once.
        assert growing or not fake.parts()
        tried(len(FORMS))


def parts_of(content_type: str, body: bytes) -> list[bytes]:
    """Return the bodies of a ``multipart/byteranges`` response."""
    boundary = content_type.partition("boundary=")[2].encode()
    first, *parts, last = body.split(b"--" + boundary)
    assert (first, last) == (b"", b"--\r\n")
    return [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts]


@pytest.mark.row("L4-ranges")
@STATES
async def test_several_ranges_are_one_multipart_response(
    tmp_path: Path, growing: bool, tried: Callable[[int], None]
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        url = server.blob(digest)
        thousand = [(n, n + 90) for n in range(0, 1_000_000, 1000)]
        for spans in ([(0, 9), (100, 199), (1_999_990, 1_999_999)], thousand):
            header = {"Range": "bytes=" + ",".join(f"{first}-{last}" for first, last in spans)}
            status, headers, body = await server.get(url, header)
            assert status == 206
            assert int(headers["Content-Length"]) == len(body)
            wanted = [DATA[first : last + 1] for first, last in spans]
            assert parts_of(headers["Content-Type"], body) == wanted
            tried(len(spans))
        assert fake.count_to_end() == 1
        assert growing or not fake.parts()


@pytest.mark.row("L4-ranges")
@STATES
async def test_1000_overlapping_ranges_get_the_whole_content(
    tmp_path: Path, growing: bool, tried: Callable[[int], None]
) -> None:
    """The ranges merge into one. A response with a single part would not match the request."""
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        if not growing:
            await server.get(server.blob(digest))
        overlapping = ",".join(f"{n}-{n + 5000}" for n in range(0, 1_000_000, 1000))
        header = {"Range": f"bytes={overlapping}"}
        status, _, body = await server.get(server.blob(digest), header)
        assert (status, body) == (200, DATA)
        assert fake.count("GET", "blobs/") == 1
        tried(1000)


@pytest.mark.row("L5-range-far-ahead")
async def test_range_ahead_waits_without_polling_and_is_served_when_its_bytes_arrive(
    tmp_path: Path, watch: Watch
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        rest = asyncio.Event()
        # Silent at three quarters, like a slow upstream, until the test goes on.
        fake.fault(f"blobs/{digest}", Fault(stall_at=1_500_000, gate=rest))
        url = server.blob(digest)
        _, _, body = await server.get(url, {"Range": "bytes=1400000-1400099"})
        assert body == DATA[1_400_000:1_400_100]
        ahead = [
            asyncio.ensure_future(server.get(url, {"Range": f"bytes={n}-"}))  # noqa: TID251 - a test
            for n in range(1_600_000, 1_600_010)
        ]
        await fake.stalled.wait()
        while server.running_server.handler.in_flight < len(ahead):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)
        callbacks = []
        # On a busy machine the requests may take longer than 0.1 s until they wait.
        while len(callbacks) < 10 and (not callbacks or callbacks[-1] >= 50):
            await asyncio.sleep(0.1)
            before = watch.count
            await asyncio.sleep(0.3)
            callbacks.append(watch.count - before)
        assert callbacks[-1] < 50, "the clients wait without being woken"
        rest.set()
        assert [(await one)[2] for one in ahead] == [DATA[n:] for n in range(1_600_000, 1_600_010)]
        assert fake.count_to_end() == 1
        # The range with an end may be requested by itself. Those without one are not.
        assert set(fake.parts()) <= {"bytes=1400000-1400099"}


@pytest.mark.row("L6-conditional-requests")
async def test_conditional_requests_are_decided_by_etag(tmp_path: Path) -> None:
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
