"""``clients``: the configuration files with which clients pull through the mirror.

Lives here: the files of each client, and notes about mistakes that no client reports. Only
``write_files`` does I/O. Must not know: the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mirror.config.settings import Upstream
from mirror.config.values import check_endpoint

CLIENTS: Final = ("containerd", "docker", "podman", "buildkit")
_HUB: Final = "docker.io"
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
        parts = urlsplit(check_endpoint(url.rstrip("/")))
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
class ClientFile:
    """One file for a client."""

    path: str
    """Path below ``/etc`` on the client's machine."""
    text: str


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """The files of one client, and notes for the person who installs them."""

    files: Sequence[ClientFile]
    notes: Sequence[str]


def client_setup(
    client: str, mirror: MirrorAddress, upstreams: Mapping[str, Upstream], default: str = _HUB
) -> ClientSetup:
    """Return the setup of ``client``, one of ``CLIENTS``, for pulls of all ``upstreams``.

    ``default``: the mirror's ``default_upstream``. Raises ``ValueError`` for any other client.
    """
    match client:
        case "containerd":
            return _containerd(mirror, upstreams)
        case "docker":
            return _docker(mirror, upstreams, default)
        case "podman":
            return _podman(mirror, upstreams)
        case "buildkit":
            return _buildkit(mirror, upstreams)
    raise ValueError(f"unknown client: {client}")


def _toml_string(text: str) -> str:
    # A JSON string of ASCII is a basic string of TOML (TOML 1.0, "String").
    return json.dumps(text)


def _fallback_url(name: str, upstream: Upstream) -> str:
    """Return the URL that a client uses when the mirror fails: that of the upstream itself."""
    first = upstream.endpoints[0].rstrip("/")
    # An endpoint with a path is another mirror, and hosts.toml means the registry itself.
    if not urlsplit(first).path:
        return first
    return "https://registry-1.docker.io" if name == _HUB else f"https://{name}"


def _containerd(mirror: MirrorAddress, upstreams: Mapping[str, Upstream]) -> ClientSetup:
    files = []
    for name, upstream in upstreams.items():
        lines = [
            f"server = {_toml_string(_fallback_url(name, upstream))}",
            "",
            f"[host.{_toml_string(mirror.url)}]",
            '  capabilities = ["pull", "resolve"]',
        ]
        if mirror.ca is not None:
            lines.append(f"  ca = {_toml_string(mirror.ca)}")
        files.append(ClientFile(f"containerd/certs.d/{name}/hosts.toml", "\n".join(lines) + "\n"))
    return ClientSetup(
        files,
        (
            (
                "containerd reads these files only if its config.toml names the directory: 1.x "
                '[plugins."io.containerd.grpc.v1.cri".registry], 2.x '
                '[plugins."io.containerd.cri.v1.images".registry], '
                'config_path = "/etc/containerd/certs.d"; restart containerd once'
            ),
            (
                "containerd 2.1 and later may pull through its transfer service, which reads no "
                "hosts.toml: no request reaches the mirror, and nothing is logged. Set "
                'use_local_image_pull = true in [plugins."io.containerd.cri.v1.images"]'
            ),
            "config_path must not be set together with registry.mirrors or registry.configs",
            "ctr reads them with --hosts-dir /etc/containerd/certs.d, nerdctl without any option",
        ),
    )


def _docker(mirror: MirrorAddress, upstreams: Mapping[str, Upstream], default: str) -> ClientSetup:
    text = json.dumps({"registry-mirrors": [mirror.url]}, indent=2) + "\n"
    files = [ClientFile("docker/daemon.json", text)]
    if mirror.ca is not None:
        files.append(ClientFile(f"docker/certs.d/{mirror.host}/ca.crt", mirror.ca_text))
    notes = [
        (
            "Docker mirrors Docker Hub only: other registries are pulled through the mirror as "
            f"{mirror.host}/<upstream>/<repository>"
        ),
        "merge the file into an existing daemon.json; `systemctl reload docker` is enough",
    ]
    if default != _HUB or _HUB not in upstreams:
        notes.insert(
            0,
            "Docker sends no registry name to a mirror: the mirror's default_upstream must be "
            f"docker.io, and it is {default}",
        )
    if not mirror.is_https:
        notes.append(
            f'references that begin with {mirror.host} need "insecure-registries": '
            f'["{mirror.host}"] (not needed on loopback)'
        )
    return ClientSetup(files, notes)


def _podman(mirror: MirrorAddress, upstreams: Mapping[str, Upstream]) -> ClientSetup:
    blocks = []
    if _HUB in upstreams:
        blocks.append(f"unqualified-search-registries = [{_toml_string(_HUB)}]\n")
    for name, upstream in upstreams.items():
        # The fallback. These clients know the address of Docker Hub themselves.
        fallback = name if name == _HUB else urlsplit(_fallback_url(name, upstream)).netloc
        lines = [
            "[[registry]]",
            f"prefix = {_toml_string(name)}",
            f"location = {_toml_string(fallback)}",
        ]
        if _fallback_url(name, upstream).startswith("http://"):
            lines.append("insecure = true")
        lines += ["", "[[registry.mirror]]", f"location = {_toml_string(f'{mirror.host}/{name}')}"]
        if not mirror.is_https:
            lines.append("insecure = true")
        blocks.append("\n".join(lines) + "\n")
    files = [ClientFile("containers/registries.conf", "\n".join(blocks))]
    if mirror.ca is not None:
        files.append(ClientFile(f"containers/certs.d/{mirror.host}/ca.crt", mirror.ca_text))
    return ClientSetup(
        files,
        (
            "for Podman, Buildah, skopeo and CRI-O; a file in registries.conf.d does as well",
            (
                "the choice of a mirror is sticky: the host that served the manifest must serve "
                "all blobs, and a later failure does not fall back to another host"
            ),
        ),
    )


def _buildkit(mirror: MirrorAddress, upstreams: Mapping[str, Upstream]) -> ClientSetup:
    blocks = [
        f"[registry.{_toml_string(name)}]\n  mirrors = [{_toml_string(mirror.host)}]\n"
        for name in upstreams
    ]
    section = f"[registry.{_toml_string(mirror.host)}]\n"
    if not mirror.is_https:
        blocks.append(f"{section}  http = true\n")
    elif mirror.ca is not None:
        blocks.append(f"{section}  ca = [{_toml_string(mirror.ca)}]\n")
    return ClientSetup(
        [ClientFile("buildkit/buildkitd.toml", "\n".join(blocks))],
        (
            (
                "docker buildx create --use --buildkitd-config FILE (--config before 0.14) makes "
                "a builder with this file; Docker's built-in builder uses daemon.json"
            ),
            f"inside a builder's container, {mirror.host} must be reachable",
        ),
    )


def write_files(directory: Path, files: Sequence[ClientFile]) -> list[tuple[Path, bool]]:
    """Write ``files`` below ``directory``. Returns each path, and whether it was written.

    An existing file that differs is never overwritten: for such a file ``FileExistsError`` is
    raised before any file is written. Raises ``OSError``, too.
    """
    targets = [(directory / file.path, file.text) for file in files]
    for path, text in targets:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise FileExistsError(f"{path} exists and differs: not overwritten")
    results = []
    for path, text in targets:
        is_new = not path.exists()
        if is_new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        results.append((path, is_new))
    return results
