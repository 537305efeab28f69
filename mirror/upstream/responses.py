"""What an upstream's answer means: headers and statuses as values and typed errors.

Must not know: how the answer was got. A failure never becomes a 404, and what an error body says is
shown to nobody: it may hold secrets, and escapes for somebody's terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

import aiohttp
from aiohttp import hdrs

from mirror.observability.events import Kind
from mirror.oci.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    FailureScope,
    ManifestUnknown,
    MirrorError,
    NameUnknown,
    Unauthorized,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest, Tag
from mirror.upstream.transport import read_body

_ERROR_LIMIT: Final = 8 * 1024
_TAGS_LIMIT: Final = 100_000
_UNABLE: Final = frozenset({502, 503, 504})
# ratelimit-remaining: 76;w=21600
_RATE: Final = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9}))?\s*", re.ASCII)


def digest_of(headers: Mapping[str, str]) -> Digest | None:
    """``Docker-Content-Digest``. Raises ``UpstreamProtocolError`` for what is no digest."""
    raw = headers.get("Docker-Content-Digest")
    if raw is None:
        return None
    try:
        return Digest.parse(raw)
    except DigestInvalid as error:
        raise UpstreamProtocolError("a digest header that is no digest") from error


def length_of(headers: Mapping[str, str]) -> int | None:
    """``Content-Length`` in bytes, where the body is not chunked."""
    raw = headers.get(hdrs.CONTENT_LENGTH, "")
    chunked = "chunked" in headers.get(hdrs.TRANSFER_ENCODING, "").lower()
    return int(raw) if re.fullmatch(r"[0-9]{1,18}", raw) and not chunked else None


def tag_names(body: bytes) -> list[str]:
    """The tags of a ``tags/list``; what is no tag is left out. Raises ``UpstreamProtocolError``."""
    try:
        names = json.loads(body).get("tags") or []
    except (ValueError, AttributeError, RecursionError) as error:
        raise UpstreamProtocolError("a tag list that is none") from error
    if not isinstance(names, list):
        raise UpstreamProtocolError("a tag list that is none")
    found = []
    for name in names[:_TAGS_LIMIT]:
        try:
            found.append(Tag.parse(name).name)
        except (MirrorError, TypeError):
            continue
    return found


def rate_limit_of(headers: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(limit, remaining, window in seconds) of Docker Hub's headers; None: not metered."""
    remaining = _RATE.fullmatch(headers.get("ratelimit-remaining", ""))
    if remaining is None:
        return None
    limit = _RATE.fullmatch(headers.get("ratelimit-limit", ""))
    window = int(remaining[2] or 0)
    return int(limit[1]) if limit is not None else 0, int(remaining[1]), window


async def error_of(
    response: aiohttp.ClientResponse, kind: Kind, redirected: bool, pause: float | None
) -> MirrorError:
    """The error that a status is."""
    match response.status:
        case 404:
            return await _not_found(response, kind, redirected)
        case 401 | 403 if redirected:
            # Such as a signed URL that has expired: the next try has it signed anew.
            return UpstreamUnavailable(
                "the storage behind the registry refuses", scope=FailureScope.REQUEST
            )
        case 401:
            return Unauthorized("the upstream wants credentials, or refuses those it got")
        case 403:
            return Denied("the upstream denies access")
        case 429:
            return UpstreamRateLimited("the upstream limits the rate", retry_after=pause)
        case status if status >= 500 or status == 408:
            unable = status in _UNABLE and not redirected
            scope = FailureScope.PATH if unable else FailureScope.REQUEST
            return UpstreamUnavailable(f"the upstream answers {status}", scope=scope)
        case status:
            return UpstreamProtocolError(f"the upstream answers {status}")


async def _not_found(response: aiohttp.ClientResponse, kind: Kind, redirected: bool) -> MirrorError:
    code = ""
    try:
        body = await read_body(response, _ERROR_LIMIT)
        code = str(json.loads(body)["errors"][0]["code"])
    except (UpstreamError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        code = ""  # a HEAD has no body, and Harbor's says UNKNOWN
    if kind is Kind.BLOB and redirected and not code:
        # The registry has said that it is there; only another registry can say that it is not.
        return UpstreamUnavailable(
            "the storage behind the registry does not have it", scope=FailureScope.REQUEST
        )
    if code == "NAME_UNKNOWN" or kind is Kind.TAGS:
        return NameUnknown("the upstream does not know this repository")
    if kind is Kind.BLOB:
        return BlobUnknown("the upstream does not have this blob")
    return ManifestUnknown("the upstream does not have this manifest")
