"""``/healthz`` and ``/readyz``: only draining makes a server not ready."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.web.health import Health
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running


def test_report_is_degraded_but_ready_if_nothing_can_be_stored() -> None:
    reason: list[str | None] = [None]
    health = Health(lambda: reason[0])
    assert health.report() == (True, {"status": "ok"})
    reason[0] = "Read-only file system"
    assert health.report() == (True, {"status": "degraded", "storage": "Read-only file system"})
    health.is_draining = True
    assert health.report() == (False, {"status": "draining"})


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_probes_respond_without_an_upstream(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as server:
        status, headers, body = await server.get(server.url + path)
        assert (status, json.loads(body)) == (200, {"status": "ok"})
        assert headers["Content-Type"] == "application/json"
        status, headers, head_body = await server.ask("HEAD", server.url + path)
        assert (status, head_body) == (200, b"")
        assert headers["Content-Length"] == str(len(body))
        assert (await server.ask("POST", server.url + path))[0] == 405


@pytest.mark.row("C10-stop-among-pulls")
async def test_draining_server_is_healthy_and_not_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.running_server.health.is_draining = True
        assert (await server.get(f"{server.url}/healthz"))[0] == 200
        status, _, body = await server.get(f"{server.url}/readyz")
        assert (status, json.loads(body)) == (503, {"status": "draining"})
        assert (await server.ask("HEAD", f"{server.url}/readyz"))[0] == 503


@pytest.mark.row("D7-unwritable-directories")
async def test_pulls_are_served_and_the_report_is_degraded_if_the_data_directory_is_a_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").write_text("a file")
    async with FakeRegistry() as fake, running(tmp_path / "data", fake.url) as server:
        digest = fake.add_blob(b"a small blob")
        assert (await server.get(server.blob(digest)))[2] == b"a small blob"
        status, _, body = await server.get(f"{server.url}/readyz")
        report = json.loads(body)
        assert (status, report["status"]) == (200, "degraded")
        assert report["storage"]
        assert digest == Digest.of(b"a small blob")
