"""Values as the API writes them.

Lives here: the type of a JSON object. Must not know: what the values are of.
"""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""JSON values by key."""
