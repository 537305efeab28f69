"""Rows FB1, FB2, FB9 to FB11, FC1: upstreams that a client copes with, and the mirror must too."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import pytest

from mirror.config.settings import Limits
from mirror.observability.events import CircuitChanged
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.pull.attempts import STALL_GRACE_S
from mirror.upstream.retry import MAX_ATTEMPTS_PER_REQUEST
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import LIMITS, QUICK, SHORT_HEADERS, Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(1_000_000, 31)
BREAK = 400_000


def ranges(fake: FakeRegistry) -> list[str | None]:
    """Return the ``Range`` of each ``GET`` of a blob."""
    seen = [request for request in fake.requests if "blobs/" in request.path]
    return [request.headers.get("range") for request in seen if request.method == "GET"]


def circuits(server: Server) -> list[CircuitChanged]:
    return [event for event in server.events if isinstance(event, CircuitChanged)]


# --- HEAD that is refused -------------------------------------------------------------------------


@pytest.mark.row("FB1-refused-head")
@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 406, 408, 429, *range(500, 505)])
async def test_image_is_pulled_from_an_upstream_that_refuses_head(
    tmp_path: Path, status: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(DATA, tag="latest")
        fake.fault("", Fault(status=status, method="HEAD", times=None))
        for method in ("HEAD", "GET", "HEAD"):
            for reference in ("latest", digest):
                got, headers, _ = await server.ask(method, server.manifest(reference))
                assert (got, headers["Docker-Content-Digest"]) == (200, str(digest))
                manifest = fake.manifests["library/app", str(digest)][0]
                assert headers["Content-Length"] == str(len(manifest))
            got, headers, _ = await server.ask(method, server.blob(Digest.of(DATA)))
            assert (got, headers["Content-Length"]) == (200, str(len(DATA)))
        assert (await server.get(server.manifest("none")))[0] == 404
        assert not circuits(server)


@pytest.mark.row("FB1-refused-head")
@pytest.mark.parametrize(
    "fault",
    [Fault(close=True), Fault(delay=3600), Fault(status=503, headers={"Retry-After": "60"})],
    ids=["dropped", "hangs", "503"],
)
async def test_manifest_is_pulled_by_get_where_each_head_fails(
    tmp_path: Path, fault: Fault
) -> None:
    fault.method, fault.times = "HEAD", None
    limits = QUICK.model_copy(update={"headers": 1.0})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_image(DATA, tag="latest")
        fake.fault("", fault)
        direct = await server.client.get(f"{fake.url}/v2/library/app/manifests/latest")
        expected = (direct.status, await direct.read())
        for reference in ("latest", digest):
            status, _, body = await server.get(server.manifest(reference))
            assert (status, body) == expected
        mirrored = [seen for seen in fake.requests if "manifests/" in seen.path][1:]
        # aiohttp itself repeats a request whose connection was dropped.
        assert list(dict.fromkeys(seen.method for seen in mirrored)) == ["HEAD", "GET"]
        assert sum(seen.method == "GET" for seen in mirrored) == 1
        assert not circuits(server)


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.row("FB2-wrong-lengths")
@pytest.mark.parametrize("stated", [len(DATA) - 1, len(DATA) + 1, 0, 10**15], ids=str)
@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunked", "with length"])
@pytest.mark.parametrize("has_head", [True, False], ids=["after a HEAD", "at once"])
async def test_blob_of_a_wrong_stated_size_is_served_with_its_right_length(
    tmp_path: Path, stated: int, is_chunked: bool, has_head: bool
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": str(digest)}
        config = {**layer, "digest": str(fake.add_blob(b"{}")), "size": 2}
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config,
            "layers": [{**layer, "size": stated}],
        }
        fake.add_manifest(json.dumps(document).encode(), tag="latest")
        if is_chunked:
            fake.fault(f"blobs/{digest}", Fault(chunked=True, method="GET", times=None))
        fake.fault("", Fault(headers={"Content-Length": str(stated)}, method="HEAD", times=None))
        assert (await server.get(server.manifest("latest")))[0] == 200
        if has_head:
            status, headers, _ = await server.ask("HEAD", server.blob(digest))
            length = None if is_chunked else str(len(DATA))
            assert (status, headers.get("Content-Length")) == (200, length)
        status, headers, body = await server.get(server.blob(digest))
        assert (status, body) == (200, DATA)
        # The length of a chunked body is known if all of it has arrived by now.
        assert headers.get("Content-Length", str(len(DATA))) == str(len(DATA))
        assert is_chunked or "Content-Length" in headers
        await server.store.idle()
        for method in ("HEAD", "GET"):
            status, headers, body = await server.ask(method, server.blob(digest))
            assert (status, headers["Content-Length"]) == (200, str(len(DATA)))
        assert body == DATA
        assert fake.count("GET", f"blobs/{digest}") <= 2


@pytest.mark.row("FB2-wrong-lengths")
@pytest.mark.parametrize("stated", [0, 1, len(DATA) + 1], ids=str)
async def test_head_of_an_uncached_blob_has_the_length_of_the_get(
    tmp_path: Path, stated: int
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault("", Fault(headers={"Content-Length": str(stated)}, method="HEAD", times=None))
        for _ in range(2):
            status, headers, _ = await server.ask("HEAD", server.blob(digest))
            assert (status, headers["Content-Length"]) == (200, str(len(DATA)))
        fake.fault(f"blobs/{digest}", Fault(status=429, method="GET", times=None))
        status, headers, _ = await server.ask("HEAD", server.blob(digest))
        assert (status, "Content-Length" in headers) == (200, False)


@pytest.mark.row("FB2-wrong-lengths")
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_growing_blob_without_a_length_is_whole_for_each_version_of_http(
    tmp_path: Path, version: bytes
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(chunked=True, rate=1_000_000))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        path = server.blob(digest).removeprefix(server.url).encode()
        writer.write(b"GET %b HTTP/%b\r\nHost: x\r\nConnection: close\r\n\r\n" % (path, version))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.read()
        writer.close()
        assert b"content-length" not in head
        assert (b"transfer-encoding: chunked" in head) == (version == b"1.1")
        assert body == DATA if version == b"1.0" else body.endswith(b"\r\n0\r\n\r\n")


# --- ranges that are answered wrongly -------------------------------------------------------------


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(content_range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}", times=None),
        Fault(content_range=f"bytes {BREAK}-{BREAK + 9}/{len(DATA)}", times=None),
        Fault(content_range="bytes */7", times=None),
        Fault(content_range="nonsense", times=None),
        Fault(drop_headers=("Content-Range",), times=None),
        Fault(status=416),
        Fault(status=400),
        Fault(status=401),
        Fault(status=403),
    ],
    ids=["start", "part", "unsatisfied", "nonsense", "none", "416", "400", "401", "403"],
)
async def test_wrong_response_to_a_range_is_followed_by_one_request_without_a_range(
    tmp_path: Path, fault: Fault
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=BREAK), fault)
        status, _, body = await server.get(server.blob(digest))
        assert (status, body) == (200, DATA)
        first, second, third = ranges(fake)
        assert (first, third) == (None, None)
        assert second is not None


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize("status", [401, 403])
async def test_storage_that_refuses_a_range_is_asked_without_one_by_a_new_redirect(
    tmp_path: Path, status: int
) -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry() as storage,
        running(tmp_path, fake.url) as server,
    ):
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        moved = f"{storage.url}/v2/library/app/blobs/{digest}"
        fake.fault(f"blobs/{digest}", Fault(status=307, headers={"Location": moved}, times=None))
        refusals = Fault(status=status, times=MAX_ATTEMPTS_PER_REQUEST)
        storage.fault(f"blobs/{digest}", Fault(reset_at=BREAK), refusals)
        status_received, _, body = await server.get(server.blob(digest))
        assert (status_received, body) == (200, DATA)
        first, *refused, last = ranges(storage)
        assert (first, len(refused), last) == (None, MAX_ATTEMPTS_PER_REQUEST, None)
        assert None not in refused
        assert len(ranges(fake)) == len(ranges(storage)), "each URL is used once"


def refuse_ranges(fake: FakeRegistry, status: int) -> None:
    fake.guard = lambda seen: (status, {}, b"") if "range" in seen.headers else None


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize("status", [400, 401, 403, 404, 416, 500])
@pytest.mark.parametrize("is_redirected", [False, True], ids=["endpoint", "storage"])
@pytest.mark.parametrize("is_restarted", [False, True], ids=["mid-blob", "leftover"])
async def test_blob_is_served_although_ranges_are_refused(
    tmp_path: Path, status: int, *, is_redirected: bool, is_restarted: bool
) -> None:
    async with FakeRegistry() as fake, FakeRegistry() as storage:
        digest = fake.add_blob(DATA)
        storage.add_blob(DATA)
        sender = storage if is_redirected else fake
        # A reset drops bytes that were not read yet. Where the leftover is measured, all have to
        # arrive.
        broken = Fault(end_at=BREAK) if is_restarted else Fault(reset_at=BREAK)
        sender.fault(f"blobs/{digest}", broken)
        if is_redirected:
            moved = f"{storage.url}/v2/library/app/blobs/{digest}"
            redirect = Fault(status=307, headers={"Location": moved}, times=None)
            fake.fault(f"blobs/{digest}", redirect)
        if is_restarted:
            gate = asyncio.Event()
            sender.fault(f"blobs/{digest}", Fault(stall_at=0, gate=gate, times=None))
            async with running(tmp_path, fake.url) as server:
                pull = asyncio.ensure_future(  # noqa: TID251 - a test
                    server.get(server.blob(digest))
                )
                await asyncio.wait_for(sender.stalled.wait(), 20)
                pull.cancel()
                await asyncio.gather(pull, return_exceptions=True)
                await server.store.wait_until_published()
                gate.set()
            sender.faults.pop()
            (left,) = server.store.layout.ingest(digest).parent.glob(digest.hex)
            assert left.stat().st_size >= BREAK
            sender.requests.clear()
        refuse_ranges(sender, status)
        async with running(tmp_path, fake.url) as server:
            got, _, body = await server.get(server.blob(digest))
            assert (got, body) == (200, DATA)
        assert ranges(sender)[-1] is None
        assert any(ranges(sender)[:-1]), "the rest was requested first"


@pytest.mark.row("FB9-wrong-content-range-then-whole")
async def test_leftover_of_a_blob_that_is_gone_is_asked_for_twice_and_the_404_is_recorded(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=BREAK), Fault(status=403, times=2))
        async with running(tmp_path, fake.url) as server:
            with pytest.raises(aiohttp.ClientError):
                await server.get(server.blob(digest))
        fake.requests.clear()
        fake.fault(f"blobs/{digest}", Fault(status=404, times=None))
        async with running(tmp_path, fake.url) as server:
            for _ in range(3):
                assert (await server.get(server.blob(digest)))[0] == 404
        ranged, whole = ranges(fake)
        assert ranged is not None
        assert whole is None


@pytest.mark.row("FB9-wrong-content-range-then-whole")
async def test_access_that_ends_in_the_middle_of_a_blob_ends_the_pull(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=BREAK), Fault(status=403, times=None))
        with pytest.raises(aiohttp.ClientError):
            await server.get(server.blob(digest))
        assert len(ranges(fake)) == 3


@pytest.mark.row("FB9-wrong-content-range-then-whole")
async def test_range_is_left_out_after_two_transfers_in_a_row_that_failed(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(reset_at=BREAK), Fault(status=500, times=6))
        status, _, body = await server.get(server.blob(digest))
        assert (status, body) == (200, DATA)
        assert ranges(fake)[-1] is None


# --- bodies that stall ----------------------------------------------------------------------------


@pytest.mark.row("FB10-stalling-twice")
@pytest.mark.parametrize(
    "again",
    [
        Fault(stall_at=0, times=None),
        Fault(stall_at=1000, times=None),
        Fault(delay=3600, times=None),
        Fault(ignore_range=True, stall_at=BREAK, times=None),
        Fault(status=503, delay=0.4, times=None),
    ],
    ids=["headers", "few bytes", "nothing", "from the start", "errors"],
)
async def test_body_that_stalls_at_each_attempt_is_cut_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Fault
) -> None:
    monkeypatch.setattr("mirror.pull.fetch.STALL_GRACE_S", 0.5)
    limits = QUICK.model_copy(update={"idle": 1.0, "first_byte": 30.0})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(stall_at=BREAK), again)

        async def silence() -> float:
            async with server.client.get(server.blob(digest)) as response:
                await response.content.readexactly(BREAK - 64 * 1024)
                silent_since = time.monotonic()
                try:
                    while await response.content.readany():
                        silent_since = time.monotonic()
                except aiohttp.ClientError:
                    return time.monotonic() - silent_since
            raise AssertionError("the body is whole")

        for seconds in await asyncio.gather(silence(), silence()):
            assert 0.3 < seconds < 1.5 + 1.0
        assert fake.count("GET") > 1
        fake.faults.clear()
        assert (await server.get(server.blob(digest)))[2] == DATA, "the next client resumes it"


@pytest.mark.row("FB10-stalling-twice")
async def test_skipping_the_same_bytes_again_and_again_does_not_extend_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.pull.fetch.STALL_GRACE_S", 0.9)
    monkeypatch.setattr("mirror.pull.attempts._PAUSE_UNIT_S", 0.001)
    limits = QUICK.model_copy(update={"idle": 0.6})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        fake.fault(f"blobs/{digest}", Fault(ignore_range=True, stall_at=BREAK, times=None))
        with pytest.raises(aiohttp.ClientError):
            await server.get(server.blob(digest))
        # Not the message of `idle`: the limit of all attempts has ended the last one.
        assert "in several attempts" in (await server.records())[0].error


@pytest.mark.row("FB10-stalling-twice")
def test_stalled_body_is_cut_after_15_seconds_beside_idle() -> None:
    assert (Limits().idle, STALL_GRACE_S) == (30.0, 15.0)


@pytest.mark.row("FB10-stalling-twice")
async def test_long_content_is_skipped_as_long_as_bytes_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server without ``Range`` sends the start again. That takes longer than a stall may."""
    monkeypatch.setattr("mirror.pull.fetch.STALL_GRACE_S", 0.5)
    limits = QUICK.model_copy(update={"idle": 0.5})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        again = Fault(ignore_range=True, rate=len(DATA) // 3)
        fake.fault(f"blobs/{digest}", Fault(reset_at=900_000), again)
        assert (await server.get(server.blob(digest)))[2] == DATA


# --- blobs whose headers come late ----------------------------------------------------------------


async def pull_beside_slow_blobs(server: Server, fake: FakeRegistry, delay: float) -> list[str]:
    """Pull 5 blobs whose headers come after ``delay``, and 40 others that must be served at once.

    Returns the status of each slow blob, with the message of its error.
    """
    slow = [fake.add_blob(b"slow %d" % number) for number in range(5)]
    quick = [fake.add_blob(b"quick %d" % number) for number in range(40)]
    for digest in slow:
        fake.fault(f"blobs/{digest}", Fault(delay=delay, times=None))

    async def pull(digest: Digest) -> str:
        status, _, body = await server.get(server.blob(digest))
        message = json.loads(body)["errors"][0]["message"] if status != 200 else ""
        return f"{status} {message}".strip()

    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(pull(digest)) for digest in slow]
        assert {await pull(digest) for digest in quick[:20]} == {"200"}
    assert {await pull(digest) for digest in quick[20:]} == {"200"}
    assert not circuits(server)
    return [task.result() for task in waiting]


@pytest.mark.row("FB11-late-first-byte")
async def test_blob_whose_headers_come_late_is_served(tmp_path: Path) -> None:
    limits = SHORT_HEADERS.model_copy(update={"idle": 1.0})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        assert await pull_beside_slow_blobs(server, fake, 1.8) == ["200"] * 5


@pytest.mark.row("FB11-late-first-byte")
async def test_blob_whose_headers_come_too_late_fails_alone_and_names_the_key(
    tmp_path: Path,
) -> None:
    limits = LIMITS.model_copy(update={"connect": 1.0, "first_byte": 1.0})
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        results = await pull_beside_slow_blobs(server, fake, 3600)
        assert {result[:4] for result in results} == {"504 "}
        assert all("limits.first_byte" in result for result in results), results


# --- pages ----------------------------------------------------------------------------------------

NAMES = [f"{letter}{number}" for number in range(100) for letter in "aBcD_"]


@pytest.mark.row("FC1-page-order")
@pytest.mark.parametrize(
    "order",
    [str, str.lower, lambda name: -NAMES.index(name)],
    ids=["lexical", "case-insensitive", "by age"],
)
@pytest.mark.parametrize("has_cursors", [False, True], ids=["last", "cursors"])
async def test_following_link_yields_each_tag_once(
    tmp_path: Path, order: Callable[[str], object], has_cursors: bool
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(b"layer")
        fake.tags = {("library/app", name): str(digest) for name in NAMES}
        fake.tag_key, fake.tag_cursors, fake.max_page_tags = order, has_cursors, 20

        async def follow() -> list[str]:
            url, seen = f"{server.url}/v2/library/app/tags/list?n=60", list[str]()
            while True:
                async with server.client.get(url) as response:
                    seen += (await response.json())["tags"]
                    if (link := response.links.get("next")) is None:
                        return seen
                    url = urljoin(url, str(link["url"]))

        for seen in await asyncio.gather(follow(), follow(), follow()):
            assert seen == sorted(NAMES)
        assert fake.count("GET", "tags/list") <= 2 * len(NAMES) // 20


@pytest.mark.row("FC1-page-order")
async def test_list_that_breaks_in_the_middle_is_stale_or_an_error_and_never_shorter(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, tag_ttl=0.0) as server:
        digest = fake.add_image(b"layer")
        fake.tags = {("library/app", name): str(digest) for name in "abcdef"}
        fake.max_page_tags = 2
        url = f"{server.url}/v2/library/app/tags/list"
        fake.fault("tags/list", Fault(), Fault(status=404))
        assert (await server.get(url))[0] == 502
        assert json.loads((await server.get(url))[2])["tags"] == list("abcdef")
        fake.tags["library/app", "g"] = str(digest)
        fake.fault("tags/list", Fault(), Fault(end_at=3))
        status, headers, body = await server.get(url)
        assert (status, json.loads(body)["tags"]) == (200, list("abcdef"))
        assert "Warning" in headers
