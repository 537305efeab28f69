"""Single exchanges: redirects, connections, failures, bodies, proxies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.config.settings import Limits
from mirror.oci.errors import (
    MirrorError,
    OutboundRefused,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.upstream.connections import own_addresses
from mirror.upstream.outbound import Policy
from mirror.upstream.transport import Response, read_body
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.unit.upstream.kit import DATA, Kit, dead, origin, tls_server, upstream_kit

SHORT = Limits(connect=0.2, headers=0.2, idle=0.3)


@asynccontextmanager
async def exchange(
    kit: Kit,
    endpoint: str,
    path: str = "/v2/",
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    *,
    may_follow_redirects: bool = True,
) -> AsyncIterator[Response]:
    url = origin(f"{endpoint}{path}")
    policy = Policy(origin(endpoint))
    async with kit.transport.exchange(
        method,
        url,
        headers or {},
        policy,
        may_follow_redirects=may_follow_redirects,
        limit=kit.transport.response_limit(),
    ) as response:
        yield response


def moved(target: str, status: int = 307, body: bytes = b"") -> Fault:
    return Fault(status=status, headers={"Location": target}, body=body, times=None)


# --- redirects ------------------------------------------------------------------------------------


@pytest.mark.row("HU3-redirects")
async def test_authorization_is_dropped_for_good_at_another_origin() -> None:
    async with FakeRegistry() as home, FakeRegistry() as away, upstream_kit(home.url) as kit:
        home.fault("/v2/", moved("/one"))
        home.fault("/one", moved("two?x=1"))
        home.fault("/two", moved(f"{away.url}/three"))
        away.fault("/three", moved("/four"))
        away.fault("/four", moved(f"{home.url}/five"))
        home.fault("/five", Fault(status=200))
        headers = {"Authorization": "Bearer t", "Range": "bytes=5-", "If-Range": '"e"'}
        async with exchange(kit, home.url, headers=headers) as response:
            assert (response.http.status, response.is_cross_origin) == (200, True)
        sent = [(seen.path, seen.headers.get("authorization")) for seen in home.requests]
        assert sent == [
            ("/v2/", "Bearer t"),
            ("/one", "Bearer t"),
            ("/two", "Bearer t"),
            ("/five", None),
        ]
        assert [seen.headers.get("authorization") for seen in away.requests] == [None, None]
        for seen in (*home.requests, *away.requests):
            assert (seen.headers["range"], seen.headers["if-range"]) == ("bytes=5-", '"e"')


async def test_redirect_within_the_origin_is_not_cross_origin() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", moved("/artifacts-downloads/x?token=abc"))
        fake.fault("/x", Fault(status=200))
        async with exchange(kit, fake.url) as response:
            assert not response.is_cross_origin


async def test_redirect_to_another_port_is_cross_origin() -> None:
    async with FakeRegistry() as home, FakeRegistry() as away, upstream_kit(home.url) as kit:
        home.fault("/v2/", moved(f"//127.0.0.1:{away.port}/x"))
        async with exchange(kit, home.url, headers={"Authorization": "Basic x"}) as response:
            assert response.is_cross_origin
        assert "authorization" not in away.requests[0].headers


async def test_signed_url_is_requested_as_it_was_written() -> None:
    signed = "/b%2Fc/a+b?X-Sig=a%2Fb%3d&x=~%7E&y=a+b&z"
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", moved(signed))
        async with exchange(kit, fake.url):
            pass
        assert fake.requests[-1].target == signed


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_keeps_the_method(status: int) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", moved("/x", status))
        for method in ("HEAD", "GET"):
            async with exchange(kit, fake.url, method=method):
                pass
        assert [seen.method for seen in fake.requests] == ["HEAD", "HEAD", "GET", "GET"]


@pytest.mark.row("HU3-redirects")
async def test_five_redirects_are_followed_and_six_are_not() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        for hop in range(6):
            fake.fault(f"/{hop}", moved(f"/{hop + 1}"))
        async with exchange(kit, fake.url, "/1") as response:
            assert response.http.status == 404
        assert len(fake.requests) == 6
        with pytest.raises(UpstreamProtocolError):
            async with exchange(kit, fake.url, "/0"):
                pass
        assert len(fake.requests) == 12


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/", "http://u:p@127.0.0.1/", "http://["])
async def test_redirect_refused_by_the_guard_gets_no_request(target: str) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", moved(target))
        with pytest.raises(OutboundRefused):
            async with exchange(kit, fake.url):
                pass
        assert len(fake.requests) == 1


async def test_redirect_that_is_not_followed_is_the_response() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/a", moved("/x"))
        fake.fault("/b", Fault(status=302))
        fake.fault("/c", Fault(status=304, headers={"Location": "/x"}))
        async with exchange(kit, fake.url, "/a", may_follow_redirects=False) as response:
            assert response.http.status == 307
        for path, status in (("/b", 302), ("/c", 304)):
            async with exchange(kit, fake.url, path) as response:
                assert response.http.status == status


# --- connections ----------------------------------------------------------------------------------


async def test_connection_is_reused_after_a_redirect_body_that_was_not_read() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", moved("/x", body=b'<a href="/x">Temporary Redirect</a>'))
        for _ in range(5):
            async with exchange(kit, fake.url) as response:
                await response.http.read()
        assert (len(fake.requests), fake.connections) == (10, 1)


async def test_connection_with_an_unfinished_body_is_closed() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", Fault(status=200, body=b"x" * 50_000_000), Fault(status=204))
        async with exchange(kit, fake.url):
            pass
        async with exchange(kit, fake.url) as response:
            assert response.http.status == 204
        assert fake.connections == 2


async def test_request_headers_are_identity_and_user_agent_without_cookies() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.fault("/v2/", Fault(headers={"Set-Cookie": "a=b; Path=/"}))
        for _ in range(2):
            async with exchange(kit, fake.url):
                pass
        for seen in fake.requests:
            assert seen.headers["accept-encoding"] == "identity"
            assert seen.headers["user-agent"] == "oci-mirror"
            assert "cookie" not in seen.headers


async def test_closing_twice_has_no_effect() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        await kit.transport.close()
        await kit.transport.close()


# --- faults ---------------------------------------------------------------------------------------


async def failure(endpoint: str, limits: Limits = SHORT) -> MirrorError:
    async with upstream_kit(endpoint, limits=limits) as kit:
        with pytest.raises(MirrorError) as caught:
            async with exchange(kit, endpoint):
                pass
        return caught.value


@pytest.mark.row("U11-connect-faults")
async def test_unreachable_endpoint_raises_unavailable() -> None:
    for endpoint in (dead(), "http://no-such-host.invalid"):
        assert type(await failure(endpoint, Limits())) is UpstreamUnavailable


@pytest.mark.row("U11-connect-faults")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(close=True),
        Fault(status=200, headers={"Content-Length": "nonsense"}),
        Fault(status=200, headers={"X": "y" * 100_000}),
        Fault(status=200, headers={"X": "a\r\n\x00: b"}),
        Fault(status=200, headers={"Transfer-Encoding": "chunked", "Content-Length": "5"}),
    ],
)
async def test_malformed_response_raises_unavailable(fault: Fault) -> None:
    fault.times = None
    async with FakeRegistry() as fake:
        fake.fault("/v2/", fault)
        assert type(await failure(fake.url, Limits())) is UpstreamUnavailable


@pytest.mark.row("U11-connect-faults")
async def test_slow_response_raises_a_timeout() -> None:
    async with FakeRegistry() as fake:
        fake.fault("/v2/", Fault(delay=3600, times=None))
        assert type(await failure(fake.url)) is UpstreamTimeout


@pytest.mark.row("U11-connect-faults")
async def test_tls_needs_a_certificate_of_a_known_authority(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    other = Certificate.make(tmp_path, "other")
    async with FakeRegistry() as plain, FakeRegistry(tls_server(certificate)) as fake:
        ca = str(certificate.cert_file)
        async with upstream_kit(fake.url, ca=ca) as kit, exchange(kit, fake.url) as response:
            assert response.http.status == 200
        async with upstream_kit(fake.url, ca=str(other.cert_file)) as kit:
            with pytest.raises(UpstreamUnavailable, match="certificate"):
                async with exchange(kit, fake.url):
                    pass
        assert "certificate" in str(await failure(fake.url, Limits()))
        for url in (plain.url.replace("http:", "https:"), fake.url.replace("https:", "http:")):
            assert isinstance(await failure(url), UpstreamUnavailable)


async def test_read_body_refuses_large_encoded_and_broken_bodies() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, limits=Limits(idle=1.0)) as kit:
        fake.fault("/whole", Fault(status=200, body=DATA))
        async with exchange(kit, fake.url, "/whole") as response:
            assert await read_body(response, len(DATA)) == DATA
        for fault, error in (
            (Fault(status=200, body=DATA + b"x"), UpstreamProtocolError),
            (Fault(status=200, body=DATA + b"x", chunked=True), UpstreamProtocolError),
            (Fault(status=200, headers={"Content-Encoding": "gzip"}), UpstreamProtocolError),
            (Fault(status=200, body=DATA, end_at=10), UpstreamUnavailable),
            (Fault(status=200, body=DATA, reset_at=10), UpstreamUnavailable),
            (Fault(status=200, body=DATA, stall_at=10), UpstreamTimeout),
        ):
            fake.fault("/body", fault)
            async with exchange(kit, fake.url, "/body") as response:
                with pytest.raises(error):
                    await read_body(response, len(DATA))


# --- proxies --------------------------------------------------------------------------------------


@asynccontextmanager
async def tunnel(port: int) -> AsyncIterator[tuple[int, list[str]]]:
    """Run a proxy that connects every host to our ``port``. Yields its port and the requests."""
    heads: list[str] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        there, back = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], heads


async def test_http_proxy_gets_plain_requests_with_its_authorization() -> None:
    # A public registry must not point at "localhost", but a proxy may be there.
    async with FakeRegistry() as proxy:
        environment = {"http_proxy": f"http://u:p@localhost:{proxy.port}", "no_proxy": "127.0.0.1"}
        async with upstream_kit("http://registry.example", environment=environment) as kit:
            headers = {"Authorization": "Bearer t"}
            async with exchange(kit, "http://registry.example", headers=headers) as response:
                assert response.http.status == 200
        [seen] = proxy.requests
        assert seen.target == "http://registry.example/v2/"
        assert seen.headers["host"] == "registry.example"
        assert seen.headers["proxy-authorization"] == "Basic dTpw"
        assert seen.headers["authorization"] == "Bearer t"


async def test_https_proxy_tunnel_hides_the_request_from_the_proxy(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path, "registry.example")
    async with FakeRegistry(tls_server(certificate)) as fake, tunnel(fake.port) as (port, heads):
        environment = {"https_proxy": f"http://u:p@localhost:{port}"}
        endpoint = "https://registry.example"
        ca = str(certificate.cert_file)
        async with upstream_kit(endpoint, environment=environment, ca=ca) as kit:
            headers = {"Authorization": "Bearer t"}
            async with exchange(kit, endpoint, headers=headers) as response:
                assert response.http.status == 200
        [seen] = fake.requests
        assert seen.target == "/v2/"
        assert "proxy-authorization" not in seen.headers
        [head] = heads
        assert head.startswith("CONNECT registry.example:443 HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic dTpw\r\n" in head
        assert "Bearer" not in head


async def test_failing_proxy_raises_unavailable() -> None:
    async with FakeRegistry() as proxy:  # refuses CONNECT
        for url in (dead(), proxy.url, "socks5://127.0.0.1:1"):
            environment = {"https_proxy": url}
            async with upstream_kit("https://registry.example", environment=environment) as kit:
                with pytest.raises(UpstreamUnavailable):
                    async with exchange(kit, "https://registry.example"):
                        pass


# --- our own addresses ----------------------------------------------------------------------------


def test_own_addresses_include_the_listener_and_all_names_of_the_host() -> None:
    assert ("127.0.0.1", 5100) in own_addresses("127.0.0.1:5100")
    assert ("::1", 5100) in own_addresses("[::1]:5100")
    everywhere = own_addresses("0.0.0.0:5100")
    assert {port for _, port in everywhere} == {5100}
    assert set(own_addresses("127.0.0.1:5100")) - {("127.0.0.1", 5100)} < set(everywhere)
