"""Render a domain error as an HTTP response: status, OCI error body, header fields.

Lives here: the only table from errors to statuses. Must not know: why an error was raised, aiohttp.

The statuses are chosen by what clients do next:

- 4xx concerns the request or the content. A client tries its next host after any of them.
- 502 and 504 are failures of the upstream, 503 is a failure of this server (draining, disk). A
  failure of the upstream is never sent as 404, because clients would believe it, and never as 500.
- An upstream that is unavailable is 502, not 503: containerd repeats 500, 503 and 504 at its last
  host, and never 502.
- 409, not 403, for a tag that cannot be moved: no other user may do it either.
- 401 is sent at the push listener only, with a challenge. The mirror's own listener sends 403 to a
  client that may not read a repository, whether it has logged in or not.
- 403, not 401, if the upstream requires credentials that this server does not have. A 401 must
  carry a challenge (RFC 9110, section 15.5.2). A challenge would make clients send us credentials
  that are meant for the upstream: the CRI sends pull secrets to every host that challenges, and
  Podman remembers the challenge of ``/v2/``. The error code stays ``UNAUTHORIZED``, because clients
  show the code to their user.
- 429 carries the ``Retry-After`` (RFC 9110, section 10.2.3) of the upstream, and none if it sent
  none: clients obey an invented value, too. Refusals of our own (draining, too many connections)
  name one second: another server takes the request, or a connection ends. After failed logins it is
  the time until the next one.
"""

from __future__ import annotations

import json
import math
from typing import Final

from mirror.oci.errors import (
    MAX_RETRY_AFTER_S,
    ContentLost,
    Denied,
    Draining,
    EncodingUnsupported,
    InvalidRequest,
    LoginRequired,
    MethodUnsupported,
    MirrorError,
    NamesDamaged,
    NotFound,
    RangeNotSatisfiable,
    StorageUnavailable,
    TagImmutable,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    UploadOutOfOrder,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
)
from mirror.oci.headers import unsatisfied_range
from mirror.oci.text import printable

_STATUS: Final[dict[type, int]] = {
    MirrorError: 500,
    InvalidRequest: 400,
    LoginRequired: 401,
    Denied: 403,
    TagImmutable: 409,
    Unauthorized: 403,
    NotFound: 404,
    MethodUnsupported: 405,
    TooLarge: 413,
    EncodingUnsupported: 415,
    RangeNotSatisfiable: 416,
    UploadOutOfOrder: 416,
    UpstreamRateLimited: 429,
    TooManyRequests: 429,
    UpstreamError: 502,
    UpstreamTimeout: 504,
    Draining: 503,
    ContentLost: 503,
    StorageUnavailable: 503,
    NamesDamaged: 503,
}

_STORAGE_RETRY_S: Final = 10
"""Seconds until a client should try again if the disk is full or too few descriptors are free. An
eviction takes seconds."""

SAFE_HEADERS: Final = {
    # Content is the upstream's. A browser must not run it as a page of this server.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox",
}
"""Header fields that every response has."""


def status_of(error: MirrorError) -> int:
    """Return the HTTP status of the nearest base class in the table."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def body_of(error: MirrorError) -> bytes:
    """Return the JSON error body (distribution spec, "Error Codes"), with printable text only."""
    entry = {"code": error.code, "message": printable(error.message)}
    if error.detail is not None:
        entry["detail"] = printable(error.detail)
    return json.dumps({"errors": [entry]}, separators=(",", ":")).encode()


def error_headers(error: MirrorError) -> dict[str, str]:
    """Return the header fields that the response to ``error`` must have, with ``Content-Type``."""
    headers = {"Content-Type": "application/json"}
    if isinstance(error, MethodUnsupported):
        headers["Allow"] = ", ".join(error.allowed)
    elif isinstance(error, LoginRequired):
        headers["WWW-Authenticate"] = error.challenge
    elif isinstance(error, EncodingUnsupported):
        headers["Accept-Encoding"] = "identity"  # RFC 9110, section 12.5.3.
    elif isinstance(error, UploadOutOfOrder):
        headers["Location"] = error.location
        headers["Range"] = f"0-{max(0, error.offset - 1)}"
    elif isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = unsatisfied_range(error.size)
    elif isinstance(error, Draining):
        headers["Retry-After"] = "1"
    elif type(error) is StorageUnavailable:  # Its subclasses need an operator.
        headers["Retry-After"] = str(_STORAGE_RETRY_S)
    elif isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(_whole_seconds(error.retry_after))
    elif isinstance(error, UpstreamRateLimited) and (seconds := _whole_seconds(error.retry_after)):
        headers["Retry-After"] = str(seconds)
    return headers


def _whole_seconds(retry_after: float | None) -> int:
    """Round up, and limit. Returns 0 if the field has to be left out."""
    if retry_after is None or not 0 < retry_after < math.inf:
        return 0
    return math.ceil(min(retry_after, MAX_RETRY_AFTER_S))
