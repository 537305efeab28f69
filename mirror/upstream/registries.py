"""Open and close the registries of a configuration.

Lives here: how the parts of a registry are put together. Must not know: how any of them works.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from mirror.config.settings import Settings, Upstream
from mirror.observability.events import Observer
from mirror.single_flight import SingleFlight
from mirror.upstream.api import Registry
from mirror.upstream.connections import own_addresses
from mirror.upstream.failover import FailoverClient
from mirror.upstream.registry import HttpRegistry
from mirror.upstream.transport import Transport


def listener_addresses(settings: Settings) -> frozenset[tuple[str, int]]:
    """Return the (host, port) pairs of all listeners of this mirror."""
    listeners = (
        settings.listen,
        settings.admin.listen if settings.admin is not None else None,
        settings.hosted.listen if settings.hosted is not None else None,
    )
    return frozenset(
        address for listen in listeners if listen is not None for address in own_addresses(listen)
    )


class Registries(dict[str, Registry]):
    """Name of each upstream -> its registry."""

    def __init__(
        self, settings: Settings, emit: Observer, single_flight: SingleFlight, stack: AsyncExitStack
    ) -> None:
        """Open the registries of ``settings``. ``stack`` closes their connections."""
        super().__init__()
        self._listeners = listener_addresses(settings)
        self._emit = emit
        self._single_flight = single_flight
        self._stack = stack
        self._upstreams: dict[str, Upstream] = {}
        self.configure(settings.upstreams)

    def configure(self, upstreams: Mapping[str, Upstream]) -> None:
        """Open a new registry for each upstream that is new or has changed. All, or none.

        The connections of a registry that is replaced stay open until the end, because fetches may
        use them. So do those of an upstream that is no longer configured.

        Raises ``OSError`` or ``ValueError`` if a file that an upstream names cannot be used.
        """
        changed = {
            name: self._open(name, upstream)
            for name, upstream in upstreams.items()
            if self._upstreams.get(name) != upstream
        }
        self._upstreams.update(upstreams)
        self.update(changed)

    def _open(self, name: str, upstream: Upstream) -> Registry:
        transport = Transport(upstream, own_addresses=self._listeners)
        self._stack.push_async_callback(transport.close)
        client = FailoverClient(
            name,
            upstream,
            transport,
            self._emit,
            self._single_flight,
            own_addresses=self._listeners,
        )
        return HttpRegistry(name, client, upstream.limits, upstream.parallel, self._emit)


@asynccontextmanager
async def open_registries(
    settings: Settings, emit: Observer, single_flight: SingleFlight
) -> AsyncIterator[Registries]:
    """Open a registry for each configured upstream, and close their connections at the end.

    Args:
        settings: The configuration.
        emit: Receives the events of all registries.
        single_flight: Runs requests for tokens and look-ups of logins. Must stay open until the
            registries are closed.

    Yields:
        The registries.
    """
    async with AsyncExitStack() as stack:
        yield Registries(settings, emit, single_flight, stack)
