"""``check-config``: validate a configuration on this machine, and print the effective settings.

Lives here: the checks of files and addresses that a configuration names, the warnings, and the
printing without secrets. Must not know: how a configuration is read.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any, Final, TypeAlias

import yaml

from mirror.access.login_credentials import check_files
from mirror.admin.tokens import Tokens
from mirror.cli.access_warnings import access_warnings
from mirror.config.settings import EventTarget, KeyPath, Settings, Tls, Upstream
from mirror.notifications.signing import Secrets
from mirror.oci.errors import ConfigError
from mirror.oci.text import printable
from mirror.upstream.connections import tls_context
from mirror.upstream.credentials import find_entries, host_of
from mirror.upstream.outbound import TOKEN_HOSTS, Policy, Refused, UrlSource, as_url, check_url
from mirror.upstream.registries import listener_addresses

HIDDEN: Final = "(not shown)"
"""Printed in place of a password."""
_MAX_SHOWN_HOSTS: Final = 5
"""Hosts of a Docker configuration in a warning, which is one line."""

Prefix: TypeAlias = Callable[[KeyPath], str]
"""Begins a message about a key: returns ``mirror.yaml:12: upstreams.docker.io.ca: ``."""


def check_environment(settings: Settings, prefix: Prefix, *, has_logins: bool = True) -> None:
    """Check the files and addresses that ``settings`` name. ``has_logins``: those of logins, too.

    Raises :class:`ConfigError` for all that cannot be used.
    """
    lines: list[str] = []
    for check in _checks(settings, prefix, has_logins=has_logins):
        try:
            check()
        except ConfigError as error:
            lines += error.lines
    if lines:
        raise ConfigError(lines[0], lines[1:])


def _checks(
    settings: Settings, prefix: Prefix, *, has_logins: bool
) -> Iterator[Callable[[], object]]:
    """Yield each check as a function that raises ``ConfigError``."""
    yield partial(_check_data_dir, settings.data_dir, prefix)
    if settings.tls:
        yield partial(_check_certificate, settings.tls, prefix)
    if settings.access is not None:
        yield partial(check_files, settings.access, prefix)
    own = listener_addresses(settings)
    for name, upstream in settings.upstreams.items():
        path: KeyPath = ("upstreams", name)
        yield partial(_check_endpoints, prefix((*path, "endpoints")), upstream.endpoints, own)
        yield partial(_check_tls, path, upstream, prefix)
        if has_logins:
            yield partial(_check_credentials, path, upstream, prefix)
    for index, target in enumerate(settings.events):
        target_path: KeyPath = ("events", index)
        url = str(as_url(target.url).origin())
        yield partial(_check_endpoints, prefix((*target_path, "url")), (url,), own)
        yield partial(_check_tls, target_path, target, prefix)
        if has_logins:
            origin = prefix((*target_path, "secret_file")).removesuffix(": ")
            yield partial(Secrets, origin, target.secret_file)
    if has_logins and settings.admin is not None:
        yield partial(Tokens, settings.admin)  # The server reads them itself.


def _check_data_dir(path: str, prefix: Prefix) -> None:
    directory = _nearest_existing(path)
    if not directory.is_dir():
        raise ConfigError(f"{prefix(('data_dir',))}'{path}': '{directory}' is not a directory")


def _check_certificate(tls: Tls, prefix: Prefix) -> None:
    _check_readable(prefix(("tls", "certificate")), tls.certificate)
    _check_readable(prefix(("tls", "key")), tls.key)
    _check_pair(prefix(("tls",)), tls.certificate, tls.key)


def _nearest_existing(path: str) -> Path:
    """Return ``path``, or its nearest parent that exists. The server makes missing directories."""
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def _check_endpoints(
    prefix: str, endpoints: tuple[str, ...], own: Collection[tuple[str, int]]
) -> None:
    for endpoint in endpoints:
        url = as_url(endpoint)
        verdict = check_url(str(url), UrlSource.ENDPOINT, url, Policy(url, own_addresses=own))
        if isinstance(verdict, Refused):
            raise ConfigError(f"{prefix}'{endpoint}': {verdict.why}")


def _check_tls(path: KeyPath, upstream: Upstream | EventTarget, prefix: Prefix) -> None:
    if upstream.ca is not None:
        _check_readable(prefix((*path, "ca")), upstream.ca)
        try:
            tls_context(upstream.ca, None, insecure=False)
        except (OSError, ValueError):
            raise ConfigError(
                f"{prefix((*path, 'ca'))}'{upstream.ca}': has no certificates (PEM)"
            ) from None
    if upstream.client_certificate is not None:
        key = upstream.client_key
        _check_readable(prefix((*path, "client_certificate")), upstream.client_certificate)
        if key is not None:
            _check_readable(prefix((*path, "client_key")), key)
        _check_pair(prefix((*path, "client_certificate")), upstream.client_certificate, key)


def _check_pair(prefix: str, certificate: str, key: str | None) -> None:
    """Check that a private key belongs to a certificate. ``key`` None: both are in one file."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # An empty passphrase, so that OpenSSL does not prompt for one.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "cannot be used"
        files = f"'{certificate}'" if key is None else f"'{certificate}' and '{key}'"
        raise ConfigError(f"{prefix}{files}: {reason}") from None


def _check_credentials(path: KeyPath, upstream: Upstream, prefix: Prefix) -> None:
    credentials = upstream.credentials
    if credentials.password is not None and credentials.password.startswith("file:"):
        file = credentials.password.removeprefix("file:")
        _check_readable(prefix((*path, "credentials", "password")), file)
    if credentials.docker_config is not None:
        here = prefix((*path, "credentials", "docker_config"))
        _check_readable(here, credentials.docker_config)
        _read_docker_config(here, credentials.docker_config)
    if credentials.helper is not None and which(f"docker-credential-{credentials.helper}") is None:
        raise ConfigError(
            f"{prefix((*path, 'credentials', 'helper'))}'{credentials.helper}': "
            f"docker-credential-{credentials.helper} is not on the PATH"
        )


def _check_readable(prefix: str, path: str) -> None:
    try:
        with Path(path).expanduser().open("rb") as file:
            file.read(1)
    except (OSError, RuntimeError) as error:
        # RuntimeError: the user of ~user does not exist.
        reason = getattr(error, "strerror", None) or "its home directory is not known"
        raise ConfigError(f"{prefix}'{os.path.abspath(path)}': {reason}") from None


def _read_docker_config(prefix: str, path: str) -> dict[str, Any]:
    """Read a Docker ``config.json``. Raises ``ConfigError`` if it is not one."""
    try:
        document = json.loads(Path(path).expanduser().read_bytes())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{prefix}'{path}': line {error.lineno}: not JSON") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{prefix}'{path}': not JSON") from None
    sections = ("auths", "credHelpers")
    if not isinstance(document, dict) or any(
        not isinstance(document.get(section) or {}, dict) for section in sections
    ):
        raise ConfigError(f"{prefix}'{path}': not the config.json of Docker")
    return document


def effective(settings: Settings, *, has_defaults: bool) -> str:
    """Return the configuration as YAML, with passwords and queries of URLs hidden.

    ``has_defaults``: with all keys. Otherwise only those that differ from their defaults.
    """
    tree = settings.model_dump(mode="json", exclude_defaults=not has_defaults)
    for name, upstream in settings.upstreams.items():
        section: dict[str, Any] = tree["upstreams"][name]
        password = upstream.credentials.password
        if not upstream.credentials.model_fields_set:
            section.pop("credentials", None)
        elif password is not None and not password.startswith("file:"):
            section["credentials"]["password"] = HIDDEN
    for target in tree.get("events", ()):
        url, has_query, _ = target["url"].partition("?")
        target["url"] = f"{url}?{HIDDEN}" if has_query else url
    text = str(yaml.safe_dump(_without_none(tree), sort_keys=False, allow_unicode=True))
    return text + "".join(f"# {line}\n" for line in _built_in_token_hosts(settings))


def _built_in_token_hosts(settings: Settings) -> Iterator[str]:
    """Yield a line for each upstream whose tokens come from a host that no key names."""
    for name, upstream in settings.upstreams.items():
        names = (name, *(as_url(endpoint).host or "" for endpoint in upstream.endpoints))
        built_in = dict.fromkeys(host for key in names for host in TOKEN_HOSTS.get(key, ()))
        hosts = [host for host in built_in if host not in names]
        if hosts:
            yield f"upstreams.{name}.token_hosts, built in: {', '.join(hosts)}"


def _without_none(value: Any) -> Any:
    """Remove keys that have no value, and then sections that are empty."""
    if isinstance(value, dict):
        items = {key: _without_none(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in items.items() if item != {}}
    return value


# --- warnings -------------------------------------------------------------------------------------


def warnings(settings: Settings, prefix: Prefix, *, has_logins: bool = True) -> Iterator[str]:
    """Yield one line for each setting that works, but is likely a mistake.

    ``has_logins``: warn of the files of logins, too. They must have passed
    :func:`check_environment`.
    """
    directory = _nearest_existing(settings.data_dir)
    if not os.access(directory, os.W_OK | os.X_OK):
        yield f"{prefix(('data_dir',))}'{directory}' is not writable: no content would be stored"
    for name, upstream in settings.upstreams.items():
        path: KeyPath = ("upstreams", name)
        yield from _credential_warnings(path, upstream, prefix)
        yield from _pattern_warnings(path, upstream, prefix)
        if has_logins and upstream.credentials.docker_config is not None:
            yield from _docker_config_warnings(path, upstream, prefix)
        if upstream.insecure:
            yield (
                f"{prefix((*path, 'insecure'))}certificates are not verified: everybody "
                "between the mirror and this upstream can read and change its requests"
            )

    yield from access_warnings(settings, prefix)


def _credential_warnings(path: KeyPath, upstream: Upstream, prefix: Prefix) -> Iterator[str]:
    credentials = upstream.credentials
    if not credentials.model_fields_set:
        return
    here = (*path, "credentials")
    if not upstream.allow:
        yield (
            f"{prefix(here)}credentials without an allow list: every client "
            "of the mirror can pull everything that these credentials can pull"
        )
    plain = [end for end in upstream.endpoints if end.startswith("http://")]
    if plain:
        yield f"{prefix(here)}credentials are sent unencrypted to {plain[0]}"
    password = credentials.password or ""
    if password.startswith("/") and Path(password).exists():
        # The value is that of a secret, and is not shown.
        yield f"{prefix((*here, 'password'))}is the path of a file: write file: before it"


def _pattern_warnings(path: KeyPath, upstream: Upstream, prefix: Prefix) -> Iterator[str]:
    for key in ("allow", "deny"):
        for index, pattern in enumerate(getattr(upstream, key)):
            here = prefix((*path, key, index))
            if ".*" in pattern:
                yield (
                    f"{here}'{pattern}' matches only names with a dot: "
                    "it is no regular expression, and * alone stands for any text"
                )
            if path[-1] == "docker.io" and not set(pattern) & set("/*?["):
                yield f"{here}'{pattern}' matches nothing: its repository is library/{pattern}"


def _docker_config_warnings(path: KeyPath, upstream: Upstream, prefix: Prefix) -> Iterator[str]:
    here = prefix((*path, "credentials", "docker_config"))
    file = upstream.credentials.docker_config or ""
    document = _read_docker_config(here, file)
    if document.get("credsStore"):
        return  # Only the credential helper knows the hosts.
    sections = document.get("auths") or {}, document.get("credHelpers") or {}
    hosts = [host_of(as_url(endpoint)) for endpoint in upstream.endpoints]
    if not any(find_entries(section, host) for section in sections for host in hosts):
        keys = [key for section in sections for key in section]
        found = ", ".join(keys[:_MAX_SHOWN_HOSTS]) or "no host"
        wanted = " or ".join(hosts)
        yield f"{here}'{file}' has no login for {wanted}, only for {printable(found, 200)}"
