"""The guard: which URLs we connect to, and names held to the same rules as addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.upstream.outbound import (
    Allowed,
    GuardedResolver,
    Policy,
    Purpose,
    Refused,
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


def verdict(target: str, purpose: Purpose, policy: Policy = CORP) -> Verdict:
    return check_url(target, purpose, SOURCE, policy)


def goes_to(target: str, purpose: Purpose, policy: Policy = CORP) -> str | None:
    found = verdict(target, purpose, policy)
    return str(found.url) if isinstance(found, Allowed) else None


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
def test_relative_targets_keep_the_origin_and_every_sign(target: str, url: str) -> None:
    for purpose in (Purpose.REDIRECT, Purpose.NEXT_PAGE, Purpose.REALM):
        assert goes_to(target, purpose) == url
        assert verdict(target, purpose) == Allowed(URL(url, encoded=True), same_origin=True)


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
def test_realms(target: str, allowed: bool) -> None:
    assert isinstance(verdict(target, Purpose.REALM), Allowed) is allowed


def test_a_named_realm_without_tls_is_for_private_networks_only() -> None:
    endpoint = URL("http://registry.corp")
    public = Policy(endpoint, ("auth.corp",))
    known = Policy(endpoint, ("auth.corp",), private_hosts={"registry.corp"})
    for policy, allowed in ((public, False), (known, True)):
        found = check_url("http://auth.corp/token", Purpose.REALM, endpoint, policy)
        assert isinstance(found, Allowed) is allowed


@pytest.mark.parametrize("purpose", [Purpose.NEXT_PAGE, Purpose.ENDPOINT])
@pytest.mark.parametrize(
    "target",
    ["https://registry.corp/v2/", "https://evil.example/v2/", "http://registry.corp:5000/"],
)
def test_a_next_page_stays_at_its_endpoint(target: str, purpose: Purpose) -> None:
    assert isinstance(verdict(target, purpose), Refused)


@pytest.mark.row("HU3-redirects")
@pytest.mark.parametrize("purpose", list(Purpose))
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
def test_we_never_ask_ourselves_not_even_where_the_configuration_says_so(
    url: str, purpose: Purpose
) -> None:
    endpoint = URL(url)
    policy = Policy(endpoint, (endpoint.host or "",), CORP.own)
    assert check_url(f"{url}/v2/", purpose, endpoint, policy) == Refused("ourselves")


def test_a_private_registry_may_point_at_private_addresses_once_it_is_known_to_be_one() -> None:
    found: set[str] = set()
    policy = Policy(CORP.endpoint, private_hosts=found)
    assert goes_to("https://10.0.0.5:9000/b", Purpose.REDIRECT, policy) is None
    found.add("registry.corp")  # as the resolver finds it to be
    assert goes_to("https://10.0.0.5:9000/b", Purpose.REDIRECT, policy)
    assert goes_to("http://10.0.0.5:9000/b", Purpose.REDIRECT, policy) is None


@pytest.mark.parametrize(
    "target",
    ["", "/a b", "/a\n", "/\u00e4", "/" + "a" * 20_000, "mailto:a", "data:,x"],
)
def test_what_is_no_target(target: str) -> None:
    if target:
        assert isinstance(verdict(target, Purpose.REDIRECT), Refused)
    else:
        assert goes_to(target, Purpose.REDIRECT) == str(SOURCE), "the same again, which is bounded"


URLS = st.from_regex(r"(https?:)?(//)?[a-z0-9.@:\[\]%\\-]{0,20}(/[!-~]*)?", fullmatch=True)


@given(st.text() | URLS, st.sampled_from(Purpose))
def test_what_is_allowed_keeps_the_rules_whatever_is_asked(target: str, purpose: Purpose) -> None:
    found = verdict(target, purpose)
    if isinstance(found, Allowed):
        url = found.url
        assert url.scheme == "https", "never down from https"
        assert url.raw_user is None
        assert url.host
        assert (url.host, url.port) not in CORP.own
        assert found.same_origin is (url.origin() == CORP.endpoint.origin())
        if purpose in (Purpose.ENDPOINT, Purpose.NEXT_PAGE):
            assert found.same_origin
        if not found.same_origin:
            assert not is_private(url.host)


def test_loopback_in_every_notation() -> None:
    for host in ("localhost", "127.0.0.1", "127.1", "0x7f.1", "2130706433", "::1", "[::1]", "::"):
        assert is_loopback(host), host
    for host in ("10.0.0.1", "registry.corp", "localhost.corp", "", "::2"):
        assert not is_loopback(host), host


def test_an_endpoint_is_taken_as_it_is_written() -> None:
    assert str(as_url("https://cache.corp/a%2Fb/")) == "https://cache.corp/a%2Fb"


# --- names ----------------------------------------------------------------------------------------


async def resolve(resolver: GuardedResolver, host: str, port: int = 443) -> list[str]:
    try:
        return [result["host"] for result in await resolver.resolve(host, port)]
    finally:
        await resolver.close()


async def test_a_name_of_a_private_address_is_refused_to_a_public_registry() -> None:
    with pytest.raises(OSError, match="private address"):
        await resolve(GuardedResolver({"registry.example"}), "localhost")


async def test_a_configured_name_may_be_private_and_tells_of_a_private_network() -> None:
    resolver = GuardedResolver({"127.0.0.2"})
    assert resolver.private_hosts == {"127.0.0.2"}
    assert await resolve(resolver, "localhost") == ["127.0.0.1"]
    # In another spelling, it is a name that has to be looked up first.
    resolver = GuardedResolver({"LocalHost", "registry.example"})
    assert resolver.private_hosts == set()
    assert await resolve(resolver, "LocalHost") == ["127.0.0.1"]
    assert resolver.private_hosts == {"LocalHost"}
    assert await resolve(resolver, "localhost") == ["127.0.0.1"]


async def test_a_proxy_of_our_site_may_be_private_and_tells_of_nothing() -> None:
    resolver = GuardedResolver({"registry.example"}, {("localhost", 3128)})
    assert await resolve(resolver, "localhost", 3128) == ["127.0.0.1"]
    with pytest.raises(OSError, match="private address"):
        await resolve(resolver, "localhost", 443)
    assert not resolver.private_hosts


async def test_a_name_that_nobody_has() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the text is the resolver's
        await resolve(GuardedResolver({"no-such-host.invalid"}), "no-such-host.invalid")
