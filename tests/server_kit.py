"""Run the whole server in this process, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy

from mirror.config.settings import Limits, Settings, Storage, Upstream
from mirror.observability.events import Event, RequestEnded
from mirror.observability.metrics import MetricsObserver
from mirror.server import RunningServer, start_server
from mirror.single_flight import SingleFlight
from mirror.store.store import Store
from tests.real.tokens import Certificate

QUICK = Limits(connect=2.0, headers=2.0, first_byte=2.0, idle=2.0)
"""Seconds: short limits, for tests that wait until they expire. On a busy machine a response of
the fake registry can take more than one second."""
LIMITS = Limits(connect=15.0, headers=15.0, first_byte=15.0, idle=15.0)
"""Seconds: limits that a test must not reach, even on a busy machine."""
SHORT_HEADERS = LIMITS.model_copy(update={"connect": 0.5, "headers": 1.0})
"""Seconds: a response whose headers take longer than both together is given up."""


@dataclass
class Server:
    """A running server, a client of it, and the events that it has emitted."""

    url: str
    client: aiohttp.ClientSession
    running_server: RunningServer
    events: list[Event] = field(default_factory=list)
    push_url: str = ""
    """URL of the listener of the hosted repositories. Empty without one."""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def store(self) -> Store:
        return self.running_server.mirror.store

    @property
    def single_flight(self) -> SingleFlight:
        return self.running_server.mirror.single_flight

    @property
    def pulls(self) -> list[Any]:
        """Records of the requests that have ended."""
        return [event.pull for event in self.events if isinstance(event, RequestEnded)]

    async def records(self) -> list[Any]:
        """Return ``pulls`` once no request is in flight: a record ends after its response."""
        await self.running_server.handler.wait_until_idle()
        return self.pulls

    def blob(self, digest: object, repository: str = "library/app", query: str = "") -> str:
        return f"{self.url}/v2/{repository}/blobs/{digest}{query}"

    def manifest(self, reference: object, repository: str = "library/app", query: str = "") -> str:
        return f"{self.url}/v2/{repository}/manifests/{reference}{query}"

    async def get(
        self, url: str, headers: Mapping[str, str] | None = None
    ) -> tuple[int, CIMultiDictProxy[str], bytes]:
        """Return (status, headers, body). Raises ``aiohttp.ClientError`` for a truncated body."""
        return await self.ask("GET", url, headers)

    async def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None
    ) -> tuple[int, CIMultiDictProxy[str], bytes]:
        """Send a request with any method, otherwise as :meth:`get`."""
        async with self.client.request(method, url, headers=headers) as response:
            return response.status, response.headers, await response.read()


@asynccontextmanager
async def running(
    root: Path,
    *endpoints: str,
    storage: Storage | None = None,
    limits: Limits = LIMITS,
    abandoned: str = "finish",
    clock: Any = None,
    certificate: Certificate | None = None,
    other: Upstream | None = None,
    more: Mapping[str, Any] | None = None,
    others: Mapping[str, Upstream] | None = None,
    hosted: Mapping[str, Any] | None = None,
    **upstream: Any,
) -> AsyncIterator[Server]:
    """Run a server with the upstreams ``docker.io`` and ``other.io``.

    Args:
        root: The data directory.
        endpoints: Endpoints of both upstreams. Without any, connections to them are refused.
        storage: Settings of the storage.
        limits: Time limits towards the upstreams.
        abandoned: The setting ``abandoned``.
        clock: Replaces ``time.time``.
        certificate: The server uses TLS with it.
        other: Replaces the settings of ``other.io``.
        more: More keys of the configuration, such as ``catalog``.
        others: Further upstreams, by name.
        hosted: Keys of the section ``hosted``, which has a listener of its own unless they have
            ``hosts``. None: nothing is hosted.
        upstream: More settings of the upstreams.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    one = Upstream(endpoints=endpoints or ("http://127.0.0.1:9",), limits=limits, **upstream)
    settings = Settings.model_validate(
        {
            "listen": f"127.0.0.1:{port}",
            "data_dir": str(root),
            "tls": _tls(certificate),
            "storage": storage or Storage(),
            "abandoned": abandoned,
            "upstreams": {"docker.io": one, "other.io": other or one, **(others or {})},
            **_hosted_section(hosted),
            **(more or {}),
        }
    )
    push_listener = None
    if settings.hosted is not None and settings.hosted.listen is not None:
        push_listener = socket.create_server(("127.0.0.1", 0))
    events: list[Event] = []
    metrics = MetricsObserver(settings.upstreams)

    def emit(event: Event) -> None:
        metrics.observe(event)
        events.append(event)

    extra: dict[str, Any] = {} if clock is None else {"now": clock}
    push_url = ""
    if push_listener is not None:
        push_url = (
            f"{'https' if certificate else 'http'}://127.0.0.1:{push_listener.getsockname()[1]}"
        )
    async with start_server(
        settings,
        listener,
        emit,
        metrics.scrape,
        push_listener=push_listener,
        **extra,
    ) as running_server:
        trusted = certificate and ssl.create_default_context(cafile=certificate.cert_file)
        connector = aiohttp.TCPConnector(limit=0, ssl=trusted or True)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(60)
        ) as client:
            scheme = "https" if certificate else "http"
            url = f"{scheme}://127.0.0.1:{port}"
            yield Server(url, client, running_server, events, push_url)
    await asyncio.sleep(0)


def _hosted_section(hosted: Mapping[str, Any] | None) -> dict[str, Any]:
    if hosted is None:
        return {}
    push_host = {} if "hosts" in hosted else {"listen": "127.0.0.1:0"}
    return {"hosted": {"name": "registry.example", **push_host, **hosted}}


def _tls(certificate: Certificate | None) -> dict[str, str] | None:
    if certificate is None:
        return None
    return {"certificate": str(certificate.cert_file), "key": str(certificate.key_file)}
