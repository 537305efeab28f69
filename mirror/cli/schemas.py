"""The JSON Schemas of the lines that ``--json`` prints, by command.

Lives here: one table. ``docs/commands.md`` documents each field, and tests hold both the output and
the document to this table. Must not know: how a row is made.

Times are RFC 3339 text in UTC, sizes bytes, durations seconds. A value that is not known is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

RowSchema: TypeAlias = Mapping[str, Any]
"""A JSON Schema (draft 2020-12)."""


def _row(**fields: Any) -> RowSchema:
    """Return the schema of an object that has exactly these fields."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


_TEXT: Final = {"type": "string"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}

_NUMBER_OF: Final = {"type": "integer", "minimum": 0}
_DIGEST_TEXT: Final = {"type": "string", "pattern": "^sha(256:[0-9a-f]{64}|512:[0-9a-f]{128})$"}
_DIGEST_OR_NULL: Final = {"anyOf": [_DIGEST_TEXT, {"type": "null"}]}
_TIME_OR_NULL: Final = {
    "type": ["string", "null"],
    "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$",
}
_COUNT_OR_NULL: Final = {"type": ["integer", "null"], "minimum": 0}
_SECONDS_OR_NULL: Final = {"type": ["number", "null"]}
_RATIO_OR_NULL: Final = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
_YES_NO: Final = {"type": "boolean"}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_CONTENT_TYPE: Final = {"enum": ["index", "manifest", "config", "layer", "referrer", "other"]}
_FILE_TYPE: Final = {
    "enum": [*_CONTENT_TYPE["enum"], "fetching", "unfinished", "damaged"],
}
_STATE: Final = {
    "enum": [
        *("complete", "partial", "absent", "stale", "hosted", "pinned", "frozen", "leased"),
        "blocked",
    ]
}

_GROUP_USAGE: Final = _row(
    kind={"enum": ["upstream", "repository"]},
    name=_TEXT,
    images=_NUMBER_OF,
    contents=_NUMBER_OF,
    size=_NUMBER_OF,
    shared=_NUMBER_OF,
    unique=_NUMBER_OF,
    last_used=_TIME_OR_NULL,
)
_TYPE_USAGE: Final = _row(
    kind={"const": "type"},
    type=_FILE_TYPE,
    total=_NUMBER_OF,
    active=_NUMBER_OF,
    size=_NUMBER_OF,
    reclaimable=_NUMBER_OF,
)
_TIME_TEXT: Final = {"type": "string", "pattern": _TIME_OR_NULL["pattern"]}
_MARK: Final = _row(image=_TEXT, digest=_DIGEST_TEXT, since=_TIME_TEXT)
_BLOCK: Final = _row(
    target=_TEXT, reason=_TEXT, since=_TIME_TEXT, digests={"type": "array", "items": _DIGEST_TEXT}
)
_SECONDS: Final = {"type": "number", "minimum": 0}
_CLEANED: Final = _row(
    action={"enum": ["removed", "kept"]},
    kind={"enum": ["image", "content", "hosted", "leftover", "quarantine", "response"]},
    name=_TEXT_OR_NULL,
    digest=_DIGEST_OR_NULL,
    bytes=_NUMBER_OF,
    count=_NUMBER_OF,
    why=_TEXT,
)
_NEXT_EVICTION: Final = _row(
    kind={"const": "eviction"},
    digest=_DIGEST_TEXT,
    type=_FILE_TYPE,
    size=_NUMBER_OF,
    last_used=_TIME_OR_NULL,
    why=_TEXT,
    images=_TEXTS,
)

_IMAGE_ROW: Final = _row(
    name=_TEXT,
    kind={"enum": ["image", "platform", "referrer"]},
    upstream=_TEXT,
    repository=_TEXT,
    tag=_TEXT_OR_NULL,
    digest=_DIGEST_TEXT,
    current_digest=_DIGEST_TEXT,
    platforms=_TEXTS,
    missing_platforms=_TEXTS,
    size=_NUMBER_OF,
    unique=_NUMBER_OF,
    last_used=_TIME_OR_NULL,
    confirmed=_TIME_OR_NULL,
    state={"type": "array", "items": _STATE, "minItems": 1},
    missing_parts=_NUMBER_OF,
    missing_bytes=_NUMBER_OF,
    absent_why=_TEXT_OR_NULL,
    stale_why=_TEXT_OR_NULL,
    blocked_why=_TEXT_OR_NULL,
    subject=_DIGEST_OR_NULL,
    accept=_TEXT_OR_NULL,
    pushed=_TIME_OR_NULL,
    pushed_by=_TEXT_OR_NULL,
)
_UPLOAD_ROW: Final = _row(
    kind={"const": "upload"},
    id=_TEXT,
    repository=_TEXT,
    user=_TEXT_OR_NULL,
    size=_NUMBER_OF,
    reserved=_NUMBER_OF,
    started=_TIME_TEXT,
    last_byte=_TIME_TEXT,
    age=_NUMBER_OF,
    idle=_NUMBER_OF,
)
_USER_ROW: Final = _row(
    kind={"const": "user"},
    user=_TEXT,
    last_used=_TIME_TEXT,
    last_push=_TIME_OR_NULL,
    requests=_NUMBER_OF,
)
_HOSTED_USAGE: Final = _row(
    kind={"const": "hosted"},
    contents=_NUMBER_OF,
    bytes=_NUMBER_OF,
    repositories=_NUMBER_OF,
    uploads=_NUMBER_OF,
    reserved=_NUMBER_OF,
    metadata=_NUMBER_OF,
    quota=_NUMBER_OF,
)

_PULL_ROW: Final = _row(
    time=_TIME_OR_NULL,
    name=_TEXT,
    sentences={"type": "array", "items": _TEXT},
    outcome=_TEXT,
    status=_NUMBER_OF,
    method=_TEXT,
    kind=_TEXT,
    upstream=_TEXT_OR_NULL,
    repository=_TEXT_OR_NULL,
    reference=_TEXT_OR_NULL,
    digest=_TEXT_OR_NULL,
    client=_TEXT_OR_NULL,
    user_agent=_TEXT_OR_NULL,
    user=_TEXT_OR_NULL,
    command=_TEXT_OR_NULL,
    request_id=_TEXT,
    error=_TEXT_OR_NULL,
    warning=_TEXT_OR_NULL,
    bytes_sent=_NUMBER_OF,
    is_complete=_YES_NO,
    size=_COUNT_OR_NULL,
    duration=_SECONDS,
    first_byte=_SECONDS_OR_NULL,
    stages={"type": "object", "additionalProperties": _SECONDS},
    source_wait=_SECONDS,
    fetched_bytes=_COUNT_OR_NULL,
    fetched_seconds=_SECONDS_OR_NULL,
    connections=_NUMBER_OF,
    late_parts=_NUMBER_OF,
    joined_at_byte=_COUNT_OR_NULL,
    aside_bytes=_NUMBER_OF,
    tag_age=_SECONDS_OR_NULL,
    tag_ttl=_SECONDS_OR_NULL,
    previous_digest=_TEXT_OR_NULL,
)
_ACCESS_ROW: Final = _row(
    kind={"const": "access"},
    user=_TEXT,
    groups=_TEXTS,
    action={"enum": ["pull", "push", "delete", "admin"]},
    repository=_TEXT,
    is_allowed=_YES_NO,
    rule=_COUNT_OR_NULL,
    why=_TEXT,
)

SCHEMAS: Final[Mapping[str, RowSchema]] = {
    "backup": _row(
        images=_NUMBER_OF,
        contents=_NUMBER_OF,
        bytes=_NUMBER_OF,
        added=_NUMBER_OF,
        added_bytes=_NUMBER_OF,
        missing={"type": "array", "items": _DIGEST_TEXT},
    ),
    "block": _BLOCK,
    "doctor": _row(
        check=_TEXT,
        subject=_TEXT,
        status={"enum": ["ok", "warning", "problem"]},
        message=_TEXT,
        remedy=_TEXT_OR_NULL,
    ),
    "du": {"oneOf": [_TYPE_USAGE, _GROUP_USAGE, _HOSTED_USAGE, _NEXT_EVICTION]},
    "explain": {"oneOf": [_PULL_ROW, _ACCESS_ROW]},
    "forget": _row(
        image=_TEXT,
        tags=_TEXTS,
        manifests=_NUMBER_OF,
        blobs=_NUMBER_OF,
        negatives=_NUMBER_OF,
        error=_TEXT_OR_NULL,
    ),
    "freeze": _MARK,
    "gc": _CLEANED,
    "history": _row(
        image=_TEXT,
        digest=_TEXT,
        first_seen=_TIME_OR_NULL,
        last_seen=_TIME_OR_NULL,
        is_current=_YES_NO,
        here={"enum": ["complete", "partial", "no"]},
    ),
    "in-use": _row(
        source=_TEXT,
        digests=_NUMBER_OF,
        cached=_NUMBER_OF,
        unknown=_TEXTS,
        until=_TIME_TEXT,
    ),
    "ls": {"oneOf": [_IMAGE_ROW, _UPLOAD_ROW, _USER_ROW]},
    "pin": _MARK,
    "prune": _CLEANED,
    "refresh": _row(
        image=_TEXT,
        state={"enum": ["moved", "unchanged", "new", "failed"]},
        digest=_TEXT_OR_NULL,
        previous=_TEXT_OR_NULL,
        previous_confirmed=_TIME_OR_NULL,
        error=_TEXT_OR_NULL,
    ),
    "restore": _row(images=_NUMBER_OF, contents=_NUMBER_OF, bytes=_NUMBER_OF, problems=_TEXTS),
    "rm": _CLEANED,
    "rollback": _row(image=_TEXT, digest=_DIGEST_TEXT, since=_TIME_TEXT, missing=_NUMBER_OF),
    "savings": _row(
        kind={"enum": ["upstream", "repository", "network", "total", "disk"]},
        name=_TEXT,
        since=_TIME_OR_NULL,
        requests=_NUMBER_OF,
        hit_ratio=_RATIO_OR_NULL,
        bytes_sent=_COUNT_OR_NULL,
        bytes_fetched=_NUMBER_OF,
        bytes_saved={"type": ["integer", "null"]},
        billable=_COUNT_OR_NULL,
        billed=_COUNT_OR_NULL,
        billable_saved={"type": ["integer", "null"]},
        max_size=_COUNT_OR_NULL,
        recorded_hit_ratio=_RATIO_OR_NULL,
        is_reliable={"type": ["boolean", "null"]},
    ),
    "show": _row(
        image=_TEXT,
        depth=_NUMBER_OF,
        type=_CONTENT_TYPE,
        digest=_DIGEST_TEXT,
        parent=_DIGEST_OR_NULL,
        media_type=_TEXT_OR_NULL,
        artifact_type=_TEXT_OR_NULL,
        platform=_TEXT_OR_NULL,
        size=_NUMBER_OF,
        is_cached={"type": "boolean"},
        name=_TEXT_OR_NULL,
        shared_with=_TEXTS,
    ),
    "unblock": _BLOCK,
    "unfreeze": _MARK,
    "unpin": _MARK,
    "verify": _row(
        problem={"enum": ["damaged", "unreadable", "lost", "incomplete", "absent"]},
        image=_TEXT_OR_NULL,
        digest=_DIGEST_TEXT,
        bytes=_NUMBER_OF,
        what=_TEXT,
        command=_TEXT_OR_NULL,
        is_repaired=_YES_NO,
        is_hosted=_YES_NO,
    ),
    "warm": _row(
        image=_TEXT,
        digest=_TEXT_OR_NULL,
        state={"enum": ["complete", "failed"]},
        error=_TEXT_OR_NULL,
        contents=_NUMBER_OF,
        bytes=_NUMBER_OF,
        added=_NUMBER_OF,
        added_bytes=_NUMBER_OF,
        referrers=_NUMBER_OF,
        missing_platforms=_TEXTS,
        seconds=_SECONDS,
    ),
}
"""Command -> the schema of one line of its ``--json``."""
