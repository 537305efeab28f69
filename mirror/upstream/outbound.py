"""Which URLs we connect to: one pure function with a typed verdict.

Lives here: the rules for endpoints, redirects, token realms and next pages, and the resolver that
holds names to the same rules as addresses. Must not know: requests, credentials.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeAlias

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

REDIRECT_LIMIT: Final = 5
_LENGTH_LIMIT: Final = 16 * 1024

TOKEN_HOSTS: Final[dict[str, tuple[str, ...]]] = {
    "docker.io": ("auth.docker.io",),
    "ghcr.io": ("ghcr.io",),
    "quay.io": ("quay.io",),
    "gcr.io": ("gcr.io",),
    "public.ecr.aws": ("public.ecr.aws",),
    "nvcr.io": ("nvcr.io", "authn.nvidia.com"),
    "registry.gitlab.com": ("gitlab.com",),
}
"""Token services of public registries that are on another host than the registry."""


class Purpose(Enum):
    """Why a URL is to be connected to."""

    ENDPOINT = auto()
    REDIRECT = auto()
    REALM = auto()
    NEXT_PAGE = auto()


@dataclass(frozen=True, slots=True)
class Allowed:
    """It may be connected to. ``same_origin``: it may be shown the endpoint's credentials."""

    url: URL
    same_origin: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """It may not."""

    why: str


Verdict: TypeAlias = Allowed | Refused


@dataclass(frozen=True, slots=True)
class Policy:
    """What one upstream's URLs are held to."""

    endpoint: URL
    token_hosts: tuple[str, ...] = ()
    own: Collection[tuple[str, int]] = ()
    """(host, port) at which we listen ourselves."""
    private_hosts: Collection[str] = ()
    """Names that were found to be those of addresses that are not public."""

    @property
    def private(self) -> bool:
        """Whether the endpoint is on a network that is not public."""
        host = self.endpoint.host or ""
        return host in self.private_hosts or host == "localhost" or is_private(host)


def check_url(target: str, purpose: Purpose, source: URL, policy: Policy) -> Verdict:
    """May ``target``, named by the answer of ``source``, be connected to?

    A relative ``target`` is resolved against ``source`` (RFC 3986, section 5).
    """
    if len(target) > _LENGTH_LIMIT or any(ord(char) < 0x21 or ord(char) > 0x7E for char in target):
        return Refused("not a URL")
    try:
        # What is signed must stay as it was written: nothing is quoted anew.
        url = source.join(URL(target, encoded=True))
        port = url.port
    except ValueError:
        return Refused("not a URL")
    host = url.host
    if url.scheme not in ("http", "https") or not host or port is None or "\\" in target:
        return Refused("not an http(s) URL")
    if url.raw_user is not None or url.raw_password is not None:
        return Refused("user information in a URL")
    if source.scheme == "https" and url.scheme != "https":
        return Refused("from https down to http")
    if (host, port) in policy.own or (is_loopback(host) and port in {p for _, p in policy.own}):
        return Refused("ourselves")
    same = url.origin() == policy.endpoint.origin()
    match purpose:
        case Purpose.ENDPOINT | Purpose.NEXT_PAGE:
            return Allowed(url, same) if same else Refused("another origin than the endpoint")
        case Purpose.REALM:
            own_host = (host, port) == (policy.endpoint.host, policy.endpoint.port)
            named = {host, f"{host}:{port}"} & set(policy.token_hosts)
            # A token host is trusted by its name, which only TLS proves.
            if own_host or (named and (url.scheme == "https" or policy.private)):
                return Allowed(url, same)
            return Refused("a token realm that is neither the endpoint nor in token_hosts")
        case Purpose.REDIRECT:
            if not same and not policy.private and (is_private(host) or host == "localhost"):
                return Refused("a public registry points at a private address")
            return Allowed(url, same)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, in any of the ways in which one can write that."""
    address = _address(host)
    return host == "localhost" or (
        address is not None and (address.is_loopback or address.is_unspecified)
    )


def is_private(host: str) -> bool:
    """Whether ``host`` is an address that is not public, in any notation that resolvers take."""
    address = _address(host)
    return address is not None and not address.is_global


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
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


class GuardedResolver(AbstractResolver):
    """Resolves names; those that a public registry pointed at must not be private addresses.

    What is asked through a proxy is resolved there, out of our sight.
    """

    def __init__(self, trusted: Collection[str], proxies: Collection[tuple[str, int]] = ()) -> None:
        """``trusted``: hosts that the configuration names; ``proxies``: those of our own site."""
        self._trusted = frozenset(trusted)
        self._proxies = frozenset(proxies)
        self._resolver = ThreadedResolver()
        self.private_hosts = {host for host in trusted if host == "localhost" or is_private(host)}
        """Hosts of the configuration that are on a network that is not public."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """See :class:`aiohttp.abc.AbstractResolver`. Raises ``OSError``."""
        results = await self._resolver.resolve(host, port, family)
        hidden = any(is_private(result["host"]) for result in results)
        if host in self._trusted:
            # A name in the configuration that is private tells of a private network.
            if hidden:
                self.private_hosts.add(host)
        elif hidden and not self.private_hosts and (host, port) not in self._proxies:
            raise OSError(None, "a public registry points at a private address")
        return results

    async def close(self) -> None:
        """Nothing is kept."""
        await self._resolver.close()


def as_url(value: Any) -> URL:
    """A URL of the configuration, which has been checked when it was read."""
    return URL(str(value).rstrip("/"), encoded=True)
