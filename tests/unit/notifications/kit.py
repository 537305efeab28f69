"""A notification service whose clock belongs to the test, and a receiver of webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mirror.config.settings import Settings, build
from mirror.notifications.notification_service import NotificationService
from mirror.observability.events import (
    Event,
    HostedChange,
    Kind,
    LogMessage,
    NotificationsDropped,
    NotificationSent,
    Outcome,
    RequestEnded,
    RequestRecord,
)
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Repository
from mirror.single_flight import SingleFlight
from mirror.store.layout import Layout
from tests.fakes.registry import Answer, FakeRegistry, ReceivedRequest
from tests.waiting import until

NOW = 1_900_000_000.0
NAME = "registry.example"
SECRETS = tuple(base64.b64encode(bytes([n]) * 32).decode() for n in range(3))
"""Secrets in their base64 form."""
DIGEST = Digest.of(b"manifest")
T = TypeVar("T")


# --- the receiver ---------------------------------------------------------------------------------


class Receiver(FakeRegistry):
    """Accepts each notification, unless a fault of ``/events`` says otherwise."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.guard = self._accept

    def _accept(self, request: ReceivedRequest) -> Answer:
        return 204, {}, b""

    @property
    def target(self) -> str:
        """The URL that notifications are sent to."""
        return f"{self.url}/events"

    def bodies(self) -> list[dict[str, Any]]:
        """Return the events that were received, also those that were not accepted."""
        return [json.loads(request.body) for request in self.requests]

    def subjects(self) -> list[str]:
        return [body["subject"] for body in self.bodies()]


def is_signed_by(request: ReceivedRequest, secret: str) -> bool:
    """Return whether a request has a signature by a secret in its base64 form."""
    headers = request.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    digest = hmac.new(base64.b64decode(secret), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}" in headers["webhook-signature"].split(" ")


# --- the service ----------------------------------------------------------------------------------


@dataclass
class NotificationKit:
    """A service of one process, and what it has emitted."""

    service: NotificationService
    single_flight: SingleFlight
    root: Path
    clock: list[float]
    events: list[Event] = field(default_factory=list)
    timers: list[Callable[[], None]] = field(default_factory=list)

    def push(self, tag: str = "v1", **fields: Any) -> None:
        """Tell of a push of a tag. ``fields``: others of the change."""
        self.service.observe(a_change(**{"tag": tag, "at": self.clock[0], **fields}))

    def pull(self, reference: str = "v1", **fields: Any) -> None:
        """Tell of the end of a request. ``fields``: of its record."""
        self.service.observe(RequestEnded(a_pull(**{"reference": reference, **fields})))

    def run_timers(self) -> None:
        """Let the time of the batch of pulls pass."""
        timers, self.timers[:] = list(self.timers), []
        for timer in timers:
            timer()

    async def written(self) -> None:
        """Wait until all that was observed is in the queue."""
        writer = self.service._recorder._writer
        if writer is not None:
            await until(lambda: writer.is_idle)

    async def settle(self, seconds: float = 0.0) -> None:
        """Let ``seconds`` pass, and wait until nothing more is sent."""
        await self.written()
        await until(lambda: len(self.single_flight) == 0)
        self.clock[0] += seconds
        await self.service.poll()
        await until(lambda: len(self.single_flight) == 0)

    def seen(self, kind: type[T]) -> list[T]:
        """Return the events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def results(self) -> list[str]:
        """The results of all requests."""
        return [event.result for event in self.seen(NotificationSent)]

    @property
    def dropped(self) -> dict[tuple[str, str], int]:
        """(target, reason) -> number of notifications."""
        found: dict[tuple[str, str], int] = {}
        for event in self.seen(NotificationsDropped):
            key = event.target, event.reason
            found[key] = found.get(key, 0) + event.count
        return found

    @property
    def messages(self) -> list[str]:
        """The messages for the log."""
        return [event.message for event in self.seen(LogMessage)]

    def configure(self, *targets: dict[str, Any]) -> None:
        """Use other targets."""
        self.service.prepare(settings_with(self.root, *targets))()


def settings_with(root: Path, *targets: dict[str, Any]) -> Settings:
    """Return settings with these targets. Their secret is the first one, unless they say so."""
    root.mkdir(exist_ok=True)
    secret = root / "secret"
    if not secret.exists():
        secret.write_text(f"whsec_{SECRETS[0]}\n")
    events = [{"name": "audit", "secret_file": str(secret), **target} for target in targets]
    return build(
        {"events": events, "upstreams": {"docker.io": {"endpoints": ["https://x.example"]}}}
    )


@asynccontextmanager
async def notification_kit(
    root: Path, *targets: dict[str, Any], clock: Sequence[float] = (NOW,)
) -> AsyncIterator[NotificationKit]:
    """Run a service below ``root``, which several of them may share."""
    now = clock if isinstance(clock, list) else list(clock)
    events: list[Event] = []
    timers: list[Callable[[], None]] = []
    service = NotificationService(
        Layout(root / "data"),
        events.append,
        lambda seconds, call: timers.append(call),
        lambda: now[0],
    )
    service.prepare(settings_with(root, *targets))()
    async with SingleFlight() as single_flight:
        async with service.delivering(single_flight):
            yield NotificationKit(service, single_flight, root, now, events, timers)
        service.close(30.0)


def a_change(**fields: Any) -> HostedChange:
    """A push of an image, unless ``fields`` say otherwise."""
    values: dict[str, Any] = {
        "action": "push",
        "repository": Repository(NAME, "team/app"),
        "digest": DIGEST,
        "tag": "v1",
        "media_type": OCI_MANIFEST,
        "size": 8,
        "user": "ci",
        "client": "10.0.0.7",
        "at": NOW,
    }
    return HostedChange(**{**values, **fields})


def a_pull(**fields: Any) -> RequestRecord:
    """A ``GET`` of a manifest, unless ``fields`` say otherwise."""
    values = {
        "request_id": "id",
        "method": "GET",
        "path": "/v2/library/app/manifests/v1",
        "client": "10.0.0.7",
        "user_agent": "containerd/2.0",
        "kind": Kind.MANIFEST,
        "upstream": "docker.io",
        "repository": "library/app",
        "reference": "v1",
        "digest": str(DIGEST),
        "outcome": Outcome.HIT,
        "status": 200,
        "bytes_sent": 8,
        "is_complete": True,
    }
    return RequestRecord(**{**values, **fields})
