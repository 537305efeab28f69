"""Errors of the admin API, as problem details (RFC 9457).

Lives here: one exception type for all refusals of the API, and the table from domain errors to
statuses. Must not know: routes, why a domain error was raised.
"""

from __future__ import annotations

import http
import json
from typing import Final

from mirror.oci.errors import (
    Draining,
    InvalidRequest,
    MirrorError,
    NotFound,
    StorageUnavailable,
    UpstreamError,
)
from mirror.oci.text import printable

PROBLEM_TYPE: Final = "application/problem+json"
_MAX_DETAIL_CHARS: Final = 500
"""Characters of a detail: a sentence or two."""
_STATUS_OF_ERROR: Final[tuple[tuple[type[Exception], int], ...]] = (
    (InvalidRequest, 400),
    (NotFound, 404),
    (Draining, 503),
    (StorageUnavailable, 503),
    (UpstreamError, 502),
    (MirrorError, 409),
    (OSError, 503),
)
"""Error -> status of the response. The first match counts."""


class ApiProblem(Exception):
    """A request is refused. The status and the text go to the caller."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        """Create a problem.

        Args:
            status: HTTP status.
            detail: One sentence that names the cause, and the remedy if there is one.
            headers: Further header fields, with ``_`` for ``-``.
        """
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> bytes:
        """Return the problem details, as JSON."""
        fields = {
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": printable(self.detail, _MAX_DETAIL_CHARS),
        }
        return json.dumps(fields).encode()


def problem_of(error: Exception) -> ApiProblem:
    """Return the problem for an error of the packages below. An unknown one is a 500."""
    status = next((status for kind, status in _STATUS_OF_ERROR if isinstance(error, kind)), 500)
    if status == 500:
        return ApiProblem(500, "an unexpected error: see the log of the server")
    if isinstance(error, MirrorError):
        return ApiProblem(status, error.message)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ApiProblem(status, text)
