"""Refuse requests that another web site makes a browser send.

Lives here: which ``Host`` and ``Origin`` are ours. Pure functions. Must not know: tokens, what a
request asks for.

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
