"""What connections need beside sockets: addresses of names, TLS settings, our own addresses.

Lives here: the resolver of one upstream, the TLS settings of its connections, and the addresses at
which this mirror listens. Must not know: which names and addresses are allowed (the outbound guard
decides), requests.

``getaddrinfo`` cannot be cancelled, and takes up to minutes if no name server responds. With a pool
of threads, names that hang would delay all others. So each name has its own thread, and each
upstream its own limit of them.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Collection
from functools import cache, partial
from typing import Final

from aiohttp.abc import AbstractResolver, ResolveResult

from mirror.threads import HangingCalls

_MAX_LOOKUPS: Final = 16
"""Names of one upstream that are looked up at the same time. An upstream has a few hosts: its
endpoints, its token service, its storage. Only a hostile one redirects to more."""
_UNUSED_ADDRESSES: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses that no host has (RFC 5737, RFC 3849). The route to them shows our own addresses."""


class Resolver(AbstractResolver):
    """Resolves the names that one upstream uses."""

    def __init__(self) -> None:
        self._lookups = HangingCalls("name", _MAX_LOOKUPS)

    def is_looking_up(self, host: str) -> bool:
        """Return whether a look-up of ``host`` has not ended."""
        return self._lookups.is_running(host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve ``host``. See :class:`aiohttp.abc.AbstractResolver`.

        Raises:
            OSError: the name cannot be resolved, or too many other names are being looked up.
        """
        look_up = partial(
            socket.getaddrinfo,
            host,
            None,
            family=family,
            type=socket.SOCK_STREAM,
            flags=socket.AI_ADDRCONFIG,
        )
        found = await self._lookups.run(host, look_up)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for family, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Do nothing. A look-up that hangs ends by itself, in a thread of its own."""


# --- TLS ------------------------------------------------------------------------------------------


def tls_context(
    ca: str | None, client: tuple[str, str | None] | None, insecure: bool
) -> ssl.SSLContext:
    """Return the TLS settings of connections, loaded once for each version of the files.

    Args:
        ca: PEM file of authorities, beside those of the system. None: no others.
        client: PEM files of the client certificate and of its key. None: no client certificate. A
            key that is None is in the file of the certificate.
        insecure: Accept any certificate.

    Raises:
        OSError: a file cannot be read, or has no certificate or key (``ssl.SSLError``).
    """
    files = [os.stat(file) for file in (ca, *(client or ())) if file is not None]
    return _load_context(ca, client, insecure, tuple((f.st_mtime_ns, f.st_ino) for f in files))


@cache
def _load_context(
    ca: str | None,
    client: tuple[str, str | None] | None,
    insecure: bool,
    versions: tuple[tuple[int, int], ...],
) -> ssl.SSLContext:
    """Load TLS settings. Cached, because this takes longer than the rest of a start together."""
    context = ssl.create_default_context()
    if ca is not None:
        context.load_verify_locations(cafile=ca)
    if client is not None:
        # An empty passphrase, so that OpenSSL does not prompt for one.
        context.load_cert_chain(client[0], client[1], password="")
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# --- our own addresses ----------------------------------------------------------------------------


def own_addresses(listen: str) -> Collection[tuple[str, int]]:
    """Return the (host, port) pairs of this mirror, for ``listen`` (host:port)."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    names = {host, socket.gethostname()}
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        names |= {_source_address(*pair) or host for pair in _UNUSED_ADDRESSES}
    return {(name, int(port)) for name in names}


def _source_address(family: socket.AddressFamily, target: str) -> str | None:
    """Return our address on the route to ``target``, without a packet. None without a route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
