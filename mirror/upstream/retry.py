"""When to try again: pure, with time passed in.

Lives here: which failures may pass, backoff with full jitter, and what ``Retry-After`` says
(RFC 9110, section 10.2.3). Only ``GET`` and ``HEAD`` are ever tried again, and only before a byte
of a body is out.
"""

from __future__ import annotations

import email.utils
import re
from datetime import UTC
from typing import Final

from mirror.oci.errors import MirrorError, UpstreamRateLimited, UpstreamTimeout, UpstreamUnavailable

ATTEMPTS: Final = 3
"""Exchanges for one question at most, over all endpoints."""
BUDGET: Final = 20.0
"""Seconds after which none but a second endpoint is tried: clients have others to ask."""
_CEILING: Final = 2.0
_DELAY_LIMIT: Final = 86400.0


def may_pass(error: MirrorError | None) -> bool:
    """Whether the same endpoints may be asked again at once.

    What broke, or was answered with a 5xx, may pass; what is slow, asks for a pause, or is wrong
    may not.
    """
    return isinstance(error, UpstreamUnavailable) and not isinstance(
        error, UpstreamRateLimited | UpstreamTimeout
    )


def backoff(attempt: int, random: float) -> float:
    """Seconds before ``attempt`` (1 is the first retry); ``random`` is in [0, 1).

    Full jitter: those whom one failure stopped together do not come back together.
    """
    return float(min(_CEILING, 0.1 * 2 ** min(attempt, 16)) * random)


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds to wait, at most a day; None if there is no header or it is nonsense.

    ``now`` is in seconds since the epoch, for the form with a date.
    """
    if header is None:
        return None
    text = header.strip()
    if re.fullmatch(r"[0-9]{1,20}", text):
        return min(float(text), _DELAY_LIMIT)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    # "all HTTP-date timestamps MUST be in UTC": also those that do not say so
    at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    return min(max(0.0, at - now), _DELAY_LIMIT)
