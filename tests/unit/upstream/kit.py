"""Shared parts of these tests: a registry over HTTP whose clock the test sets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from yarl import URL

from mirror.config.settings import Limits, Upstream
from mirror.observability.events import Event, Kind
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.failover import FailoverClient
from mirror.upstream.messages import AcceptedResponse, RegistryRequest
from mirror.upstream.registry import HttpRegistry
from mirror.upstream.transport import Transport
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.server_kit import LIMITS

REPO = Repository("docker.io", "library/app")
DATA = bytes(range(256)) * 400
T = TypeVar("T")
DOWN = 503
"""Status of an endpoint that is down."""


@dataclass
class Kit:
    """One upstream, the events that it emitted, and its clock."""

    client: FailoverClient
    registry: HttpRegistry
    transport: Transport
    single_flight: SingleFlight
    events: list[Event] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [1000.0])

    def seen(self, kind: type[T]) -> list[T]:
        """Return the events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    async def status(
        self, path: str = "manifests/latest", method: str = "GET", repository: Repository = REPO
    ) -> int:
        """Send a request, and return the status of the response. Raises like ``send``."""
        request = RegistryRequest(method, repository, path, Kind.MANIFEST)
        async with self.client.send(request, unread) as response:
            return response.http.status

    async def read(self, digest: Digest, repository: Repository = REPO, **how: Any) -> bytes:
        """Read a blob. ``how``: further arguments of ``open``."""
        async with self.registry.open(repository, digest, Kind.BLOB, **how) as stream:
            return b"".join([chunk async for chunk in stream])


@asynccontextmanager
async def upstream_kit(
    *endpoints: str,
    name: str = "docker.io",
    limits: Limits = LIMITS,
    environment: Mapping[str, str] | None = None,
    own_addresses: Collection[tuple[str, int]] = (),
    clock: Callable[[], float] | None = None,
    **settings: Any,
) -> AsyncIterator[Kit]:
    """Open an upstream with ``endpoints``. Retries are sent without a delay."""
    upstream = Upstream(endpoints=endpoints, limits=limits, **settings)
    events: list[Event] = []
    times = [1000.0]
    async with SingleFlight() as single_flight:
        transport = Transport(upstream, environment or {}, own_addresses)
        client = FailoverClient(
            name,
            upstream,
            transport,
            events.append,
            single_flight,
            own_addresses,
            clock or (lambda: times[0]),
            jitter=lambda: 0.0,
        )
        registry = HttpRegistry(name, client, limits, upstream.parallel, events.append)
        try:
            yield Kit(client, registry, transport, single_flight, events, times)
        finally:
            await transport.close()


async def unread(response: AcceptedResponse) -> AcceptedResponse:
    """Return the response: a reader for ``send`` that accepts any body."""
    return response


def dead() -> str:
    """Return the URL of an endpoint at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def registry() -> FakeRegistry:
    """Return a fake registry that has a manifest at ``latest``."""
    fake = FakeRegistry()
    fake.add_manifest(b"{}", tag="latest", media_type=OCI_MANIFEST)
    return fake


def down(*fakes: FakeRegistry) -> None:
    """Let these registries respond to every request with 503."""
    for fake in fakes:
        fake.fault("", Fault(status=DOWN, times=None))


def up(*fakes: FakeRegistry) -> None:
    """Let these registries respond as usual again."""
    for fake in fakes:
        fake.faults.clear()


async def failure(
    kit: Kit, path: str = "manifests/latest", method: str = "GET", repository: Repository = REPO
) -> MirrorError:
    """Send a request that must fail, and return its error."""
    with pytest.raises(MirrorError) as caught:
        await kit.status(path, method, repository)
    return caught.value


def repository(number: int) -> Repository:
    """Return one of many repositories, each in a project of its own."""
    return Repository("docker.io", f"project-{number}/app")


def helper(directory: Path, script: str, name: str = "test") -> Path:
    """Install a credential helper. Returns the log of its requests."""
    log = directory / f"{name}.log"
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\nread server\necho \"$1 $server\" >> '{log}'\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return log


def rotating_helper(directory: Path, secret: str = "old") -> Path:
    """Install a helper that returns the content of the file ``secret``. Returns its log."""
    path = directory / "secret"
    path.write_text(secret)
    return helper(directory, f'printf \'{{"Username":"u","Secret":"%s"}}\' "$(cat {path})"')


async def at_once(count: int, call: Callable[[], Awaitable[T]]) -> list[T | BaseException]:
    """Run ``count`` calls at the same time. Returns their results and exceptions."""
    return await asyncio.gather(*(call() for _ in range(count)), return_exceptions=True)


def origin(text: str) -> URL:
    """Parse the URL of an endpoint like the package does."""
    return URL(text, encoded=True)


def tls_server(certificate: Certificate) -> ssl.SSLContext:
    """Return the TLS context of a fake registry."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_file, certificate.key_file)
    return context
