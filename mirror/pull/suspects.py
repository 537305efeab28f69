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


class Suspects:
    """The suspected endpoints, by the content of which they sent wrong bytes."""

    def __init__(self) -> None:
        self._by_digest: TTLCache[Digest, dict[str, str]] = TTLCache(
            _MAX_SUSPECTED_DIGESTS, _SUSPECT_TTL_S
        )

    def of(self, digest: Digest) -> dict[str, str]:
        """Return {URL of the endpoint: its upstream} of one content, the latest one last."""
        return self._by_digest.get(digest) or {}

    def add(self, digest: Digest, endpoints: dict[str, str]) -> None:
        """Add endpoints of one content."""
        earlier = self.of(digest)
        others = {url: earlier[url] for url in earlier if url not in endpoints}
        self._by_digest[digest] = {**others, **endpoints}
