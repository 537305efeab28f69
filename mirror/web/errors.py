"""The one table that turns a domain error into an HTTP answer.

Lives here: status, body and headers of an error. Must not know: how it came about, aiohttp.

The policy is what makes clients do the right thing next:

- 4xx is an answer about the request or the content. A client falls back to its next host on any.
- 502 and 504 are the upstream's fault, 503 is ours (draining, disk). An upstream's fault is never
  a 404, which clients would believe, and never a 500. 502 rather than 503 for an upstream that
  cannot be asked: containerd tries 500, 503 and 504 of its last host again, 502 never.
- 403, not 401, when the upstream wants credentials that we lack. A 401 must carry a challenge (RFC
  9110, section 15.5.2), and a challenge of ours would make clients send us credentials that are
  not for us: the CRI sends pull secrets to any host that challenges, Podman remembers it from the
  ping. The code stays ``UNAUTHORIZED``, so a person reads why; the code is what clients show.
- 429 carries ``Retry-After`` only where the upstream gave one: clients obey an invented one.
"""

from __future__ import annotations

import json
import math
from typing import Final

from mirror.oci.errors import (
    ContentLost,
    Denied,
    Draining,
    InvalidRequest,
    MethodUnsupported,
    MirrorError,
    NotFound,
    RangeNotSatisfiable,
    StorageUnavailable,
    Unauthorized,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
)
from mirror.oci.headers import unsatisfied_range
from mirror.oci.text import printable
from mirror.web.paths import METHODS

_STATUS: Final[dict[type, int]] = {
    InvalidRequest: 400,
    Denied: 403,
    Unauthorized: 403,
    NotFound: 404,
    MethodUnsupported: 405,
    RangeNotSatisfiable: 416,
    UpstreamRateLimited: 429,
    UpstreamError: 502,
    UpstreamTimeout: 504,
    Draining: 503,
    ContentLost: 503,
    StorageUnavailable: 503,
}

_RETRY_LIMIT: Final = 86400
"""Seconds; what an upstream wants beyond it is not worth a client's belief."""


def status_of(error: BaseException) -> int:
    """The HTTP status: that of the nearest class in the table; 500 for a fault in our own code."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def code_of(error: BaseException) -> str:
    """The OCI error code."""
    return error.code if isinstance(error, MirrorError) else MirrorError.code


def body_of(error: BaseException) -> bytes:
    """The error as the specification writes it ("Error Codes"); what is not ours says nothing."""
    if not isinstance(error, MirrorError):
        entry = {"code": MirrorError.code, "message": "internal error"}
    else:
        entry = {"code": error.code, "message": printable(error.message)}
        if error.detail is not None:
            entry["detail"] = printable(error.detail)
    return json.dumps({"errors": [entry]}, separators=(",", ":")).encode()


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers that this error's answer has to have, ``Content-Type`` included."""
    headers = {"Content-Type": "application/json"}
    if isinstance(error, MethodUnsupported):
        headers["Allow"] = ", ".join(METHODS)
    elif isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = unsatisfied_range(error.size)
    elif isinstance(error, UpstreamRateLimited) and (seconds := _seconds(error.retry_after)):
        headers["Retry-After"] = str(seconds)
    return headers


def _seconds(retry_after: float | None) -> int:
    """Whole seconds, 0 for what is not worth a header."""
    if retry_after is None or not 0 < retry_after < math.inf:
        return 0
    return math.ceil(min(retry_after, _RETRY_LIMIT))
