"""Refusals of an upstream: a status code becomes a typed error.

Lives here: the meaning of status codes, and of the codes in error bodies. Must not know: which
endpoint is next, whether the request is repeated.

Two rules. A failure never becomes a 404. The text of an error body is never shown: it may
hold secrets, or escape sequences for a terminal.
"""

from __future__ import annotations

import json
from typing import Final

from mirror.observability.events import Kind
from mirror.oci import errors
from mirror.upstream.transport import Response, read_body, retry_after_of

_MAX_ERROR_BODY_BYTES: Final = 8 * 1024
"""Bytes of an error body that are read. OCI error bodies have a few hundred."""
_UNABLE_TO_RESPOND: Final = frozenset({502, 503, 504})
_REFERRERS_UNSUPPORTED: Final = frozenset({301, 302, 303, 307, 308, 400, 405, 406, 501})
"""Statuses of registries that do not have the referrers API, beside 404."""


async def error_of(
    response: Response, kind: Kind, missing: str = "the upstream does not have this content"
) -> errors.MirrorError:
    """Translate the status of a response that was not accepted into an error.

    ``kind``: the requested kind of object. It selects the error class of a 404, whose text is
    ``missing``. A 401 or 403 from
    another origin (the storage that a redirect led to) becomes ``StorageRefused``, because the
    registry itself did not refuse.
    """
    host = response.http.url.origin()
    match response.http.status:
        case 404:
            return await _not_found(response, kind, missing)
        case status if kind is Kind.REFERRERS and status in _REFERRERS_UNSUPPORTED:
            return errors.ManifestUnknown("the upstream does not list referrers")
        case 401 | 403 if response.is_cross_origin:
            # For example an expired signed URL: the next attempt gets a new one.
            return errors.StorageRefused(
                f"{host}: the storage behind the registry refuses access",
                scope=errors.FailureScope.REQUEST,
            )
        case 401:
            return errors.Unauthorized(f"{host} requires credentials, or refused ours")
        case 403:
            return errors.Denied(f"{host} denies access")
        case 429:
            return errors.UpstreamRateLimited(
                f"{host} limits the rate", retry_after=retry_after_of(response.http)
            )
        case status if status >= 500 or status == 408:
            is_unable = status in _UNABLE_TO_RESPOND and not response.is_cross_origin
            scope = errors.FailureScope.SAME_KIND if is_unable else errors.FailureScope.REQUEST
            return errors.UpstreamUnavailable(f"{host} responded with {status}", scope=scope)
        case status:
            return errors.UpstreamProtocolError(f"{host} responded with {status}")


async def _not_found(response: Response, kind: Kind, missing: str) -> errors.MirrorError:
    """Translate a 404 by the code of its body (OCI Distribution specification, "Error Codes")."""
    try:
        body = await read_body(response, _MAX_ERROR_BODY_BYTES)
        code = str(json.loads(body)["errors"][0]["code"])
    except (errors.UpstreamError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        code = ""  # A response to HEAD has no body. Harbor's code is UNKNOWN.
    if kind is Kind.BLOB and response.is_cross_origin and not code:
        # The registry has the blob: it redirected to it. Only a registry can deny that.
        return errors.UpstreamUnavailable(
            f"{response.http.url.origin()}: the storage behind the registry does not have the blob",
            scope=errors.FailureScope.REQUEST,
        )
    if code == "NAME_UNKNOWN" or kind is Kind.TAGS:
        return errors.NameUnknown(missing)
    return errors.BlobUnknown(missing) if kind is Kind.BLOB else errors.ManifestUnknown(missing)
