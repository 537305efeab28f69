"""Values as the API writes them.

Lives here: the type of a JSON object, and times in RFC 3339. Must not know: what the values are of.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeAlias, overload

JsonObject: TypeAlias = dict[str, Any]
"""JSON values by key."""


@overload
def timestamp(seconds: float) -> str: ...
@overload
def timestamp(seconds: float | None) -> str | None: ...
def timestamp(seconds: float | None) -> str | None:
    """Return a Unix time as ``2026-01-02T03:04:05Z``. None for None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
