"""The frame around every request: its id, its record, its errors, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest

from mirror.config.settings import Limits
from mirror.observability.events import LogMessage, Outcome, PullEnded, PullStarted
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(600_000, 63)
DIGEST = Digest.of(DATA)


def balanced(server: Server) -> bool:
    """Whether every request that began has ended."""
    begun = [event.pull for event in server.events if isinstance(event, PullStarted)]
    ended = [event.pull for event in server.events if isinstance(event, PullEnded)]
    return sorted(map(id, begun)) == sorted(map(id, ended))


async def test_a_request_keeps_the_id_it_came_with(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for given in ("abc-123", "a.b_C", "x" * 64):
            _, headers, _ = await server.get(f"{server.url}/v2/", {"X-Request-Id": given})
            assert headers["X-Request-Id"] == given
            assert (await server.records())[-1].request_id == given


async def test_an_id_that_could_harm_a_log_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for given in ("", "x" * 65, "a b", "<script>", "é"):
            _, headers, _ = await server.get(f"{server.url}/v2/", {"X-Request-Id": given})
            assert re.fullmatch(r"[0-9a-f]{16}", headers["X-Request-Id"])


async def test_an_error_carries_the_id_as_well(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        given = {"X-Request-Id": "find-me"}
        for path in ("/v2/a/manifests/..", "/nothing", "/v2/a/b/manifests/1?ns=evil.example"):
            _, headers, _ = await server.get(server.url + path, given)
            assert headers["X-Request-Id"] == "find-me"


async def test_a_write_is_told_what_is_allowed(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for method in ("PUT", "POST", "PATCH", "DELETE"):
            for path in (f"blobs/{DIGEST}", "manifests/latest", "blobs/uploads/"):
                url = f"{server.url}/v2/library/app/{path}"
                status, headers, body = await server.ask(method, url)
                assert (status, headers["Allow"]) == (405, "GET, HEAD")
                assert json.loads(body)["errors"][0]["code"] == "UNSUPPORTED"
        assert {pull.outcome for pull in await server.records()} == {Outcome.ERROR}
        assert balanced(server)


async def test_a_fault_of_ours_is_500_and_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as server:

        async def broken(*arguments: object, **named: object) -> None:
            raise ZeroDivisionError("canary")

        monkeypatch.setattr(server.room.service, "blob", broken)
        status, headers, body = await server.get(server.blob(DIGEST))
        assert status == 500
        assert json.loads(body)["errors"][0] == {"code": "UNKNOWN", "message": "internal error"}
        assert "canary" not in str(headers)
        (pull,) = await server.records()
        assert (pull.outcome, pull.status) == (Outcome.ERROR, 500)
        (noted,) = (event for event in server.events if isinstance(event, LogMessage))
        assert noted.level == "error"
        assert dict(noted.fields)["error"] == "ZeroDivisionError('canary')"
        # the connection, and the server, go on
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
        assert balanced(server)


async def test_how_a_request_failed_is_in_its_record(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, negative_ttl=0.0) as server:
        for status, outcome in [
            (404, Outcome.NEGATIVE),
            (403, Outcome.DENIED),
            (401, Outcome.DENIED),
            (500, Outcome.ERROR),
        ]:
            fake.fault(f"blobs/{DIGEST}", Fault(status=status, times=None))
            got, _, body = await server.get(server.blob(DIGEST))
            pull = (await server.records())[-1]
            assert (pull.outcome, pull.status) == (outcome, got)
            assert pull.error.startswith(f"{json.loads(body)['errors'][0]['code']}: ")
            assert not pull.complete
            assert not pull.bytes_sent
            fake.faults.clear()


@pytest.mark.row("C10-stop-among-pulls")
async def test_draining_refuses_new_work_and_ends_what_is_under_way(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        rest = asyncio.Event()
        fake.fault(f"blobs/{DIGEST}", Fault(stall_at=300_000, gate=rest))
        async with server.client.get(server.blob(DIGEST)) as response:
            await response.content.readexactly(1000)
            server.room.health.draining = True
            status, headers, body = await server.get(server.blob(DIGEST))
            assert (status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")
            assert "Docker-Distribution-Api-Version" in headers
            assert (await server.get(f"{server.url}/v2/"))[0] == 503
            assert (await server.get(f"{server.url}/healthz"))[0] == 200
            assert (await server.get(f"{server.url}/metrics"))[0] == 200
            assert server.room.middleware.in_flight == 1
            rest.set()
            assert await response.content.read() == DATA[1000:]
        async with asyncio.timeout(20):
            await server.room.middleware.idle()
        assert balanced(server)


async def test_requests_end_also_where_clients_leave(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        fake.fault(f"blobs/{DIGEST}", Fault(stall_at=300_000))
        leaving = [await server.client.get(server.blob(DIGEST)) for _ in range(5)]
        assert server.room.middleware.in_flight == 5
        for response in leaving:
            response.close()
        async with asyncio.timeout(20):
            await server.room.middleware.idle()
        assert balanced(server)
        assert {pull.error for pull in await server.records()} == {"client left"}


async def test_an_error_is_timed_too(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        _, headers, _ = await server.get(server.blob(Digest.of(b"absent")))
        assert "total;dur=" in headers["Server-Timing"]


async def test_draining_ends_kept_connections(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.room.health.draining = True
        _, headers, _ = await server.get(f"{server.url}/v2/")
        assert headers.get("Connection", "").lower() == "close"


async def test_a_hang_up_in_the_middle_of_an_answer_is_routine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = random_bytes(16_000_000, 64)
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        url = server.blob(fake.add_blob(data))
        await server.get(url)
        await server.store.idle()
        path = url.removeprefix(server.url)
        request = f"GET {path} HTTP/1.1\r\nHost: m\r\nRange: bytes=5-\r\n\r\n"
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request.encode())
            assert await reader.read(20_000)
            writer.transport.abort()
            async with asyncio.timeout(30):
                await server.records()
        assert [pull.error for pull in server.pulls[1:]] == ["client left"] * 5
        assert {pull.outcome for pull in server.pulls[1:]} == {Outcome.HIT}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_leaves_before_any_answer_has_hit_nothing(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url, limits=Limits()) as server:
        fake.add_image(b"layer")
        fake.fault("manifests/latest", Fault(delay=30))
        path = server.manifest("latest").removeprefix(server.url)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        async with asyncio.timeout(30):
            while not fake.count("HEAD", "latest"):  # noqa: ASYNC110 - a fake tells nobody
                await asyncio.sleep(0.01)
        writer.transport.abort()
        left = (await server.records())[0]
        assert (left.outcome, left.status, left.error) == (Outcome.MISS, 0, "client left")
