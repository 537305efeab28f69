"""Proxies of the environment: which one a URL is asked through, and which URL none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable
from mirror.upstream.proxies import Proxies

BOTH = {"http_proxy": "http://plain.corp:3128", "https_proxy": "http://secure.corp:3129"}


def through(environment: dict[str, str], url: str) -> str | None:
    proxy = Proxies.of(environment).of_url(URL(url))
    return str(proxy.url) if proxy is not None else None


def test_each_scheme_has_its_own() -> None:
    assert through(BOTH, "http://registry.example/v2/") == "http://plain.corp:3128"
    assert through(BOTH, "https://registry.example/v2/") == "http://secure.corp:3129"
    assert through({}, "https://registry.example/") is None
    assert through({"http_proxy": "http://plain.corp"}, "https://registry.example/") is None
    assert Proxies.of(BOTH).addresses == {("plain.corp", 3128), ("secure.corp", 3129)}


def test_names_may_be_in_capitals_and_small_letters_win() -> None:
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
def test_what_a_proxy_is_written_like(text: str, url: str) -> None:
    assert through({"https_proxy": text}, "https://registry.example/") == url


@pytest.mark.parametrize("text", ["socks5://proxy.corp", "http://", "http://p:99999", "http://[x"])
def test_one_that_cannot_be_used_is_not_gone_around(text: str) -> None:
    with pytest.raises(UpstreamUnavailable):
        through({"https_proxy": text}, "https://registry.example/")
    assert through({"https_proxy": text, "no_proxy": "*"}, "https://registry.example/") is None


def test_credentials_go_into_a_header_and_are_not_printed() -> None:
    proxy = Proxies.of({"http_proxy": "http://user:p%40ss@proxy.corp"}).of_url(URL("http://a.b/"))
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
def test_who_is_asked_directly(entry: str, url: str, direct: bool) -> None:
    assert (through({**BOTH, "no_proxy": entry}, url) is None) is direct


@given(st.text(), st.text())
def test_nothing_else_is_ever_raised(proxy: str, entries: str) -> None:
    proxies = Proxies.of({"https_proxy": proxy, "no_proxy": entries})
    for url in ("https://registry.example/", "https://10.1.2.3:5000/", "https://[fd00::5]/"):
        try:
            found = proxies.of_url(URL(url))
        except UpstreamUnavailable:
            continue
        assert found is None or found.url.scheme in ("http", "https")
