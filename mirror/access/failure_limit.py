"""How often clients of an address may fail to log in.

Lives here: the counts, in bounded memory. Must not know: credentials, HTTP.

A user name has a count of its own at each address: who guesses the password of one user keeps no
other user behind the same address from logging in. All names of an address have another count, for
clients that try a few passwords with many names. It does not keep out a name that has logged in
there before: otherwise such a client could lock out all users of its address.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from functools import lru_cache
from typing import Final

from cachetools import LRUCache

from mirror.config.access import MAX_USER_CHARS

MAX_LOGIN_FAILURES: Final = 10
"""Failures in a row of a name at an address. A person mistypes twice; a guess needs millions."""
RECOVERY_S: Final = 6.0
"""Seconds after which one more failure is allowed: ten in a minute."""
MAX_ADDRESS_FAILURES: Final = 50
"""The same of all names of an address, behind which there may be an office."""
ADDRESS_RECOVERY_S: Final = 2.0
"""Seconds after which one more is allowed: thirty checks of a password in a minute."""
_MAX_ENTRIES: Final = 10_000
"""Addresses, and names at addresses, that are remembered: 5 MB. The oldest are forgotten first."""
_IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that count: one customer has all addresses of such a network."""


class FailureLimit:
    """Says whether a client may try to log in."""

    def __init__(self) -> None:
        """Start without failures."""
        self._names = _FailureCounts(MAX_LOGIN_FAILURES, RECOVERY_S)
        self._addresses = _FailureCounts(MAX_ADDRESS_FAILURES, ADDRESS_RECOVERY_S)
        self._known: LRUCache[str, bool] = LRUCache(_MAX_ENTRIES)
        """Names that have logged in, each with its address."""

    def seconds_to_wait(self, client: str, user: str, now: float) -> float:
        """Return the seconds until a client may try a name again. 0: at once.

        Args:
            client: Address of the client.
            user: The name that it has sent. Empty: a bearer token.
            now: Time in seconds.
        """
        name = _counted_name(client, user)
        wait = self._names.seconds_to_wait(name, now)
        if name in self._known:
            return wait
        return max(wait, self._addresses.seconds_to_wait(counted_address(client), now))

    def record_failure(self, client: str, user: str, now: float) -> None:
        """Count a failure at ``now``, in seconds. ``user``: the name that the client has sent."""
        self._names.record(_counted_name(client, user), now)
        self._addresses.record(counted_address(client), now)

    def record_login(self, client: str, user: str) -> None:
        """Record that a user has logged in with a password."""
        self._known[_counted_name(client, user)] = True


class _FailureCounts:
    """Counts failures of addresses, or of names. One is forgotten every ``recovery`` seconds."""

    def __init__(self, limit: int, recovery: float) -> None:
        self._limit = limit
        self._recovery = recovery
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Who -> (failures, time of the last one in seconds)."""

    def seconds_to_wait(self, who: str, now: float) -> float:
        return max(0.0, (self._count(who, now) - self._limit + 1) * self._recovery)

    def record(self, who: str, now: float) -> None:
        """Count a failure. Those at the same time count up to the limit, so that nobody has to wait
        for longer than one recovery."""
        self._failures[who] = min(self._count(who, now) + 1, self._limit), now
        self._failures.move_to_end(who)
        if len(self._failures) > _MAX_ENTRIES:
            self._failures.popitem(last=False)

    def _count(self, who: str, now: float) -> float:
        failures, last = self._failures.get(who, (0.0, now))
        if now < last:  # The clock was set back. Nothing is forgiven, and it counts from now on.
            self._failures[who] = failures, now
        return max(0.0, failures - max(0.0, now - last) / self._recovery)


def _counted_name(client: str, user: str) -> str:
    """Return a name with its address. Longer ones than users can have count as the same one."""
    return f"{counted_address(client)} {user[: MAX_USER_CHARS + 1]}"


@lru_cache(1024)
def counted_address(client: str) -> str:
    """Return the address of a client as it is counted: an IPv6 address as its network."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
    return client
