"""The endpoints that sent wrong bytes a while ago.

Lives here: how long they are remembered. Must not know: what a suspicion means for a fetch.
"""

from __future__ import annotations

from typing import Final

from cachetools import TTLCache

from mirror.oci.reference import Digest

_SUSPECT_TTL_S: Final = 600.0
"""Seconds for which an endpoint that sent wrong bytes is tried last: longer than clients retry, and
short enough for a repaired endpoint to come back into use."""
_MAX_SUSPECTED_DIGESTS: Final = 1000
"""Digests whose suspected endpoints are kept in memory. Wrong bytes are rare."""


class Suspects(TTLCache[Digest, dict[str, str]]):
    """{URL of the endpoint: its upstream} of all that sent wrong bytes, the latest one last."""

    def __init__(self) -> None:
        super().__init__(_MAX_SUSPECTED_DIGESTS, _SUSPECT_TTL_S)

    def add(self, digest: Digest, endpoints: dict[str, str]) -> None:
        """Add endpoints of one content."""
        earlier = self.get(digest) or {}
        kept = {name: earlier[name] for name in earlier if name not in endpoints}
        self[digest] = {**kept, **endpoints}
