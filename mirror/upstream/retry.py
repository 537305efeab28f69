"""When to send a request again. Pure functions: the caller passes the time.

Lives here: which failures are retried, backoff with full jitter, the value of ``Retry-After``
(RFC 9110, section 10.2.3). Must not know: requests. Only ``GET`` and ``HEAD`` are ever retried, and
only before a byte of the body was passed on.
"""

from __future__ import annotations

import email.utils
import re
from datetime import UTC
from typing import Final, TypeGuard

from mirror.oci.errors import (
    MAX_RETRY_AFTER_S,
    MirrorError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)

MAX_ATTEMPTS_PER_REQUEST: Final = 3
"""Failed attempts of one request, over all endpoints. A refusal (401, 403, 404) is no failure. One
attempt may be several exchanges: a 401 repeats it with credentials. More attempts would multiply
the load of an outage."""
RETRY_BUDGET_S: Final = 20.0
"""Seconds after which no third attempt starts, because a client can use its next mirror by then.
The time never prevents a second attempt at another endpoint."""
_MAX_BACKOFF_S: Final = 2.0
"""Seconds before a retry at most: a client is waiting for it."""


def is_transient(error: MirrorError | None) -> TypeGuard[UpstreamUnavailable]:
    """Return whether the same endpoints may be tried again at once.

    True for broken connections and 5xx. False for timeouts, 429, and malformed responses.
    """
    return isinstance(error, UpstreamUnavailable) and not isinstance(
        error, UpstreamRateLimited | UpstreamTimeout
    )


def backoff_delay(attempts: int, random: float) -> float:
    """Return the seconds to wait before a retry.

    Full jitter: requests that failed together are not sent again together.

    Args:
        attempts: Attempts so far, over all endpoints.
        random: A random number in [0, 1).
    """
    return float(min(_MAX_BACKOFF_S, 0.1 * 2 ** min(attempts, 16)) * random)


def parse_retry_after(header: str | None, now: float) -> float | None:
    """Return the seconds to wait, at most a day. None without a header, or for a malformed one.

    ``Retry-After = HTTP-date / delay-seconds`` (RFC 9110, section 10.2.3).

    Args:
        header: The value of the header.
        now: Seconds since the epoch, to which an ``HTTP-date`` is compared.
    """
    if header is None:
        return None
    text = header.strip()
    if re.fullmatch(r"[0-9]{1,20}", text):
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    # "all HTTP-date timestamps MUST be in UTC" (section 5.6.7): also without a time zone.
    timestamp = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    return min(max(0.0, timestamp - now), MAX_RETRY_AFTER_S)
