"""Outbound guard: URLs, resolved names, and proxies."""

from __future__ import annotations

import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable
from mirror.upstream.outbound import (
    CONFIGURED,
    PRIVATE_ONLY,
    AddressRefused,
    AddressRule,
    Allowed,
    Policy,
    Proxies,
    Refused,
    UrlSource,
    Verdict,
    Zone,
    as_url,
    check_url,
    is_loopback,
    zone_of,
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
    policy = Policy(endpoint, ("auth.corp", "8.8.8.8", "10.0.0.9"))
    for host, addresses in (("auth.corp", PRIVATE_ONLY), ("registry.corp", CONFIGURED)):
        result = check_url(f"http://{host}/token", UrlSource.REALM, endpoint, policy)
        assert isinstance(result, Allowed)
        assert result.addresses == addresses
    assert isinstance(
        check_url("http://10.0.0.9/token", UrlSource.REALM, endpoint, policy), Allowed
    )
    refused = check_url("http://8.8.8.8/token", UrlSource.REALM, endpoint, policy)
    assert isinstance(refused, Refused)
    assert not PRIVATE_ONLY.is_permitted("8.8.8.8")
    assert PRIVATE_ONLY.is_permitted("10.0.0.9")


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


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.parametrize(
    ("sender", "permitted"),
    [
        (Zone.PUBLIC, {"8.8.8.8"}),
        (Zone.PRIVATE, {"8.8.8.8", "10.0.0.5"}),
        (Zone.LOOPBACK, {"8.8.8.8", "10.0.0.5", "127.0.0.1"}),
    ],
)
def test_redirect_never_leads_nearer_to_the_mirror_than_its_sender(
    sender: Zone, permitted: set[str]
) -> None:
    for host in ("8.8.8.8", "10.0.0.5", "127.0.0.1", "169.254.169.254"):
        target = f"https://{host}:9000/b"
        literal = check_url(target, UrlSource.REDIRECT, SOURCE, CORP, sender)
        assert isinstance(literal, Allowed) is (host in permitted)
        named = check_url("https://minio.corp/b", UrlSource.REDIRECT, SOURCE, CORP, sender)
        assert isinstance(named, Allowed), "a name is decided by the address of its connection"
        assert named.addresses.is_permitted(host) is (host in permitted)
    down = check_url("http://10.0.0.5:9000/b", UrlSource.REDIRECT, SOURCE, CORP, sender)
    assert isinstance(down, Refused)


@pytest.mark.row("FD5-private-redirect-targets")
@pytest.mark.parametrize(
    ("entry", "host"),
    [
        ("minio.corp", "minio.corp"),
        ("minio.corp:9000", "minio.corp"),
        ("*.corp", "minio.corp"),
        ("10.0.0.5", "10.0.0.5"),
        ("10.0.0.0/8", "10.0.0.5"),
        ("fd00::/8", "[fd00::5]"),
        ("127.0.0.0/8", "127.0.0.1"),
    ],
)
def test_redirect_hosts_allow_a_private_target(entry: str, host: str) -> None:
    policy = Policy(CORP.endpoint, redirect_hosts=(entry,), upstream="corp")
    target = f"https://{host}:9000/b"
    assert isinstance(check_url(target, UrlSource.REDIRECT, SOURCE, policy), Allowed)
    other = check_url("https://10.9.0.5.example:9000/b", UrlSource.REDIRECT, SOURCE, policy)
    assert isinstance(other, Allowed)
    assert other.addresses.is_permitted("192.168.0.1") is False
    assert other.addresses.is_permitted("169.254.169.254") is False


@pytest.mark.row("FD5-private-redirect-targets")
def test_refused_redirect_names_its_address_and_the_key() -> None:
    policy = Policy(CORP.endpoint, upstream="corp.example")
    result = check_url("https://10.0.0.5/b", UrlSource.REDIRECT, SOURCE, policy)
    assert result == Refused(
        "10.0.0.5 is a private address, and upstreams.corp.example.redirect_hosts does not name it"
    )
    result = check_url("https://169.254.169.254/b", UrlSource.REDIRECT, SOURCE, policy)
    assert isinstance(result, Refused)
    assert "redirect_hosts" not in result.why, "no key allows it"


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.parametrize("source", list(UrlSource))
@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fe80::1]", "[64:ff9b::a9fe:a9fe]", "[fd00:ec2::254]"]
)
def test_link_local_address_is_refused_from_every_source(host: str, source: UrlSource) -> None:
    endpoint = URL(f"https://{host}")
    policy = Policy(endpoint, (host,), redirect_hosts=("169.254.0.0/16", host.strip("[]")))
    assert isinstance(check_url(f"https://{host}/x", source, endpoint, policy), Refused)


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.parametrize(
    ("address", "zone"),
    [
        ("8.8.8.8", Zone.PUBLIC),
        ("2001:4860:4860::8888", Zone.PUBLIC),
        ("::ffff:8.8.8.8", Zone.PUBLIC),
        ("64:ff9b::8.8.8.8", Zone.PUBLIC),
        ("10.1.2.3", Zone.PRIVATE),
        ("100.64.0.1", Zone.PRIVATE),
        ("fd00::1", Zone.PRIVATE),
        ("64:ff9b::10.1.2.3", Zone.PRIVATE),
        ("64:ff9b:1::10.1.2.3", Zone.PRIVATE),
        ("2002:a01:203::1", Zone.PRIVATE),
        ("::10.1.2.3", Zone.PRIVATE),
        ("::ffff:0:10.1.2.3", Zone.PRIVATE),
        ("127.0.0.1", Zone.LOOPBACK),
        ("0.0.0.0", Zone.LOOPBACK),
        ("::", Zone.LOOPBACK),
        ("::1", Zone.LOOPBACK),
        ("::127.0.0.1", Zone.LOOPBACK),
        ("::ffff:127.0.0.1", Zone.LOOPBACK),
        ("64:ff9b::127.0.0.1", Zone.LOOPBACK),
        ("2002:7f00:1::", Zone.LOOPBACK),
        ("169.254.169.254", Zone.LINK_LOCAL),
        ("fe80::1%eth0", Zone.LINK_LOCAL),
        ("::ffff:169.254.169.254", Zone.LINK_LOCAL),
        ("::169.254.169.254", Zone.LINK_LOCAL),
        ("2002:a9fe:a9fe::1", Zone.LINK_LOCAL),
        ("fd00:ec2::254", Zone.LINK_LOCAL),
        ("fd20:ce::254", Zone.LINK_LOCAL),
        ("fd00:c1::a9fe:a9fe", Zone.LINK_LOCAL),
        ("fd00:42::42", Zone.LINK_LOCAL),
        ("100.100.100.200", Zone.LINK_LOCAL),
        ("::ffff:100.100.100.200", Zone.LINK_LOCAL),
        ("168.63.129.16", Zone.LINK_LOCAL),
        ("192.0.0.192", Zone.LINK_LOCAL),
        ("registry.corp", None),
    ],
)
def test_zone_is_that_of_the_embedded_ipv4_address(address: str, zone: Zone | None) -> None:
    assert zone_of(address) is zone
    assert CONFIGURED.is_permitted(address) is (zone not in (None, Zone.LINK_LOCAL))


@pytest.mark.row("FD6-address-of-each-connection")
def test_socket_is_made_for_permitted_addresses_only() -> None:
    def make(rule: AddressRule, address: str) -> None:
        rule.open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))).close()

    make(CONFIGURED, "10.0.0.1")
    for rule, address in (
        (CONFIGURED, "169.254.169.254"),
        (AddressRule(nearest=Zone.PUBLIC), "10.0.0.1"),
        (PRIVATE_ONLY, "8.8.8.8"),
    ):
        with pytest.raises(AddressRefused) as caught:
            make(rule, address)
        assert caught.value.address == address


@pytest.mark.row("HU3-redirects")
def test_no_socket_is_made_for_a_name_of_the_mirror_that_listens_at_all_addresses() -> None:
    own = {("0.0.0.0", 5100), ("10.0.0.9", 5100)}
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 5100)),
        (socket.AF_INET, ("10.0.0.9", 5100)),
        (socket.AF_INET6, ("::1", 5100, 0, 0)),
    ):
        with pytest.raises(AddressRefused) as caught:
            CONFIGURED.open_socket((family, socket.SOCK_STREAM, 6, "", address), own)
        assert caught.value.is_own


@pytest.mark.row("FD4-endpoint-with-a-path")
@pytest.mark.parametrize(
    ("endpoint", "api", "prefix"),
    [
        ("https://r.corp", "https://r.corp/v2/", ""),
        ("https://r.corp/hub-proxy", "https://r.corp/v2/", "hub-proxy/"),
        ("https://r.corp:5000/a/b", "https://r.corp:5000/v2/", "a/b/"),
        ("https://r.corp/base/v2", "https://r.corp/base/v2/", ""),
        ("https://r.corp/base/v2/a/b", "https://r.corp/base/v2/", "a/b/"),
        ("https://r.corp/v2/v2", "https://r.corp/v2/", "v2/"),
    ],
)
def test_path_of_an_endpoint_is_api_and_prefix(endpoint: str, api: str, prefix: str) -> None:
    policy = Policy(as_url(endpoint))
    assert (policy.api_url, policy.repository_prefix) == (api, prefix)


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
@example("//[]@", UrlSource.ENDPOINT)
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
            assert zone_of(url.host) in (None, Zone.PUBLIC)


def test_is_loopback_knows_every_notation() -> None:
    for host in ("localhost", "127.0.0.1", "127.1", "0x7f.1", "2130706433", "::1", "[::1]", "::"):
        assert is_loopback(host), host
    for host in ("10.0.0.1", "registry.corp", "localhost.corp", "", "::2"):
        assert not is_loopback(host), host


def test_as_url_keeps_the_quoting() -> None:
    assert str(as_url("https://cache.corp/a%2Fb/")) == "https://cache.corp/a%2Fb"


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


@pytest.mark.parametrize(
    "text", ["socks5://proxy.corp", "http://", "http://p:99999", "http://[x", "http://[]@"]
)
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
