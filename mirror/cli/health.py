"""``healthcheck``: check the health of the server on this machine, for ``HEALTHCHECK`` of an image.

Lives here: the request to ``/healthz``, without any proxy. Must not know: the server, but for its
address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from mirror.cli.own_server import OwnServer, failure_text
from mirror.config.settings import Settings
from mirror.config.values import check_listen, split_host

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
        status = OwnServer(f"{parts.scheme}://{parts.netloc}").get(parts.path or "/healthz").status
    except (OSError, ValueError) as error:
        return failure_text(error)
    return None if status == 200 else f"status {status}"
