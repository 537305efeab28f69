"""Which ``Host`` and ``Origin`` are ours."""

from __future__ import annotations

import pytest

from mirror.web.browser_guard import is_same_site, may_be_host

pytestmark = pytest.mark.row("HC13-admin-api")
NAMES = ("mirror.example", "other.example:8443")


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:5102", "127.0.0.1", "10.0.0.5:5102", "[::1]:5102"),
        *("mirror.example", "mirror.example:1", "Mirror.Example", "other.example:8443"),
    ],
)
def test_localhost_addresses_and_configured_names_are_accepted(host: str) -> None:
    assert may_be_host(host, NAMES)


@pytest.mark.parametrize(
    "host",
    [
        *("", "attacker.example", "localhost.attacker.example", "mirror.example.attacker.example"),
        *("other.example", "other.example:1", "x@127.0.0.1", "127.0.0.1/x", "127.0.0.1:x", "1.2.3"),
        *("[::1", "127.0.0.1.attacker.example", "127.0.0.1 ", "0x7f.1"),
    ],
)
def test_other_hosts_are_refused(host: str) -> None:
    assert not may_be_host(host, NAMES)


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        (None, "localhost:5102", True),
        ("http://localhost:5102", "localhost:5102", True),
        ("http://LOCALHOST:5102", "localhost:5102", True),
        ("https://mirror.example", "mirror.example", True),
        ("https://mirror.example", "mirror.example:443", True),
        ("http://mirror.example:80", "mirror.example", True),
        ("http://localhost:5100", "localhost:5102", False),
        ("http://127.0.0.1:5102", "localhost:5102", False),
        ("https://mirror.example", "mirror.example:80", False),
        ("null", "localhost:5102", False),
        ("", "localhost:5102", False),
        ("file://", "localhost:5102", False),
        ("chrome-extension://localhost:5102", "localhost:5102", False),
        ("http://localhost:5102.attacker.example", "localhost:5102", False),
    ],
)
def test_origin_has_to_be_the_host(origin: str | None, host: str, is_own: bool) -> None:
    headers = {} if origin is None else {"Origin": origin}
    assert is_same_site(headers, host, is_navigation=False) is is_own


@pytest.mark.parametrize(
    ("site", "is_own"),
    [("same-origin", True), ("none", True), ("same-site", False), ("cross-site", False)],
)
def test_site_that_caused_the_request_has_to_be_ours_but_for_a_link(
    site: str, is_own: bool
) -> None:
    headers = {"Sec-Fetch-Site": site}
    assert is_same_site(headers, "localhost", is_navigation=False) is is_own
    assert is_same_site(headers, "localhost", is_navigation=True)
