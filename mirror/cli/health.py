"""``healthcheck``: check the health of the server on this machine, for ``HEALTHCHECK`` of an image.

Lives here: the request to ``/healthz``, without any proxy. Must not know: the server, but for its
address.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from mirror.config.settings import Settings
from mirror.config.values import check_listen, split_host

_TIMEOUT_S: Final = 5.0
"""Seconds; less than the ``--timeout`` of the image's ``HEALTHCHECK``, so that it can say why."""
WILDCARD_ADDRESSES: Final = {
    "0.0.0.0": "127.0.0.1",  # noqa: S104 - mapped, not listened on
    "::": "::1",
}
"""Wildcard address -> loopback address of the same family, at which a server that listens on the
wildcard address can be reached."""


def own_url(listen: str, *, has_tls: bool) -> str:
    """Return the health URL of a server that listens on ``listen``."""
    host, port = split_host(listen)
    host = WILDCARD_ADDRESSES.get(host, host)
    scheme = "https" if has_tls else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/healthz"


def health_url(settings: Settings | None, environ: Mapping[str, str]) -> str:
    """Return the health URL of the configured server. Without ``settings``, as ``environ`` says.

    Raises ``ValueError`` for a malformed ``OCI_MIRROR_LISTEN``.
    """
    if settings is not None:
        return own_url(settings.listen, has_tls=settings.tls is not None)
    listen = environ.get("OCI_MIRROR_LISTEN") or Settings.model_fields["listen"].default
    return own_url(check_listen(listen), has_tls="OCI_MIRROR_TLS__CERTIFICATE" in environ)


def check_health(url: str) -> str | None:
    """Request ``url``. Returns None for a response of 200, else the reason why it is unhealthy."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return "not an http(s) URL"
        connection: HTTPConnection
        if parts.scheme == "https":
            # The server is on this machine, and its certificate need not name the address.
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = HTTPSConnection(
                parts.hostname, parts.port, timeout=_TIMEOUT_S, context=context
            )
        else:
            connection = HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", parts.path or "/healthz")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError) as error:
        return str(error) or type(error).__name__
    return None if status == 200 else f"status {status}"
