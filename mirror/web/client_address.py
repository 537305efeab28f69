"""The address of the client, and its URL, behind proxies that the configuration trusts.

Lives here: ``X-Forwarded-For``, ``Forwarded`` (RFC 7239), ``X-Forwarded-Prefix``, and the count of
connections of each address. Must not know: aiohttp, sockets.

Each proxy appends the address of its own peer. So the list is read from its end: it is true up to
and including the first address that is no trusted proxy. A client can forge everything before it.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from typing import Final, TypeAlias

_MAX_HOPS: Final = 32
"""Entries of the list that are read, from its end. Real chains of proxies have at most a few."""
_REMOVED_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~-]{1,64}){1,8}", re.ASCII)
"""A path of ``X-Forwarded-Prefix``. With an empty component, ``//host`` would name another host."""

_IpAddress: TypeAlias = IPv4Address | IPv6Address


class TrustedProxies:
    """The networks whose proxies may name the client."""

    def __init__(self, networks: Sequence[str]) -> None:
        """Parse ``networks``: addresses or networks. Raises ``ValueError``."""
        self._networks: tuple[IPv4Network | IPv6Network, ...] = tuple(
            ipaddress.ip_network(network) for network in networks
        )

    def is_trusted(self, peer: str) -> bool:
        """Return whether ``peer``, an address, is a trusted proxy."""
        address = _parse_address(peer)
        return address is not None and self._is_listed(address)

    def _is_listed(self, address: _IpAddress) -> bool:
        return any(
            address.version == network.version and address in network for network in self._networks
        )

    def client_of(
        self,
        peer: str,
        forwarded_for: Sequence[str],
        forwarded: Sequence[Mapping[str, str]],
    ) -> str:
        """Return the address of the client.

        Args:
            peer: The address of the connection.
            forwarded_for: Values of the ``X-Forwarded-For`` fields.
            forwarded: Elements of the ``Forwarded`` fields. Used only without ``forwarded_for``:
                nearly every proxy adds to that one, and many pass on a ``Forwarded`` that the
                client has written.

        Returns:
            The last address of the list that is no trusted proxy. The last one before an entry that
            is no address (``unknown``, a name), or ``peer`` if there is none.
        """
        hops: Sequence[str] = [hop for field in forwarded_for for hop in field.split(",")]
        if not hops:
            hops = [element.get("for", "") for element in forwarded]
        client = peer
        for hop in islice(reversed(hops), _MAX_HOPS):
            if not self.is_trusted(client):
                break
            address = _parse_hop(hop)
            if address is None:
                break
            client = str(address)
        return client

    def prefix_of(self, peer: str, forwarded_prefix: Sequence[str]) -> str:
        """Return the path that proxies have removed from the front of the client's path.

        Args:
            peer: The address of the connection.
            forwarded_prefix: Values of the ``X-Forwarded-Prefix`` fields. Each proxy appends its
                own part: the first one has removed the first part.

        Returns:
            The path, such as ``/mirror``. Empty if ``peer`` is no trusted proxy, if there is no
            such field, or if a part is no path.
        """
        parts = (part for field in forwarded_prefix for part in field.split(","))
        prefix = "".join(part.strip().rstrip("/") for part in parts)
        return prefix if self.is_trusted(peer) and _REMOVED_PATH.fullmatch(prefix) else ""


def _parse_hop(hop: str) -> _IpAddress | None:
    """Parse ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1`` or ``[2001:db8::1]:80``."""
    text = hop.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return _parse_address(text)


def _parse_address(text: str) -> _IpAddress | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # A socket for both families shows an IPv4 peer as ::ffff:192.0.2.1.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


class AddressLimit:
    """Counts the connections of each address, and refuses more than ``limit``. 0: no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: Counter[str] = Counter()

    def try_open(self, address: str) -> bool:
        """Count a connection of ``address``. False, and not counted, if that would be too many."""
        if self._limit and self._open[address] >= self._limit:
            return False
        self._open[address] += 1
        return True

    def close(self, address: str) -> None:
        """Stop counting a connection. Call it once for each :meth:`try_open` that returned True."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]
