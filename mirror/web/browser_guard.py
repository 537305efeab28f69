"""Refuse requests that another web site makes a browser send.

Lives here: which ``Host`` and ``Origin`` are ours. Pure functions. Must not know: who the client
is, what a request asks for.

- **DNS rebinding.** A page of an attacker's name can have that name resolved to our address. Its
  requests are of its own origin then, but their ``Host`` has the attacker's name. A name is
  accepted only if it is ``localhost`` or configured. An address cannot be rebound.
- **Cross-site requests.** A browser states the site that caused a request, in ``Origin`` (RFC 6454)
  for all but plain reads, and in ``Sec-Fetch-Site`` (Fetch Metadata). Neither may be another one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from typing import Final

from mirror.config.values import split_host

_PRIVATE_ENDINGS: Final = (".localhost", ".internal")
"""Domains that nobody can register (RFC 6761, section 6.3; ICANN resolution 2024.07.29.06)."""
_OWN_SITES: Final = frozenset({"", "same-origin", "none"})
"""Values of ``Sec-Fetch-Site`` that no other site can cause. Programs other than browsers send no
such field. ``none``: a person has typed the address."""


def may_be_host(host: str, names: Collection[str]) -> bool:
    """Return whether a ``Host`` may be ours.

    Args:
        host: The field of the request, with or without a port.
        names: Configured names, each with or without a port. One without counts for every port.
    """
    try:
        name, port = split_host(host)
    except ValueError:
        return False
    name = name.lower()
    configured = {one.lower() for one in names}
    if name == "localhost" or name in configured or f"{name}:{port}" in configured:
        return True
    return _is_address(name)


def may_be_private_host(host: str, names: Collection[str]) -> bool:
    """Return whether a ``Host`` may be ours, or is one that no web site can have.

    That is a name of one label (a container, a service of Compose), or one of a domain that nobody
    can register (``host.docker.internal``). An attacker's name has a public domain.

    Args:
        host: See :func:`may_be_host`.
        names: See :func:`may_be_host`.
    """
    if may_be_host(host, names):
        return True
    try:
        name = split_host(host)[0].lower().removesuffix(".")
    except ValueError:
        return False
    return "." not in name or name.endswith(_PRIVATE_ENDINGS)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_same_site(headers: Mapping[str, str], host: str, *, is_navigation: bool) -> bool:
    """Return whether no other site has caused a request.

    Args:
        headers: The header fields of the request.
        host: Its ``Host``.
        is_navigation: Whether it only shows the page: a link of another site may lead there.
    """
    origin = headers.get("Origin")
    if origin is not None and not _is_own_origin(origin, host):
        return False
    return is_navigation or headers.get("Sec-Fetch-Site", "").lower() in _OWN_SITES


def _is_own_origin(origin: str, host: str) -> bool:
    """Return whether an ``Origin`` has this host and port.

    The scheme is not compared: a proxy in front of us may speak HTTPS.
    """
    scheme, separator, authority = origin.partition("://")
    if not separator or scheme not in ("http", "https"):
        return False  # "null", a file, an extension.
    default = f":{80 if scheme == 'http' else 443}"
    mine = host.lower()
    return authority.lower().removesuffix(default) == mine.removesuffix(default)
