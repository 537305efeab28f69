"""Logins from the configuration, files, a Docker ``config.json``, and credential helpers.

Lives here: the look-up of a login, and a short-lived cache. A pull of forty layers runs a helper
once, and a rotated secret is read as soon as the old one is refused. Must not know: how a login is
sent. Secrets are never printed: they are in no repr and in no error message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from yarl import URL

from mirror.config.settings import Upstream
from mirror.oci.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from mirror.single_flight import SingleFlight
from mirror.threads import HangingCalls

LOGIN_TTL_S: Final = 30.0
"""Seconds for which a login is cached, unless it is refused: about one pull."""
_LOOKUP_TIMEOUT_S: Final = 10.0
"""Seconds for one look-up at most: cloud helpers take one or two, and a client is waiting."""
_MAX_OUTPUT_BYTES: Final = 64 * 1024
"""Bytes of a helper's output that are read. Logins have a few KiB."""
_FILES: Final = HangingCalls("credentials", 64)
"""Reads of files, which may be on a network file system that does not answer."""
_TOKEN_USER: Final = "<token>"  # noqa: S105 - the user name that marks an identity token
_DOCKER_HUB: Final = "https://index.docker.io/v1/"
_DOCKER_HUB_NAMES: Final = ("registry-1.docker.io", "index.docker.io", "docker.io")
"""Hosts of Docker Hub. Docker's tools keep its login under the key ``_DOCKER_HUB``."""
# The name becomes part of a file name. The grammar is that of the configuration.
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Login:
    """A user name and a password, or an identity token (a refresh token of OAuth 2)."""

    username: str = field(repr=False)
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def identity(self) -> str:
        """Key of the login in caches: a hash that does not reveal it."""
        secret = f"{self.username}\0{self.password}\0{self.identity_token}"
        return hashlib.sha256(secret.encode()).hexdigest()

    @property
    def basic(self) -> str | None:
        """``Authorization`` of RFC 7617. None for an identity token alone."""
        if not self.username and not self.password:
            return None
        raw = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(raw).decode("ascii")


@dataclass(frozen=True, slots=True, eq=False)
class CredentialLookup:
    """Result of one look-up. Two look-ups are never equal, even with the same login."""

    login: Login | None
    """None: there is no login for this host."""
    looked_up_at: float

    @property
    def identity(self) -> str:
        """Key of the login in caches. Empty without a login."""
        return self.login.identity if self.login is not None else ""


class Logins:
    """Cached logins of one upstream, by host. Concurrent requests share one look-up.

    A login is bound to the host that it was given for: no other host is sent it.
    """

    def __init__(
        self,
        settings: Upstream,
        upstream: str,
        single_flight: SingleFlight,
        clock: Callable[[], float],
    ) -> None:
        """Create an empty cache.

        Args:
            settings: The sources of logins, the endpoints, and the time limits. A look-up takes no
                longer than an attempt of a request may take.
            upstream: Name of the upstream.
            single_flight: Runs the look-ups.
            clock: Returns seconds.
        """
        self._credentials = settings.credentials
        self._timeout = min(settings.limits.connect + settings.limits.headers, _LOOKUP_TIMEOUT_S)
        self._hosts = settings.credentials.hosts or (host_of(URL(settings.endpoints[0])),)
        self._upstream = upstream
        self._single_flight = single_flight
        self._clock = clock
        self._lookups: dict[str, Mapping[str, CredentialLookup | UpstreamError]] = {}
        used = [
            name
            for name in ("username", "docker_config", "helper")
            if getattr(settings.credentials, name) is not None
        ]
        self.key = ".".join(["upstreams", upstream, "credentials", *used])
        """Configuration key of the source, for messages."""

    async def get(self, host: str, repository: str) -> CredentialLookup:
        """Return the login for a repository at ``host``, cached or looked up now.

        Args:
            host: Host of the endpoint, with its port if it is not the default one.
            repository: Path of the repository. The login with the longest prefix of it is used.

        Raises:
            UpstreamUnavailable: the configured source cannot be read.
            UpstreamTimeout: the look-up took too long.
            Draining: the process shuts down.
        """
        cached = self._lookups.get(host)
        lookup = _longest_match(cached, repository) if cached is not None else None
        if (
            not isinstance(lookup, CredentialLookup)
            or self._clock() - lookup.looked_up_at >= LOGIN_TTL_S
        ):
            key = "login", self._upstream, host
            renewed = await self._single_flight.share(key, lambda: self._renew(host))
            lookup = _longest_match(renewed, repository)
        if isinstance(lookup, UpstreamError):
            raise lookup
        return lookup

    def reject(self, host: str, lookup: CredentialLookup) -> None:
        """Drop a look-up whose login was refused, unless it was replaced already.

        The secret may have been rotated.
        """
        if lookup in self._lookups.get(host, {}).values():
            del self._lookups[host]

    def describe_missing(self, host: str) -> str:
        """Return why there is no login for ``host``, with the configuration key to set."""
        credentials = self._credentials
        if credentials.username is not None:
            return f"{self.key} is for {' and '.join(self._hosts)}, see credentials.hosts"
        if credentials.docker_config is not None:
            return f"the file of {self.key} has no login for {host}"
        if credentials.helper is not None:
            return f"the helper of {self.key} has no login for {host}"
        return f"{self.key} is not set"

    async def _renew(self, host: str) -> Mapping[str, CredentialLookup | UpstreamError]:
        """Look the logins of a host up, and replace the cached ones. A failure is not cached."""
        try:
            async with asyncio.timeout(self._timeout):
                logins = await self._look_up(host)
        except TimeoutError as error:
            self._lookups.pop(host, None)
            message = f"{self.key} gave no login within {self._timeout:g} s"
            raise UpstreamTimeout(message) from error
        except UpstreamError:
            self._lookups.pop(host, None)
            raise
        now = self._clock()
        lookups = {
            prefix: login if isinstance(login, UpstreamError) else CredentialLookup(login, now)
            for prefix, login in {"": None, **logins}.items()
        }
        self._lookups[host] = lookups
        return lookups

    async def _look_up(self, host: str) -> Mapping[str, Login | UpstreamError | None]:
        """Return prefix of repositories -> login. The empty prefix is that of the whole host."""
        credentials = self._credentials
        if credentials.username is not None:
            if host not in self._hosts:
                return {}
            password = await _resolve_password(credentials.password or "", self.key)
            return {"": Login(credentials.username, password)}
        if credentials.helper is not None:
            return {"": await _run_helper(credentials.helper, _server_name(host), self.key)}
        if credentials.docker_config is not None:
            return await _read_docker_config(credentials.docker_config, host, self.key)
        return {}


def host_of(endpoint: URL) -> str:
    """Return the host of an endpoint, with its port if it is not the default one."""
    return endpoint.host_port_subcomponent or ""


def _longest_match(
    logins: Mapping[str, CredentialLookup | UpstreamError], repository: str
) -> CredentialLookup | UpstreamError:
    """Return the entry with the longest prefix of ``repository``, in whole components."""
    prefix = repository
    while prefix not in logins:
        prefix = prefix.rpartition("/")[0]
    return logins[prefix]


async def _resolve_password(value: str, key: str) -> str:
    if not value.startswith("file:"):
        return value
    return (await _read_file(value.removeprefix("file:"), key)).rstrip("\r\n")


async def _read_file(path: str, key: str) -> str:
    """Read a file of credentials. ``key``: the configuration key that names it."""
    try:
        return await _FILES.run(path, lambda: Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        # RuntimeError: the user of ~user does not exist.
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise UpstreamUnavailable(f"the file of {key} cannot be read: {reason}") from error


# --- a Docker config.json -------------------------------------------------------------------------


def _server_name(host: str) -> str:
    """Return the key of a registry in Docker's configuration and for helpers."""
    return _DOCKER_HUB if host in _DOCKER_HUB_NAMES else host


async def _read_docker_config(
    path: str, host: str, key: str
) -> Mapping[str, Login | UpstreamError | None]:
    """Read ``credHelpers``, ``auths`` and ``credsStore``, in the order of docker/cli.

    Returns:
        Prefix of repositories -> login, or the reason why it cannot be had. The reason counts for
        this prefix only. Prefixes are those of containers/image (``containers-auth.json(5)``).
    """
    text = await _read_file(path, key)
    try:
        document = json.loads(text)
        helpers = find_entries(document.get("credHelpers"), host)
        auths = find_entries(document.get("auths"), host)
        store = str(document.get("credsStore") or "")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UpstreamUnavailable(f"the file of {key} is no Docker configuration") from error
    logins: dict[str, Login | UpstreamError | None] = {}
    for prefix in {"": None, **auths, **helpers}:
        try:
            if prefix in helpers:
                # Helpers know hosts only, no prefixes.
                server = host if prefix else helpers[prefix][0]
                logins[prefix] = await _run_helper(str(helpers[prefix][1]), server, key)
                continue
            logins[prefix] = _parse_auth(auths[prefix][1]) if prefix in auths else None
            if logins[prefix] is None and store and not prefix:
                logins[prefix] = await _run_helper(store, _server_name(host), key)
        except (ValueError, TypeError, AttributeError):
            name = f"{host}/{prefix}".rstrip("/")
            message = f"the file of {key} has a malformed entry for {name}"
            logins[prefix] = UpstreamUnavailable(message)
        except UpstreamUnavailable as error:
            logins[prefix] = error
    return logins


def find_entries(section: Any, host: str) -> dict[str, tuple[str, Any]]:
    """Return prefix of repositories -> (key, value) of a section of a Docker ``config.json``.

    Args:
        section: ``auths`` or ``credHelpers``. None: it is missing.
        host: Only entries for this host are returned.

    Keys are hosts, ``host/prefix``, or URLs with any path (docker/cli, ``ConvertToHostname``). A
    key that equals a name of the host goes first. Empty values are left out.
    """
    values: Mapping[str, Any] = dict(section or {})
    names = [_server_name(host), host, *(_DOCKER_HUB_NAMES if host in _DOCKER_HUB_NAMES else ())]
    hosts = {_split_key(name)[0] for name in names}
    entries: dict[str, tuple[str, Any]] = {}
    for key in sorted(values, key=lambda key: names.index(key) if key in names else len(names)):
        name, prefix = _split_key(key)
        if name in hosts and values[key]:
            entries.setdefault(prefix, (key, values[key]))
    return entries


def _split_key(key: str) -> tuple[str, str]:
    """Return (host, prefix of repositories). The path of a URL, and ``v1`` or ``v2``, is none."""
    address = key.removeprefix("https://").removeprefix("http://")
    host, _, path = address.partition("/")
    path = path.strip("/")
    return host, "" if address != key or path in ("v1", "v2") else path


def _parse_auth(entry: Any) -> Login | None:
    """Return the login of an entry of ``auths``. Raises ``ValueError`` for a malformed one."""
    if not entry:
        return None
    token = str(entry.get("identitytoken") or "")
    if entry.get("auth"):
        try:
            raw = base64.b64decode(entry["auth"], validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ValueError("auth") from error
        username, _, password = raw.partition(":")
        return Login(username, password.rstrip("\0"), identity_token=token)
    if entry.get("username"):
        return Login(str(entry["username"]), str(entry.get("password") or ""), token)
    return Login(username="", password="", identity_token=token) if token else None


# --- helper programs ------------------------------------------------------------------------------


async def _run_helper(name: str, server: str, key: str) -> Login | None:
    """Run ``docker-credential-NAME get`` with the server on standard input.

    This is the protocol of docker-credential-helpers. A cancelled call ends the helper.

    Args:
        name: The part of the program's name after ``docker-credential-``.
        server: The registry.
        key: Configuration key that names the helper, for messages.
    """
    if not _HELPER_NAME.fullmatch(name):
        raise UpstreamUnavailable(f"the name of a credential helper in {key} is malformed")
    helper = f"the credential helper {name} of {key}"
    try:
        process = await asyncio.create_subprocess_exec(
            f"docker-credential-{name}",
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise UpstreamUnavailable(f"{helper} cannot be run: {error.strerror}") from error
    try:
        output, _ = await process.communicate(server.encode())
    finally:
        if process.returncode is None:
            # A helper may be a script. The processes that it started keep its output open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        if b"credentials not found" in output:
            return None
        # Its output is not shown: it may hold a secret.
        raise UpstreamUnavailable(f"{helper} failed with exit status {process.returncode}")
    try:
        document = json.loads(output[:_MAX_OUTPUT_BYTES])
        username, secret = str(document["Username"]), str(document["Secret"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UpstreamUnavailable(f"{helper} returned a malformed response") from error
    return (
        Login(username="", password="", identity_token=secret)
        if username == _TOKEN_USER
        else Login(username, secret)
    )
