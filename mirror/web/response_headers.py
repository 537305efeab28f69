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
_IMMUTABLE: Final = "max-age=31536000, immutable"
"""The lifetime of content by its digest (RFC 8246): one year, in seconds."""


def immutable(pull: RequestRecord) -> str:
    """Return ``Cache-Control`` of content by its digest.

    ``public`` lets a shared cache send it to clients without credentials (RFC 9111, section 3.5).
    """
    return f"{'private' if pull.is_private else 'public'}, {_IMMUTABLE}"


def common_headers(pull: RequestRecord) -> dict[str, str]:
    """Return the header fields that every response has, an error response too."""
    headers = {
        "Docker-Distribution-Api-Version": "registry/2.0",
        "X-Request-Id": pull.request_id,
        "Server": "oci-mirror",
        "Server-Timing": server_timing(pull),
        **SAFE_HEADERS,
    }
    if pull.is_private:
        # An error, too: a cache in front that ignores RFC 9111, section 3.5, would mix answers.
        headers |= {"Cache-Control": "private", "Vary": "Authorization"}
    if pull.ns is not None:
        headers["OCI-Namespace"] = pull.ns
    if pull.warning:
        # Distribution spec, "Warnings": warn-code 299, warn-agent "-".
        text = pull.warning.replace("\\", "").replace('"', "'")[:_MAX_WARNING_CHARS]
        headers["Warning"] = f'299 - "served from the cache: {text}"'
    return headers
