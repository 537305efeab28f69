"""Outbound guard: URLs, resolved names, and proxies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable
from mirror.upstream.outbound import (
    Allowed,
    GuardedResolver,
    Policy,
    Proxies,
    Refused,
    UrlSource,
    Verdict,
    as_url,
    check_url,
    is_loopback,
    is_private,
)

CORP = Policy(
    URL("https://registry.corp:5000/prefix", encoded=True),
    ("auth.corp", "tokens.corp:8443"),
    {("mirror.corp", 5100), ("0.0.0.0", 5100)},
)
SOURCE = URL("https://registry.corp:5000/prefix/v2/a/blobs/x?n=1")


def verdict(target: str, source: UrlSource, policy: Policy = CORP) -> Verdict:
    return check_url(target, source, SOURCE, policy)


def allowed_url(target: str, source: UrlSource, policy: Policy = CORP) -> str | None:
    result = verdict(target, source, policy)
    return str(result.url) if isinstance(result, Allowed) else None


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("/v2/b/blobs/y", "https://registry.corp:5000/v2/b/blobs/y"),
        ("y?sig=a%2Fb%3D", "https://registry.corp:5000/prefix/v2/a/blobs/y?sig=a%2Fb%3D"),
        ("?n=2", "https://registry.corp:5000/prefix/v2/a/blobs/x?n=2"),
        ("../tags/list", "https://registry.corp:5000/prefix/v2/a/tags/list"),
        ("//registry.corp:5000/y", "https://registry.corp:5000/y"),
    ],
)
def test_relative_target_keeps_origin_and_quoting(target: str, url: str) -> None:
    for source in (UrlSource.REDIRECT, UrlSource.NEXT_PAGE, UrlSource.REALM):
        assert allowed_url(target, source) == url
        assert verdict(target, source) == Allowed(URL(url, encoded=True), is_same_origin=True)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("https://registry.corp:5000/token", True),
        ("https://registry.corp/token", False),
        ("https://registry.corp:5001/token", False),
        ("https://auth.corp/token", True),
        ("https://auth.corp:8443/token", True),
        ("https://AUTH.corp/token", True),
        ("https://sub.auth.corp/token", False),
        ("https://tokens.corp:8443/token", True),
        ("https://tokens.corp/token", False),
    ],
)
def test_realm_is_allowed_at_the_endpoint_and_at_token_hosts(target: str, allowed: bool) -> None:
    assert isinstance(verdict(target, UrlSource.REALM), Allowed) is allowed


def test_token_host_without_tls_is_allowed_on_private_networks_only() -> None:
    endpoint = URL("http://registry.corp")
    public = Policy(endpoint, ("auth.corp",))
    known = Policy(endpoint, ("auth.corp",), private_hosts={"registry.corp"})
    for policy, allowed in ((public, False), (known, True)):
        result = check_url("http://auth.corp/token", UrlSource.REALM, endpoint, policy)
        assert isinstance(result, Allowed) is allowed


@pytest.mark.parametrize("source", [UrlSource.NEXT_PAGE, UrlSource.ENDPOINT])
@pytest.mark.parametrize(
    "target",
    ["https://registry.corp/v2/", "https://evil.example/v2/", "http://registry.corp:5000/"],
)
def test_next_page_of_another_origin_is_refused(target: str, source: UrlSource) -> None:
    assert isinstance(verdict(target, source), Refused)


@pytest.mark.row("HU3-redirects")
@pytest.mark.parametrize("source", list(UrlSource))
@pytest.mark.parametrize(
    "url",
    [
        "https://mirror.corp:5100",
        "http://127.0.0.1:5100",
        "http://127.9.9.9:5100",
        "http://localhost:5100",
        "http://[::1]:5100",
        "http://0.0.0.0:5100",
    ],
)
def test_own_address_is_refused_from_every_source(url: str, source: UrlSource) -> None:
    endpoint = URL(url)
    policy = Policy(endpoint, (endpoint.host or "",), CORP.own_addresses)
    assert check_url(f"{url}/v2/", source, endpoint, policy) == Refused("an address of this mirror")


def test_redirect_to_a_private_address_is_allowed_from_a_private_registry_only() -> None:
    private_hosts: set[str] = set()
    policy = Policy(CORP.endpoint, private_hosts=private_hosts)
    assert allowed_url("https://10.0.0.5:9000/b", UrlSource.REDIRECT, policy) is None
    private_hosts.add("registry.corp")  # as the resolver does
    assert allowed_url("https://10.0.0.5:9000/b", UrlSource.REDIRECT, policy)
    assert allowed_url("http://10.0.0.5:9000/b", UrlSource.REDIRECT, policy) is None


@pytest.mark.parametrize(
    "target",
    ["", "/a b", "/a\n", "/\u00e4", "/" + "a" * 20_000, "mailto:a", "data:,x"],
)
def test_malformed_target_is_refused(target: str) -> None:
    if target:
        assert isinstance(verdict(target, UrlSource.REDIRECT), Refused)
    else:
        assert allowed_url(target, UrlSource.REDIRECT) == str(SOURCE), (
            "the same URL again: the number of redirects is limited"
        )


URLS = st.from_regex(r"(https?:)?(//)?[a-z0-9.@:\[\]%\\-]{0,20}(/[!-~]*)?", fullmatch=True)


@given(st.text() | URLS, st.sampled_from(UrlSource))
def test_any_allowed_url_keeps_the_rules(target: str, source: UrlSource) -> None:
    result = verdict(target, source)
    if isinstance(result, Allowed):
        url = result.url
        assert url.scheme == "https", "never a downgrade"
        assert url.raw_user is None
        assert url.host
        assert (url.host, url.port) not in CORP.own_addresses
        assert result.is_same_origin is (url.origin() == CORP.endpoint.origin())
        if source in (UrlSource.ENDPOINT, UrlSource.NEXT_PAGE):
            assert result.is_same_origin
        if not result.is_same_origin:
            assert not is_private(url.host)


def test_is_loopback_knows_every_notation() -> None:
    for host in ("localhost", "127.0.0.1", "127.1", "0x7f.1", "2130706433", "::1", "[::1]", "::"):
        assert is_loopback(host), host
    for host in ("10.0.0.1", "registry.corp", "localhost.corp", "", "::2"):
        assert not is_loopback(host), host


def test_as_url_keeps_the_quoting() -> None:
    assert str(as_url("https://cache.corp/a%2Fb/")) == "https://cache.corp/a%2Fb"


# --- names ----------------------------------------------------------------------------------------


async def resolve(resolver: GuardedResolver, host: str, port: int = 443) -> list[str]:
    try:
        return [result["host"] for result in await resolver.resolve(host, port)]
    finally:
        await resolver.close()


async def test_resolver_refuses_a_private_address_to_a_public_registry() -> None:
    with pytest.raises(OSError, match="private address"):
        await resolve(GuardedResolver({"registry.example"}), "localhost")


async def test_resolver_allows_a_configured_private_name_and_learns_the_private_network() -> None:
    resolver = GuardedResolver({"127.0.0.2"})
    assert resolver.private_hosts == {"127.0.0.2"}
    assert await resolve(resolver, "localhost") == ["127.0.0.1"]
    # In another spelling it is a name that must be resolved first.
    resolver = GuardedResolver({"LocalHost", "registry.example"})
    assert resolver.private_hosts == set()
    assert await resolve(resolver, "LocalHost") == ["127.0.0.1"]
    assert resolver.private_hosts == {"LocalHost"}
    assert await resolve(resolver, "localhost") == ["127.0.0.1"]


async def test_resolver_allows_a_private_proxy_and_learns_nothing() -> None:
    resolver = GuardedResolver({"registry.example"}, {("localhost", 3128)})
    assert await resolve(resolver, "localhost", 3128) == ["127.0.0.1"]
    with pytest.raises(OSError, match="private address"):
        await resolve(resolver, "localhost", 443)
    assert not resolver.private_hosts


async def test_resolver_raises_os_error_for_an_unknown_name() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the text is the resolver's
        await resolve(GuardedResolver({"no-such-host.invalid"}), "no-such-host.invalid")


# --- proxies --------------------------------------------------------------------------------------

BOTH = {"http_proxy": "http://plain.corp:3128", "https_proxy": "http://secure.corp:3129"}


def through(environment: dict[str, str], url: str) -> str | None:
    proxy = Proxies.from_environment(environment).proxy_for(URL(url))
    return str(proxy.url) if proxy is not None else None


def test_each_scheme_has_its_own_proxy() -> None:
    assert through(BOTH, "http://registry.example/v2/") == "http://plain.corp:3128"
    assert through(BOTH, "https://registry.example/v2/") == "http://secure.corp:3129"
    assert through({}, "https://registry.example/") is None
    assert through({"http_proxy": "http://plain.corp"}, "https://registry.example/") is None
    assert Proxies.from_environment(BOTH).addresses == {("plain.corp", 3128), ("secure.corp", 3129)}


def test_proxy_variables_in_lower_case_win_over_upper_case() -> None:
    capitals = {"HTTPS_PROXY": "http://a.corp:1", "NO_PROXY": "b.example"}
    assert through(capitals, "https://registry.example/") == "http://a.corp:1"
    assert through(capitals, "https://b.example/") is None
    both = {**capitals, "https_proxy": "http://c.corp:1", "no_proxy": "d.example"}
    assert through(both, "https://b.example/") == "http://c.corp:1"
    assert through({**capitals, "https_proxy": " "}, "https://x.example/") is None


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("proxy.corp:3128", "http://proxy.corp:3128"),
        ("http://proxy.corp", "http://proxy.corp"),
        ("http://proxy.corp:3128/", "http://proxy.corp:3128"),
        ("https://proxy.corp:3128", "https://proxy.corp:3128"),
        ("http://[fd00::1]:3128", "http://[fd00::1]:3128"),
        ("http://10.0.0.1:3128", "http://10.0.0.1:3128"),
    ],
)
def test_proxy_variable_may_leave_out_scheme_and_port(text: str, url: str) -> None:
    assert through({"https_proxy": text}, "https://registry.example/") == url


@pytest.mark.parametrize("text", ["socks5://proxy.corp", "http://", "http://p:99999", "http://[x"])
def test_malformed_proxy_raises_and_is_not_bypassed(text: str) -> None:
    with pytest.raises(UpstreamUnavailable):
        through({"https_proxy": text}, "https://registry.example/")
    assert through({"https_proxy": text, "no_proxy": "*"}, "https://registry.example/") is None


def test_proxy_credentials_become_a_header_and_are_in_no_repr() -> None:
    proxy = Proxies.from_environment({"http_proxy": "http://user:p%40ss@proxy.corp"}).proxy_for(
        URL("http://a.b/")
    )
    assert proxy is not None
    assert proxy.headers == {"Proxy-Authorization": "Basic dXNlcjpwQHNz"}
    assert "dXNl" not in repr(proxy)
    assert str(proxy.url) == "http://proxy.corp"


@pytest.mark.parametrize(
    ("entry", "url", "direct"),
    [
        ("*", "https://registry.example/", True),
        ("registry.example", "https://registry.example/", True),
        ("Registry.Example", "https://registry.example/", True),
        ("registry.example", "https://registry.example./", True),
        ("example", "https://registry.example/", True),
        (".example", "https://registry.example/", True),
        ("*.example", "https://registry.example/", True),
        (" other , registry.example ", "https://registry.example/", True),
        ("registry.example:443", "https://registry.example/", True),
        ("registry.example:5000", "https://registry.example:5000/", True),
        ("registry.example:5000", "https://registry.example/", False),
        ("gistry.example", "https://registry.example/", False),
        ("registry.example.org", "https://registry.example/", False),
        (", ,", "https://registry.example/", False),
        ("10.0.0.0/8", "https://10.1.2.3/", True),
        ("10.0.0.1/8", "https://10.1.2.3/", True),
        ("10.1.2.3", "https://10.1.2.3:5000/", True),
        ("10.1.2.3:5000", "https://10.1.2.3:5000/", True),
        ("10.1.2.3:5001", "https://10.1.2.3:5000/", False),
        ("10.0.0.0/8", "https://11.1.2.3/", False),
        ("10.0.0.0/8", "https://10.example/", False),
        ("10.0.0.0/99", "https://10.1.2.3/", False),
        ("fd00::/8", "https://[fd00::5]/", True),
        ("[fd00::5]:443", "https://[fd00::5]/", True),
        ("fd00::5", "https://[fd00::5]/", True),
        ("fd00::/8", "https://[fe00::5]/", False),
        ("", "http://localhost:5000/", True),
        ("", "http://127.0.0.1:5000/", True),
        ("", "http://[::1]:5000/", True),
    ],
)
def test_no_proxy_entry_matches_like_in_go(entry: str, url: str, direct: bool) -> None:
    assert (through({**BOTH, "no_proxy": entry}, url) is None) is direct


@given(st.text(), st.text())
def test_any_proxy_variable_gives_a_proxy_none_or_unavailable(proxy: str, entries: str) -> None:
    proxies = Proxies.from_environment({"https_proxy": proxy, "no_proxy": entries})
    for url in ("https://registry.example/", "https://10.1.2.3:5000/", "https://[fd00::5]/"):
        try:
            result = proxies.proxy_for(URL(url))
        except UpstreamUnavailable:
            continue
        assert result is None or result.url.scheme in ("http", "https")
