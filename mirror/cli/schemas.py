"""The JSON Schemas of the lines that ``--json`` prints, by command.

Lives here: one table. ``docs/commands.md`` documents each field, and tests hold both the output and
the document to this table. Must not know: how a row is made.

Times are RFC 3339 text in UTC, sizes bytes, durations seconds. A value that is not known is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

RowSchema: TypeAlias = Mapping[str, Any]
"""A JSON RowSchema (draft 2020-12)."""


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
_TEXTS: Final = {"type": "array", "items": _TEXT}
_CONTENT_TYPE: Final = {"enum": ["index", "manifest", "config", "layer", "referrer", "other"]}
_FILE_TYPE: Final = {
    "enum": [*_CONTENT_TYPE["enum"], "fetching", "unfinished", "damaged"],
}
_STATE: Final = {"enum": ["complete", "partial", "stale", "pinned", "frozen", "leased", "blocked"]}

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
_NEXT_EVICTION: Final = _row(
    kind={"const": "eviction"},
    digest=_DIGEST_TEXT,
    type=_FILE_TYPE,
    size=_NUMBER_OF,
    last_used=_TIME_OR_NULL,
    why=_TEXT,
    images=_TEXTS,
)

SCHEMAS: Final[Mapping[str, RowSchema]] = {
    "doctor": _row(
        check=_TEXT,
        subject=_TEXT,
        status={"enum": ["ok", "warning", "problem"]},
        message=_TEXT,
        remedy=_TEXT_OR_NULL,
    ),
    "du": {"oneOf": [_TYPE_USAGE, _GROUP_USAGE, _NEXT_EVICTION]},
    "ls": _row(
        name=_TEXT,
        kind={"enum": ["image", "referrer"]},
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
        checked=_TIME_OR_NULL,
        state={"type": "array", "items": _STATE, "minItems": 1},
        missing_parts=_NUMBER_OF,
        missing_bytes=_NUMBER_OF,
        stale_why=_TEXT_OR_NULL,
        blocked_why=_TEXT_OR_NULL,
        subject=_DIGEST_OR_NULL,
        accept=_TEXT_OR_NULL,
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
        is_here={"type": "boolean"},
        name=_TEXT_OR_NULL,
        shared_with=_TEXTS,
    ),
}
"""Command -> the schema of one line of its ``--json``."""
