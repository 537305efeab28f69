"""``check-config``: validate a configuration on this machine, and print the effective settings.

Lives here: the checks of files and addresses that a configuration names, the warnings, and the
printing without secrets. Must not know: how a configuration is read.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Collection, Iterator
from pathlib import Path
from shutil import which
from typing import Any, Final

import yaml

from mirror.config.settings import Settings, Upstream
from mirror.oci.errors import ConfigError
from mirror.upstream.outbound import Policy, Refused, UrlSource, as_url, check_url
from mirror.upstream.transport import own_addresses

HIDDEN: Final = "(not shown)"
"""Printed in place of a password."""


def check_environment(settings: Settings, *, secrets: bool = True) -> None:
    """Check the files and addresses that ``settings`` name. ``secrets``: those of logins, too.

    Raises :class:`ConfigError` for the first one that cannot be used.
    """
    directory = _nearest_existing(settings.data_dir)
    if not directory.is_dir():
        raise ConfigError(f"data_dir: '{settings.data_dir}': '{directory}' is not a directory")
    if settings.tls:
        _check_readable("tls.certificate", settings.tls.certificate)
        _check_readable("tls.key", settings.tls.key)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # An empty passphrase, so that OpenSSL does not prompt for one.
            context.load_cert_chain(settings.tls.certificate, settings.tls.key, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or "cannot be used"
            raise ConfigError(
                f"tls: '{settings.tls.certificate}' and '{settings.tls.key}': {reason}"
            ) from None
    own = own_addresses(settings.listen)
    for name, upstream in settings.upstreams.items():
        _check_endpoints(f"upstreams.{name}.endpoints", upstream.endpoints, own)
        _check_upstream(f"upstreams.{name}", upstream, secrets)


def _nearest_existing(path: str) -> Path:
    """Return ``path``, or its nearest parent that exists. The server makes missing directories."""
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def _check_endpoints(
    key: str, endpoints: tuple[str, ...], own: Collection[tuple[str, int]]
) -> None:
    for endpoint in endpoints:
        url = as_url(endpoint)
        verdict = check_url(str(url), UrlSource.ENDPOINT, url, Policy(url, own_addresses=own))
        if isinstance(verdict, Refused):
            raise ConfigError(f"{key}: '{endpoint}': {verdict.why}")


def _check_upstream(key: str, upstream: Upstream, secrets: bool) -> None:
    if upstream.ca is not None:
        _check_readable(f"{key}.ca", upstream.ca)
        try:
            ssl.create_default_context(cafile=upstream.ca)
        except (OSError, ValueError):
            raise ConfigError(f"{key}.ca: '{upstream.ca}': has no certificates (PEM)") from None
    if not secrets:
        return
    credentials = upstream.credentials
    if credentials.password is not None and credentials.password.startswith("file:"):
        _check_readable(f"{key}.credentials.password", credentials.password.removeprefix("file:"))
    if credentials.docker_config is not None:
        _check_readable(f"{key}.credentials.docker_config", credentials.docker_config)
    if credentials.helper is not None and which(f"docker-credential-{credentials.helper}") is None:
        raise ConfigError(
            f"{key}.credentials.helper: '{credentials.helper}': "
            f"docker-credential-{credentials.helper} is not on the PATH"
        )


def _check_readable(key: str, path: str) -> None:
    try:
        with Path(path).expanduser().open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{key}: '{path}': {error.strerror}") from None


def effective(settings: Settings) -> str:
    """Return the whole configuration as YAML, with passwords hidden."""
    tree = settings.model_dump(mode="json")
    for name, upstream in settings.upstreams.items():
        credentials: dict[str, Any] = tree["upstreams"][name]["credentials"]
        password = upstream.credentials.password
        if password is not None and not password.startswith("file:"):
            credentials["password"] = HIDDEN
    return str(yaml.safe_dump(_without_none(tree), sort_keys=False, allow_unicode=True))


def _without_none(value: Any) -> Any:
    """Remove keys that have no value, and then sections that are empty."""
    if isinstance(value, dict):
        items = {key: _without_none(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in items.items() if item != {}}
    return value


def warnings(settings: Settings) -> Iterator[str]:
    """Yield one line for each setting that works, but is likely a mistake."""
    directory = _nearest_existing(settings.data_dir)
    if not os.access(directory, os.W_OK | os.X_OK):
        yield f"data_dir: '{directory}' is not writable: no content would be stored"
    for name, upstream in settings.upstreams.items():
        if upstream.credentials.model_fields_set and not upstream.allow:
            yield (
                f"upstreams.{name}: credentials without an allow list: every client "
                "of the mirror can pull everything that these credentials can pull"
            )
        insecure = [end for end in upstream.endpoints if end.startswith("http://")]
        if insecure and upstream.credentials.model_fields_set:
            yield f"upstreams.{name}: credentials are sent unencrypted to {insecure[0]}"
