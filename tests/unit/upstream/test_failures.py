"""Messages of failures: the endpoint, the cause in words, the key to set."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from yarl import URL

from mirror.config.settings import Limits
from mirror.oci.errors import MirrorError
from mirror.upstream.failures import Hop, ResponseLimit, describe_failure
from mirror.upstream.outbound import Policy
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.unit.upstream.kit import Kit, dead, failure, tls_server, upstream_kit

SHORT = Limits(connect=0.4, headers=0.4, idle=2.0)
pytestmark = pytest.mark.row("FE5-messages-with-a-cause")


async def message(
    endpoint: str,
    *,
    environment: Mapping[str, str] | None = None,
    limits: Limits = SHORT,
    **settings: Any,
) -> str:
    """Return the message of a request that fails."""
    async with upstream_kit(endpoint, environment=environment, limits=limits, **settings) as kit:
        return (await failure(kit)).message


@contextmanager
def lookup_fails(error: Exception | None) -> Iterator[None]:
    """Let every look-up fail, or hang (None)."""
    gate = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        gate.wait(20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        yield
        gate.set()


async def test_endpoint_that_refuses_connections() -> None:
    endpoint = dead()
    assert await message(endpoint) == f"{endpoint}: connection refused"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), "its name is not found in DNS"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "no name server responds"),
        (None, "no name server has found its address within 0.8 s"),
    ],
)
async def test_name_that_cannot_be_resolved(error: Exception | None, cause: str) -> None:
    with lookup_fails(error):
        said = await message("http://registry.example")
    assert said.startswith(f"http://registry.example: {cause}")


@pytest.mark.parametrize(
    ("days", "cause"),
    [
        ((-9, -2), f"expired on {(datetime.now(UTC) - timedelta(days=2)).date()}"),
        ((2, 9), f"is not valid before {(datetime.now(UTC) + timedelta(days=2)).date()}"),
    ],
)
async def test_certificate_out_of_its_time(
    tmp_path: Path, days: tuple[int, int], cause: str
) -> None:
    certificate = Certificate.make(tmp_path, "localhost", *days)
    async with FakeRegistry(tls_server(certificate)) as fake:
        said = await message(fake.url, ca=str(certificate.cert_file), limits=Limits())
        assert said.startswith(f"{fake.url}: its certificate {cause}")
        assert all("authorization" not in seen.headers for seen in fake.requests)


@pytest.mark.parametrize("time", [b"\x17\x0d991399999999Z", b"\x18\x0f00000101000000Z"])
def test_certificate_with_impossible_dates_is_described_without_them(time: bytes) -> None:
    """It is read without verification, so it may be another one than the one that expired."""
    expired = ssl.SSLCertVerificationError(1, "certificate verify failed")
    expired.verify_code = 10
    url = URL("https://registry.example")
    error = aiohttp.ClientConnectorCertificateError(
        Mock(host="registry.example", port=443), expired
    )
    hop = Hop(url, None, Policy(url), SHORT, ResponseLimit(0.0, "headers", 1.0))
    validity = b"\x30" + bytes([2 * len(time)]) + 2 * time
    described = describe_failure(error, replace(hop, certificate=validity))
    assert described == "https://registry.example: its certificate expired"


async def test_certificate_of_an_unknown_authority_names_the_key(tmp_path: Path) -> None:
    async with FakeRegistry(tls_server(Certificate.make(tmp_path))) as fake:
        assert await message(fake.url, limits=Limits()) == (
            f"{fake.url}: its certificate is signed by an authority that is not known "
            "(upstreams.docker.io.ca adds one)"
        )


async def test_certificate_for_another_name(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    async with FakeRegistry(tls_server(certificate), host="127.0.0.2") as fake:
        said = await message(fake.url, ca=str(certificate.cert_file), limits=Limits())
        assert said == f"{fake.url}: its certificate is for another name than 127.0.0.2"


async def test_endpoint_without_tls() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(5)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        endpoint = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        said = await message(endpoint, limits=Limits())
        assert said == f"{endpoint}: it does not use TLS: is its URL http://?"


async def test_endpoint_that_wants_a_client_certificate_names_the_key(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    context = tls_server(certificate)
    context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=certificate.cert_file)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            # asyncio's server sends no alert.
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, pytest.raises(ssl.SSLError):
                    context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=refuse)
        thread.start()
        endpoint = f"https://127.0.0.1:{listener.getsockname()[1]}"
        said = await message(endpoint, ca=str(certificate.cert_file), limits=Limits())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert said.startswith(f"{endpoint}: refused the TLS connection")
    assert "upstreams.docker.io.client_certificate" in said


async def test_limits_that_ran_out_are_named() -> None:
    async with FakeRegistry() as fake:
        fake.fault("", Fault(delay=3600, times=None))
        said = await message(fake.url)
        assert said == (
            f"{fake.url}: sent no response within 0.8 s "
            "(upstreams.docker.io.limits.connect and upstreams.docker.io.limits.headers)"
        )
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        endpoint = f"http://127.0.0.1:{full.getsockname()[1]}"
        said = await message(endpoint, limits=Limits(connect=0.3, headers=5))
        for one in waiting:
            one.close()
        assert (
            said == f"{endpoint}: no connection within 0.3 s (upstreams.docker.io.limits.connect)"
        )


async def test_proxy_that_asks_for_a_log_in_names_the_variable() -> None:
    async with FakeRegistry() as proxy:
        proxy.fault("", Fault(status=407, times=None))
        for scheme in ("http", "https"):
            environment = {f"{scheme}_proxy": proxy.url}
            said = await message(f"{scheme}://registry.example", environment=environment)
            assert said == (
                f"the proxy {proxy.url} asks for a log-in: "
                f"put user and password into {scheme}_proxy"
            )


async def test_proxy_that_refuses_or_is_down_is_named() -> None:
    async with FakeRegistry() as proxy:
        proxy.fault("", Fault(status=403, times=None))
        said = await message("https://registry.example", environment={"https_proxy": proxy.url})
        assert said == (
            f"the proxy {proxy.url} does not connect to https://registry.example: "
            "it responded with 403"
        )
    gone = dead()
    said = await message("https://registry.example", environment={"https_proxy": gone})
    assert said == f"the proxy {gone}: connection refused"


async def test_closed_connection_and_malformed_response() -> None:
    async with FakeRegistry() as fake:
        fake.fault("", Fault(close=True, times=None))
        said = await message(fake.url)
        assert said == f"{fake.url}: closed the connection without a response"
        fake.faults.clear()
        fault = Fault(status=200, headers={"Content-Length": "nonsense"}, times=None)
        fake.fault("", fault)
        assert await message(fake.url) == f"{fake.url}: sent a malformed response"


async def test_status_names_its_host() -> None:
    async with FakeRegistry() as fake:
        fake.fault("", Fault(status=503, times=None))
        assert await message(fake.url) == f"{fake.url} responded with 503"


async def test_refused_realm_names_its_host_and_the_key() -> None:
    async with FakeRegistry() as fake:
        fake.token, fake.challenge = "t", 'Bearer realm="https://auth.example:444/token"'
        said = await message(fake.url)
        assert "auth.example:444" in said
        assert "upstreams.docker.io.token_hosts" in said


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.EMFILE, "x"), "raise its limit of open files"),
        (OSError(errno.EHOSTUNREACH, "x"), "no route"),
        (OSError("Multiple exceptions: a, b"), "none of its addresses accepts a connection"),
        (ValueError("x"), "malformed response"),
        (aiohttp.SocketTimeoutError("x"), "sent nothing for 30 s"),
    ],
)
def test_no_message_has_the_name_of_an_exception_or_a_query(error: Exception, cause: str) -> None:
    url = URL("https://registry.example:444/v2/a?signature=secret")
    limit = ResponseLimit(0.0, "headers", 20.0)
    said = describe_failure(
        error, Hop(url, None, Policy(url.origin(), upstream="x"), Limits(), limit)
    )
    assert said.startswith("https://registry.example:444: ")
    assert cause in said
    for word in ("Error", "Exception", "secret", "errno", "\n"):
        assert word not in said


async def test_body_that_stops_or_breaks_names_its_host() -> None:
    async def body_failure(kit: Kit, fake: FakeRegistry, fault: Fault) -> str:
        digest = fake.add_blob(b"x" * 1000)
        fake.fault(f"blobs/{digest}", fault)
        with pytest.raises(MirrorError) as caught:
            await kit.read(digest)
        return caught.value.message

    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=Limits(idle=0.4)) as kit:
        said = await body_failure(kit, fake, Fault(stall_at=10))
        assert said == f"{fake.url} stopped sending in the middle of a body (limits.idle)"
        said = await body_failure(kit, fake, Fault(reset_at=10))
        assert said == f"{fake.url}: the connection broke in the middle of a body"


async def test_endpoints_that_are_not_tried_for_a_while_name_their_last_failure() -> None:
    endpoint = dead()
    async with upstream_kit(endpoint) as kit:
        for number in range(4):
            said = (await failure(kit, f"manifests/v{number}")).message
    assert said.startswith("no request is sent to ")
    assert said.endswith(f"{endpoint}: connection refused")
