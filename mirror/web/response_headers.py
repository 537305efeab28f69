"""The header fields that do not depend on the content of a response.

Lives here: the fields that every response has, and which caches may store it. Must not know: how a
response is sent, rules.
"""

from __future__ import annotations

from typing import Final

from mirror.observability.events import RequestRecord
from mirror.observability.logs import server_timing
from mirror.web.errors import SAFE_HEADERS

_MAX_WARNING_CHARS: Final = 1024
"""Characters of the ``Warning`` header field: clients limit the size of a response's header."""
CONTENT_CACHE_CONTROL: Final = {
    is_private: f"{'private' if is_private else 'public'}, max-age=31536000, immutable"
    for is_private in (False, True)
}
"""``Cache-Control`` of content by its digest: for one year (RFC 8246).

With ``public``, a shared cache sends it to clients without credentials (RFC 9111, section 3.5)."""


def common_headers(record: RequestRecord) -> dict[str, str]:
    """Return the header fields that every response has, an error response too."""
    headers = {
        "Docker-Distribution-Api-Version": "registry/2.0",
        "X-Request-Id": record.request_id,
        "Server": "oci-mirror",
        "Server-Timing": server_timing(record),
        **SAFE_HEADERS,
    }
    if record.is_private:
        # An error, too: a cache in front that ignores RFC 9111, section 3.5, would mix answers.
        headers |= {"Cache-Control": "private", "Vary": "Authorization"}
    if record.ns is not None:
        headers["OCI-Namespace"] = record.ns
    if record.warning:
        # Distribution spec, "Warnings": warn-code 299, warn-agent "-".
        text = record.warning.replace("\\", "").replace('"', "'")[:_MAX_WARNING_CHARS]
        headers["Warning"] = f'299 - "served from the cache: {text}"'
    return headers
