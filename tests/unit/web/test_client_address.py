"""The address of the client behind trusted proxies, and the count of its connections (row FE11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from mirror.web.client_address import AddressLimit, TrustedProxies

PROXIES = TrustedProxies(("10.0.0.0/8", "2001:db8::/32"))


def client_of(
    peer: str, forwarded_for: Sequence[str] = (), forwarded: Sequence[Mapping[str, str]] = ()
) -> str:
    return PROXIES.client_of(peer, forwarded_for, forwarded)


@pytest.mark.row("FE11-trusted-proxies")
@pytest.mark.parametrize(
    ("peer", "fields", "expected"),
    [
        ("10.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", ["192.0.2.7, 10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", ["192.0.2.7", "10.0.0.2"], "192.0.2.7"),
        # A client wrote the first entry. Only the last one that no proxy of ours has is true.
        ("10.0.0.1", ["203.0.113.9, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", ["192.0.2.7:4711"], "192.0.2.7"),
        ("10.0.0.1", ["[2001:db9::7]:4711"], "2001:db9::7"),
        ("10.0.0.1", ["2001:db9::7"], "2001:db9::7"),
        ("10.0.0.1", ['"192.0.2.7"'], "192.0.2.7"),
        # A socket for IPv4 and IPv6.
        ("::ffff:10.0.0.1", ["192.0.2.7"], "192.0.2.7"),
        ("2001:db8::1", ["::ffff:192.0.2.7"], "192.0.2.7"),
        # All hops are proxies: the first of them is nearest to the client.
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # No address: the last one that is known.
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["192.0.2.7, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["<script>"], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        # The peer is no proxy of ours: the client itself wrote the field.
        ("192.0.2.7", ["203.0.113.9"], "192.0.2.7"),
        ("", ["203.0.113.9"], ""),
    ],
)
def test_client_is_the_last_address_that_is_no_trusted_proxy(
    peer: str, fields: list[str], expected: str
) -> None:
    assert client_of(peer, fields) == expected


@pytest.mark.row("FC3-links-behind-a-prefix")
@pytest.mark.parametrize(
    ("peer", "fields", "expected"),
    [
        ("10.0.0.1", ["/mirror"], "/mirror"),
        ("10.0.0.1", ["/mirror/"], "/mirror"),
        ("10.0.0.1", ["/team-a/mirror.v2"], "/team-a/mirror.v2"),
        # The outer proxy has removed the first part, and the inner one the second part.
        ("10.0.0.1", ["/outer, /inner"], "/outer/inner"),
        ("10.0.0.1", ["/outer", "/inner/"], "/outer/inner"),
        # It removes nothing.
        ("10.0.0.1", ["/"], ""),
        ("10.0.0.1", [""], ""),
        ("10.0.0.1", [], ""),
        # Not a path, or one that a client would take for another host.
        ("10.0.0.1", ["mirror"], ""),
        ("10.0.0.1", ["//evil.example"], ""),
        ("10.0.0.1", ["/mirror//evil.example"], ""),
        ("10.0.0.1", ["https://evil.example"], ""),
        ("10.0.0.1", ["/a>; rel=next, <https://evil.example"], ""),
        ("10.0.0.1", ["/a?b"], ""),
        ("10.0.0.1", ["/\u0131"], ""),
        ("10.0.0.1", ["/" + "a" * 65], ""),
        ("10.0.0.1", ["/a" * 9], ""),
        # The peer is no proxy of ours: the client itself wrote the field.
        ("192.0.2.7", ["/mirror"], ""),
        ("", ["/mirror"], ""),
    ],
)
def test_prefix_is_the_path_that_trusted_proxies_have_removed(
    peer: str, fields: list[str], expected: str
) -> None:
    assert PROXIES.prefix_of(peer, fields) == expected


@pytest.mark.row("FE11-trusted-proxies")
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("for=192.0.2.7", "192.0.2.7"),
        ('for="[2001:db9::7]:4711";proto=https;by=10.0.0.1', "2001:db9::7"),
        ("for=203.0.113.9, For=192.0.2.7, for=10.0.0.2", "192.0.2.7"),
        ("for=unknown", "10.0.0.1"),
        ("proto=https", "10.0.0.1"),
        # A quote that the client left open must not hide its address behind another one.
        ('for="203.0.113.9, for=192.0.2.7', "192.0.2.7"),
    ],
)
def test_forwarded_names_the_client_as_aiohttp_parses_it(field: str, expected: str) -> None:
    request = make_mocked_request("GET", "/", headers={"Forwarded": field})
    assert client_of("10.0.0.1", (), request.forwarded) == expected


@pytest.mark.row("FE11-trusted-proxies")
def test_forwarded_of_the_client_is_ignored_beside_x_forwarded_for() -> None:
    """Nearly every proxy adds to ``X-Forwarded-For``, and passes on a ``Forwarded`` unchanged."""
    assert client_of("10.0.0.1", ["192.0.2.7"], [{"for": "203.0.113.9"}]) == "192.0.2.7"


@pytest.mark.row("FE11-trusted-proxies")
def test_long_list_of_hops_is_read_up_to_32() -> None:
    hops = ", ".join(["192.0.2.7", *["10.0.0.2"] * 1000])
    assert client_of("10.0.0.1", [hops]) == "10.0.0.2"


@given(st.lists(st.text(), max_size=3))
def test_any_field_gives_the_peer_or_an_address(fields: list[str]) -> None:
    client = client_of("10.0.0.1", fields)
    assert client == "10.0.0.1" or PROXIES.is_trusted(client) in (True, False)
    assert client.isprintable()


@pytest.mark.row("HC8-connection-limits")
def test_limit_counts_each_address_for_itself() -> None:
    limit = AddressLimit(2)
    assert [limit.try_open("a") for _ in range(3)] == [True, True, False]
    assert limit.try_open("b")
    limit.close("a")
    assert [limit.try_open("a") for _ in range(2)] == [True, False]


def test_limit_of_0_refuses_nothing() -> None:
    limit = AddressLimit(0)
    assert all(limit.try_open("a") for _ in range(1000))
