"""Requests to the admin listener: tokens, Host and Origin, limits, routing, problems."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mirror.admin.dispatch import MAX_BODY_BYTES
from mirror.admin.operations import OPERATIONS
from tests.unit.admin.kit import READ_ONLY, running_admin

CHANGES = [one.path for one in OPERATIONS if one.is_change]


@pytest.mark.row("HC13-admin-api")
async def test_request_without_a_right_token_gets_401_and_a_challenge(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as kit:
        for authorization in ("", "Bearer wrong-token-0123456789", "Basic eDp5", "Bearer"):
            status, body, headers = await kit.ask(
                "GET", "/admin/v1/images", Authorization=authorization
            )
            assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="oci-mirror admin"')
            assert body["status"] == 401
        status, _, _ = await kit.ask("GET", "/admin/v1/nothing", Authorization="")
        assert status == 401


@pytest.mark.row("HC13-admin-api")
@pytest.mark.parametrize("path", CHANGES)
async def test_read_only_token_may_change_nothing(tmp_path: Path, path: str) -> None:
    async with running_admin(tmp_path) as kit:
        kit.token = READ_ONLY
        status, body = await kit.post(path.replace("{id}", "x"), {})
        assert (status, body["detail"]) == (403, "this token is read-only")
        status, session = await kit.get("/admin/v1/session")
        assert (status, session["role"]) == (200, "read-only")


@pytest.mark.row("HC13-admin-api")
async def test_only_read_only_tokens_configured_means_nothing_can_be_changed(
    tmp_path: Path,
) -> None:
    async with running_admin(tmp_path, token_file=None) as kit:
        assert (await kit.post("/admin/v1/pin", {"image": "nginx"}))[0] == 401
        kit.token = READ_ONLY
        assert (await kit.post("/admin/v1/pin", {"image": "nginx"}))[0] == 403


@pytest.mark.row("HC13-admin-api")
@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:5102", "localhost.attacker.example", "a@127.0.0.1", ""],
)
async def test_another_name_in_host_is_refused(tmp_path: Path, host: str) -> None:
    async with running_admin(tmp_path) as kit:
        for path in ("/", "/admin/v1/session"):
            status, body, _ = await kit.ask("GET", path, Host=host)
            assert status == 403
            assert "admin.hosts" in body["detail"]


@pytest.mark.row("HC13-admin-api")
@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1:5102", "[::1]:5102", "mirror.example"]
)
async def test_localhost_addresses_and_configured_names_are_hosts_of_ours(host: str) -> None:
    async with running_admin(hosts=["mirror.example"]) as kit:
        assert (await kit.get("/admin/v1/session", Host=host))[0] == 200


@pytest.mark.row("HC13-admin-api")
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
async def test_request_that_another_site_has_caused_is_refused(headers: dict[str, str]) -> None:
    """Also on a listener that needs no token: a browser on the same machine can reach it."""
    async with running_admin() as kit:
        status, body = await kit.post("/admin/v1/pin", {"image": "nginx"}, **headers)
        assert (status, body["detail"]) == (403, "another web site has caused this request")
        assert kit.sources.marks.pins == {}
        assert (await kit.get("/admin/v1/images", **headers))[0] == 403


@pytest.mark.row("HC13-admin-api")
async def test_link_of_another_site_may_lead_to_the_page() -> None:
    async with running_admin() as kit:
        assert (await kit.get("/", Sec_Fetch_Site="cross-site"))[0] == 200


@pytest.mark.row("HC13-admin-api")
async def test_own_origin_is_accepted() -> None:
    async with running_admin() as kit:
        headers = {"Origin": kit.url, "Sec_Fetch_Site": "same-origin"}
        assert (await kit.post("/admin/v1/pin", {"image": "nginx"}, **headers))[0] == 200


@pytest.mark.row("HC13-admin-api")
async def test_form_of_another_site_is_no_json() -> None:
    async with (
        running_admin() as kit,
        kit.session.post(
            f"{kit.url}/admin/v1/pin",
            data=b'{"image":"nginx"}',
            headers={"Content-Type": "text/plain"},
        ) as response,
    ):
        assert response.status == 415


async def test_body_above_the_limit_gets_413_with_and_without_a_length() -> None:
    async def parts() -> Any:
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            yield b" " * 65536

    async with running_admin() as kit:
        for data in (b" " * (MAX_BODY_BYTES + 1), parts()):
            async with kit.session.post(f"{kit.url}/admin/v1/pin", data=data) as response:
                assert response.status == 413


async def test_slow_body_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.admin.dispatch.BODY_TIMEOUT_S", 0.05)
    async with running_admin() as kit:
        reader, writer = await asyncio.open_connection("127.0.0.1", kit.admin.port)
        writer.write(
            b"POST /admin/v1/pin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_unknown_paths_methods_and_fields_are_problems() -> None:
    async with running_admin() as kit:
        status, body, headers = await kit.ask("DELETE", "/admin/v1/images")
        assert (status, headers["Allow"], body["status"]) == (405, "GET", 405)
        assert headers["Content-Type"] == "application/problem+json"
        assert (await kit.get("/admin/v1/nothing"))[0] == 404
        assert (await kit.get("/nothing"))[0] == 404
        status, body = await kit.get("/admin/v1/images?serach=x")
        assert status == 400
        assert body["detail"].startswith("unknown field serach; known: search,")
        for query in ("limit=0", "limit=x", "sort=nothing", "limit=1&limit=2", "a=1&" * 30):
            assert (await kit.get(f"/admin/v1/images?{query}"))[0] == 400
        for content in (
            {},
            {"image": ""},
            {"image": 1},
            {"image": "UPPER"},
            [],
            {"image": "a", "b": 1},
        ):
            assert (await kit.post("/admin/v1/pin", content))[0] == 400


async def test_unexpected_error_is_a_500_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(query: object) -> None:
        raise RuntimeError("secret")

    async with running_admin() as kit:
        monkeypatch.setattr(kit.sources.images, "find", fail)
        status, body = await kit.get("/admin/v1/images")
        assert status == 500
        assert "secret" not in json.dumps(body)
        assert "secret" in str(kit.events)


async def test_each_change_is_logged_with_its_client_and_arguments() -> None:
    async with running_admin() as kit:
        await kit.post("/admin/v1/block", {"target": "docker.io/x/*", "reason": "CVE"})
        (line,) = [event for event in kit.events if getattr(event, "message", "") == "admin"]
        assert dict(line.fields) == {
            "action": "block",
            "client": "127.0.0.1",
            "arguments": '{"target": "docker.io/x/*", "reason": "CVE"}',
        }


async def test_every_response_forbids_sniffing_framing_and_storing() -> None:
    async with running_admin() as kit:
        for path in ("/", "/admin/v1/session", "/nothing"):
            _, _, headers = await kit.ask("GET", path)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] in ("no-store", "no-cache")
            assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            assert "unsafe" not in headers["Content-Security-Policy"]
