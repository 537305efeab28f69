"""Logins from the configuration, files, a Docker ``config.json``, and credential helpers.

Lives here: the look-up of a login, and a short-lived cache. A pull of forty layers runs a helper
once, and a rotated secret is read as soon as the old one is refused. Must not know: where a login
is sent. Secrets are never printed: they are in no repr and in no error message.
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
from math import inf
from pathlib import Path
from typing import Any, Final

from mirror.config.settings import Credentials
from mirror.oci.errors import MirrorError, UpstreamTimeout, UpstreamUnavailable
from mirror.single_flight import SingleFlight

LOGIN_TTL_S: Final = 30.0
"""Seconds for which a login is cached, unless it is refused: about one pull."""
_LOOKUP_TIMEOUT_S: Final = 10.0
"""Seconds for one look-up at most: cloud helpers take one or two, and a client is waiting."""
_MAX_OUTPUT_BYTES: Final = 64 * 1024
"""Bytes of a helper's output that are read. Logins have a few KiB."""
_TOKEN_USER: Final = "<token>"  # noqa: S105 - the user name that marks an identity token
_DOCKER_HUB: Final = "https://index.docker.io/v1/"
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
    """Cached logins of one upstream, by host. Concurrent requests share one look-up."""

    def __init__(
        self,
        credentials: Credentials,
        upstream: str,
        single_flight: SingleFlight,
        clock: Callable[[], float],
        timeout: float = inf,
    ) -> None:
        """Create an empty cache.

        Args:
            credentials: Sources of logins.
            upstream: Name of the upstream.
            single_flight: Runs the look-ups.
            clock: Returns seconds.
            timeout: Seconds that an attempt of a request may take: a look-up takes no longer.
        """
        self._timeout = timeout
        self._credentials = credentials
        self._upstream = upstream
        self._single_flight = single_flight
        self._clock = clock
        self._lookups: dict[str, CredentialLookup] = {}

    async def get(self, host: str, refused: CredentialLookup | None = None) -> CredentialLookup:
        """Return the login for ``host``, cached or looked up now.

        Args:
            host: Host of the endpoint, with its port if it is not the default one.
            refused: A look-up whose login was refused. It is not returned from the cache.

        Raises:
            UpstreamError: see :func:`look_up`.
            Draining: the process shuts down.
        """
        lookup = self._lookups.get(host)
        if (
            lookup is None
            or lookup is refused
            or self._clock() - lookup.looked_up_at >= LOGIN_TTL_S
        ):
            key = "login", self._upstream, host
            lookup = await self._single_flight.share(key, lambda: self._renew(host))
        return lookup

    async def _renew(self, host: str) -> CredentialLookup:
        """Look a login up, and replace the cached one. After a failure, none is cached."""
        try:
            login = await look_up(self._credentials, self._upstream, host, self._timeout)
        except MirrorError:
            self._lookups.pop(host, None)
            raise
        lookup = self._lookups[host] = CredentialLookup(login, self._clock())
        return lookup


async def look_up(
    credentials: Credentials, upstream: str, host: str, timeout: float = inf
) -> Login | None:
    """Look up the login of an upstream.

    Args:
        credentials: Sources of logins. The first one that is configured is used.
        upstream: Name of the upstream.
        host: Host of its endpoint, with its port if it is not the default one.
        timeout: Seconds at most. More than 10 s count as 10 s.

    Returns:
        The login. None if the source has no login for this host.

    Raises:
        UpstreamUnavailable: a configured source cannot be read.
        UpstreamTimeout: the look-up took longer than ``timeout``.
    """
    timeout = min(timeout, _LOOKUP_TIMEOUT_S)
    try:
        async with asyncio.timeout(timeout):
            if credentials.username is not None:
                password = await asyncio.to_thread(_resolve_password, credentials.password or "")
                return Login(credentials.username, password)
            if credentials.helper is not None:
                return await _run_helper(credentials.helper, _server_name(upstream, host))
            if credentials.docker_config is not None:
                return await _read_docker_config(credentials.docker_config, upstream, host)
            return None
    except TimeoutError as error:
        raise UpstreamTimeout(f"no credentials after {timeout:g} s") from error


def _resolve_password(value: str) -> str:
    is_file = value.startswith("file:")
    return _read_file(value.removeprefix("file:")).rstrip("\r\n") if is_file else value


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        # RuntimeError: the user of ~user does not exist.
        raise UpstreamUnavailable("the credentials cannot be read") from error


def _server_name(upstream: str, host: str) -> str:
    """Return the key of a registry in Docker's configuration and for helpers."""
    return _DOCKER_HUB if upstream == "docker.io" else host


async def _read_docker_config(path: str, upstream: str, host: str) -> Login | None:
    """Read ``credHelpers``, ``auths`` and ``credsStore``, in the order of docker/cli."""
    text = await asyncio.to_thread(_read_file, path)
    server = _server_name(upstream, host)
    try:
        document = json.loads(text)
        helper = _find_entry(document.get("credHelpers"), upstream, host)
        if helper is not None:
            return await _run_helper(str(helper[1]), helper[0])
        entry = _find_entry(document.get("auths"), upstream, host)
        login = _parse_auth(entry[1]) if entry is not None else None
        store = document.get("credsStore")
        return await _run_helper(str(store), server) if login is None and store else login
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UpstreamUnavailable("the Docker configuration cannot be read") from error


def _find_entry(section: Any, upstream: str, host: str) -> tuple[str, Any] | None:
    """Return (key, value) of a section for this registry, without empty values.

    A key that equals a name goes first. Keys are hosts, or URLs with any path (docker/cli,
    ``ConvertToHostname``).
    """
    if not section:
        return None
    names = dict.fromkeys((_server_name(upstream, host), upstream, host))
    entries: Mapping[str, Any] = {str(key): value for key, value in section.items() if value}
    for name in names:
        if name in entries:
            return name, entries[name]
    hosts = {_host_of(name) for name in names}
    return next(((key, value) for key, value in entries.items() if _host_of(key) in hosts), None)


def _host_of(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


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
        return Login(username, password.rstrip("\0"), token)
    if entry.get("username"):
        return Login(str(entry["username"]), str(entry.get("password") or ""), token)
    return Login("", "", token) if token else None


async def _run_helper(name: str, server: str) -> Login | None:
    """Run ``docker-credential-NAME get`` with the server on standard input.

    This is the protocol of docker-credential-helpers. A cancelled call ends the helper.
    """
    if not _HELPER_NAME.fullmatch(name):
        raise UpstreamUnavailable("the name of the credential helper is malformed")
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
        raise UpstreamUnavailable(f"the credential helper {name} cannot be run") from error
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
        raise UpstreamUnavailable(f"the credential helper {name} failed")
    try:
        document = json.loads(output[:_MAX_OUTPUT_BYTES])
        username, secret = str(document["Username"]), str(document["Secret"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"the credential helper {name} returned a malformed response"
        raise UpstreamUnavailable(message) from error
    return Login("", "", secret) if username == _TOKEN_USER else Login(username, secret)
