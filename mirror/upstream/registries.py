"""Open and close the registries of a configuration.

Lives here: how the parts of a registry are put together. Must not know: how any of them works.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from mirror.config.settings import Settings
from mirror.observability.events import Observer
from mirror.single_flight import SingleFlight
from mirror.upstream.api import Registry
from mirror.upstream.failover import FailoverClient
from mirror.upstream.registry import HttpRegistry
from mirror.upstream.transport import Transport, own_addresses


@asynccontextmanager
async def open_registries(
    settings: Settings, emit: Observer, single_flight: SingleFlight
) -> AsyncIterator[dict[str, Registry]]:
    """Open a registry for each configured upstream, and close their connections at the end.

    Args:
        settings: The configuration.
        emit: Receives the events of all registries.
        single_flight: Runs requests for tokens and look-ups of logins. Must stay open until the
            registries are closed.

    Yields:
        Name of the upstream -> its registry.
    """
    listeners = own_addresses(settings.listen)
    registries: dict[str, Registry] = {}
    async with AsyncExitStack() as stack:
        for name, upstream in settings.upstreams.items():
            transport = Transport(upstream)
            stack.push_async_callback(transport.close)
            client = FailoverClient(
                name, upstream, transport, emit, single_flight, own_addresses=listeners
            )
            registries[name] = HttpRegistry(name, client, upstream.limits, emit)
        yield registries
