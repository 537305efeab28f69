"""Why the upstream is asked before a tag is served again.

Lives here: the reasons, in words. Must not know: what an upstream answers. Failures of upstreams
are not recorded, so a reason is what the record of the tag and the configuration say.
"""

from __future__ import annotations

from typing import Final

from mirror.config.settings import Upstream

MOVED: Final = "the tag has moved to content that is not in the cache"
NOT_CONFIGURED: Final = "its upstream is not configured"
NOT_CONFIRMED: Final = "not confirmed since the index was lost"


def why_stale(checked: float | None, upstream: Upstream | None, *, is_current: bool) -> str | None:
    """Return why a cached tag is stale. None: the upstream has confirmed it.

    A tag that is older than ``tag_ttl`` is not stale: its next pull asks the upstream, as usual.

    Args:
        checked: When the upstream last confirmed the tag, in seconds since the epoch.
        upstream: Settings of the upstream. None: it is not configured.
        is_current: Whether the digest that the upstream has named last is on disk.
    """
    if not is_current:
        return MOVED
    if upstream is None:
        return NOT_CONFIGURED
    is_asked_always = upstream.pull_policy != "IfNotPresent"
    return NOT_CONFIRMED if checked is None and not is_asked_always else None
