"""Every error that one room raises for another, as one tree.

Lives here: what went wrong, in the words of the domain, with the OCI error
code that a client will be shown. Must not know: HTTP status codes of ours
(``web/errors.py`` holds the one table), aiohttp, files.

Codes are those of the OCI Distribution specification ("Error Codes") and of
Distribution's ``errcode`` for the two the specification leaves out
(``UNKNOWN``, ``UNAVAILABLE``).
"""

from __future__ import annotations

from enum import Enum, auto


class MirrorError(Exception):
    """The root. ``code`` is the OCI code, ``str(error)`` is safe to show to a client."""

    code = "UNKNOWN"

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail


# --- what a client asked for cannot be understood -------------------------------------------


class InvalidRequest(MirrorError):
    """The request itself is malformed; answered with 400 and no look at the store."""

    code = "UNSUPPORTED"


class NameInvalid(InvalidRequest):
    """A repository name outside the grammar (spec, "Pulling manifests", ``<name>``)."""

    code = "NAME_INVALID"


class TagInvalid(InvalidRequest):
    """A tag outside the grammar (spec, "Pulling manifests", ``<reference>``)."""

    code = "TAG_INVALID"


class DigestInvalid(InvalidRequest):
    """A digest outside the grammar, or of an algorithm that is not registered."""

    code = "DIGEST_INVALID"


class PaginationInvalid(InvalidRequest):
    """``n`` or ``last`` of a list request is not what the specification allows."""

    code = "PAGINATION_NUMBER_INVALID"


class MethodUnsupported(MirrorError):
    """A method or an operation that a pull-through mirror does not offer."""

    code = "UNSUPPORTED"


class RangeNotSatisfiable(MirrorError):
    """RFC 9110 section 15.5.17; ``size`` is the length that the range missed."""

    code = "SIZE_INVALID"

    def __init__(self, size: int) -> None:
        super().__init__(f"range not satisfiable for {size} bytes")
        self.size = size


# --- what was asked for is not here, or not for this client ---------------------------------


class NotFound(MirrorError):
    """The content is not known: the upstream said so, or the policy forbids to ask it."""


class NameUnknown(NotFound):
    """A repository, or an upstream, that does not exist for us."""

    code = "NAME_UNKNOWN"


class ManifestUnknown(NotFound):
    """No such tag or manifest in this repository."""

    code = "MANIFEST_UNKNOWN"


class BlobUnknown(NotFound):
    """No such blob in this repository."""

    code = "BLOB_UNKNOWN"


class Denied(MirrorError):
    """The upstream (403), or a rule of ours, refuses this repository."""

    code = "DENIED"


class Unauthorized(MirrorError):
    """The upstream wants credentials that we do not have, or refused ours (401)."""

    code = "UNAUTHORIZED"


# --- the upstream cannot be asked, or answers nonsense --------------------------------------


class UpstreamError(MirrorError):
    """The upstream failed. Never an answer about the content, so never a 404 of ours."""

    code = "UNAVAILABLE"
    endpoint = ""
    """The endpoint that failed, where it is of one."""


class FailureScope(Enum):
    """How far a failure reaches: what it says of other questions to the same endpoint."""

    NONE = auto()
    """Nothing: it is not the endpoint's, or the endpoint was not asked."""
    REQUEST = auto()
    """The endpoint works: it has answered, and this request failed."""
    PATH = auto()
    """It had no answer for this path, and may have one for others."""
    ENDPOINT = auto()
    """It cannot be asked at all, or not in time."""


class UpstreamUnavailable(UpstreamError):
    """It cannot be asked now: DNS, connect, TLS, 5xx, an open circuit, a failing token service."""

    def __init__(self, message: str, *, scope: FailureScope = FailureScope.NONE) -> None:
        super().__init__(message)
        self.scope = scope


class AllCircuitsOpen(UpstreamUnavailable):
    """No endpoint was asked: all have failed too often, and are tried again after a while."""


class UpstreamTimeout(UpstreamUnavailable):
    """A time limit ran out: connect, response headers, silence in mid-body, the rate floor."""


class UpstreamRateLimited(UpstreamUnavailable):
    """429, or a budget that is used up. ``retry_after`` is in seconds, where one was given."""

    code = "TOOMANYREQUESTS"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamProtocolError(UpstreamError):
    """It answered, but not as the specification says (sizes, types, lengths, headers)."""


class OutboundRefused(UpstreamError):
    """The outbound guard refused a URL that the upstream named (realm, redirect, next page)."""


class DigestMismatch(UpstreamError):
    """Bytes that do not hash to their name. What was received has been dropped."""


class ManifestInvalid(UpstreamError):
    """A manifest that is too large, no JSON object, or is confused about its own type."""

    code = "MANIFEST_INVALID"


# --- ourselves ------------------------------------------------------------------------------


class Draining(MirrorError):
    """The server is shutting down and takes no new work."""

    code = "UNAVAILABLE"


class ContentLost(MirrorError):
    """Content that was there went away under a reader (cut, unlinked, an I/O error)."""

    code = "UNAVAILABLE"


class StorageUnavailable(MirrorError):
    """The disk refused (full, read-only, I/O error, out of descriptors). Never corruption."""

    code = "UNAVAILABLE"


class ConfigError(Exception):
    """A setting that cannot be used: one line that names the key and the value."""
