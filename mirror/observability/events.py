"""Events, and the record of one request.

Lives here: a frozen type for each event that a package may report. A package gets an
:data:`Observer` and calls it with events; ``metrics.py`` and ``logs.py`` have the observers. Must
not know: who observes.

A request is one :class:`RequestRecord`, which the packages fill in as the request passes them. The
log line, ``Server-Timing`` and the metrics all read it, so nothing is measured twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, TypeAlias

from mirror.observability.hosted_events import HostedChange as HostedChange
from mirror.observability.hosted_events import HostedMeasured as HostedMeasured
from mirror.observability.job_events import PrefetchEnded as PrefetchEnded
from mirror.observability.job_events import RetentionEnded as RetentionEnded
from mirror.observability.notification_events import (
    NotificationQueueMeasured as NotificationQueueMeasured,
)
from mirror.observability.notification_events import NotificationsDropped as NotificationsDropped
from mirror.observability.notification_events import NotificationSent as NotificationSent
from mirror.observability.traces import PullTrace
from mirror.oci.reference import Repository


class Kind(StrEnum):
    """The kind of object that a request names. A metric label, so its values are few."""

    __hash__ = str.__hash__  # Enum's own is a Python function, and each request calls it often.

    PING = "ping"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    CATALOG = "catalog"
    INVALID = "invalid"


class Outcome(StrEnum):
    """The result of a request. Each request has exactly one (``docs/metrics.md`` explains them)."""

    __hash__ = str.__hash__

    HIT = "hit"
    JOIN = "join"
    MISS = "miss"
    ASIDE = "aside"
    REVALIDATED = "revalidated"
    STALE = "stale"
    PUSHED = "pushed"
    DELETED = "deleted"
    NEGATIVE = "negative"
    DENIED = "denied"
    REJECTED = "rejected"
    ERROR = "error"


@dataclass(slots=True)
class RequestRecord:
    """The record of one request, from its first line to its last byte. Times are in seconds."""

    request_id: str
    method: str
    path: str
    client: str = ""
    user_agent: str = ""
    user: str = ""
    """The user whose credentials were right. Empty: anonymous, or there are no rules."""
    kind: Kind = Kind.INVALID
    ns: str | None = None
    """The ``ns`` query parameter, if it names a configured upstream (containerd sends it)."""
    upstream: str = ""
    """Name of the configured upstream; empty if the request names none of them."""
    repository: str = ""
    reference: str = ""
    digest: str = ""
    outcome: Outcome = Outcome.ERROR
    status: int = 0
    """HTTP status of the response; 0 until its headers are sent."""
    error: str = ""
    """OCI code and message of an error; empty without one."""
    warning: str = ""
    """Reason for a stale response; becomes the ``Warning`` header."""
    is_private: bool = False
    """Whether not everybody may have the response, so that a shared cache must not store it."""
    bytes_sent: int = 0
    bytes_received: int = 0
    """Bytes of the body of a push."""
    is_sent_in_one_write: bool = False
    """Whether headers and body were one write. Then there are no :class:`BytesSent` events."""
    is_complete: bool = False
    """Whether the whole body was sent."""
    joined_at_byte: int | None = None
    """Offset in bytes that an ingest had reached when this request joined it. None: joined none."""
    is_unverified: bool = False
    """Whether bytes of the response may come from an aside request, which no digest verifies."""
    aside_bytes: int = 0
    """Bytes that came from aside requests, in place of the running fetch."""
    connections: int = 0
    """Most connections that fetched a blob together, of the request that started the fetch, when it
    ended. 0: only one, or nothing was fetched."""
    late_parts: int = 0
    """Number of parts of that blob that arrived too slowly, and whose rest was fetched again."""
    started: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    """Seconds from the start to the first byte of the response; None before it."""
    duration: float = 0.0
    stages: list[tuple[str, float]] = field(default_factory=list)
    """(name, seconds) of each measured stage. ``token`` is a part of another one."""
    trace: PullTrace | None = None
    """Further measurements. None: the response came from memory."""
    is_pull_refused: Callable[[Repository], bool] | None = None
    """Returns whether a rule forbids the client to pull from a repository. None: no rules."""
    command: str = ""
    """The command or job of the mirror that asks, such as ``warm``. Empty: a client asks."""

    def stage(self, name: str) -> StageTimer:
        """Return a context that measures one stage. Stages of the same name add up."""
        return StageTimer(self.stages, name)


class StageTimer:
    """A context manager that adds its duration to ``stages``, also if its block raises."""

    __slots__ = ("_name", "_stages", "_started")

    def __init__(self, stages: list[tuple[str, float]], name: str) -> None:
        self._stages = stages
        self._name = name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._stages.append((self._name, time.monotonic() - self._started))


CURRENT_RECORD: Final[ContextVar[RequestRecord | None]] = ContextVar("record", default=None)
"""The record of the request that the running task works for: it handles the request, or the request
has started it. So work that several requests share counts for the first one."""


def current_stage(name: str) -> StageTimer:
    """Return a context that measures one stage of the current request, if there is one."""
    record = CURRENT_RECORD.get()
    return StageTimer([] if record is None else record.stages, name)


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """A request was received."""

    pull: RequestRecord


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request ended, with any outcome. There is exactly one for each :class:`RequestStarted`."""

    pull: RequestRecord


@dataclass(frozen=True, slots=True)
class OwnRequestEnded:
    """A request ended that a command or a job of the mirror has made: no client has sent it."""

    pull: RequestRecord


@dataclass(frozen=True, slots=True)
class BytesSent:
    """Bytes of a body were sent to a client. Reported several times for one body."""

    upstream: str
    count: int


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """Bytes of a body were received from an upstream. Reported several times for one body."""

    upstream: str
    count: int


@dataclass(frozen=True, slots=True)
class ExchangeEnded:
    """An HTTP exchange with an endpoint ended.

    ``status`` is 0 if there was no response; ``error`` says why. ``seconds`` is the time to the
    response headers. ``billed``: the registry may count the request against a pull limit (a ``GET``
    of a manifest).
    """

    upstream: str
    endpoint: str
    method: str
    kind: Kind
    status: int
    seconds: float
    is_billed: bool
    error: str = ""


TokenResult: TypeAlias = Literal["ok", "refused", "error"]
"""A token; no token for this repository (it may not exist); a failure, or a refused login."""


@dataclass(frozen=True, slots=True)
class TokenFetched:
    """An exchange with a token service ended after ``seconds``."""

    upstream: str
    result: TokenResult
    seconds: float


@dataclass(frozen=True, slots=True)
class RateLimitSeen:
    """A response had ``ratelimit-limit`` and ``ratelimit-remaining`` (Docker Hub), in pulls."""

    upstream: str
    limit: int
    remaining: int
    window: int
    """Seconds for which the limit counts pulls."""


@dataclass(frozen=True, slots=True)
class CircuitChanged:
    """The circuit breaker of an endpoint opened (no requests are sent) or closed again."""

    upstream: str
    endpoint: str
    is_open: bool


@dataclass(frozen=True, slots=True)
class Resumed:
    """A broken transfer was resumed at ``offset`` bytes, or from 0 if ``restarted``."""

    upstream: str
    offset: int
    is_restart: bool
    reason: str


AsideResult: TypeAlias = Literal["ok", "no_range", "rate_limited", "failed", "dropped"]
"""- ``ok``: the bytes have arrived.
- ``no_range``: the response was not the requested range.
- ``rate_limited``: 429.
- ``failed``: any other failure.
- ``dropped``: the request was ended, because no client waits for its bytes any more."""


@dataclass(frozen=True, slots=True)
class AsideEnded:
    """A request for a range beside the fetch of its blob, or without one, has ended.

    ``bytes``: how many were received.
    """

    upstream: str
    result: AsideResult
    bytes: int
    reason: str
    """Message of the failure. Empty without one."""


@dataclass(frozen=True, slots=True)
class ConnectionsChanged:
    """The number of connections that fetch blobs beside the first one of each blob has changed."""

    upstream: str
    change: int


@dataclass(frozen=True, slots=True)
class PieceCut:
    """A part of a blob arrived far slower than other parts. Its rest is fetched again.

    ``offset``: offset in bytes of the first byte that has not arrived.
    """

    upstream: str
    endpoint: str
    offset: int


BackOffReason: TypeAlias = Literal[
    "no_gain", "slow_ranges", "rate_limited", "reclaimed", "no_ranges", "failed"
]
"""- ``no_gain``: one more connection brought no more bytes.
- ``slow_ranges``: a range had less than 0.8 of the rate of the plain response, or brought nothing
  in time.
- ``rate_limited``: 429 or 503.
- ``reclaimed``: the initial request of another blob got a 429, a 503 or no response here.
- ``no_ranges``: the response was not the range.
- ``failed``: ranges failed twice in a row, three times within 16, or during the trial."""


@dataclass(frozen=True, slots=True)
class BackedOff:
    """A blob is fetched by fewer connections from now on: ``connections`` of them."""

    upstream: str
    endpoint: str
    reason: BackOffReason
    connections: int


@dataclass(frozen=True, slots=True)
class DigestMismatched:
    """Bytes did not hash to their digest. ``where`` they came from: upstream, resume or disk."""

    upstream: str
    digest: str
    where: str


@dataclass(frozen=True, slots=True)
class Reverified:
    """Content whose last verification was too old was hashed again. ``ok``: it is intact."""

    digest: str
    is_ok: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """``count`` contents of ``bytes`` in all left the cache. ``reason``: quota, disk, corrupt.

    They were deleted, or moved to ``quarantine/`` if the reason is corrupt.
    """

    count: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Uncached:
    """A pull was served, but its content was not stored.

    ``reason``: full, readonly, descriptors, removed, io, stalled, handover (``docs/metrics.md``).
    """

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """Content is complete, verified and durable."""

    digest: str
    bytes: int
    seconds: float
    """Seconds from the start of the ingest to the rename of its file."""


@dataclass(frozen=True, slots=True)
class StorageMeasured:
    """The current number and bytes of contents on disk, and the quota in bytes."""

    count: int
    bytes: int
    quota: int
    is_writable: bool


@dataclass(frozen=True, slots=True)
class IndexDamaged:
    """The index was damaged: its directory was renamed, and a new one is made."""

    why: str
    """The error that showed the damage."""


@dataclass(frozen=True, slots=True)
class IndexRestored:
    """An index that had lost its rows has got the names in ``index.json`` back."""

    names: int


@dataclass(frozen=True, slots=True)
class TagMoved:
    """The upstream has resolved a tag to another digest than before, or for the first time.

    Times are in seconds since the epoch.
    """

    upstream: str
    repository: str
    tag: str
    variant: str
    """Empty: for clients that accept all media types. Other clients may get another manifest."""
    digest: str
    at: float
    previous: tuple[str, float, float] | None
    """(digest, first seen, last seen) of the tag until then. None: the tag was not known."""


@dataclass(frozen=True, slots=True)
class ContentUsed:
    """The last use of content was set on the disk, if it is there (at most once a minute each)."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HistoryRowsDropped:
    """``count`` rows of the history were lost: there were too many, or the disk refused them."""

    count: int


@dataclass(frozen=True, slots=True)
class IngestsMeasured:
    """The current number of running ingests of this process."""

    count: int
    oldest_idle: float
    """Longest time, in seconds, that one of them has received no data."""


@dataclass(frozen=True, slots=True)
class ConnectionRefused:
    """A connection was refused: ``client``, an address, has ``max_client_connections`` already."""

    client: str


@dataclass(frozen=True, slots=True)
class LogLinesDropped:
    """``count`` log lines were lost: nothing reads the standard output, or it cannot be written."""

    count: int


@dataclass(frozen=True, slots=True)
class LogMessage:
    """A message for the log, as one line. ``level``: debug, info, warning, error."""

    level: str
    message: str
    fields: tuple[tuple[str, str | int | float], ...] = ()


Event: TypeAlias = (
    RequestStarted
    | RequestEnded
    | OwnRequestEnded
    | BytesSent
    | BytesFetched
    | ExchangeEnded
    | TokenFetched
    | RateLimitSeen
    | CircuitChanged
    | Resumed
    | AsideEnded
    | ConnectionsChanged
    | PieceCut
    | BackedOff
    | DigestMismatched
    | Reverified
    | Evicted
    | PrefetchEnded
    | RetentionEnded
    | Uncached
    | Published
    | StorageMeasured
    | IndexDamaged
    | IndexRestored
    | TagMoved
    | HostedChange
    | HostedMeasured
    | NotificationSent
    | NotificationsDropped
    | NotificationQueueMeasured
    | ContentUsed
    | HistoryRowsDropped
    | IngestsMeasured
    | ConnectionRefused
    | LogLinesDropped
    | LogMessage
)
Observer: TypeAlias = Callable[[Event], None]
