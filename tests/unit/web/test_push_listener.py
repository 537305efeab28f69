"""The push listener against what only an attacker sends: encodings, web pages, probes of lists."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mirror.oci.reference import Digest
from tests.server_kit import running
from tests.unit.access.kit import basic, rule
from tests.unit.hosted.kit import CONFIG, PushClient, Reply
from tests.unit.web.test_access_listeners import CI, HOST, both_listeners, push_image

EVIL = "evil.example:5101"


async def test_body_with_content_encoding_is_415_and_is_not_decoded(tmp_path: Path) -> None:
    packed = gzip.compress(CONFIG)
    async with running(tmp_path, hosted={}) as server:
        client = PushClient(server)
        upload = (await client.start()).location
        digest = Digest.of(CONFIG)
        for method, path in (
            ("POST", f"{client.base}/blobs/uploads/?digest={digest}"),
            ("PATCH", upload),
            ("PUT", f"{upload}?digest={digest}"),
            ("PUT", f"{client.base}/manifests/v1"),
        ):
            for coding in ("gzip", "GZIP", "deflate", "identity, gzip", "x"):
                reply = await client.ask(method, path, packed, {"Content-Encoding": coding})
                assert (reply.status, reply.code) == (415, "UNSUPPORTED"), (method, coding)
                assert reply.headers["Accept-Encoding"] == "identity"
        assert (await client.ask("GET", upload)).headers["Range"] == "0-0"
        sent = await client.ask("PATCH", upload, CONFIG, {"Content-Encoding": "identity"})
        assert sent.status == 202
        pulling = PushClient(server, url=server.url)
        for path in ("/v2/", f"{client.base}/manifests/v1"):
            reply = await pulling.ask("PUT", path, packed, {"Content-Encoding": "gzip"})
            assert reply.status == 405


@pytest.mark.parametrize(
    "fields",
    [
        {"Host": EVIL},
        {"Host": EVIL, "Origin": f"http://{EVIL}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_open_push_listener_refuses_requests_of_web_pages(
    tmp_path: Path, fields: dict[str, str]
) -> None:
    async with running(tmp_path, hosted={}) as server:
        client = PushClient(server)
        assert (await client.push_image()).status == 201
        for method, path in (
            ("POST", f"{client.base}/blobs/uploads/"),
            ("PUT", f"{client.base}/manifests/v2"),
            ("DELETE", f"{client.base}/manifests/v1"),
            ("GET", f"{client.base}/manifests/v1"),
            ("GET", "/v2/"),
        ):
            reply = await client.ask(method, path, None, fields)
            assert (reply.status, reply.code) == (403, "DENIED"), (method, path)
        assert (await client.ask("GET", f"{client.base}/manifests/v1")).status == 200


async def test_open_push_listener_accepts_the_names_by_which_clients_reach_it(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, hosted={}) as server:
        client = PushClient(server)
        for host in (
            *("127.0.0.1:1", "[::1]:40123", "localhost:40123", "LOCALHOST", "10.0.0.7:5101"),
            *("registry:5000", "host.docker.internal:5101", "a.localhost", HOST, f"{HOST}:5101"),
        ):
            assert (await client.ask("GET", "/v2/", None, {"Host": host})).status == 200, host
        own = {"Host": "localhost:5101", "Origin": "http://localhost:5101"}
        assert (await client.ask("GET", "/v2/", None, own)).status == 200


async def test_push_listener_with_rules_has_any_name_but_no_other_site(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        for fields, status in (({"Host": EVIL}, 200), ({"Origin": f"http://{EVIL}"}, 403)):
            fields = {**fields, "Authorization": CI}
            assert (await both.push.ask("GET", "/v2/", None, fields)).status == status


async def test_anonymous_changes_need_a_name_that_no_web_page_has(tmp_path: Path) -> None:
    everything = rule("**", "anonymous", "pull", "push", "delete")
    async with both_listeners(tmp_path, everything) as both:
        await push_image(both, user="Basic Og==")
        uploads, tag = "/v2/team/app/blobs/uploads/", "/v2/team/app/manifests/v1"
        upload = (await both.ask("POST", uploads)).location
        page = {"Host": EVIL, "Origin": f"http://{EVIL}", "Sec-Fetch-Site": "same-origin"}
        for fields in (page, {"Host": EVIL}, {**page, "Authorization": "Basic Og=="}):
            for method, path in (
                *(("POST", uploads), ("GET", upload), ("PATCH", upload), ("DELETE", upload)),
                *(("PUT", tag), ("DELETE", tag)),
            ):
                reply = await both.push.ask(method, path, b"x", fields)
                assert (reply.status, reply.code) == (403, "DENIED"), (method, path)
            assert (await both.push.ask("GET", tag, None, fields)).status == 200
        for fields in ({"Host": f"{HOST}:5101"}, {"Host": EVIL, "Authorization": CI}):
            assert (await both.push.ask("POST", uploads, None, fields)).status == 202


async def test_pages_of_catalogs_say_nothing_of_hidden_repositories(tmp_path: Path) -> None:
    mallory = rule(f"{HOST}/**", "reader", "pull")
    secret = rule(f"{HOST}/*secret*/**", "reader")
    reader = basic("reader", "reader's")
    rules = (rule(f"{HOST}/**", "ci", "admin"), secret, mallory)

    def page_of(reply: Reply) -> tuple[list[str], Any]:
        return json.loads(reply.body)["repositories"], reply.headers.get("Link")

    async with both_listeners(tmp_path, *rules, more={"catalog": True}) as both:
        for name in ("a/x", "secret1/x", "t/x"):
            await push_image(both, name)
        at_mirror = {"url": both.server.url}
        for path, keys in (("/v2/_catalog?", {}), (f"/v2/_catalog?ns={HOST}&", at_mirror)):
            for _ in range(2):  # Once more with a hidden one at the end.
                names, link = page_of(await both.ask("GET", f"{path}n=1", reader, **keys))
                assert names == ["a/x"]
                assert "last=a%2Fx" in link
                last = await both.ask("GET", f"{path}n=1&last=a/x", reader, **keys)
                assert page_of(last) == (["t/x"], None)
                whole = await both.ask("GET", path, reader, **keys)
                assert page_of(whole) == (["a/x", "t/x"], None)
                after = await both.ask("GET", f"{path}n=1&last=t/x", reader, **keys)
                assert page_of(after) == ([], None)
                await push_image(both, "u-secret/x")
