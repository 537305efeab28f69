"""The errors that one package raises for another, as one tree.

Lives here: one class for each kind of failure, with the OCI error code for the client. A docstring
says what happened, who raises it, and the code if the class has one of its own. Must not know: our
HTTP status codes (``web/errors.py`` has the one table), aiohttp, files.

Codes are those of the OCI Distribution specification ("Error Codes"). ``UNKNOWN`` and
``UNAVAILABLE`` are not among them, and come from the ``errcode`` package of Distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

MAX_RETRY_AFTER_S: Final = 86400.0
"""Seconds that a ``Retry-After`` may name, received or sent: one day. Longer ones are mistakes."""


class MirrorError(Exception):
    """The root of the tree.

    ``message`` and ``detail`` go to the client, so they must not hold secrets. ``code`` is the OCI
    error code. The root's own code, ``UNKNOWN``, is for faults in our code.
    """

    code = "UNKNOWN"
    is_without_token = False
    """Whether an endpoint got no request with credentials, since none could be had, for example
    from its token service. No kind of request would get through."""
    endpoint = ""
    """URL of the endpoint that failed or refused; empty if it is not that of one endpoint."""
    next_request_in: float | None = None
    """Seconds until an endpoint that got no request may be asked. It pauses after a 429, or its
    circuit is open: then 0.0, since that may close at any time. None: no endpoint has to wait."""
    for_operator = ""
    """Text that the line of the log has after the message, and no response."""
    is_wait = False
    """Whether no endpoint has failed: some have to wait, and all others refused."""
    others: tuple[MirrorError, ...] = ()
    """The other failures and refusals of the same request, of other endpoints or earlier attempts.
    This error takes precedence over them."""

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail


# --- the request cannot be understood -------------------------------------------------------------


class InvalidRequest(MirrorError):
    """The request is malformed. Raised by ``web`` before it calls ``pull``, and by ``hosted``."""

    code = "UNSUPPORTED"


class NameInvalid(InvalidRequest):
    """A repository name is outside the grammar (Distribution, "Pulling manifests", ``<name>``).

    Raised by :meth:`mirror.oci.reference.Repository.parse`. Code ``NAME_INVALID``.
    """

    code = "NAME_INVALID"


class TagInvalid(InvalidRequest):
    """A tag is outside the grammar (Distribution, "Pulling manifests", ``<reference>``).

    Raised by :meth:`mirror.oci.reference.Tag.parse`. Code ``TAG_INVALID``.
    """

    code = "TAG_INVALID"


class DigestInvalid(InvalidRequest):
    """A digest is outside the grammar, or its algorithm is not registered (descriptor.md).

    Raised by :meth:`mirror.oci.reference.Digest.parse`. Code ``DIGEST_INVALID``.
    """

    code = "DIGEST_INVALID"


class PaginationInvalid(InvalidRequest):
    """``n`` or ``last`` of a list request is not what the specification allows.

    Raised by ``web`` (Distribution, "Listing Tags"). Code ``PAGINATION_NUMBER_INVALID``.
    """

    code = "PAGINATION_NUMBER_INVALID"


class ManifestRefused(InvalidRequest):
    """A manifest that a client pushes is not accepted. The message says what is wrong with it.

    Raised by ``hosted``. Code ``MANIFEST_INVALID``.
    """

    code = "MANIFEST_INVALID"


class PartsUnknown(InvalidRequest):
    """A pushed manifest refers to content that its repository does not have (code-1).

    Raised by ``hosted``. Code ``MANIFEST_BLOB_UNKNOWN``.
    """

    code = "MANIFEST_BLOB_UNKNOWN"


class UploadInvalid(InvalidRequest):
    """An upload was requested, or fed, against the specification.

    Raised by ``hosted`` and ``web``. Code ``BLOB_UPLOAD_INVALID``.
    """

    code = "BLOB_UPLOAD_INVALID"


class SizeInvalid(InvalidRequest):
    """The length of a chunk is not that of its range. Raised by ``web``. Code ``SIZE_INVALID``."""

    code = "SIZE_INVALID"


class TooLarge(MirrorError):
    """The body of a request is larger than is accepted.

    Raised by ``web``, for manifests of more than 4 MiB. Code ``SIZE_INVALID``.
    """

    code = "SIZE_INVALID"


class EncodingUnsupported(MirrorError):
    """The body of a request has a ``Content-Encoding``. Raised by ``web``. Code ``UNSUPPORTED``."""

    code = "UNSUPPORTED"


class UploadOutOfOrder(MirrorError):
    """A chunk does not begin where the upload ends, or another request feeds the upload now.

    ``offset``: bytes that the upload has. Raised by ``hosted``. Code ``BLOB_UPLOAD_INVALID``.
    """

    code = "BLOB_UPLOAD_INVALID"

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset
        self.location = ""
        """Path of the upload, for clients. ``web`` sets it."""


class MethodUnsupported(MirrorError):
    """The path does not have the method of the request.

    ``allowed``: the methods that it has. Raised by ``web``. Code ``UNSUPPORTED``.
    """

    code = "UNSUPPORTED"

    def __init__(self, message: str, *, allowed: Sequence[str] = ("GET", "HEAD")) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)


class RangeNotSatisfiable(MirrorError):
    """No requested range lies within the content (RFC 9110, section 15.5.17).

    ``size`` is the length of the content in bytes. Raised by
    :func:`mirror.oci.headers.parse_range`. Code ``SIZE_INVALID``.
    """

    code = "SIZE_INVALID"

    def __init__(self, size: int) -> None:
        super().__init__(f"range not satisfiable for {size} bytes")
        self.size = size


# --- the content does not exist, or this client may not have it -----------------------------------


class NotFound(MirrorError):
    """The content is unknown: the upstream says so, or the pull policy forbids a request to it."""


class NameUnknown(NotFound):
    """The repository does not exist, or its upstream is not configured.

    Raised by ``web`` for the upstream, and by ``pull`` and ``upstream`` for the repository. Code
    ``NAME_UNKNOWN``.
    """

    code = "NAME_UNKNOWN"


class ManifestUnknown(NotFound):
    """The repository has no such tag or manifest.

    Raised by ``upstream`` for a 404, and by ``pull`` for a remembered 404 and for content that is
    not cached under the policy Never. Code ``MANIFEST_UNKNOWN``.
    """

    code = "MANIFEST_UNKNOWN"


class BlobUnknown(NotFound):
    """The repository has no such blob.

    Raised by ``upstream`` for a 404, and by ``pull`` for content that is not cached under the
    policy Never. Code ``BLOB_UNKNOWN``.
    """

    code = "BLOB_UNKNOWN"


class UploadUnknown(NotFound):
    """The repository has no such upload: it was finished, cancelled or ended, or never begun.

    Raised by ``hosted``. Code ``BLOB_UPLOAD_UNKNOWN``.
    """

    code = "BLOB_UPLOAD_UNKNOWN"


class Denied(MirrorError):
    """The upstream (403), an allow or deny list, or a rule of access refuses this repository.

    Raised by ``upstream``, ``pull`` and ``access``. Code ``DENIED``.
    """

    code = "DENIED"
    user = ""
    """The user whom a rule of access refuses. Empty: anonymous, or it is no such rule."""


class QuotaExceeded(Denied):
    """A push needs more bytes than the quota of the hosted repositories has left.

    Raised by ``hosted``. Code ``DENIED``: all clients show its message.
    """


class TagImmutable(Denied):
    """A push or a deletion would change an immutable tag of a hosted repository.

    Raised by ``hosted``. Code ``DENIED``: all clients show its message.
    """


class Unauthorized(MirrorError):
    """The upstream needs credentials that we do not have, or refused ours (401).

    Raised by ``upstream``. Code ``UNAUTHORIZED``.
    """

    code = "UNAUTHORIZED"


class LoginRequired(MirrorError):
    """The client has to send credentials, or has sent wrong ones. Code ``UNAUTHORIZED``.

    ``challenge`` is the value of ``WWW-Authenticate``. Raised at the push listener only: the
    mirror's own listener never challenges.
    """

    code = "UNAUTHORIZED"

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message)
        self.challenge = challenge


# --- the upstream is unavailable, or its response is malformed ------------------------------------


class UpstreamError(MirrorError):
    """The upstream failed.

    This says nothing about the content, so the client must never get a 404 for it. The code is
    ``UNAVAILABLE``, unless a subclass has another one.
    """

    code = "UNAVAILABLE"


class FailureScope(Enum):
    """The requests to an endpoint that a failure says something about.

    The circuit breaker (``upstream/endpoints.py``) counts a failure by its scope.
    """

    NONE = auto()
    """No request: the endpoint is not at fault, or got no request."""
    REQUEST = auto()
    """This request only: the endpoint responded, so it works."""
    SAME_KIND = auto()
    """Requests of the same kind to the same repository: no response within the time limit, the
    connection broke before the headers, the status was 502, 503 or 504, the body broke, stalled or
    was too slow, or the token service cannot be reached."""
    ENDPOINT = auto()
    """All requests: there is no connection to the endpoint."""


class UpstreamUnavailable(UpstreamError):
    """No usable response of the upstream: DNS, connect, TLS, 5xx, or a token service that failed.

    Raised by ``upstream``, and by ``store`` for a fetch of another process that failed so.
    """

    def __init__(self, message: str, *, scope: FailureScope = FailureScope.NONE) -> None:
        super().__init__(message)
        self.scope = scope

    @property
    def may_depend_on_request(self) -> bool:
        """Whether the same endpoint may answer another kind of request: it can be reached."""
        return self.scope in (FailureScope.REQUEST, FailureScope.SAME_KIND)


class AllCircuitsOpen(UpstreamUnavailable):
    """No request was sent to an endpoint that may have the content: its circuit breaker is open.

    A request is sent again once the circuit breaker permits it.

    Raised by ``upstream/failover.py``.
    """


class UpstreamTimeout(UpstreamUnavailable):
    """A time limit ran out: connect, response headers, idle body, or the minimum rate of a body.

    Raised by ``upstream``, and by ``single_flight`` for a client that has waited too long.
    """


class StorageRefused(UpstreamUnavailable):
    """The storage that the upstream redirected to refuses access (401, 403).

    The signed URL may have expired, or the storage may refuse a range. The upstream itself has the
    content. Raised by ``upstream``.
    """


class UpstreamRateLimited(UpstreamUnavailable):
    """The upstream responded 429, or a pause that it requested has not ended.

    ``retry_after`` is in seconds; None if the upstream gave no time. Raised by ``upstream``. Code
    ``TOOMANYREQUESTS``.
    """

    code = "TOOMANYREQUESTS"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamProtocolError(UpstreamError):
    """The upstream responded against the specification (sizes, types, lengths, headers).

    Raised by ``upstream``, ``pull`` and ``store``.
    """


class OutboundRefused(UpstreamError):
    """The outbound guard refused a URL that the upstream named (token realm, redirect, next page).

    Raised by ``upstream`` (see ``upstream/outbound.py``).
    """


class DigestMismatch(UpstreamError):
    """Bytes do not hash to their digest.

    Bytes from an upstream are dropped. Stored content is moved to ``quarantine/``.

    Raised by :class:`mirror.oci.reference.Verifier` and by ``store``.
    """


class ManifestInvalid(UpstreamError):
    """A manifest is too large, nested too deeply, has too many objects, or is no JSON object.

    Raised by :mod:`mirror.oci.descriptor` and by ``pull``. Code ``MANIFEST_INVALID``.
    """

    code = "MANIFEST_INVALID"


class WholeManifestNeeded(ManifestInvalid):
    """The digest of a manifest may be that of a part of its bytes, so the store cannot verify it.

    Raised by :mod:`mirror.oci.descriptor`, and handled by ``pull``: it fetches the manifest in one
    piece, and computes the digest of that part.
    """


# --- the mirror itself fails ----------------------------------------------------------------------


class Draining(MirrorError):
    """The server is shutting down and takes no new work.

    Raised by ``single_flight`` and ``web``. Code ``UNAVAILABLE``.
    """

    code = "UNAVAILABLE"


class TooManyRequests(MirrorError):
    """One client address has more connections or requests than is allowed, or too many failures.

    ``retry_after``: seconds until it may try again. Raised by ``web`` and ``access``. Code
    ``TOOMANYREQUESTS``.
    """

    code = "TOOMANYREQUESTS"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ContentLost(MirrorError):
    """Content was truncated or deleted, or cannot be read, while a reader had it open.

    Raised by ``store`` and ``web``. Code ``UNAVAILABLE``.
    """

    code = "UNAVAILABLE"


class StorageUnavailable(MirrorError):
    """Cached content cannot be opened or sent, usually because no file descriptor is free.

    The content is not damaged, and it is not fetched again. Raised by ``store`` and ``web``. Code
    ``UNAVAILABLE``.
    """

    code = "UNAVAILABLE"


class ContentUnreadable(StorageUnavailable):
    """The disk reports an error for content that it has. The content stays, and may be intact.

    Raised by ``store``, for hosted content only: cached content is fetched again.
    """


class NamesDamaged(MirrorError):
    """The database of the hosted repositories cannot be used. It is never replaced.

    Raised by ``hosted`` when it opens or reads the database. Code ``UNAVAILABLE``.
    """

    code = "UNAVAILABLE"


class ConfigError(Exception):
    """A setting cannot be used. The text is one line that names the key and the value.

    Raised by ``config`` and ``cli``, before a server runs, so no client sees it.
    """

    def __init__(self, message: str, others: Sequence[str] = ()) -> None:
        more = f" (and {len(others)} more)" if others else ""
        super().__init__(f"{message}{more}")
        self.lines = (message, *others)
        """All that is wrong, one line for each setting."""


# --- the text of any error ------------------------------------------------------------------------


def error_text(error: BaseException) -> str:
    """Return what an error says, for people.

    The class of an error of the program itself is named: the text alone, such as ``'tag'``, would
    say nothing.
    """
    import sqlite3  # Imported here: most modules that import this one need no database.

    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MirrorError):
        return error.message
    if isinstance(error, ConfigError):
        return str(error)
    text = str(error)
    is_plain = isinstance(error, OSError | sqlite3.Error) and text
    return text if is_plain else f"{type(error).__name__}: {text}".removesuffix(": ")
