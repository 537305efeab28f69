"""The JSON Schemas of the lines that ``--json`` prints, by command.

Lives here: one table. ``docs/commands.md`` documents each field, and tests hold both the output and
the document to this table. Must not know: how a row is made.

Times are RFC 3339 text in UTC, sizes bytes, durations seconds. A value that is not known is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

Schema: TypeAlias = Mapping[str, Any]
"""A JSON Schema (draft 2020-12)."""


def _row(**fields: Any) -> Schema:
    """Return the schema of an object that has exactly these fields."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


_TEXT: Final = {"type": "string"}

_COUNT: Final = {"type": "integer", "minimum": 0}
_COUNT_OR_NULL: Final = {"type": ["integer", "null"], "minimum": 0}
_SECONDS: Final = {"type": "number", "minimum": 0}
_SECONDS_OR_NULL: Final = {"type": ["number", "null"]}
_RATIO_OR_NULL: Final = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
_YES_NO: Final = {"type": "boolean"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}
_TEXTS: Final = {"type": "array", "items": _TEXT}

_RFC3339: Final = {"type": "string", "format": "date-time"}
_RFC3339_OR_NULL: Final = {"type": ["string", "null"], "format": "date-time"}
_MARK: Final = _row(image=_TEXT, digest=_TEXT, since=_RFC3339)
_BLOCK: Final = _row(target=_TEXT, reason=_TEXT, since=_RFC3339, digests=_TEXTS)

SCHEMAS: Final[Mapping[str, Schema]] = {
    "block": _BLOCK,
    "explain": _row(
        time=_RFC3339,
        name=_TEXT,
        sentences={"type": "array", "items": _TEXT},
        outcome=_TEXT,
        status=_COUNT,
        method=_TEXT,
        kind=_TEXT,
        upstream=_TEXT_OR_NULL,
        repository=_TEXT_OR_NULL,
        reference=_TEXT_OR_NULL,
        digest=_TEXT_OR_NULL,
        client=_TEXT_OR_NULL,
        user_agent=_TEXT_OR_NULL,
        request_id=_TEXT,
        error=_TEXT_OR_NULL,
        warning=_TEXT_OR_NULL,
        bytes_sent=_COUNT,
        is_complete=_YES_NO,
        size=_COUNT_OR_NULL,
        duration=_SECONDS,
        first_byte=_SECONDS_OR_NULL,
        stages={"type": "object", "additionalProperties": _SECONDS},
        source_wait=_SECONDS,
        fetched_bytes=_COUNT_OR_NULL,
        fetched_seconds=_SECONDS_OR_NULL,
        connections=_COUNT,
        late_parts=_COUNT,
        joined_at_byte=_COUNT_OR_NULL,
        aside_bytes=_COUNT,
        tag_age=_SECONDS_OR_NULL,
        tag_ttl=_SECONDS_OR_NULL,
        previous_digest=_TEXT_OR_NULL,
    ),
    "freeze": _MARK,
    "history": _row(
        image=_TEXT,
        digest=_TEXT,
        first_seen=_RFC3339_OR_NULL,
        last_seen=_RFC3339_OR_NULL,
        is_current=_YES_NO,
        is_here=_YES_NO,
    ),
    "in-use": _row(
        source=_TEXT,
        digests=_COUNT,
        cached=_COUNT,
        unknown=_TEXTS,
        until=_RFC3339,
    ),
    "pin": _MARK,
    "rollback": _row(image=_TEXT, digest=_TEXT, since=_RFC3339, missing=_COUNT),
    "savings": _row(
        kind={"enum": ["upstream", "repository", "network", "total", "disk"]},
        name=_TEXT,
        since=_RFC3339_OR_NULL,
        requests=_COUNT,
        hit_ratio=_RATIO_OR_NULL,
        bytes_sent=_COUNT_OR_NULL,
        bytes_fetched=_COUNT,
        bytes_saved={"type": ["integer", "null"]},
        billable=_COUNT_OR_NULL,
        billed=_COUNT_OR_NULL,
        billable_saved={"type": ["integer", "null"]},
        max_size=_COUNT_OR_NULL,
    ),
    "unblock": _BLOCK,
    "unfreeze": _MARK,
    "unpin": _MARK,
}
"""Command -> the schema of one line of its ``--json``."""
