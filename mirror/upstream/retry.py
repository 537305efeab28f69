"""When to try again: pure, with time passed in.

Lives here: backoff with full jitter, and what ``Retry-After`` says (RFC 9110, section 10.2.3).
"""

from __future__ import annotations

import email.utils
import re
from typing import Final

ATTEMPTS: Final = 3
"""Exchanges for one question at most, over all endpoints."""
BUDGET: Final = 20.0
"""Seconds after which no further exchange is begun: clients have other hosts to ask."""
RETRYABLE: Final = frozenset({500, 502, 503, 504})
_CEILING: Final = 2.0
_DELAY_LIMIT: Final = 86400.0


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
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    return min(max(0.0, at - now), _DELAY_LIMIT)
