"""What happened, as frozen values, and the record of one pull.

Lives here: the vocabulary in which every room reports. A room gets an :data:`Observer` and calls
it; ``metrics.py`` and ``logs.py`` are the observers. Must not know: who listens.

A pull is one :class:`Pull`, filled in as it passes the rooms; the log line, ``Server-Timing`` and
the metrics all read it, so nothing is measured twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias


class Kind(StrEnum):
    """What a request is about. A bounded label."""

    PING = "ping"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    INVALID = "invalid"


class Outcome(StrEnum):
    """How a request ended. Exactly one each, so that they add up to all requests."""

    HIT = "hit"
    JOIN = "join"
    MISS = "miss"
    REVALIDATED = "revalidated"
    STALE = "stale"
    NEGATIVE = "negative"
    DENIED = "denied"
    ERROR = "error"


@dataclass(slots=True)
class Pull:
    """One request, from its first line to its last byte. Times are seconds."""

    request_id: str
    method: str
    path: str
    client: str = ""
    user_agent: str = ""
    kind: Kind = Kind.INVALID
    ns: str | None = None
    """What the client named the upstream, where it said so and we know it."""
    upstream: str = ""
    """The configured upstream's name, or empty: never what a client made up."""
    repository: str = ""
    reference: str = ""
    digest: str = ""
    outcome: Outcome = Outcome.ERROR
    status: int = 0
    """What the client was told; 0 until its headers are on their way."""
    error: str = ""
    """The OCI code, and why, where there was an error."""
    warning: str = ""
    """Why a stale answer was given; becomes the ``Warning`` header."""
    bytes_sent: int = 0
    sent_in_one_write: bool = False
    """Whether the body went out at once: then no :class:`BytesSent` tells of it."""
    complete: bool = False
    """Whether all that the response promised was sent."""
    joined_at: int | None = None
    """Bytes that had arrived when this pull joined growing content."""
    started: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    """Seconds from the start to the first byte of the answer."""
    duration: float = 0.0
    stages: list[tuple[str, float]] = field(default_factory=list)
    """(name, seconds): admission, index, token, resolve, upstream, wait, send …"""

    def stage(self, name: str) -> Stage:
        """Measure one stage; stages of the same name add up for ``Server-Timing``."""
        return Stage(self.stages, name)


class Stage:
    """A context whose time is one stage of a pull, however it ends."""

    __slots__ = ("_begun", "_name", "_stages")

    def __init__(self, stages: list[tuple[str, float]], name: str) -> None:
        self._stages = stages
        self._name = name

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *ending: object) -> None:
        self._stages.append((self._name, time.monotonic() - self._begun))


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PullStarted:
    """A request came in."""

    pull: Pull


@dataclass(frozen=True, slots=True)
class PullEnded:
    """A request is over, whatever its outcome: exactly one for each ``PullStarted``."""

    pull: Pull


@dataclass(frozen=True, slots=True)
class BytesSent:
    """Bytes of a body that went to a client, as they go."""

    upstream: str
    count: int


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """Bytes of a body that came from an upstream, as they come."""

    upstream: str
    count: int


@dataclass(frozen=True, slots=True)
class UpstreamResponded:
    """One HTTP exchange with an endpoint. ``status`` 0: no answer, ``error`` says why.

    ``billed``: a request that a registry counts against a pull limit (``GET`` of a manifest).
    """

    upstream: str
    endpoint: str
    method: str
    kind: Kind
    status: int
    seconds: float
    billed: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class TokenFetched:
    """One exchange with a token service."""

    upstream: str
    ok: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class RateLimitSeen:
    """``ratelimit-limit`` and ``ratelimit-remaining`` of an answer (Docker Hub)."""

    upstream: str
    limit: int
    remaining: int
    window: int
    """Seconds."""


@dataclass(frozen=True, slots=True)
class CircuitChanged:
    """A circuit opened (requests are not tried) or closed again."""

    upstream: str
    endpoint: str
    open: bool


@dataclass(frozen=True, slots=True)
class Resumed:
    """A transfer broke at ``offset`` and goes on from there (or from 0: ``restarted``)."""

    upstream: str
    offset: int
    restarted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DigestMismatched:
    """Bytes that were not what their name says. ``where``: upstream, disk or resume."""

    upstream: str
    digest: str
    where: str


@dataclass(frozen=True, slots=True)
class Reverified:
    """Content whose verification had aged was hashed again."""

    digest: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """Content that was dropped. ``reason``: quota, disk, corrupt."""

    count: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Uncached:
    """A pull was served, but not kept. ``reason``: full, quota, readonly, io, stalled …"""

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """Content became whole and durable."""

    digest: str
    bytes: int
    seconds: float
    """From the first byte asked of the upstream to the rename."""


@dataclass(frozen=True, slots=True)
class StorageMeasured:
    """What is on disk now."""

    count: int
    bytes: int
    quota: int
    writable: bool


@dataclass(frozen=True, slots=True)
class IngestsMeasured:
    """Growing content of this process now; ``oldest_idle`` is seconds without progress."""

    count: int
    oldest_idle: float


@dataclass(frozen=True, slots=True)
class LogMessage:
    """Something an operator wants to read once, in one line."""

    level: str
    message: str
    fields: tuple[tuple[str, str | int | float], ...] = ()


Event: TypeAlias = (
    PullStarted
    | PullEnded
    | BytesSent
    | BytesFetched
    | UpstreamResponded
    | TokenFetched
    | RateLimitSeen
    | CircuitChanged
    | Resumed
    | DigestMismatched
    | Reverified
    | Evicted
    | Uncached
    | Published
    | StorageMeasured
    | IngestsMeasured
    | LogMessage
)
Observer: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer that does nothing."""
