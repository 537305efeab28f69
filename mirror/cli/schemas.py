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
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}

_TIME_OR_NULL: Final = {"type": ["string", "null"], "format": "date-time"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_SECONDS: Final = {"type": "number", "minimum": 0}
_TEXTS: Final = {"type": "array", "items": _TEXT}

SCHEMAS: Final[Mapping[str, Schema]] = {
    "forget": _row(
        image=_TEXT,
        tags=_TEXTS,
        manifests=_COUNT,
        blobs=_COUNT,
        refusals=_COUNT,
        error=_TEXT_OR_NULL,
    ),
    "refresh": _row(
        image=_TEXT,
        state={"enum": ["moved", "unchanged", "new", "failed"]},
        digest=_TEXT_OR_NULL,
        previous=_TEXT_OR_NULL,
        previous_confirmed=_TIME_OR_NULL,
        error=_TEXT_OR_NULL,
    ),
    "warm": _row(
        image=_TEXT,
        digest=_TEXT_OR_NULL,
        state={"enum": ["complete", "failed"]},
        error=_TEXT_OR_NULL,
        contents=_COUNT,
        bytes=_COUNT,
        added=_COUNT,
        added_bytes=_COUNT,
        referrers=_COUNT,
        missing_platforms=_TEXTS,
        seconds=_SECONDS,
    ),
}
"""Command -> the schema of one line of its ``--json``."""
