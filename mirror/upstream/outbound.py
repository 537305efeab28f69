"""Outbound guard: which URLs may be connected to, and through which proxy.

Lives here: the rules for endpoints, redirects, token realms and next pages (one pure function), the
resolver that applies them to resolved addresses, and the proxies of the environment. Must not know:
requests, credentials of registries.

Upstreams are not trusted: a redirect, a realm or a ``Link`` may point into the network of the
mirror, at the mirror itself, or down to plain HTTP.

Proxies are read from ``http_proxy``, ``https_proxy`` and ``no_proxy``. These names, also in upper
case, and hosts and domains in ``no_proxy`` are read as curl, Go and Python read them. Three rules
are those of Go, the language of the container clients: ports in ``no_proxy``, networks in
``no_proxy``, and that a loopback address never uses a proxy. No file is read: nobody configured
``netrc`` as a source of credentials.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Self, TypeAlias

from aiohttp import encode_basic_auth
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable

MAX_REDIRECTS: Final = 5
"""Redirects that are followed for one request, so that a loop ends."""
_MAX_URL_BYTES: Final = 16 * 1024
"""Bytes of a URL at most: far above the length of signed URLs, which are the longest."""
_PROXY_SCHEMES: Final = ("http", "https")

TOKEN_HOSTS: Final[dict[str, tuple[str, ...]]] = {
    "docker.io": ("auth.docker.io",),
    "ghcr.io": ("ghcr.io",),
    "quay.io": ("quay.io",),
    "gcr.io": ("gcr.io",),
    "public.ecr.aws": ("public.ecr.aws",),
    "nvcr.io": ("nvcr.io", "authn.nvidia.com"),
    "registry.gitlab.com": ("gitlab.com",),
}
"""Upstream -> hosts of its token services. Public registries often use another host for them."""

# --- URLs -----------------------------------------------------------------------------------------


class UrlSource(Enum):
    """The place that a URL comes from. Each has its own rules."""

    ENDPOINT = auto()
    """The configuration."""
    REDIRECT = auto()
    """``Location`` of a redirect."""
    REALM = auto()
    """``realm`` of a ``WWW-Authenticate`` header."""
    NEXT_PAGE = auto()
    """``Link`` header with ``rel=next``."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Verdict: ``url`` may be connected to.

    ``same_origin``: it has the origin of the endpoint, so it may receive its credentials.
    """

    url: URL
    is_same_origin: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Verdict: the URL must not be connected to. ``why`` is the reason, safe to log."""

    why: str


Verdict: TypeAlias = Allowed | Refused


@dataclass(frozen=True, slots=True)
class Policy:
    """The configuration that the URLs of one endpoint are checked against."""

    endpoint: URL
    token_hosts: tuple[str, ...] = ()
    """``host`` or ``host:port`` of token services, beside the endpoint itself."""
    own_addresses: Collection[tuple[str, int]] = ()
    """(host, port) pairs at which this mirror listens."""
    private_hosts: Collection[str] = ()
    """Configured host names that resolve to addresses that are not public. May grow."""

    @property
    def is_on_private_network(self) -> bool:
        """Whether the endpoint is on a network that is not public."""
        host = self.endpoint.host or ""
        return host in self.private_hosts or host == "localhost" or is_private(host)


def check_url(target: str, source: UrlSource, base: URL, policy: Policy) -> Verdict:
    """Decide whether a URL may be connected to.

    Args:
        target: The URL as it was received. A relative one is resolved against ``base`` (RFC 3986,
            section 5).
        source: Selects the rules.
        base: URL of the response that named ``target``.
        policy: The endpoint of the request, and its configuration.
    """
    if len(target) > _MAX_URL_BYTES or any(ord(char) < 0x21 or ord(char) > 0x7E for char in target):
        return Refused("not a URL")
    try:
        # Signed URLs must stay exactly as they were written, so nothing is quoted again.
        url = base.join(URL(target, encoded=True))
        port = url.port
    except ValueError:
        return Refused("not a URL")
    host = url.host
    if url.scheme not in ("http", "https") or not host or port is None or "\\" in target:
        return Refused("not an http(s) URL")
    if url.raw_user is not None or url.raw_password is not None:
        return Refused("user information in a URL")
    if base.scheme == "https" and url.scheme != "https":
        return Refused("downgrade from https to http")
    own_ports = {port for _, port in policy.own_addresses}
    if (host, port) in policy.own_addresses or (is_loopback(host) and port in own_ports):
        return Refused("an address of this mirror")
    is_same_origin = url.origin() == policy.endpoint.origin()
    match source:
        case UrlSource.ENDPOINT | UrlSource.NEXT_PAGE:
            return Allowed(url, is_same_origin) if is_same_origin else Refused("another origin")
        case UrlSource.REALM:
            is_endpoint = (host, port) == (policy.endpoint.host, policy.endpoint.port)
            is_token_host = bool({host, f"{host}:{port}"} & set(policy.token_hosts))
            # A token host is trusted by its name, which only TLS proves.
            is_proven = url.scheme == "https" or policy.is_on_private_network
            if is_endpoint or (is_token_host and is_proven):
                return Allowed(url, is_same_origin)
            return Refused("a token realm that is neither the endpoint nor in token_hosts")
        case UrlSource.REDIRECT:
            is_internal = is_private(host) or host == "localhost"
            if is_internal and not is_same_origin and not policy.is_on_private_network:
                return Refused("a public registry points at a private address")
            return Allowed(url, is_same_origin)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine, in any notation that resolvers accept."""
    address = _parse_address(host)
    return host == "localhost" or (
        address is not None and (address.is_loopback or address.is_unspecified)
    )


def is_private(host: str) -> bool:
    """Return whether ``host`` is a non-public address, in any notation that resolvers accept."""
    address = _parse_address(host)
    return address is not None and not address.is_global


def _parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        try:
            # Decimal, hexadecimal and short forms: 2130706433, 0x7f.1, 127.1
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def as_url(value: Any) -> URL:
    """Convert a URL of the configuration, which was validated when it was read."""
    return URL(str(value).rstrip("/"), encoded=True)


# --- names ----------------------------------------------------------------------------------------


class GuardedResolver(AbstractResolver):
    """Resolves names. Refuses private addresses for names that a public registry has sent.

    Names behind a proxy are resolved by the proxy, and cannot be checked here.
    """

    def __init__(self, trusted: Collection[str], proxies: Collection[tuple[str, int]] = ()) -> None:
        """Create a resolver.

        Args:
            trusted: Hosts that the configuration names. They may have private addresses.
            proxies: (host, port) pairs of the proxies. They may have private addresses, too.
        """
        self._trusted = frozenset(trusted)
        self._proxies = frozenset(proxies)
        self._resolver = ThreadedResolver()
        self.private_hosts = {host for host in trusted if host == "localhost" or is_private(host)}
        """Hosts of the configuration that are on a network that is not public."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve ``host``. See :class:`aiohttp.abc.AbstractResolver`.

        Raises:
            OSError: the name cannot be resolved, or its address is refused.
        """
        results = await self._resolver.resolve(host, port, family)
        has_private = any(is_private(result["host"]) for result in results)
        if host in self._trusted:
            # A private address of a configured name means that the upstream is on our own network.
            if has_private:
                self.private_hosts.add(host)
        elif has_private and not self.private_hosts and (host, port) not in self._proxies:
            raise OSError(None, "a public registry points at a private address")
        return results

    async def close(self) -> None:
        """Close the wrapped resolver."""
        await self._resolver.close()


# --- proxies --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. ``headers``: its ``Proxy-Authorization``, or empty."""

    url: URL
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies of an environment."""

    by_scheme: Mapping[str, Proxy | None]
    """Scheme of a URL -> its proxy. None: the value of the variable is not usable."""
    no_proxy: tuple[str, ...]
    """Entries of ``no_proxy``, in lower case."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables. Lower case wins over upper case."""

        def read_variable(name: str) -> str:
            return (environment.get(name) or environment.get(name.upper()) or "").strip()

        texts = {scheme: read_variable(f"{scheme}_proxy") for scheme in _PROXY_SCHEMES}
        entries = (entry.strip().lower() for entry in read_variable("no_proxy").split(","))
        return cls(
            {scheme: _parse_proxy(text) for scheme, text in texts.items() if text},
            tuple(entry for entry in entries if entry),
        )

    @property
    def addresses(self) -> frozenset[tuple[str, int]]:
        """(host, port) of each proxy."""
        return frozenset(
            (proxy.url.host or "", proxy.url.port or 0)
            for proxy in self.by_scheme.values()
            if proxy
        )

    def proxy_for(self, url: URL) -> Proxy | None:
        """Return the proxy for ``url``. None: connect directly.

        Raises:
            UpstreamUnavailable: the variable is set, but not usable. A direct connection would
                bypass the proxy that the operator wants.
        """
        host = (url.host or "").rstrip(".").lower()
        if url.scheme not in self.by_scheme or is_loopback(host):
            return None
        if any(_is_excluded(entry, host, url.port) for entry in self.no_proxy):
            return None
        proxy = self.by_scheme[url.scheme]
        if proxy is None:
            raise UpstreamUnavailable(f"{url.scheme}_proxy is not the URL of an HTTP proxy")
        return proxy


def _parse_proxy(text: str) -> Proxy | None:
    try:
        url = URL(text if "://" in text else f"http://{text}")
        if url.scheme not in _PROXY_SCHEMES or not url.host or url.port is None:
            return None
        headers = {}
        if url.user is not None or url.password is not None:
            value = encode_basic_auth(url.user or "", url.password or "")
            headers["Proxy-Authorization"] = value
        return Proxy(url.origin(), headers)
    except ValueError:
        return None


def _is_excluded(entry: str, host: str, port: int | None) -> bool:
    """Return whether an entry of ``no_proxy`` (``*``, network, address, domain) names this host."""
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        pass  # One of them is a name, or has a port.
    name, _, digits = entry.rpartition(":")
    if name and digits.isdecimal() and not (":" in name and not name.endswith("]")):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))
