"""Outbound guard: which URLs may be connected to, and through which proxy.

Lives here: the rules for endpoints, redirects, token realms and next pages (one pure function), the
rule for the address of each connection, and the proxies of the environment. Must not know:
requests, names and their look-up, credentials of registries.

Upstreams are not trusted: a redirect, a realm or a ``Link`` may point into the network of the
mirror, at the mirror itself, or down to plain HTTP. A name may have another address each time it is
looked up. So an address is checked when a socket is made for it, and no answer is remembered.

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
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from functools import cache
from typing import Any, Final, Self, TypeAlias

from aiohttp import AddrInfoType, encode_basic_auth
from yarl import URL

from mirror.oci.errors import UpstreamUnavailable
from mirror.oci.reference import Repository

MAX_REDIRECTS: Final = 5
"""Redirects that are followed for one request, so that a loop ends."""
_MAX_URL_BYTES: Final = 16 * 1024
"""Bytes of a URL at most: far above the length of signed URLs, which are the longest."""
_PROXY_SCHEMES: Final = ("http", "https")

TOKEN_HOSTS: Final[dict[str, tuple[str, ...]]] = {
    "docker.io": ("auth.docker.io",),
    "registry-1.docker.io": ("auth.docker.io",),
    "ghcr.io": ("ghcr.io",),
    "quay.io": ("quay.io",),
    "gcr.io": ("gcr.io",),
    "public.ecr.aws": ("public.ecr.aws",),
    "nvcr.io": ("nvcr.io", "authn.nvidia.com"),
    "registry.gitlab.com": ("gitlab.com",),
}
"""Upstream, or host of an endpoint -> hosts of its token services. Public registries often use
another host for them."""

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# --- addresses ------------------------------------------------------------------------------------


class Zone(IntEnum):
    """The part of the network that an address belongs to. A higher zone is nearer to the mirror."""

    PUBLIC = auto()
    PRIVATE = auto()
    """A network that is not public (RFC 6890), such as 10.0.0.0/8."""
    LOOPBACK = auto()
    """This machine."""
    LINK_LOCAL = auto()
    """169.254.0.0/16, fe80::/10, and the other addresses at which clouds hand out credentials to
    their machines. The mirror never connects there."""


_ZONE_NAMES: Final = {
    Zone.PUBLIC: "a public address",
    Zone.PRIVATE: "a private address",
    Zone.LOOPBACK: "an address of the mirror's own machine",
    Zone.LINK_LOCAL: "a link-local address or one of a cloud's metadata, never connected to",
}
_LINK_LOCAL: Final[tuple[_Network, ...]] = (
    ipaddress.IPv4Network("169.254.0.0/16"),
    ipaddress.IPv6Network("fe80::/10"),
    ipaddress.IPv6Network("fd00:ec2::/32"),  # AWS
    ipaddress.IPv6Network("fd20:ce::254"),  # Google Cloud
    ipaddress.IPv6Network("fd00:c1::a9fe:a9fe"),  # Oracle Cloud
    ipaddress.IPv4Network("192.0.0.192"),  # Oracle Cloud, older machines
    ipaddress.IPv6Network("fd00:42::42"),  # Scaleway
    ipaddress.IPv4Network("100.100.100.200"),  # Alibaba Cloud
    ipaddress.IPv4Network("168.63.129.16"),  # Azure, a public address
)
_EMBEDDED_IPV4: Final = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped (RFC 4291, section 2.5.5.2)
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # translated (RFC 7915)
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052)
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),  # NAT64 of a site (RFC 8215)
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4 (RFC 3056)
    (ipaddress.IPv6Network("::/96"), 0),  # compatible (RFC 4291, section 2.5.5.1)
)
"""IPv6 networks whose addresses lead to an IPv4 address, and the bits to the right of it."""


def zone_of(host: str) -> Zone | None:
    """Return the zone of an address, in any notation that resolvers accept. None for a name."""
    if host == "localhost":
        return Zone.LOOPBACK
    address = _parse_address(host)
    if address is None:
        return None
    if any(address in network for network in _LINK_LOCAL):
        return Zone.LINK_LOCAL
    if address.is_loopback or address.is_unspecified:
        return Zone.LOOPBACK
    return Zone.PUBLIC if address.is_global else Zone.PRIVATE


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine, in any notation that resolvers accept."""
    return zone_of(host) is Zone.LOOPBACK


def _parse_address(host: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        try:
            # Decimal, hexadecimal and short forms: 2130706433, 0x7f.1, 127.1
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None
    number = int(address)
    if address.version == 6 and number > 1:  # 0 and 1 are :: and ::1.
        for network, bits in _EMBEDDED_IPV4:
            if address in network:
                return ipaddress.IPv4Address((number >> bits) & 0xFFFFFFFF)
    return address


class AddressRefused(OSError):
    """The rule of a connection does not permit an address."""

    def __init__(self, address: str, *, is_own: bool = False) -> None:
        """Create the error. ``is_own``: this mirror listens at the address."""
        # All have the same text, so that aiohappyeyeballs raises one of them unchanged.
        super().__init__(None, "no address is permitted")
        self.address = address
        self.is_own = is_own


@dataclass(frozen=True, slots=True)
class AddressRule:
    """The addresses that a connection may be made to. Link-local ones are never among them."""

    nearest: Zone = Zone.LOOPBACK
    """No address may be in a higher zone, except for those in ``networks``."""
    farthest: Zone = Zone.PUBLIC
    """No address may be in a lower zone."""
    networks: tuple[_Network, ...] = ()
    """Networks whose addresses are permitted in any zone, except for link-local ones."""

    def is_permitted(self, address: str) -> bool:
        """Return whether a connection to ``address`` may be made."""
        zone = zone_of(address)
        if zone is None or zone is Zone.LINK_LOCAL:
            return False
        parsed = _parse_address(address)
        return self.farthest <= zone <= self.nearest or any(parsed in n for n in self.networks)

    def open_socket(
        self, address_info: AddrInfoType, own_addresses: Collection[tuple[str, int]] = ()
    ) -> socket.socket:
        """Return a socket for a connection. Raises ``AddressRefused``.

        Args:
            address_info: An element of the result of ``getaddrinfo``.
            own_addresses: (host, port) pairs at which this mirror listens. They are refused.
        """
        family, kind, protocol, _, address = address_info
        if _is_own(str(address[0]), address[1], own_addresses):
            raise AddressRefused(str(address[0]), is_own=True)
        if not self.is_permitted(str(address[0])):
            raise AddressRefused(str(address[0]))
        return socket.socket(family, kind, protocol)


def _is_own(host: str, port: int, own_addresses: Collection[tuple[str, int]]) -> bool:
    """Return whether this mirror listens at ``host`` and ``port``, as far as that is known.

    One that listens at all addresses knows some of them only. Each loopback address is its own.
    """
    is_own_port = zone_of(host) is Zone.LOOPBACK and any(port == own for _, own in own_addresses)
    return is_own_port or (host, port) in own_addresses


CONFIGURED: Final = AddressRule()
"""The rule for hosts that the configuration or the environment names."""
PRIVATE_ONLY: Final = AddressRule(farthest=Zone.PRIVATE)
"""The rule for token hosts without TLS: nothing but the network proves who answers."""

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

    ``is_same_origin``: it has the origin of the endpoint, so it may receive its credentials.
    ``addresses``: the rule for the connection.
    """

    url: URL
    is_same_origin: bool
    addresses: AddressRule = CONFIGURED


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
    redirect_hosts: tuple[str, ...] = ()
    """Hosts, domains and networks that redirects may lead to, although they are private."""
    upstream: str = ""
    """Name of the upstream, for messages."""
    section: str = "upstreams"
    """Section of the configuration that names it."""

    @property
    def api_url(self) -> str:
        """URL of the API, with ``/v2/`` at its end."""
        return f"{self.endpoint.origin()}{_split_path(self.endpoint.raw_path)[0]}"

    @property
    def repositories_url(self) -> str:
        """URL that all repositories of the endpoint are below, with a slash at its end."""
        return f"{self.endpoint.origin()}{''.join(_split_path(self.endpoint.raw_path))}"

    @property
    def repository_prefix(self) -> str:
        """Prefix of the names of all repositories at the endpoint: empty, or ``hub-proxy/``."""
        return _split_path(self.endpoint.raw_path)[1]

    def path_of(self, repository: Repository) -> str:
        """Return the name of a repository at the endpoint."""
        return f"{self.repository_prefix}{repository.path}"

    def key(self, name: str) -> str:
        """Return the full name of a key of this upstream: ``upstreams.docker.io.token_hosts``."""
        return f"{self.section}.{self.upstream}.{name}"

    def redirect_rule(self, host: str, port: int, sender: Zone) -> AddressRule:
        """Return the rule for a redirect to ``host``, which an address in ``sender`` sent."""
        if any(is_listed(entry, host, port) for entry in self.redirect_hosts):
            return CONFIGURED
        return AddressRule(nearest=sender, networks=_networks(self.redirect_hosts))


@cache
def _split_path(path: str) -> tuple[str, str]:
    """Return the path of the API and the prefix of repositories, for the path of an endpoint."""
    base, separator, prefix = f"{path.rstrip('/')}/".partition("/v2/")
    return (f"{base}/v2/", prefix) if separator else ("/v2/", base.removeprefix("/"))


@cache
def _networks(entries: tuple[str, ...]) -> tuple[_Network, ...]:
    """Return those of ``entries`` that are addresses or networks."""
    networks = []
    for entry in entries:
        with suppress(ValueError):
            networks.append(ipaddress.ip_network(entry, strict=False))
    return tuple(networks)


def check_url(
    target: str, source: UrlSource, base: URL, policy: Policy, sender: Zone = Zone.PUBLIC
) -> Verdict:
    """Decide whether a URL may be connected to.

    Args:
        target: The URL as it was received. A relative one is resolved against ``base`` (RFC 3986,
            section 5).
        source: Selects the rules.
        base: URL of the response that named ``target``.
        policy: The endpoint of the request, and its configuration.
        sender: Zone of the address that sent a redirect. The target must not be in a higher zone.

    Returns:
        ``Allowed`` with the absolute URL and the rule for its connection, or ``Refused`` with the
        reason.
    """
    url = _parse_target(target, base)
    if isinstance(url, Refused):
        return url
    if why := _refusal_from_any_source(url, base, policy):
        return Refused(why)
    is_same_origin = url.origin() == policy.endpoint.origin()
    match source:
        case UrlSource.REALM:
            return _check_realm(url, policy)
        case _ if is_same_origin:
            return Allowed(url, is_same_origin)
        case UrlSource.ENDPOINT | UrlSource.NEXT_PAGE:
            return Refused("another origin")
        case UrlSource.REDIRECT:
            rule = policy.redirect_rule(url.host or "", url.port or 0, sender)
            return _check_address(url, rule, policy)


def _parse_target(target: str, base: URL) -> URL | Refused:
    """Return the absolute http(s) URL of ``target``."""
    if len(target) > _MAX_URL_BYTES or any(ord(char) < 0x21 or ord(char) > 0x7E for char in target):
        return Refused("not a URL")
    try:
        # Signed URLs must stay exactly as they were written, so nothing is quoted again.
        url = base.join(URL(target, encoded=True))
        port = url.port
    except (ValueError, IndexError):  # The latter: empty brackets before an @.
        return Refused("not a URL")
    if url.scheme not in ("http", "https") or not url.host or port is None or "\\" in target:
        return Refused("not an http(s) URL")
    return url


def _refusal_from_any_source(url: URL, base: URL, policy: Policy) -> str | None:
    """Return why a URL is refused, wherever it comes from. None: it is not."""
    host = url.host or ""
    if url.raw_user is not None or url.raw_password is not None:
        return "user information in a URL"
    if base.scheme == "https" and url.scheme != "https":
        return f"downgrade from https to {url.origin()}"
    if _is_own(host, url.port or 0, policy.own_addresses):
        return "an address of this mirror"
    if zone_of(host) is Zone.LINK_LOCAL:
        return f"{host} is {_ZONE_NAMES[Zone.LINK_LOCAL]}"
    return None


def _check_realm(url: URL, policy: Policy) -> Verdict:
    """Decide about a token service: it must be named by the configuration, or be the endpoint."""
    is_endpoint = (url.host, url.port) == (policy.endpoint.host, policy.endpoint.port)
    is_token_host = bool({url.host, f"{url.host}:{url.port}"} & set(policy.token_hosts))
    if not is_endpoint and not is_token_host:
        key = policy.key("token_hosts")
        return Refused(f"{url.host_port_subcomponent} is neither the endpoint nor in {key}")
    return _check_address(url, realm_rule(url, (policy.endpoint,)), policy)


def _check_address(url: URL, rule: AddressRule, policy: Policy) -> Verdict:
    """Decide about a host that is an address. A name is looked up for each connection."""
    host = url.host or ""
    if zone_of(host) is not None and not rule.is_permitted(host):
        return Refused(address_refusal(AddressRefused(host), rule, policy))
    return Allowed(url, url.origin() == policy.endpoint.origin(), rule)


def realm_rule(realm: URL, endpoints: Collection[URL]) -> AddressRule:
    """Return the rule for connections to a token service.

    It is trusted by its name, which only TLS proves. Without TLS it must be one of the endpoints,
    or on a network that is not public.
    """
    is_endpoint = any(realm.origin() == endpoint.origin() for endpoint in endpoints)
    return CONFIGURED if is_endpoint or realm.scheme == "https" else PRIVATE_ONLY


def address_refusal(error: AddressRefused, rule: AddressRule, policy: Policy) -> str:
    """Return why ``rule`` does not permit an address, with the key to set if there is one."""
    if error.is_own:
        return f"{error.address} is an address of this mirror"
    zone = zone_of(error.address) or Zone.PUBLIC
    why = f"{error.address} is {_ZONE_NAMES[zone]}"
    if zone is Zone.LINK_LOCAL:
        return why
    if zone < rule.farthest:
        return f"{why}, where a token service must have TLS"
    return f"{why}, and {policy.key('redirect_hosts')} does not name it"


def as_url(value: Any) -> URL:
    """Convert a URL of the configuration, which was validated when it was read."""
    return URL(str(value).rstrip("/"), encoded=True)


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
        if any(is_listed(entry, host, url.port) for entry in self.no_proxy):
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
    except (ValueError, IndexError):  # The latter: empty brackets before an @.
        return None


def is_listed(entry: str, host: str, port: int | None) -> bool:
    """Return whether an entry of a list of hosts names this one.

    ``entry``: ``*``, a network, an address, or a domain, which names the hosts below it, too.
    """
    if entry == "*":
        return True
    with suppress(ValueError):  # One of them is a name, or has a port.
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    name, _, digits = entry.rpartition(":")
    if name and digits.isdecimal() and not (":" in name and not name.endswith("]")):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))
