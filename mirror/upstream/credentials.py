"""Where secrets come from: the configuration, files, a Docker ``config.json``, helper programs.

Lives here: looking a login up, and keeping it for a short while: a pull of forty layers runs a
helper once, and a rotated secret is taken as soon as the old one is refused. Must not know: what it
is shown to. Nothing here is ever printed: logins have no repr, errors no values.
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

from mirror.config.settings import Credentials
from mirror.oci.errors import UpstreamTimeout, UpstreamUnavailable
from mirror.upstream.shared_value import SharedValue

KEPT: Final = 30.0
"""Seconds for which a login is not looked up again, unless it is refused."""
_HELPER_TIMEOUT: Final = 10.0
_OUTPUT_LIMIT: Final = 64 * 1024
_TOKEN_USER: Final = "<token>"  # noqa: S105 - the name that helpers give to identity tokens
_DOCKER_HUB: Final = "https://index.docker.io/v1/"
# The name becomes a part of a file name (the same grammar as in the configuration).
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password, or an identity token."""

    username: str = field(repr=False)
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def identity(self) -> str:
        """Names the login in caches, without giving it away."""
        secret = f"{self.username}\0{self.password}\0{self.identity_token}"
        return hashlib.sha256(secret.encode()).hexdigest()

    @property
    def basic(self) -> str | None:
        """``Authorization`` of RFC 7617; None for an identity token alone."""
        if not self.username and not self.password:
            return None
        raw = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(raw).decode("ascii")


@dataclass(frozen=True, slots=True, eq=False)
class CredentialLookup:
    """What one look-up found (None: nothing), and when."""

    login: Login | None
    at: float

    @property
    def identity(self) -> str:
        """Names the login in caches; empty for none."""
        return self.login.identity if self.login is not None else ""


class Logins:
    """The logins of one upstream, by host: one look-up for all who need one at once."""

    def __init__(self, credentials: Credentials, upstream: str, clock: Callable[[], float]) -> None:
        self._credentials = credentials
        self._upstream = upstream
        self._clock = clock
        self._kept: dict[str, SharedValue[CredentialLookup]] = {}

    async def get(self, host: str, refused: CredentialLookup | None = None) -> CredentialLookup:
        """The login for ``host``; ``refused``, and what is old, is looked up anew.

        Raises what :func:`look_up` raises.
        """

        def good(found: CredentialLookup) -> bool:
            return found is not refused and self._clock() - found.at < KEPT

        async def ask() -> CredentialLookup:
            return CredentialLookup(
                await look_up(self._credentials, self._upstream, host), self._clock()
            )

        return await self._kept.setdefault(host, SharedValue()).get(good, ask)


async def look_up(credentials: Credentials, upstream: str, host: str) -> Login | None:
    """The login for an upstream whose endpoint is ``host`` (with its port, if it has one).

    Raises :class:`UpstreamUnavailable` where a source that is configured cannot be read, and
    :class:`UpstreamTimeout` where a helper does not answer.
    """
    if credentials.username is not None:
        password = await asyncio.to_thread(_resolve, credentials.password or "")
        return Login(credentials.username, password)
    if credentials.helper is not None:
        return await _ask_helper(credentials.helper, _server(upstream, host))
    if credentials.docker_config is not None:
        return await _from_docker_config(credentials.docker_config, upstream, host)
    return None


def _resolve(value: str) -> str:
    if not value.startswith("file:"):
        return value
    return _read(value.removeprefix("file:")).rstrip("\r\n")


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        # RuntimeError: the home of a ~user who does not exist
        raise UpstreamUnavailable("credentials cannot be read") from error


def _server(upstream: str, host: str) -> str:
    return _DOCKER_HUB if upstream == "docker.io" else host


async def _from_docker_config(path: str, upstream: str, host: str) -> Login | None:
    """``credHelpers``, ``auths`` and ``credsStore`` of docker/cli's ``config.json``."""
    text = await asyncio.to_thread(_read, path)
    server = _server(upstream, host)
    try:
        document = json.loads(text)
        helper = _entry(document.get("credHelpers"), upstream, host)
        if helper is not None:
            return await _ask_helper(str(helper[1]), helper[0])
        entry = _entry(document.get("auths"), upstream, host)
        login = _from_auth(entry[1]) if entry is not None else None
        store = document.get("credsStore")
        return await _ask_helper(str(store), server) if login is None and store else login
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UpstreamUnavailable("the Docker configuration cannot be read") from error


def _entry(section: Any, upstream: str, host: str) -> tuple[str, Any] | None:
    """(key, value) of a section for this registry; an empty value is none.

    Keys are hosts, or URLs of any path (docker/cli, ``ConvertToHostname``).
    """
    if not section:
        return None
    names = dict.fromkeys((_server(upstream, host), upstream, host))
    found: Mapping[str, Any] = {str(key): value for key, value in section.items() if value}
    for name in names:
        if name in found:
            return name, found[name]
    hosts = {_host_of(name) for name in names}
    return next(((key, value) for key, value in found.items() if _host_of(key) in hosts), None)


def _host_of(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _from_auth(entry: Any) -> Login | None:
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


async def _ask_helper(name: str, server: str) -> Login | None:
    """The protocol of docker-credential-helpers: ``get`` with the server on standard input."""
    if not _HELPER_NAME.fullmatch(name):
        raise UpstreamUnavailable("the name of a credential helper is not a name")
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
        async with asyncio.timeout(_HELPER_TIMEOUT):
            output, _ = await process.communicate(server.encode())
    except TimeoutError as error:
        raise UpstreamTimeout(f"the credential helper {name} does not answer") from error
    finally:
        if process.returncode is None:
            # A helper may be a script: what it started holds its output open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        if b"credentials not found" in output:
            return None
        raise UpstreamUnavailable(f"the credential helper {name} failed")
    try:
        document = json.loads(output[:_OUTPUT_LIMIT])
        username, secret = str(document["Username"]), str(document["Secret"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UpstreamUnavailable(f"the credential helper {name} answers nonsense") from error
    return Login("", "", secret) if username == _TOKEN_USER else Login(username, secret)
