"""Row L12: the requests of lazy snapshotters for cold layers.

The upstream holds the fetch of the whole layer after 128 KiB. So a response that is complete shows
that it did not wait for the layer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mirror.config.settings import Limits, Storage
from mirror.observability.events import AsideEnded, Outcome, Published
from tests.fakes.registry import FakeRegistry, Fault
from tests.robustness.test_ranges import parts_of
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes
from tests.waiting import until

CHUNK = 50_000
"""Bytes of a chunk of stargz."""
SIZE = 80 * CHUNK + 1_234
DATA = random_bytes(SIZE, 91)
WARNING = '299 - "this range was fetched by itself: it is not verified and not stored"'


@pytest.fixture(autouse=True)
def _one_connection_for_each_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other connection bring the layer while its fetch stands still."""
    monkeypatch.setattr("mirror.pull.connection_budget.MAX_PER_ENDPOINT", 0)


class Layer:
    """A cold layer, whose fetch stands still until ``gate`` is set."""

    def __init__(self, fake: FakeRegistry, server: Server) -> None:
        self.fake, self.server = fake, server
        self.digest = fake.add_blob(DATA)
        self.url = server.blob(self.digest)
        self.gate = asyncio.Event()
        self.fault(Fault(stall_at=131_072, gate=self.gate))

    def fault(self, *faults: Fault) -> None:
        """Add faults of the next requests for the layer."""
        self.fake.fault(f"blobs/{self.digest}", *faults)

    async def get(self, spans: str) -> tuple[int, Mapping[str, str], bytes]:
        return await self.server.get(self.url, {"Range": f"bytes={spans}"})

    @property
    def asides(self) -> list[tuple[str, int]]:
        """(result, bytes) of the aside requests."""
        events = [event for event in self.server.events if isinstance(event, AsideEnded)]
        return [(event.result, event.bytes) for event in events]


@asynccontextmanager
async def cold_layer(root: Path, **more: Any) -> AsyncIterator[Layer]:
    patient = Limits(idle=60.0)  # The fetch must not be resumed while it stands still.
    async with FakeRegistry() as fake, running(root, fake.url, limits=patient, **more) as server:
        layer = Layer(fake, server)
        try:
            yield layer
        finally:
            layer.gate.set()


@pytest.mark.row("L12-lazy-pull")
async def test_requests_of_stargz_do_not_wait_for_the_layer(tmp_path: Path) -> None:
    """As its ``fs/remote/resolver.go`` sends them: a probe, a ``HEAD``, then chunks."""
    async with cold_layer(tmp_path) as layer:
        status, headers, body = await layer.get("0-1")
        assert (status, body) == (206, DATA[:2])
        assert headers["Content-Range"] == f"bytes 0-1/{SIZE}"
        assert "Warning" not in headers
        status, headers, _ = await layer.server.ask("HEAD", layer.url)
        assert (status, headers["Content-Length"]) == (200, str(SIZE))
        # The footer, within the last chunk.
        first = SIZE // CHUNK * CHUNK
        status, headers, body = await layer.get(f"{first}-{SIZE - 1}")
        assert (status, body) == (206, DATA[first:])
        assert headers["Content-Range"] == f"bytes {first}-{SIZE - 1}/{SIZE}"
        assert (headers["Warning"], headers["Cache-Control"]) == (WARNING, "no-store")
        # The table of contents, then the chunks of one file that are not in its cache yet.
        chunks = [(40, 42), (44, 44), (46, 60), (70, 71)]
        ranges = [(a * CHUNK, (b + 1) * CHUNK - 1) for a, b in chunks]
        status, headers, body = await layer.get(",".join(f"{a}-{b}" for a, b in ranges))
        assert status == 206
        wanted = [DATA[a : b + 1] for a, b in ranges]
        assert parts_of(headers["Content-Type"], body) == wanted
        assert headers["Warning"] == WARNING
        assert layer.fake.count_to_end() == 1
        assert [result for result, _ in layer.asides] == ["ok"] * 3, "near ranges are joined"
        layer.gate.set()
        await until(lambda: any(isinstance(e, Published) for e in layer.server.events))
        status, headers, body = await layer.get(f"{first}-{SIZE - 1}")
        assert (status, body, headers.get("Warning")) == (206, DATA[first:], None)
        outcomes = [pull.outcome for pull in await layer.server.records()]
        assert outcomes[2:] == [Outcome.ASIDE, Outcome.ASIDE, Outcome.HIT]


@pytest.mark.row("L12-lazy-pull")
async def test_100_spans_of_soci_at_once_do_not_wait_for_the_layer(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    async with cold_layer(tmp_path) as layer:
        assert (await layer.get("0-1"))[0] == 206
        firsts = random.Random(7).sample(range(131_073, SIZE - 30_000), 100)
        responses = await asyncio.gather(*(layer.get(f"{a}-{a + 29_999}") for a in firsts))
        for first, (status, _, body) in zip(firsts, responses, strict=True):
            assert (status, body) == (206, DATA[first : first + 30_000])
        assert layer.fake.count_to_end() == 1
        assert layer.asides == [("ok", 30_000)] * 100
        tried(100)


@pytest.mark.row("L12-lazy-pull")
async def test_probes_of_overlaybd_start_one_fetch_of_the_layer(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        assert (await layer.get("0-0"))[2] == DATA[:1]
        # A GET that only looks for a redirect: the body is not read.
        async with layer.server.client.get(layer.url) as response:
            assert (response.status, response.headers["Content-Length"]) == (200, str(SIZE))
            response.close()
        for first in range(3_000_000, 3_800_000, 262_144):
            status, _, body = await layer.get(f"{first}-{first + 262_143}")
            assert (status, body) == (206, DATA[first : first + 262_144])
        assert layer.fake.count_to_end() == 1


@pytest.mark.row("L12-lazy-pull")
async def test_50_ranges_beside_a_whole_pull_are_exact(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        order = random.Random(11)
        spans = []
        for _ in range(50):
            first = order.randrange(SIZE - 1)
            spans.append((first, min(SIZE, first + order.randrange(1, 200_000)) - 1))

        async def pull_part(number: int, first: int, last: int) -> None:
            if number == 25:
                layer.gate.set()
            status, headers, body = await layer.get(f"{first}-{last}")
            assert (status, body) == (206, DATA[first : last + 1])
            assert headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"

        async with asyncio.TaskGroup() as group:
            whole = group.create_task(layer.server.get(layer.url))
            for number, span in enumerate(spans):
                group.create_task(pull_part(number, *span))
                await asyncio.sleep(0.01)
        assert whole.result()[2] == DATA
        assert layer.fake.count_to_end() == 1


@pytest.mark.row("L12-lazy-pull")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(content_range=f"bytes 0-50/{SIZE}"),
        Fault(content_range=f"bytes {SIZE - 51}-{SIZE - 1}/{SIZE + 1}"),
        Fault(content_range="nonsense"),
        Fault(drop_headers=("Content-Range",)),
        Fault(status=416),
        Fault(status=404),
        Fault(status=403),
        Fault(status=429, headers={"Retry-After": "60"}),
        Fault(status=503, times=None),
        Fault(close=True, times=None),
        Fault(reset_at=20),
        Fault(end_at=20),
        Fault(headers={"Content-Encoding": "gzip"}),
    ],
    ids=lambda fault: str(fault).partition("(")[2][:40],
)
async def test_failed_request_for_a_range_fails_no_client(tmp_path: Path, fault: Fault) -> None:
    async with cold_layer(tmp_path) as layer:
        layer.fault(fault)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(layer.get("-51"))
            await until(lambda: len(layer.asides) == 1)
            layer.gate.set()
        status, headers, body = reading.result()
        assert (status, body) == (206, DATA[-51:])
        assert headers["Content-Range"] == f"bytes {SIZE - 51}-{SIZE - 1}/{SIZE}"
        assert layer.asides[0][0] in ("no_range", "rate_limited", "failed")
        # The failure of a range says nothing about whole blobs.
        other = layer.fake.add_blob(b"another layer")
        assert (await layer.server.get(layer.server.blob(other)))[2] == b"another layer"
        assert (await layer.server.get(layer.url))[2] == DATA


@pytest.mark.row("L12-lazy-pull")
async def test_upstream_that_ignores_range_ends_the_requests_that_wait_for_their_turn(
    tmp_path: Path,
) -> None:
    async with cold_layer(tmp_path) as layer:
        assert (await layer.get("0-1"))[0] == 206
        layer.fault(Fault(ignore_range=True, delay=0.2, times=None))
        firsts = range(1_000_000, 3_000_000, 50_000)
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(layer.get(f"{a}-{a + 9}")) for a in firsts]
            await until(lambda: len(layer.asides) == 2)
            layer.gate.set()
        for first, task in zip(firsts, reading, strict=True):
            assert task.result()[2] == DATA[first : first + 10]
        assert layer.asides == [("no_range", 0)] * 2
        assert layer.fake.count("GET", "blobs/") == 3


@pytest.mark.row("L12-lazy-pull")
async def test_client_that_hangs_up_ends_its_request_at_once(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        layer.fault(Fault(stall_at=10))
        async with layer.server.client.get(layer.url, headers={"Range": "bytes=-51"}) as response:
            assert response.status == 206
            await until(lambda: layer.fake.count("GET", "blobs/") == 2)
            response.close()
        await until(lambda: [result for result, _ in layer.asides] == ["dropped"])


@pytest.mark.row("L12-lazy-pull")
async def test_ranges_of_a_layer_that_is_not_stored_start_no_second_fetch(tmp_path: Path) -> None:
    """Its first bytes have left the memory when the parts are requested."""
    async with cold_layer(tmp_path, storage=Storage(max_size=100_000)) as layer:
        async with layer.server.client.get(layer.url) as whole:
            assert await whole.content.readexactly(131_072) == DATA[:131_072]
            for first in (1_000_000, 2_000_000, 3_000_000):
                status, _, body = await layer.get(f"{first}-{first + 9}")
                assert (status, body) == (206, DATA[first : first + 10])
            layer.gate.set()
            assert await whole.read() == DATA[131_072:]
        assert layer.fake.count_to_end() == 1


@pytest.mark.row("L12-lazy-pull")
async def test_lazy_pull_of_a_layer_that_the_disk_does_not_take_starts_one_fetch(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    """No client wants the whole layer, so each fetch of it would end with its client."""
    async with cold_layer(tmp_path, storage=Storage(max_size=100_000)) as layer:
        assert (await layer.get("0-1"))[2] == DATA[:2]
        await until(lambda: not layer.server.store.active_ingests)
        sent = layer.fake.bytes_sent
        for first in range(0, 3_000_000, 250_000):
            status, headers, body = await layer.get(f"{first}-{first + CHUNK - 1}")
            assert (status, body) == (206, DATA[first : first + CHUNK])
            assert (headers["Warning"], headers["Cache-Control"]) == (WARNING, "no-store")
        assert layer.fake.count_to_end() == 1
        assert layer.fake.bytes_sent - sent == 12 * CHUNK
        # The whole layer is served, as always.
        layer.gate.set()
        status, headers, body = await layer.server.get(layer.url)
        assert (status, body, headers.get("Warning")) == (200, DATA, None)
        tried(12)


@pytest.mark.row("L12-lazy-pull")
async def test_response_for_a_range_that_does_not_end_is_closed(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        layer.fault(Fault(chunked=True, endless=True))
        sent = layer.fake.bytes_sent
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(layer.get("-51"))
            await until(lambda: len(layer.asides) == 1)
            layer.gate.set()
        assert reading.result()[2] == DATA[-51:]
        assert layer.asides[0][1] <= 51
        assert layer.fake.bytes_sent - sent < 64 << 20


@pytest.mark.row("L12-lazy-pull")
async def test_range_comes_although_the_fetch_fails_meanwhile(tmp_path: Path) -> None:
    limits = Limits(idle=0.5)
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=limits) as server:
        digest = fake.add_blob(DATA)
        path = f"blobs/{digest}"
        fake.fault(path, Fault(stall_at=131_072), Fault(delay=1.5), Fault(status=404, times=None))
        async with asyncio.TaskGroup() as group:
            whole = group.create_task(cut_off(server, server.blob(digest)))
            part = group.create_task(server.get(server.blob(digest), {"Range": "bytes=-51"}))
        assert part.result()[::2] == (206, DATA[-51:])
        assert whole.result()


async def cut_off(server: Server, url: str) -> bool:
    """Return whether a response breaks off."""
    try:
        await server.get(url)
    except aiohttp.ClientError:
        return True
    return False


@pytest.mark.row("L12-lazy-pull")
async def test_range_is_requested_where_the_fetch_has_gone_to(tmp_path: Path) -> None:
    """The first endpoint has other content of the same length under this digest."""
    patient = Limits(idle=60.0)
    async with FakeRegistry() as wrong, FakeRegistry() as right:
        digest = right.add_blob(DATA)
        wrong.blobs["library/app", str(digest)] = DATA[::-1]
        gate = asyncio.Event()
        wrong.fault(f"blobs/{digest}", Fault(end_at=1000))
        right.fault(f"blobs/{digest}", Fault(stall_at=131_072, gate=gate))
        endpoints = wrong.url, right.url
        async with running(tmp_path, *endpoints, limits=patient) as server:
            async with asyncio.TaskGroup() as group:
                whole = group.create_task(cut_off(server, server.blob(digest)))
                await until(lambda: right.stalled.is_set())
                _, _, body = await server.get(server.blob(digest), {"Range": "bytes=-51"})
                gate.set()
            assert body == DATA[-51:]
            assert wrong.count("GET", "blobs/") == 1
            assert whole.result(), "the bytes of two endpoints are no content"


@pytest.mark.row("L6-conditional-requests")
async def test_304_has_no_warning_and_starts_no_aside_request(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        condition = {"If-None-Match": f'"{layer.digest}"', "Range": "bytes=-51"}
        status, headers, _ = await layer.server.get(layer.url, condition)
        assert status == 304
        assert "Warning" not in headers
        assert headers["Cache-Control"] != "no-store"
        assert not layer.asides
        assert layer.fake.count("GET", "blobs/") == 1


@pytest.mark.row("L12-lazy-pull")
async def test_aside_bytes_are_in_the_metrics(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        size = 1_000_000
        assert (await layer.get(f"-{size}"))[2] == DATA[-size:]
        (record,) = await layer.server.records()
        assert (record.aside_bytes, record.outcome) == (size, Outcome.ASIDE)
        _, _, text = await layer.server.get(f"{layer.server.url}/metrics")
        assert b'oci_mirror_aside_bytes_total{upstream="docker.io"} 1e+06' in text
        line = b'oci_mirror_aside_requests_total{result="ok",upstream="docker.io"} 1.0'
        assert line in text


@pytest.mark.row("L12-lazy-pull")
async def test_denied_repository_gets_no_range(tmp_path: Path) -> None:
    async with cold_layer(tmp_path) as layer:
        assert (await layer.get("-51"))[0] == 206
        url = layer.server.blob(layer.digest, "library/stranger")
        status, _, _ = await layer.server.get(url, {"Range": "bytes=-51"})
        assert status == 404
