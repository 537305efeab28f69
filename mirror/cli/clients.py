"""``clients``: the files that make clients pull through the mirror.

Lives here: what each client's configuration looks like, and what silently goes wrong with it. Pure,
but for ``write``. Must not know: the server.
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


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where clients reach the mirror. ``ca``: a PEM file, by its path on the client's machine."""

    url: str
    host: str
    """With its port, as in image references."""
    secure: bool
    ca: str | None = None
    authority: str = ""
    """What ``ca`` holds."""

    @classmethod
    def parse(cls, url: str, ca: str | None = None, authority: str = "") -> Mirror:
        """Raises ``ValueError``."""
        parts = urlsplit(check_endpoint(url.rstrip("/")))
        if parts.path:
            raise ValueError("must have no path: clients find /v2/ at the root")
        if ca is not None and parts.scheme != "https":
            raise ValueError("a certificate authority is for https://")
        secure = parts.scheme == "https"
        return cls(f"{parts.scheme}://{parts.netloc}", parts.netloc, secure, ca, authority)


@dataclass(frozen=True, slots=True)
class File:
    """``path``: below ``/etc`` on the client's machine."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Setup:
    """What one client needs: its files, and what to know about them."""

    files: Sequence[File]
    notes: Sequence[str]


def setup(
    client: str, mirror: Mirror, upstreams: Mapping[str, Upstream], default: str = _HUB
) -> Setup:
    """The files of one of ``CLIENTS``. ``default``: the mirror's ``default_upstream``."""
    match client:
        case "containerd":
            return _containerd(mirror, upstreams)
        case "docker":
            return _docker(mirror, upstreams, default)
        case "podman":
            return _podman(mirror, upstreams)
        case "buildkit":
            return _buildkit(mirror, upstreams)
    raise ValueError(f"no such client: {client}")


def _quoted(text: str) -> str:
    # A JSON string of ASCII is a basic string of TOML.
    return json.dumps(text)


def _server(name: str, upstream: Upstream) -> str:
    """Where a client asks when the mirror fails: the upstream itself."""
    first = upstream.endpoints[0].rstrip("/")
    # A prefix in the endpoint's path is another mirror's; hosts.toml means the registry itself.
    if not urlsplit(first).path:
        return first
    return "https://registry-1.docker.io" if name == _HUB else f"https://{name}"


def _containerd(mirror: Mirror, upstreams: Mapping[str, Upstream]) -> Setup:
    files = []
    for name, upstream in upstreams.items():
        lines = [
            f"server = {_quoted(_server(name, upstream))}",
            "",
            f"[host.{_quoted(mirror.url)}]",
            '  capabilities = ["pull", "resolve"]',
        ]
        if mirror.ca is not None:
            lines.append(f"  ca = {_quoted(mirror.ca)}")
        files.append(File(f"containerd/certs.d/{name}/hosts.toml", "\n".join(lines) + "\n"))
    return Setup(
        files,
        (
            (
                "containerd reads these files only where its config.toml names them: 1.x "
                '[plugins."io.containerd.grpc.v1.cri".registry], 2.x '
                '[plugins."io.containerd.cri.v1.images".registry], '
                'config_path = "/etc/containerd/certs.d"; restart containerd once'
            ),
            (
                "containerd 2.1 and later may pull through its transfer service, which reads no "
                "hosts.toml: no request arrives here, and nothing is logged. Set "
                'use_local_image_pull = true in [plugins."io.containerd.cri.v1.images"]'
            ),
            "config_path must not be set together with registry.mirrors or registry.configs",
            "ctr reads them with --hosts-dir /etc/containerd/certs.d, nerdctl as they are",
        ),
    )


def _docker(mirror: Mirror, upstreams: Mapping[str, Upstream], default: str) -> Setup:
    text = json.dumps({"registry-mirrors": [mirror.url]}, indent=2) + "\n"
    files = [File("docker/daemon.json", text)]
    if mirror.ca is not None:
        files.append(File(f"docker/certs.d/{mirror.host}/ca.crt", mirror.authority))
    notes = [
        (
            "Docker mirrors Docker Hub only: other registries are pulled through the mirror as "
            f"{mirror.host}/<upstream>/<repository>"
        ),
        "merge it into a daemon.json that exists; `systemctl reload docker` is enough",
    ]
    if default != _HUB or _HUB not in upstreams:
        notes.insert(
            0,
            "Docker does not say which registry it means: the mirror's default_upstream must be "
            f"docker.io, and it is {default}",
        )
    if not mirror.secure:
        notes.append(
            f'for references that begin with {mirror.host}: "insecure-registries": '
            f'["{mirror.host}"] (not needed on loopback)'
        )
    return Setup(files, notes)


def _podman(mirror: Mirror, upstreams: Mapping[str, Upstream]) -> Setup:
    blocks = []
    if _HUB in upstreams:
        blocks.append(f"unqualified-search-registries = [{_quoted(_HUB)}]\n")
    for name, upstream in upstreams.items():
        # The registry itself, as a fallback; Docker Hub's own address is known to these clients.
        itself = name if name == _HUB else urlsplit(_server(name, upstream)).netloc
        lines = ["[[registry]]", f"prefix = {_quoted(name)}", f"location = {_quoted(itself)}"]
        if _server(name, upstream).startswith("http://"):
            lines.append("insecure = true")
        lines += ["", "[[registry.mirror]]", f"location = {_quoted(f'{mirror.host}/{name}')}"]
        if not mirror.secure:
            lines.append("insecure = true")
        blocks.append("\n".join(lines) + "\n")
    files = [File("containers/registries.conf", "\n".join(blocks))]
    if mirror.ca is not None:
        files.append(File(f"containers/certs.d/{mirror.host}/ca.crt", mirror.authority))
    return Setup(
        files,
        (
            "for Podman, Buildah, skopeo and CRI-O; a file in registries.conf.d does as well",
            (
                "the choice of a mirror is sticky: who answered for the manifest must have all "
                "blobs, a later failure does not fall back"
            ),
        ),
    )


def _buildkit(mirror: Mirror, upstreams: Mapping[str, Upstream]) -> Setup:
    blocks = [
        f"[registry.{_quoted(name)}]\n  mirrors = [{_quoted(mirror.host)}]\n" for name in upstreams
    ]
    itself = f"[registry.{_quoted(mirror.host)}]\n"
    if not mirror.secure:
        blocks.append(f"{itself}  http = true\n")
    elif mirror.ca is not None:
        blocks.append(f"{itself}  ca = [{_quoted(mirror.ca)}]\n")
    return Setup(
        [File("buildkit/buildkitd.toml", "\n".join(blocks))],
        (
            (
                "docker buildx create --use --buildkitd-config FILE (--config before 0.14) makes "
                "a builder with it; Docker's own builder uses daemon.json"
            ),
            f"inside a builder's container, {mirror.host} must be an address that it can reach",
        ),
    )


def write(directory: Path, files: Sequence[File]) -> list[tuple[Path, bool]]:
    """Write them below ``directory``; pairs of path and whether it changed.

    A file that is there and differs is somebody's work. Raises ``FileExistsError`` for it before
    anything is written, and ``OSError``.
    """
    targets = [(directory / file.path, file.text) for file in files]
    for path, text in targets:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise FileExistsError(f"{path} exists and differs: not overwritten")
    done = []
    for path, text in targets:
        changed = not path.exists()
        if changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        done.append((path, changed))
    return done
