"""The parts that the configuration files of all clients share.

Lives here: the mirror's address as clients see it, one file, the setup of one client, and how files
are written. Only ``write_files`` does I/O. Must not know: the clients, the server.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mirror.config.settings import Upstream
from mirror.config.values import check_http_url

HUB: Final = "docker.io"
"""Name of Docker Hub in image references."""


@dataclass(frozen=True, slots=True)
class MirrorAddress:
    """The address at which clients reach the mirror, and its certificate authority, if any."""

    url: str
    host: str
    """Host and port, as in image references."""
    is_https: bool
    ca: str | None = None
    """Path of a PEM file on the client's machine; None to use the authorities of its system."""
    ca_text: str = ""
    """The text of ``ca``."""

    @classmethod
    def parse(cls, url: str, ca: str | None = None, ca_text: str = "") -> MirrorAddress:
        """Check ``url``, which has no path. Raises ``ValueError``."""
        parts = urlsplit(check_http_url(url.rstrip("/")))
        if parts.path:
            raise ValueError("must have no path: clients find /v2/ at the root")
        if ca is not None and parts.scheme != "https":
            raise ValueError("a certificate authority is for https://")
        return cls(
            url=f"{parts.scheme}://{parts.netloc}",
            host=parts.netloc,
            is_https=parts.scheme == "https",
            ca=ca,
            ca_text=ca_text,
        )


@dataclass(frozen=True, slots=True)
class ClientLogin:
    """The credentials that clients send to the mirror, in each request."""

    authorization: str = field(repr=False)
    """The header field ``Authorization``."""

    @classmethod
    def parse(cls, text: str) -> ClientLogin:
        """Parse ``USER:PASSWORD``, or a token. Raises ``ValueError``."""
        line = text.strip()
        if not line or not line.isprintable():
            raise ValueError("must have one line: USER:PASSWORD, or a token")
        if ":" not in line:
            return cls(f"Bearer {line}")
        return cls(f"Basic {base64.b64encode(line.encode()).decode()}")


@dataclass(frozen=True, slots=True)
class SetupOptions:
    """Options of the files to build: the mirror, the upstreams, and the kind of access."""

    mirror: MirrorAddress
    upstreams: Mapping[str, Upstream]
    default_upstream: str = HUB
    """The mirror's ``default_upstream``."""
    is_enforced: bool = False
    """Leave out the fallback to the upstream: clients cannot pull what the mirror refuses."""
    hosted_name: str | None = None
    """The host of the hosted repositories, which is one of ``upstreams``. None: there are none."""
    login: ClientLogin | None = None
    """The credentials of the clients. None: they send none."""

    def has_fallback(self, name: str | None) -> bool:
        """Return whether there is another source than the mirror. ``name``: None for any name."""
        return not self.is_enforced and (name is None or name != self.hosted_name)


@dataclass(frozen=True, slots=True)
class ClientFile:
    """One file for a client."""

    path: str
    """Path below ``/etc`` on the client's machine, or the file's name if it is not ``on_node``."""
    text: str
    is_on_node: bool = True
    """False: the file is passed to a tool, which writes the files of the machine."""
    is_secret: bool = False
    """Whether the text has credentials: then only the owner may read the file."""


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """The files of one client, and notes for the person who installs them."""

    files: Sequence[ClientFile]
    notes: Sequence[str]


def toml_string(text: str) -> str:
    """Return ``text`` quoted for TOML and YAML."""
    # A JSON string of ASCII is a basic string of TOML (TOML 1.0, "String"), and one of YAML 1.2.
    return json.dumps(text)


def registry_url(name: str, upstream: Upstream) -> str:
    """Return the URL of the registry itself: the fallback of every client, if the mirror fails.

    The name in the image decides, and not the mirror's endpoint. That may be another cache, or an
    address that means another machine on a node. An endpoint only tells that the registry of this
    name speaks plain HTTP.
    """
    if name == HUB:
        return "https://registry-1.docker.io"
    is_plain = f"http://{name}" in (endpoint.rstrip("/") for endpoint in upstream.endpoints)
    return f"{'http' if is_plain else 'https'}://{name}"


def pull_urls(options: SetupOptions, name: str) -> list[str]:
    """Return the URLs of a client that asks one after the other, and then ``https://name``.

    A registry that speaks plain HTTP has to be named, because these clients do not try that.
    """
    registry = registry_url(name, options.upstreams[name])
    is_named = registry.startswith("http://") and not options.is_enforced
    return [options.mirror.url, *([registry] if is_named else [])]


def fallback_notes(upstreams: Mapping[str, Upstream]) -> list[str]:
    """Return a note for each upstream of which the mirror asks another host than clients do."""
    notes = []
    for name, upstream in upstreams.items():
        fallback = registry_url(name, upstream)
        if fallback not in (endpoint.rstrip("/") for endpoint in upstream.endpoints):
            notes.append(
                f"{name}: if the mirror fails, clients pull from {fallback}, and not from its "
                f"endpoint {upstream.endpoints[0]}, which is for the mirror only"
            )
    return notes


def write_files(directory: Path, files: Sequence[ClientFile]) -> list[tuple[Path, bool]]:
    """Write ``files`` below ``directory``. Returns each path, and whether it was written.

    An existing file that differs is never overwritten: for such a file ``FileExistsError`` is
    raised before any file is written. Raises ``OSError``, too.
    """
    targets = [(directory / file.path, file.text, file.is_secret) for file in files]
    for path, text, _ in targets:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise FileExistsError(f"{path} exists and differs: not overwritten")
    results = []
    for path, text, is_secret in targets:
        is_new = not path.exists()
        if is_new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600 if is_secret else 0o666)
            path.write_text(text, encoding="utf-8")
        results.append((path, is_new))
    return results
