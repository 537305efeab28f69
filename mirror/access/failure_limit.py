"""How often an address may fail to log in.

Lives here: the count, in bounded memory. Must not know: credentials, HTTP.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

MAX_LOGIN_FAILURES: Final = 10
"""Failures in a row that an address may have. A person mistypes twice; a guess needs millions."""
RECOVERY_S: Final = 6.0
"""Seconds after which one more failure is allowed: ten in a minute."""
_MAX_ADDRESSES: Final = 10_000
"""Addresses that are remembered: 2 MB. Those that have failed longest ago are forgotten first."""
_IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that count: one customer has all addresses of such a network."""


class FailureLimit:
    """Counts the failures of each address. One is forgotten every :data:`RECOVERY_S`."""

    def __init__(self) -> None:
        """Start without failures."""
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Address -> (failures, time of the last one in seconds)."""

    def seconds_to_wait(self, client: str, now: float) -> float:
        """Return the seconds until an address may try again. 0: at once."""
        failures = self._count(counted_address(client), now)
        return max(0.0, (failures - MAX_LOGIN_FAILURES + 1) * RECOVERY_S)

    def record(self, client: str, now: float) -> None:
        """Count a failure of an address at ``now``, in seconds.

        Failures at the same time count up to the limit. So nobody else at the address, such as that
        of a NAT, waits longer than :data:`RECOVERY_S`.
        """
        network = counted_address(client)
        failures = self._count(network, now)
        self._failures[network] = min(failures + 1, MAX_LOGIN_FAILURES), now
        self._failures.move_to_end(network)
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def _count(self, network: str, now: float) -> float:
        failures, last = self._failures.get(network, (0.0, now))
        if now < last:  # The clock was set back. Nothing is forgiven, and it counts from now on.
            self._failures[network] = failures, now
        return max(0.0, failures - max(0.0, now - last) / RECOVERY_S)


def counted_address(client: str) -> str:
    """Return the address of a client as it is counted: an IPv6 address as its network."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
    return client
