"""Proxies of the environment: ``http_proxy``, ``https_proxy``, ``no_proxy``, as clients read them.

Lives here: which proxy a URL is asked through, pure but for the mapping that is passed in. Must not
know: requests. No file is looked at: netrc is not a source of credentials that anybody named.

curl, Go and Python agree on the lower-case names, also in capitals, and on hosts and domains in
``no_proxy``. From Go, which every container client is written in: ports and networks in
``no_proxy``, and that a loopback address is never asked through a proxy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from aiohttp import encode_basic_auth
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable
from mirror.upstream.outbound import is_loopback

_SCHEMES: Final = ("http", "https")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and what it wants of credentials."""

    url: URL
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Proxies:
    """What an environment says."""

    by_scheme: Mapping[str, Proxy | None]
    """None: what is there cannot be used."""
    direct: tuple[str, ...]
    """``no_proxy``, in lower case."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables."""

        def variable(name: str) -> str:
            return (environment.get(name) or environment.get(name.upper()) or "").strip()

        found = {scheme: variable(f"{scheme}_proxy") for scheme in _SCHEMES}
        entries = (entry.strip().lower() for entry in variable("no_proxy").split(","))
        return cls(
            {scheme: _parse(text) for scheme, text in found.items() if text},
            tuple(entry for entry in entries if entry),
        )

    @property
    def addresses(self) -> frozenset[tuple[str, int]]:
        """(host, port) of each."""
        return frozenset(
            (proxy.url.host or "", proxy.url.port or 0)
            for proxy in self.by_scheme.values()
            if proxy
        )

    def of_url(self, url: URL) -> Proxy | None:
        """The proxy for ``url``; None: it is asked directly.

        Raises ``UpstreamUnavailable`` where one is meant that cannot be used: going around it would
        not be what was meant.
        """
        host = (url.host or "").rstrip(".").lower()
        if url.scheme not in self.by_scheme or is_loopback(host):
            return None
        if any(_matches(entry, host, url.port) for entry in self.direct):
            return None
        proxy = self.by_scheme[url.scheme]
        if proxy is None:
            raise UpstreamUnavailable(f"{url.scheme}_proxy is not the URL of an HTTP proxy")
        return proxy


def _parse(text: str) -> Proxy | None:
    try:
        url = URL(text if "://" in text else f"http://{text}")
        if url.scheme not in _SCHEMES or not url.host or url.port is None:
            return None
        headers = {}
        if url.user is not None or url.password is not None:
            value = encode_basic_auth(url.user or "", url.password or "")
            headers["Proxy-Authorization"] = value
        return Proxy(url.origin(), headers)
    except ValueError:
        return None


def _matches(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of ``no_proxy`` names this host: all, network, address, host or domain."""
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        pass  # one of them is a name, or has a port
    name, _, digits = entry.rpartition(":")
    if name and digits.isdecimal() and not (":" in name and not name.endswith("]")):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))
