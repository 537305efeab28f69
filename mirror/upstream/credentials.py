"""Where secrets come from: the configuration, files, a Docker ``config.json``, helper programs.

Lives here: looking a login up, at each use, so that a rotated secret is taken at once. Must not
know: what it is shown to. Nothing here is ever printed: logins have no repr, errors no values.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mirror.config import Credentials
from mirror.oci.errors import UpstreamUnavailable

_HELPER_TIMEOUT: Final = 10.0
_OUTPUT_LIMIT: Final = 64 * 1024
_TOKEN_USER: Final = "<token>"  # noqa: S105 - the name that helpers give to identity tokens
_DOCKER_HUB: Final = "https://index.docker.io/v1/"


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
    def basic(self) -> str:
        """``Authorization`` of RFC 7617."""
        raw = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(raw).decode("ascii")


async def look_up(credentials: Credentials, upstream: str, host: str) -> Login | None:
    """The login for an upstream whose endpoint is ``host`` (with its port, if it has one).

    Raises :class:`UpstreamUnavailable` where a source that is configured cannot be read.
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
    except (OSError, UnicodeDecodeError) as error:
        raise UpstreamUnavailable("credentials cannot be read") from error


def _server(upstream: str, host: str) -> str:
    return _DOCKER_HUB if upstream == "docker.io" else host


async def _from_docker_config(path: str, upstream: str, host: str) -> Login | None:
    """``auths``, ``credHelpers`` and ``credsStore`` of docker/cli's ``config.json``."""
    text = await asyncio.to_thread(_read, path)
    try:
        document = json.loads(text)
        names = [_server(upstream, host), upstream, host, f"https://{host}", f"https://{upstream}"]
        helpers = document.get("credHelpers") or {}
        for name in names:
            if name in helpers:
                return await _ask_helper(str(helpers[name]), name)
        auths = document.get("auths") or {}
        for name in names:
            login = _from_auth(auths.get(name))
            if login is not None:
                return login
        store = document.get("credsStore")
        return await _ask_helper(str(store), _server(upstream, host)) if store else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UpstreamUnavailable("the Docker configuration cannot be read") from error


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
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UpstreamUnavailable("the name of a credential helper is not a name")
    try:
        process = await asyncio.create_subprocess_exec(
            f"docker-credential-{name}",
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise UpstreamUnavailable(f"the credential helper {name} cannot be run") from error
    try:
        async with asyncio.timeout(_HELPER_TIMEOUT):
            output, _ = await process.communicate(server.encode())
    except TimeoutError as error:
        raise UpstreamUnavailable(f"the credential helper {name} does not answer") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        if b"credentials not found" in output:
            return None
        raise UpstreamUnavailable(f"the credential helper {name} failed")
    try:
        document = json.loads(output[:_OUTPUT_LIMIT])
        username, secret = str(document["Username"]), str(document["Secret"])
    except (ValueError, TypeError, KeyError) as error:
        raise UpstreamUnavailable(f"the credential helper {name} answers nonsense") from error
    return Login("", "", secret) if username == _TOKEN_USER else Login(username, secret)
