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

SCHEMAS: Final[Mapping[str, RowSchema]] = {
    "doctor": _row(
        check=_TEXT,
        subject=_TEXT,
        status={"enum": ["ok", "warning", "problem"]},
        message=_TEXT,
        remedy=_TEXT_OR_NULL,
    ),
}
"""Command -> the schema of one line of its ``--json``."""
