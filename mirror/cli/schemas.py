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
_TEXTS: Final = {"type": "array", "items": _TEXT}

_RFC3339: Final = {"type": "string", "format": "date-time"}
_MARK: Final = _row(image=_TEXT, digest=_TEXT, since=_RFC3339)
_BLOCK: Final = _row(target=_TEXT, reason=_TEXT, since=_RFC3339, digests=_TEXTS)

SCHEMAS: Final[Mapping[str, Schema]] = {
    "block": _BLOCK,
    "freeze": _MARK,
    "in-use": _row(
        source=_TEXT,
        digests=_COUNT,
        cached=_COUNT,
        unknown=_TEXTS,
        until=_RFC3339,
    ),
    "pin": _MARK,
    "rollback": _row(image=_TEXT, digest=_TEXT, since=_RFC3339, missing=_COUNT),
    "unblock": _BLOCK,
    "unfreeze": _MARK,
    "unpin": _MARK,
}
"""Command -> the schema of one line of its ``--json``."""
