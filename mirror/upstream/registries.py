"""The registries of a configuration, opened together and closed together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from mirror.config.settings import Settings
from mirror.observability.events import Observer
from mirror.upstream.api import Registry
from mirror.upstream.failover import FailoverClient
from mirror.upstream.registry import HttpRegistry
from mirror.upstream.transport import Transport, own_addresses


@asynccontextmanager
async def open_registries(settings: Settings, emit: Observer) -> AsyncIterator[dict[str, Registry]]:
    """A registry for each configured upstream, by name."""
    own = own_addresses(settings.listen)
    registries: dict[str, Registry] = {}
    async with AsyncExitStack() as stack:
        for name, upstream in settings.upstreams.items():
            client = FailoverClient(name, upstream, Transport(upstream), emit, own)
            registry = HttpRegistry(name, client, upstream.limits, emit)
            stack.push_async_callback(registry.close)
            registries[name] = registry
        yield registries
