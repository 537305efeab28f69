"""The rows of the history as values.

Lives here: what is kept of a request, of a period, and of a tag's digest, and their JSON. Must not
know: the database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from mirror.observability.events import Kind, Outcome, RequestRecord

SAVED_OUTCOMES: Final = frozenset(
    {Outcome.HIT, Outcome.JOIN, Outcome.REVALIDATED, Outcome.STALE},
)
"""Outcomes of requests that were served without a fetch of their own."""
SERVED_OUTCOMES: Final = SAVED_OUTCOMES | {Outcome.MISS, Outcome.ASIDE}
"""Outcomes of requests that were served."""
_MAX_TEXT_CHARS: Final = 512
"""Characters of one text of a row: a client or an upstream may send longer ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPull:
    """One request that has ended. Sizes are in bytes, durations in seconds."""

    row_id: int = 0
    """Number of the row: later rows have larger ones."""
    at: float
    """Unix time in seconds at which the request began."""
    request_id: str
    method: str
    path: str = ""
    """Only kept if the request names no repository."""
    client: str = ""
    user_agent: str = ""
    user: str = ""
    """The user, if access was decided by one. Empty: anonymous, or everybody may do this."""
    command: str = ""
    """The command or job of the mirror that has asked. Empty: a client."""
    kind: str = Kind.INVALID.value
    upstream: str = ""
    repository: str = ""
    """Path of the repository, without its upstream."""
    reference: str = ""
    digest: str = ""
    outcome: str = Outcome.ERROR.value
    status: int = 0
    error: str = ""
    warning: str = ""
    bytes_sent: int = 0
    is_complete: bool = False
    first_byte: float | None = None
    duration: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    joined_at_byte: int | None = None
    aside_bytes: int = 0
    connections: int = 0
    late_parts: int = 0
    size: int | None = None
    is_known: bool = False
    is_damaged: bool = False
    is_frozen: bool = False
    uncached: str = ""
    tag_age: float | None = None
    tag_ttl: float | None = None
    previous_digest: str = ""
    source_wait: float = 0.0
    fetched_bytes: int = 0
    """Bytes that the fetch had received when this request ended. 0: there was no fetch here."""
    fetched_seconds: float = 0.0

    @property
    def is_fetched_elsewhere(self) -> bool:
        """Whether another process has fetched the bytes that were sent."""
        is_miss = self.outcome in (Outcome.MISS.value, Outcome.JOIN.value)
        is_streamed = self.kind == Kind.BLOB.value and self.bytes_sent > 0
        return is_miss and is_streamed and not self.fetched_bytes

    @property
    def name(self) -> str:
        """The full name of the image or the content, as far as the request names one."""
        if not self.repository:
            return self.path
        mark = "@" if ":" in self.reference else ":"
        reference = f"{mark}{self.reference}" if self.reference else ""
        return f"{self.upstream}/{self.repository}{reference}"

    @classmethod
    def of_record(cls, pull: RequestRecord, at: float) -> StoredPull:
        """Return the row of a request that has ended. ``at``: Unix time in seconds of its begin."""
        stages: dict[str, float] = {}
        for name, seconds in pull.stages:
            stages[name] = round(stages.get(name, 0.0) + seconds, 6)
        more: dict[str, Any] = {}
        if (trace := pull.trace) is not None:
            more = {
                "size": trace.size,
                "is_known": trace.is_known,
                "is_damaged": trace.is_damaged,
                "is_frozen": trace.is_frozen,
                "tag_age": trace.tag_age,
                "tag_ttl": trace.tag_ttl,
                "previous_digest": trace.previous_digest,
                "source_wait": round(trace.source_wait, 6),
            }
            if (progress := trace.progress) is not None and progress.bytes:
                more["fetched_bytes"] = progress.bytes
                more["fetched_seconds"] = round(progress.latest - progress.began, 6)
                more["uncached"] = progress.uncached
        return cls(
            at=at,
            request_id=pull.request_id,
            method=pull.method,
            path="" if pull.repository else pull.path.partition("?")[0][:_MAX_TEXT_CHARS],
            client=pull.client,
            user_agent=pull.user_agent[:_MAX_TEXT_CHARS],
            user=pull.user[:_MAX_TEXT_CHARS],
            command=pull.command,
            kind=pull.kind.value,
            upstream=pull.upstream,
            repository=pull.repository,
            reference=pull.reference,
            digest=pull.digest,
            outcome=pull.outcome.value,
            status=pull.status,
            error=pull.error[:_MAX_TEXT_CHARS],
            warning=pull.warning[:_MAX_TEXT_CHARS],
            bytes_sent=pull.bytes_sent,
            is_complete=pull.is_complete,
            first_byte=None if pull.first_byte is None else round(pull.first_byte, 6),
            duration=round(pull.duration, 6),
            stages=stages,
            joined_at_byte=pull.joined_at_byte,
            aside_bytes=pull.aside_bytes,
            connections=pull.connections,
            late_parts=pull.late_parts,
            **more,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a row of ``explain --json``. A value that is not known is None."""
        values = asdict(self)
        for key in ("row_id", "path", "at", "is_known", "is_damaged", "is_frozen", "uncached"):
            del values[key]
        values["name"] = self.name
        for key in ("upstream", "repository", "reference", "digest", "previous_digest"):
            values[key] = values[key] or None
        for key in ("client", "user_agent", "user", "command", "error", "warning"):
            values[key] = values[key] or None
        if not self.fetched_bytes:
            values["fetched_bytes"] = values["fetched_seconds"] = None
        return values

    def dump(self) -> str:
        """Return the JSON of the row, without the fields that have their default."""
        values = ((name, getattr(self, name)) for name in _DEFAULTS)
        kept = {name: value for name, value in values if value != _DEFAULTS[name]}
        return _ROW_TO_TEXT(kept)

    @classmethod
    def load(cls, row_id: int, text: str) -> StoredPull | None:
        """Return the row of a text of :meth:`dump`. None if it is malformed.

        Fields of a later version are passed over.
        """
        try:
            raw = json.loads(text)
            known = {name: raw[name] for name in raw.keys() & _PULL_FIELDS}
            return cls(**{"at": 0.0, "request_id": "", "method": "", **known, "row_id": row_id})
        except (ValueError, TypeError, AttributeError):
            return None


_DEFAULTS: Final = asdict(StoredPull(at=0.0, request_id="", method=""))
"""Field -> the value that is not written."""
_PULL_FIELDS: Final = frozenset(_DEFAULTS)
_ROW_TO_TEXT: Final = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodCount:
    """Counters of one period: a minute, ten minutes, or an hour. Sizes are in bytes."""

    start: int
    """Unix time in seconds at which the period begins."""
    upstream: str
    outcome: str
    requests: int
    bytes_sent: int
    bytes_fetched: int
    billable: int
    """Manifests that clients got by ``GET``. An upstream would have billed each of them."""
    billed: int
    """Requests to the upstream that it may have billed."""
    repository: str = ""
    """Empty: not counted by repository, or the request was not served."""
    network: str = ""
    """Network of the client: /24, or /64. Empty: not counted by network."""


@dataclass(frozen=True, slots=True)
class TagDigest:
    """A digest that a tag has named. Times in seconds since the epoch."""

    digest: str
    first_seen: float
    last_seen: float
