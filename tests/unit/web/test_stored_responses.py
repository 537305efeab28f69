"""Stored responses: their bytes and records when they are reused, and when they are not reused."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.observability.events import Outcome, RequestEnded, RequestRecord, RequestStarted
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.server import _drain
from mirror.threads import run_in_thread
from mirror.web import client_socket, stored_responses
from mirror.web.stored_responses import ReusingConnection, ReusingServer, is_whole_request
from mirror.web.streaming import SingleWriteResponse
from tests.fakes.registry import FakeRegistry
from tests.real.tokens import Certificate
from tests.server_kit import Server, running
from tests.unit.store.kit import random_bytes
from tests.waiting import until

LAYER = random_bytes(300, 81)
BLOB = f"/v2/library/app/blobs/{Digest.of(LAYER)}"
TAG = "/v2/library/app/manifests/latest"
MEASURED = re.compile(
    rb"(?<=Date: )[^\r]+|(?<=X-Request-Id: )[0-9a-f]{16}(?=\r)|(?<=Server-Timing: )[^\r]+"
)
"""Parts of a response that differ between two that are the same."""
WAIT_S = 20.0


def a_request(path: str = TAG, *lines: str, method: str = "GET") -> bytes:
    """Return the bytes of a request, as curl writes them."""
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: mirror", *lines, "", "")).encode()


class Wire(asyncio.Transport):
    """The client's side of a connection in memory. It keeps all that the server writes."""

    def __init__(self, client: str = "192.0.2.7") -> None:
        super().__init__({"peername": (client, 4711)})
        self.written = b""
        self.is_closed = False
        self.queued = 0
        """Bytes that the client has not read."""

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, pieces: Iterable[Any]) -> None:
        self.write(b"".join(pieces))

    def get_write_buffer_size(self) -> int:
        return self.queued

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is buffered."""

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        """Nothing reads."""

    resume_reading = pause_reading


class Client:
    """One connection to the handler of a server, without a socket."""

    def __init__(self, server: Server, client: str = "192.0.2.7") -> None:
        handler = server.running_server.handler
        # Without lingering, no request waits for the rest of its body.
        options = {"keepalive_timeout": 15.0, "access_log": None, "lingering_time": 0.0}
        manager = ReusingServer(handler, handler.stored_responses, **options)
        connection = manager()
        assert isinstance(connection, ReusingConnection)
        self.connection = connection
        self.wire = Wire(client)
        connection.connection_made(self.wire)

    @property
    def is_quiet(self) -> bool:
        """Whether the server waits for more bytes, or has ended the connection."""
        waiter, task = self.connection._waiter, self.connection._task_handler
        is_waiting = waiter is not None and not waiter.done() and not self.connection._messages
        return is_waiting or task is None or task.done()

    async def send(self, *pieces: bytes) -> bytes:
        """Send pieces, each after the server has done with the one before. Returns its bytes."""
        start = len(self.wire.written)
        for piece in pieces:
            await self.wait()
            if not self.wire.is_closed:
                self.connection.data_received(piece)
        await self.wait()
        return self.wire.written[start:]

    def send_at_once(self, data: bytes) -> bytes:
        """Return what the server writes before anything else runs: such as a stored response."""
        start = len(self.wire.written)
        self.connection.data_received(data)
        return self.wire.written[start:]

    async def wait(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.is_quiet:  # noqa: ASYNC110 - aiohttp has no event for it
                await asyncio.sleep(0)

    async def close(self) -> None:
        self.connection.connection_lost(None)
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(root: Path, **settings: Any) -> AsyncIterator[tuple[FakeRegistry, Server]]:
    """Run a server that has pulled one image with one small layer."""
    async with FakeRegistry() as fake, running(root, fake.url, **settings) as server:
        fake.add_blob(LAYER)
        fake.add_image(LAYER)
        assert (await server.get(server.manifest("latest")))[0] == 200
        assert (await server.get(server.blob(Digest.of(LAYER))))[0] == 200
        await server.store.idle()
        await server.records()
        server.events.clear()
        yield fake, server


def without_measured(data: bytes) -> bytes:
    return MEASURED.sub(b"*", data)


# --- the same bytes -----------------------------------------------------------------------------

HEADERS = st.sampled_from(
    [
        *("Accept: */*", f"Accept: {OCI_MANIFEST}", "Accept: text/plain", "X-Request-Id: mine"),
        *("X-Request-Id: not valid", "User-Agent: curl/8", "User-Agent:", "Connection: close"),
        *("Connection: keep-alive", "Range: bytes=0-9", "Range: bytes=-5", "Range: bytes=9999-"),
        *("Range: bytes=0-0,2-3", f'If-None-Match: "{Digest.of(LAYER)}"', "If-None-Match: *"),
        *("Host: other", "Content-Length: 0", "Content-Length: 3", "Content-Length: x"),
        *("Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Expect: 100-continue"),
        *("Upgrade: websocket", "Connection: upgrade", "Authorization: Basic eA==", "Cookie: a=b"),
        *("Host : x", " folded: x", "X: a\x00b", "X: \xe9", "no-colon", ": nameless", "A_b: c"),
    ]
)
TARGETS = (
    *(TAG, TAG, TAG, BLOB, BLOB, f"{BLOB}?ns=docker.io", f"{TAG}?ns=nowhere", "/v2/"),
    *("/v2/library/app/manifests/none", f"/v2/library/other/blobs/{Digest.of(LAYER)}"),
    *("http://mirror" + TAG, "*", "/v2/%2e%2e/x", TAG + "#x", TAG + " x"),
)


@st.composite
def wire_requests(draw: st.DrawFn) -> bytes:
    """Draw the bytes of one request, most of them valid."""
    method = draw(st.sampled_from(["GET", "GET", "GET", "HEAD", "HEAD", "POST", "get"]))
    version = draw(st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/2.0", "HTTP/1.1 "]))
    lines = [f"{method} {draw(st.sampled_from(TARGETS))} {version}", "Host: mirror"]
    lines += draw(st.lists(HEADERS, max_size=2))
    end = draw(st.sampled_from(["\r\n"] * 8 + ["\n", "\r"]))
    body = draw(st.sampled_from([b""] * 6 + [b"abc", b"0\r\n\r\n", b"\r\n", a_request(BLOB)]))
    return end.join((*lines, "", "")).encode("latin-1") + body


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Draw what a client sends on one connection, in pieces."""
    some = draw(st.lists(wire_requests(), min_size=1, max_size=3))
    # Repetitions are what this is about, so each conversation has some.
    some += draw(st.sampled_from([[a_request()], [a_request(BLOB), a_request(method="HEAD")]]))
    pieces: list[bytes] = []
    for request in draw(st.lists(st.sampled_from(some), min_size=3, max_size=8)):
        cut = draw(st.sampled_from([0, 0, 0, 0, 1, 20, len(request) - 2, len(request) - 1]))
        pieces += [part for part in (request[:cut], request[cut:]) if part]
    if draw(st.booleans()):
        return pieces
    joined = draw(st.integers(0, len(pieces)))
    return [part for part in (*pieces[:joined], b"".join(pieces[joined:])) if part]


def story(pull: RequestRecord) -> RequestRecord:
    """Return a record without the values that are measured, or made up."""
    request_id = "" if re.fullmatch("[0-9a-f]{16}", pull.request_id) else pull.request_id
    return replace(
        pull, request_id=request_id, started=0.0, first_byte=0.0, duration=0.0, stages=[]
    )


@pytest.mark.row("HC1-smuggling")
async def test_any_conversation_has_the_same_bytes_and_records_with_and_without_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    repeated = 0
    async with serving(tmp_path, negative_ttl=3600.0) as (_, server):
        find = server.running_server.handler.stored_responses.find

        async def converse(pieces: Sequence[bytes], *, is_on: bool) -> tuple[object, ...]:
            nonlocal repeated
            stored = server.running_server.handler.stored_responses
            monkeypatch.setattr(stored, "find", find if is_on else lambda data: None)
            server.events.clear()
            client = Client(server)
            for piece in pieces:
                before = server.events[:]
                await client.wait()
                if not client.wire.is_closed:
                    client.connection.data_received(piece)
                    repeated += len(server.events) > len(before) and is_on
            await client.wait()
            await client.close()
            stories = [story(pull) for pull in server.pulls]
            return without_measured(client.wire.written), client.wire.is_closed, stories

        @settings(
            max_examples=80,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(conversations())
        def check(pieces: list[bytes]) -> None:
            def run(is_on: bool) -> tuple[object, ...]:
                work = converse(pieces, is_on=is_on)
                return asyncio.run_coroutine_threadsafe(work, loop).result()

            assert run(True) == run(False)

        for path in TARGETS:  # What the upstream says once, it is not asked again.
            await converse([a_request(path), a_request(path, method="HEAD")], is_on=False)
        await run_in_thread(check)
    assert repeated > 50, "no stored response was reused"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("what", ["tag", "digest", "blob"])
async def test_repeated_request_is_answered_at_once_with_the_same_bytes_and_record(
    tmp_path: Path, method: str, what: str
) -> None:
    async with serving(tmp_path) as (_, server):
        _, headers, _ = await server.get(server.manifest("latest"))
        digest = f"/v2/library/app/manifests/{headers['Docker-Content-Digest']}"
        path = {"tag": TAG, "digest": digest, "blob": BLOB}[what]
        request = a_request(path, "Accept: */*", "User-Agent: test", method=method)
        client = Client(server)
        first = await client.send(request)
        if what == "blob":  # The first one has read the file.
            first = await client.send(request)
        server.events.clear()
        second = client.send_at_once(request)
        started, ended = server.events
        assert isinstance(started, RequestStarted)
        assert isinstance(ended, RequestEnded)
        assert started.pull is ended.pull
        assert without_measured(second) == without_measured(first)
        timing = re.compile(rb"\r\nServer-Timing: ([^\r]+)")
        assert [re.sub(rb"[0-9.]+", b"", timing.search(x)[1]) for x in (first, second)] == [  # type: ignore[index] # in each
            b"index;dur=, total;dur=" if what == "tag" else b"total;dur=",
            b"total;dur=",  # The index was not asked again.
        ]
        assert re.search(rb"\r\nX-Request-Id: (\w+)", second) != re.search(
            rb"\r\nX-Request-Id: (\w+)", first
        )
        pull = ended.pull
        assert pull.client == "192.0.2.7"
        assert (pull.method, pull.path, pull.status) == (method, path, 200)
        assert (pull.outcome, pull.user_agent) == (Outcome.HIT, "test")
        assert pull.digest
        assert pull.request_id.encode() in second
        assert pull.duration >= (pull.first_byte or 0.0) >= 0.0
        await client.close()


async def test_record_of_a_repetition_has_every_field_of_the_first_record() -> None:
    """A field that is added to the record must not be forgotten here."""
    values: dict[str, Any] = {field.name: f"<{field.name}>" for field in fields(RequestRecord)}
    # A hit is no error, has no warning, and no fetch has brought a byte of it.
    values |= {"stages": [("index", 1.0)], "error": "", "warning": "", "joined_at_byte": None}
    values |= {"is_unverified": False, "aside_bytes": 0, "connections": 0, "late_parts": 0}
    values |= {"trace": None, "command": "", "is_private": False, "is_pull_refused": None}
    first = RequestRecord(**values)
    measured_fields = {"Server-Timing": "index;dur=1.00, total;dur=2.00", "Date": "<date>"}
    header_fields = {"X-Request-Id": "<request_id>", **measured_fields}
    response = SingleWriteResponse(header_fields, b"", lambda: True)
    stored = stored_responses.StoredResponse(response, first, "<request_id>")
    measured = {"client": "<client>", "started": 2.0, "first_byte": 3.0, "duration": 0.0}
    record, data = stored.reuse("<client>", 2.0, 3.0)
    assert record == replace(first, **measured, stages=[])
    assert b"\r\nX-Request-Id: <request_id>\r\n" in data
    assert b"\r\nServer-Timing: total;dur=3000.00\r\n" in data


async def test_each_client_has_its_own_address_and_a_given_request_id_is_kept(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (_, server):
        request = a_request(TAG, "X-Request-Id: mine")
        clients = [Client(server, f"192.0.2.{number}") for number in (1, 2)]
        await clients[0].send(request)
        server.events.clear()
        for client in clients:
            assert b"\r\nX-Request-Id: mine\r\n" in client.send_at_once(request)
            await client.close()
        assert [pull.client for pull in server.pulls] == ["192.0.2.1", "192.0.2.2"]


async def test_repetitions_are_counted_and_measured_as_other_requests_are(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):

        async def samples() -> dict[str, float]:
            _, _, body = await server.get(f"{server.url}/metrics")
            lines = [line.rpartition(" ") for line in body.decode().splitlines()]
            return {
                name: float(value)
                for name, _, value in lines
                if "manifest" in name and name[0] != "#"
            }

        client, request = Client(server), a_request()
        size = len((await client.send(request)).partition(b"\r\n\r\n")[2])
        before = await samples()
        for _ in range(3):
            assert client.send_at_once(request)
        await client.close()
        after = await samples()
        labels = 'kind="manifest",outcome="hit"'
        for name in (
            f'oci_mirror_requests_total{{{labels},upstream="docker.io"}}',
            f"oci_mirror_request_duration_seconds_count{{{labels}}}",
            f'oci_mirror_time_to_first_byte_seconds_bucket{{kind="manifest",le="+Inf",{labels[16:]}}}',
        ):
            assert after[name] - before[name] == 3, name
        assert sum(pull.bytes_sent for pull in server.pulls[-4:-1]) == 3 * size


# --- framing ------------------------------------------------------------------------------------


@pytest.mark.row("HC1-smuggling")
@pytest.mark.parametrize(
    ("data", "is_whole"),
    [
        (a_request(), True),
        (a_request(method="HEAD"), True),
        (b"GET / HTTP/1.1\r\n\r\n", True),
        (a_request(TAG, "X-A:", "Connection: keep-alive"), True),
        (a_request()[:-1], False),
        (a_request() + b"\r\n", False),
        (a_request() + a_request(), False),
        (b"\r\n" + a_request(), False),
        (a_request(method="POST"), False),
        (a_request(method="get"), False),
        (a_request("http://mirror/v2/"), False),
        (a_request("*"), False),
        (a_request("/a b"), False),
        (a_request().replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (a_request().replace(b"\r\n", b"\n"), False),
        (a_request(TAG, "Content-Length: 0"), False),
        (a_request(TAG, "content-length: 5"), False),
        (a_request(TAG, "Transfer-Encoding: chunked"), False),
        (a_request(TAG, "Transfer-Encoding : chunked"), False),
        (a_request(TAG, "Expect: 100-continue"), False),
        (a_request(TAG, "Upgrade: h2c"), False),
        (a_request(TAG, "AUTHORIZATION: Bearer x"), False),
        (a_request(TAG, "Cookie: a=b"), False),
        (a_request(TAG, " folded"), False),
        (a_request(TAG, "X: \xe9"), False),
        (a_request(TAG, "X: a\rb"), False),
        (a_request(TAG, "X: a\x00b"), False),
        (a_request(TAG, "X: " + "a" * 5000), False),
    ],
)
def test_only_the_response_to_a_whole_request_without_a_body_may_be_stored(
    data: bytes, is_whole: bool
) -> None:
    assert is_whole_request(data) is is_whole


@pytest.mark.row("HC1-smuggling")
@pytest.mark.parametrize(
    "before",
    [
        a_request()[:-1],
        a_request(TAG, "Content-Length: 400"),
        b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n190\r\n",
        b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Rest: ",
    ],
    ids=["no-end", "body", "post", "chunked", "field"],
)
async def test_known_bytes_inside_of_another_request_are_not_answered(
    tmp_path: Path, before: bytes
) -> None:
    async with serving(tmp_path) as (_, server):
        request = a_request()
        known = Client(server)
        await known.send(request)
        assert known.send_at_once(request)
        client = Client(server)
        client.connection.data_received(before)
        assert client.send_at_once(request) == b""
        for open_client in (known, client):
            await open_client.close()


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, request = Client(server), a_request()
        await client.send(request)
        first = a_request("/v2/library/app/manifests/none")
        client.connection.data_received(first)
        assert client.send_at_once(request) == b"", "the first one is still being handled"
        await client.wait()
        statuses = re.findall(rb"HTTP/1.1 (\d+)", client.wire.written)
        assert statuses == [b"200", b"404", b"200"]
        # The connection was never anything but whole requests, so it goes on.
        assert client.send_at_once(request)
        assert server.running_server.handler.stored_responses.find(first) is None
        await client.close()


async def test_response_is_not_stored_for_a_request_that_came_while_it_was_made(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (_, server):
        client, repeated = Client(server), server.running_server.handler.stored_responses
        requests = [a_request(TAG, f"X-Number: {number}") for number in range(3)]
        for request in requests:
            client.connection.data_received(request)
        await client.wait()
        assert client.wire.written.count(b"HTTP/1.1 200 OK") == 3
        assert [repeated.find(request) for request in requests] == [None] * 3
        await client.close()


# --- nothing is kept longer than its origin -----------------------------------------------------


async def answered(server: Server, request: bytes) -> tuple[Client, int]:
    """Return a client whose request was just answered from memory, and the upstream's requests."""
    client = Client(server)
    await client.send(request)
    await client.send(request)
    assert client.send_at_once(request).startswith(b"HTTP/1.1 200")
    return client, 0


async def test_stored_response_is_discarded_when_its_content_leaves_memory(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request(BLOB))
        server.store.layout.blob(Digest.of(LAYER)).unlink()
        async with asyncio.timeout(WAIT_S):
            while client.send_at_once(a_request(BLOB)):  # noqa: ASYNC110 - it is time that passes
                await asyncio.sleep(0.05)
        await client.wait()
        assert (await server.records())[-1].outcome is Outcome.MISS
        await client.close()


async def test_response_to_a_tag_that_is_due_for_a_check_is_not_reused(tmp_path: Path) -> None:
    clock = [1_800_000_000.0]
    async with serving(tmp_path, clock=lambda: clock[0], tag_ttl=300.0) as (fake, server):
        for jump in (300.0, -3600.0):
            client, _ = await answered(server, a_request())
            asked = len(fake.requests)
            clock[0] += jump
            assert client.send_at_once(a_request()) == b""
            await client.wait()
            assert len(fake.requests) == asked + 1
            assert (await server.records())[-1].outcome is Outcome.REVALIDATED
            await client.close()


def deny_all(server: Server) -> None:
    """Apply a configuration that does not admit the image."""
    one = server.running_server
    denying = one.mirror.settings.upstreams["docker.io"].model_copy(update={"deny": ("library/*",)})
    upstreams = {**one.mirror.settings.upstreams, "docker.io": denying}
    one.apply(one.mirror.settings.model_copy(update={"upstreams": upstreams}))


async def test_new_configuration_discards_all_stored_responses(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request())
        deny_all(server)
        assert client.send_at_once(a_request()) == b""
        await client.wait()
        assert b"HTTP/1.1 403" in client.wire.written
        await client.close()


@pytest.mark.parametrize("path", [BLOB, TAG], ids=["blob", "tag"])
async def test_response_to_a_request_that_began_before_a_new_configuration_is_not_stored(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as (_, server):
        store, started, gate = server.store.blobs, asyncio.Event(), asyncio.Event()
        read = store.read

        async def read_slowly(*arguments: Any) -> bytes | None:
            started.set()
            await gate.wait()
            return await read(*arguments)

        monkeypatch.setattr(store, "read", read_slowly)
        server.running_server.mirror.service._small_blobs.clear()
        server.running_server.mirror.service._manifests._results.clear()
        client, other = Client(server), Client(server)
        client.connection.data_received(a_request(path))
        await started.wait()
        deny_all(server)
        gate.set()
        await client.wait()
        assert client.wire.written.startswith(b"HTTP/1.1 200")
        assert (await other.send(a_request(path))).startswith(b"HTTP/1.1 403")
        for each in (client, other):
            await each.close()


async def test_draining_server_reuses_no_response(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request())
        server.running_server.health.is_draining = True
        response = await client.send(a_request())
        assert response.startswith(b"HTTP/1.1 503")
        assert b"\r\nConnection: close\r\n" in response
        await client.close()
        server.running_server.health.is_draining = False


@pytest.mark.parametrize(
    "request_bytes",
    [
        a_request(TAG, "Authorization: Basic eDp5"),
        a_request(TAG, "Connection: close"),
        a_request(BLOB, "Range: bytes=0-9"),
        a_request("/v2/library/app/manifests/none"),
        a_request("/v2/"),
    ],
)
async def test_other_responses_are_not_stored(tmp_path: Path, request_bytes: bytes) -> None:
    async with serving(tmp_path) as (_, server):
        for _ in range(2):
            client = Client(server)
            assert await client.send(request_bytes)
            assert server.running_server.handler.stored_responses.find(request_bytes) is None
            await client.close()


async def test_nothing_is_stored_behind_a_trusted_proxy(tmp_path: Path) -> None:
    more = {"trusted_proxies": ["192.0.2.0/24"]}
    async with serving(tmp_path, more=more) as (_, server):
        client, request = Client(server), a_request(TAG, "X-Forwarded-For: 198.51.100.9")
        for _ in range(3):
            await client.send(request)
        assert server.pulls[-1].client == "198.51.100.9"
        assert server.running_server.handler.stored_responses.find(request) is None
        await client.close()


# --- memory, time limits, TLS -------------------------------------------------------------------


async def test_client_that_does_not_read_gets_no_second_stored_response(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request())
        client.wire.queued = 1
        assert client.send_at_once(a_request()) == b""
        await client.wait()
        await client.close()


async def test_memory_of_stored_responses_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_responses, "_MAX_BYTES", 10_000)
    async with serving(tmp_path) as (_, server):
        stored, client = server.running_server.handler.stored_responses, Client(server)
        for number in [*range(25), *range(25)]:
            await client.send(a_request(TAG, f"X-Number: {number % 7}"))
            sizes = [
                stored_responses._size(data, one.response)
                for data, one in stored._responses.items()
            ]
            assert stored._bytes == sum(sizes) <= 10_000
        assert 0 < len(sizes) < 7
        await client.close()


async def test_stored_responses_take_no_more_memory_than_is_counted(tmp_path: Path) -> None:
    count = 100
    async with serving(tmp_path) as (_, server):
        stored, client = server.running_server.handler.stored_responses, Client(server)
        await client.send(a_request())
        tracemalloc.start()
        try:
            for number in range(count):
                await client.send(a_request(TAG, f"User-Agent: {number}{'u' * 3800}"))
                server.events.clear()
                client.wire.written = b""
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert len(stored._responses) == count + 1
        # Some of it belongs to the test, and to caches.
        assert taken < 1.1 * stored._bytes
        await client.close()


LARGEST = random_bytes(64 * 1024, 82)
"""The largest blob that is kept in memory."""


@asynccontextmanager
async def unread(
    server: Server, monkeypatch: pytest.MonkeyPatch, certificate: Certificate | None = None
) -> AsyncIterator[tuple[asyncio.StreamWriter, list[asyncio.Transport]]]:
    """Connect a client that reads nothing. Yields it, and the server's ends of connections."""
    monkeypatch.setattr(client_socket, "CLIENT_STALL_TIMEOUT_S", 0.2)
    transports: list[asyncio.Transport] = []
    connection_made = ReusingConnection.connection_made

    def note(self: ReusingConnection, transport: asyncio.BaseTransport) -> None:
        connection_made(self, transport)
        assert isinstance(transport, asyncio.Transport)
        transports.append(transport)

    monkeypatch.setattr(ReusingConnection, "connection_made", note)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    trusted = certificate and ssl.create_default_context(cafile=certificate.cert_file)
    name = "127.0.0.1" if trusted else None
    _, writer = await asyncio.open_connection(
        sock=connection, ssl=trusted, server_hostname=name, limit=1024
    )
    try:
        yield writer, transports
    finally:
        writer.transport.abort()


def small_buffer(transport: asyncio.Transport) -> None:
    """Let the kernel take only a few bytes that the client has not read."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def is_reset(writer: asyncio.StreamWriter) -> bool:
    """Return whether the server has reset the connection, of which nothing is read."""
    connection = writer.get_extra_info("socket")
    return bool(writer.is_closing() or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@pytest.mark.row("HC7-slow-attacks")
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
async def test_client_that_reads_none_of_its_small_responses_is_cut_off(
    tmp_path: Path, is_tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The responses are written at once, by both ways."""
    certificate = Certificate.make(tmp_path) if is_tls else None
    async with (
        serving(tmp_path / "data", certificate=certificate) as (fake, server),
        unread(server, monkeypatch, certificate) as (writer, transports),
    ):
        blob = server.blob(fake.add_blob(LARGEST))
        for _ in range(2):
            await server.get(blob)
            await server.store.idle()
        path = blob.removeprefix(server.url)
        waiting: list[int] = [0]

        def is_cut() -> bool:
            waiting.extend(t.get_write_buffer_size() for t in transports if not t.is_closing())
            return is_reset(writer)

        writer.write(a_request(path) * 100)  # Pipelined.
        await until(is_cut)
        assert 0 < max(waiting) < len(LARGEST) + 2048


@pytest.mark.row("HC7-slow-attacks")
async def test_client_that_reads_no_small_response_and_sends_no_more_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving(tmp_path) as (fake, server),
        unread(server, monkeypatch) as (writer, transports),
    ):
        blob = server.blob(fake.add_blob(LARGEST))
        for _ in range(2):
            await server.get(blob)
            await server.store.idle()
        await until(lambda: len(transports) > 0)
        small_buffer(transports[0])
        writer.write(a_request(blob.removeprefix(server.url)))
        await until(lambda: is_reset(writer))


@asynccontextmanager
async def receiving_slowly(server: Server, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request, whose response waits for the client. Yields what reads it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    try:
        writer.write(a_request(path))
        await until(lambda: len(server.running_server.unsent) == 1)
        yield reader
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("is_repeated", [False, True], ids=["ordinary", "repeated"])
async def test_drain_waits_for_clients_that_receive_small_responses(
    tmp_path: Path, is_repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection_made = ReusingConnection.connection_made

    def note(self: ReusingConnection, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        small_buffer(transport)
        connection_made(self, transport)

    async with serving(tmp_path) as (fake, server):
        path = server.blob(fake.add_blob(LARGEST)).removeprefix(server.url)
        for _ in range(2):
            await server.get(f"{server.url}{path}")
            await server.store.idle()
        if not is_repeated:
            server.running_server.handler.stored_responses.clear()
        monkeypatch.setattr(ReusingConnection, "connection_made", note)
        async with receiving_slowly(server, path) as reader, asyncio.TaskGroup() as group:
            draining = group.create_task(_drain(server.running_server, server.events.append))
            await asyncio.sleep(0.1)
            assert not draining.done()
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(LARGEST)) == LARGEST
        assert not [e for e in server.events if "drain timeout" in getattr(e, "message", "")]
        server.running_server.health.is_draining = False


async def test_connection_is_not_idle_while_bytes_wait_for_its_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request())
        connection = client.connection
        connection.pause_writing()
        connection._next_keepalive_close_time = 0.0
        connection._process_keepalive()
        assert not client.wire.is_closed
        connection.resume_writing()
        connection._next_keepalive_close_time = 0.0
        connection._process_keepalive()
        assert client.wire.is_closed
        await client.close()


async def test_response_that_could_not_be_sent_is_not_given_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, server):
        client, request = Client(server), a_request()
        client.connection.data_received(request)
        client.wire.is_closed = True  # The client leaves before it is answered.
        await client.wait()
        other = Client(server)
        assert other.send_at_once(request) == b""
        await other.wait()
        assert other.send_at_once(request)
        for each in (client, other):
            await each.close()


async def test_connection_with_stored_responses_is_kept_alive_and_an_idle_one_is_closed(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (_, server):
        client, _ = await answered(server, a_request())
        connection = client.connection
        connection._next_keepalive_close_time = 0.0
        assert client.send_at_once(a_request())
        connection._process_keepalive()
        assert not client.wire.is_closed
        connection._next_keepalive_close_time = 0.0
        connection._process_keepalive()
        assert client.wire.is_closed
        await client.close()


async def test_repeated_request_is_answered_at_once_over_tls(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    async with serving(tmp_path / "data", certificate=certificate) as (_, server):
        trusted = ssl.create_default_context(cafile=certificate.cert_file)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=trusted)
        heads, bodies = [], []
        for _ in range(4):
            writer.write(a_request())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index] # in each
            heads.append(without_measured(head))
            bodies.append(await reader.readexactly(length))
        writer.close()
        assert len(set(heads)) == len(set(bodies)) == 1
        assert json.loads(bodies[0])["schemaVersion"] == 2
        assert len(server.running_server.handler.stored_responses._responses) == 1
        assert [pull.client for pull in await server.records()] == ["127.0.0.1"] * 4


def test_aiohttp_has_the_attributes_that_repetition_uses() -> None:
    """If this fails with a new aiohttp, read its ``RequestHandler`` before you use it."""
    used = {"_waiter", "_request_count", "_next_keepalive_close_time", "_keepalive_timeout"}
    assert used <= set(web.RequestHandler.__slots__)
    assert "_waiter" in web.RequestHandler.start.__code__.co_names
    assert "_next_keepalive_close_time" in web.RequestHandler._process_keepalive.__code__.co_names
    assert "_request_count" in web.RequestHandler.data_received.__code__.co_names
