"""What the tests of the upstream room share: a registry over HTTP, with a clock of the test's."""

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
from mirror.upstream.failover import FailoverClient, RegistryRequest
from mirror.upstream.registry import HttpRegistry
from mirror.upstream.transport import Transport
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate

REPO = Repository("docker.io", "library/app")
DATA = bytes(range(256)) * 400
LIMITS = Limits(connect=15.0, headers=15.0, idle=15.0)
"""Of tests that do not wait for them, on whatever busy machine."""
T = TypeVar("T")
DOWN = 503
"""What an endpoint says that has no answer."""


@dataclass
class Kit:
    """One upstream, what it told its observer, and the clock it goes by."""

    client: FailoverClient
    registry: HttpRegistry
    transport: Transport
    events: list[Event] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [1000.0])

    def seen(self, kind: type[T]) -> list[T]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    async def status(self, path: str = "manifests/latest", method: str = "GET") -> int:
        """The status of the answer to a question; raises what ``ask`` raises."""
        async with self.client.ask(RegistryRequest(method, REPO, path, Kind.MANIFEST)) as (
            answer,
            _,
        ):
            return answer.response.status

    async def read(self, digest: Digest, **how: Any) -> bytes:
        """The bytes of a blob, as ``open`` gives them."""
        async with self.registry.open(REPO, digest, Kind.BLOB, **how) as stream:
            return b"".join([chunk async for chunk in stream])


@asynccontextmanager
async def upstream_kit(
    *endpoints: str,
    name: str = "docker.io",
    limits: Limits = LIMITS,
    environment: Mapping[str, str] | None = None,
    own: Collection[tuple[str, int]] = (),
    clock: Callable[[], float] | None = None,
    **settings: Any,
) -> AsyncIterator[Kit]:
    """An upstream at ``endpoints``; what is tried again is tried at once."""
    upstream = Upstream(endpoints=endpoints, limits=limits, **settings)
    events: list[Event] = []
    times = [1000.0]
    transport = Transport(upstream, environment or {})
    client = FailoverClient(
        name,
        upstream,
        transport,
        events.append,
        own,
        clock or (lambda: times[0]),
        jitter=lambda: 0.0,
    )
    registry = HttpRegistry(name, client, limits, events.append)
    try:
        yield Kit(client, registry, transport, events, times)
    finally:
        await registry.close()


def dead() -> str:
    """An endpoint at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def registry() -> FakeRegistry:
    """One that has an image at ``latest``."""
    fake = FakeRegistry()
    fake.add_manifest(b"{}", tag="latest", media_type=OCI_MANIFEST)
    return fake


def down(*fakes: FakeRegistry) -> None:
    """Let them have no answer to anything."""
    for fake in fakes:
        fake.fault("", Fault(status=DOWN, times=None))


def up(*fakes: FakeRegistry) -> None:
    """Let them answer again."""
    for fake in fakes:
        fake.faults.clear()


async def failure(kit: Kit, path: str = "manifests/latest") -> MirrorError:
    """The error that is the answer to a question."""
    with pytest.raises(MirrorError) as caught:
        await kit.status(path)
    return caught.value


def helper(directory: Path, script: str, name: str = "test") -> Path:
    """A credential helper of this name; returns the log of what it was asked for."""
    log = directory / f"{name}.log"
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\nread server\necho \"$1 $server\" >> '{log}'\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return log


def rotating_helper(directory: Path, secret: str = "old") -> Path:
    """A helper whose secret is what the file ``secret`` says; returns its log."""
    path = directory / "secret"
    path.write_text(secret)
    return helper(directory, f'printf \'{{"Username":"u","Secret":"%s"}}\' "$(cat {path})"')


async def at_once(count: int, ask: Callable[[], Awaitable[T]]) -> list[T | BaseException]:
    """The outcomes of many who ask at the same time."""
    return await asyncio.gather(*(ask() for _ in range(count)), return_exceptions=True)


def origin(text: str) -> URL:
    """An endpoint as the room has it."""
    return URL(text, encoded=True)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that has no event."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what a process or a peer does has no event here
            await asyncio.sleep(0.01)


def tls_server(certificate: Certificate) -> ssl.SSLContext:
    """What a fake serves HTTPS with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_file, certificate.key_file)
    return context
