"""For every request: its id, its record, its error response, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest

from mirror.observability.events import LogMessage, Outcome, RequestEnded, RequestStarted
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(600_000, 63)
DIGEST = Digest.of(DATA)


def every_pull_ended(server: Server) -> bool:
    """True if each ``RequestStarted`` has exactly one ``RequestEnded``."""
    started = [event.pull for event in server.events if isinstance(event, RequestStarted)]
    ended = [event.pull for event in server.events if isinstance(event, RequestEnded)]
    return sorted(map(id, started)) == sorted(map(id, ended))


async def test_valid_request_id_of_the_client_is_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for given in ("abc-123", "a.b_C", "x" * 64):
            _, headers, _ = await server.get(f"{server.url}/v2/", {"X-Request-Id": given})
            assert headers["X-Request-Id"] == given
            assert (await server.records())[-1].request_id == given


async def test_request_id_that_is_too_long_or_has_other_characters_is_replaced(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as server:
        for given in ("", "x" * 65, "a b", "<script>", "é"):
            _, headers, _ = await server.get(f"{server.url}/v2/", {"X-Request-Id": given})
            assert re.fullmatch(r"[0-9a-f]{16}", headers["X-Request-Id"])


async def test_error_response_carries_the_request_id(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        given = {"X-Request-Id": "find-me"}
        for path in ("/v2/a/manifests/..", "/nothing", "/v2/a/b/manifests/1?ns=evil.example"):
            _, headers, _ = await server.get(server.url + path, given)
            assert headers["X-Request-Id"] == "find-me"


async def test_write_methods_are_405_and_allow_names_get_and_head(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for method in ("PUT", "POST", "PATCH", "DELETE"):
            for path in (f"blobs/{DIGEST}", "manifests/latest", "blobs/uploads/"):
                url = f"{server.url}/v2/library/app/{path}"
                status, headers, body = await server.ask(method, url)
                assert (status, headers["Allow"]) == (405, "GET, HEAD")
                assert json.loads(body)["errors"][0]["code"] == "UNSUPPORTED"
        assert {pull.outcome for pull in await server.records()} == {Outcome.REJECTED}
        assert every_pull_ended(server)


async def test_unexpected_exception_is_500_without_details_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as server:

        async def broken(*arguments: object, **named: object) -> None:
            raise ZeroDivisionError("canary")

        monkeypatch.setattr(server.running_server.mirror.service, "blob", broken)
        status, headers, body = await server.get(server.blob(DIGEST))
        assert status == 500
        assert json.loads(body)["errors"][0] == {"code": "UNKNOWN", "message": "internal error"}
        assert "canary" not in str(headers)
        (pull,) = await server.records()
        assert (pull.outcome, pull.status) == (Outcome.ERROR, 500)
        (message,) = (event for event in server.events if isinstance(event, LogMessage))
        assert message.level == "error"
        assert dict(message.fields)["error"] == "ZeroDivisionError('canary')"
        # The server, and the connection, still work.
        assert (await server.get(f"{server.url}/v2/"))[0] == 200
        assert every_pull_ended(server)


@pytest.mark.row("FE9-quiet-alerts")
async def test_malformed_request_and_range_behind_the_end_are_rejected_and_no_error(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        digest = fake.add_blob(DATA)
        fake.add_image(DATA)
        assert (await server.get(server.blob(digest)))[0] == 200
        behind = {"Range": f"bytes={len(DATA)}-"}
        assert (await server.get(server.blob(digest), headers=behind))[0] == 416
        assert (await server.get(server.manifest("-x")))[0] == 400
        outcomes = [pull.outcome for pull in await server.records()]
        assert outcomes[1:] == [Outcome.REJECTED] * 2


async def test_record_of_a_failed_request_has_outcome_status_and_error(tmp_path: Path) -> None:
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
            assert not pull.is_complete
            assert not pull.bytes_sent
            fake.faults.clear()


@pytest.mark.row("C10-stop-among-pulls")
async def test_draining_refuses_new_pulls_and_completes_running_ones(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        rest = asyncio.Event()
        fake.fault(f"blobs/{DIGEST}", Fault(stall_at=300_000, gate=rest))
        async with server.client.get(server.blob(DIGEST)) as response:
            await response.content.readexactly(1000)
            server.running_server.health.is_draining = True
            status, headers, body = await server.get(server.blob(DIGEST))
            assert (status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")
            assert "Docker-Distribution-Api-Version" in headers
            assert (await server.get(f"{server.url}/v2/"))[0] == 503
            assert (await server.get(f"{server.url}/healthz"))[0] == 200
            assert (await server.get(f"{server.url}/metrics"))[0] == 200
            assert server.running_server.handler.in_flight == 1
            rest.set()
            assert await response.content.read() == DATA[1000:]
        async with asyncio.timeout(20):
            await server.running_server.handler.wait_until_idle()
        assert every_pull_ended(server)


async def test_every_request_ends_if_its_client_leaves(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_blob(DATA)
        fake.fault(f"blobs/{DIGEST}", Fault(stall_at=300_000))
        leaving = [await server.client.get(server.blob(DIGEST)) for _ in range(5)]
        assert server.running_server.handler.in_flight == 5
        for response in leaving:
            response.close()
        async with asyncio.timeout(20):
            await server.running_server.handler.wait_until_idle()
        assert every_pull_ended(server)
        assert {pull.error for pull in await server.records()} == {"client left"}


async def test_error_response_has_server_timing(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        _, headers, _ = await server.get(server.blob(Digest.of(b"absent")))
        assert "total;dur=" in headers["Server-Timing"]


async def test_draining_closes_idle_connections_after_the_response(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.running_server.health.is_draining = True
        _, headers, _ = await server.get(f"{server.url}/v2/")
        assert headers.get("Connection", "").lower() == "close"


async def test_client_that_resets_in_mid_body_is_recorded_and_causes_no_warning(
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


async def test_client_that_leaves_before_the_response_is_a_miss(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, running(tmp_path, fake.url) as server:
        fake.add_image(b"layer")
        fake.fault("manifests/latest", Fault(delay=30))
        path = server.manifest("latest").removeprefix(server.url)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
        async with asyncio.timeout(30):
            while not fake.count("HEAD", "latest"):  # noqa: ASYNC110 - the fake has no event to wait for
                await asyncio.sleep(0.01)
        writer.transport.abort()
        pull = (await server.records())[0]
        assert (pull.outcome, pull.status, pull.error) == (Outcome.MISS, 0, "client left")
