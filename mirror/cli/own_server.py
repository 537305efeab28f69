"""Requests of commands to a running server of ours, without any proxy.

Lives here: one short ``GET``. Must not know: what is requested.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from mirror.config.values import check_http_url
from mirror.oci.text import printable

_STEP_TIMEOUT_S: Final = 5.0
"""Seconds of each step of a request: the server answers these from memory. Less than the
``--timeout`` of the image's ``HEALTHCHECK``, so that ``healthcheck`` can say why."""
_MAX_BODY_BYTES: Final = 256 * 1024
"""Bytes of a body that are read: ours are smaller, and another program may send anything."""


def failure_text(error: Exception) -> str:
    """Return why a request failed, without names of Python and numbers of the system."""
    if isinstance(error, TimeoutError):
        return f"no response within {_STEP_TIMEOUT_S:.0f} s"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or 'no reason'}): check http or https"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return printable(str(error), 200) or "it is no HTTP"


@dataclass(frozen=True, slots=True)
class ServerResponse:
    """A response of a server."""

    status: int
    body: bytes
    is_ours: bool
    """Whether it is an oci-mirror, by its header ``Server``."""


class OwnServer:
    """A server at a URL, which may be on another machine."""

    def __init__(self, url: str) -> None:
        """Check the URL. Raises ``ValueError`` if it is malformed."""
        self.url = check_http_url(url.rstrip("/"))
        self._parts = urlsplit(self.url)

    def get(self, path: str) -> ServerResponse:
        """Request a path, over a new connection.

        The certificate is not verified: it need not name this address, and the response only says
        what the server is.

        Raises:
            OSError: no response in time.
            ValueError: the response is no HTTP.
        """
        host, port = self._parts.hostname or "", self._parts.port
        connection: HTTPConnection
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = HTTPSConnection(host, port, timeout=_STEP_TIMEOUT_S, context=context)
        else:
            connection = HTTPConnection(host, port, timeout=_STEP_TIMEOUT_S)
        try:
            connection.request("GET", f"{self._parts.path}{path}")
            response = connection.getresponse()
            body = response.read(_MAX_BODY_BYTES)
            is_ours = response.headers.get("Server") == "oci-mirror"
            return ServerResponse(response.status, body, is_ours)
        except HTTPException as error:
            raise ValueError(str(error) or "it is no HTTP") from None
        finally:
            connection.close()
