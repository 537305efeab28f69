"""``healthcheck``: does the server here answer, as a container's ``HEALTHCHECK`` asks it.

Must not know: anything of the server but its address. No proxy is ever asked.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from mirror.config.settings import Settings
from mirror.config.values import check_listen, split_host

_TIMEOUT: Final = 5.0
EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - mapped, not listened on


def own_url(listen: str, *, tls: bool) -> str:
    """The address to ask a server at that listens there."""
    host, port = split_host(listen)
    host = EVERYWHERE.get(host, host)
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/healthz"


def default_url(settings: Settings | None, environ: Mapping[str, str]) -> str:
    """As configured, or as the environment says. Raises ``ValueError``."""
    if settings is not None:
        return own_url(settings.listen, tls=settings.tls is not None)
    listen = environ.get("OCI_MIRROR_LISTEN") or Settings.model_fields["listen"].default
    return own_url(check_listen(listen), tls="OCI_MIRROR_TLS__CERTIFICATE" in environ)


def ask(url: str) -> str | None:
    """Why it is not healthy, or None where it answers 200."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return "not an http(s) URL"
        connection: HTTPConnection
        if parts.scheme == "https":
            # It asks itself, by an address that its certificate need not name.
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = HTTPSConnection(
                parts.hostname, parts.port, timeout=_TIMEOUT, context=context
            )
        else:
            connection = HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT)
        try:
            connection.request("GET", parts.path or "/healthz")
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError) as error:
        return str(error) or type(error).__name__
    return None if status == 200 else f"status {status}"
