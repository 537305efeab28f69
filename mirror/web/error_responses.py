"""The response to a request that fails, and its outcome in the record.

Lives here: the outcome of each kind of error. Must not know: why an error was raised, the statuses
(``errors.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from mirror.observability.events import Outcome, RequestRecord
from mirror.oci.errors import (
    Denied,
    InvalidRequest,
    LoginRequired,
    MethodUnsupported,
    MirrorError,
    NotFound,
    RangeNotSatisfiable,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    UploadOutOfOrder,
)
from mirror.web.errors import body_of, error_headers, status_of


def build_error_response(
    error: MirrorError, pull: RequestRecord, common: Mapping[str, str]
) -> web.StreamResponse:
    """Record the error, and return its response.

    Args:
        error: The error.
        pull: Record of the request. Gets the outcome and the message.
        common: The header fields that every response has.
    """
    more = f" ({error.for_operator})" if error.for_operator else ""
    pull.error = f"{error.code}: {error.message}{more}"
    match error:
        case NotFound():
            pull.outcome = Outcome.NEGATIVE
        case Denied() | Unauthorized() | LoginRequired() | TooManyRequests():
            pull.outcome = Outcome.DENIED
        case (
            InvalidRequest()
            | RangeNotSatisfiable()
            | MethodUnsupported()
            | TooLarge()
            | UploadOutOfOrder()
        ):
            pull.outcome = Outcome.REJECTED
        case _:
            pull.outcome = Outcome.ERROR
    if pull.status:
        # The response failed after its header was sent, at least in part. The sender has already
        # aborted the connection.
        return NoResponse(status=pull.status)
    headers = {**error_headers(error), **common}
    return web.Response(status=status_of(error), headers=headers, body=body_of(error))


class NoResponse(web.StreamResponse):
    """Placeholder for a response that cannot be sent: the connection is closed.

    aiohttp logs an exception of a handler with a traceback. It treats the ``ConnectionResetError``
    of a response as a client that has left.
    """

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Raise ``ConnectionResetError``."""
        raise ConnectionResetError("the client has left")
