"""The container runtimes of a node, and the commands with which each pulls and removes an image.

Lives here: which there are, how one is found, which registries it can mirror, and what to do if it
ignores the mirror. Must not know: which image is pulled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mirror.cli.client_files import HUB
from mirror.cli.doctor.findings import Checked, Finding

CONTAINERD_CONFIG: Final = "/etc/containerd/config.toml"
"""Configuration file of containerd, unless the arguments name another one."""
_CERTS_DIRECTORY: Final = "/etc/containerd/certs.d"
_CRI_PLUGINS: Final = ("io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri")
"""Plugins of containerd 2.x and 1.x that have ``registry.config_path``."""
_NAMESPACE: Final = "oci-mirror-check"
"""Namespace of containerd for the probe image, so that no other one gets it."""
_QUERY_TIMEOUT_S: Final = 10.0
"""Seconds for a command that only asks a runtime."""
_PROBE_TIMEOUT: Final = "3s"
"""Time in which a daemon on this machine accepts a connection."""
_SOCKET: Final = "/run/containerd/containerd.sock"

Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime that is on this node."""

    name: str
    pull: Callable[[str], Command]
    """Returns the command that pulls an image."""
    remove: Callable[[str], Command]
    """Returns the command that removes it again."""
    remedy: Callable[[str], str]
    """Returns what to do if pulls of a registry do not come to the mirror."""
    may_mirror: Callable[[str], bool] = lambda registry: True
    """Returns whether it can pull from a registry through a mirror at all."""
    findings: tuple[Finding, ...] = ()
    """Findings about its configuration."""
    probe: Command = ()
    """A command that fails if the runtime does not run. Empty: it has no daemon."""
    start: str = ""
    """The command that starts its daemon."""


@dataclass(frozen=True, slots=True)
class NodeMachine:
    """The machine whose runtimes are checked. Tests replace its parts."""

    environ: Mapping[str, str]
    containerd_config: str = CONTAINERD_CONFIG

    def find(self, program: str) -> str | None:
        """Return the path of a program. None: it is not installed."""
        return shutil.which(program, path=self.environ.get("PATH"))

    def query(self, *command: str) -> str:
        """Return the output of a command. Empty if it fails."""
        try:
            done = subprocess.run(  # noqa: S603 - fixed programs, no shell
                command,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_QUERY_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def find_runtimes(node: NodeMachine, chosen: Sequence[str]) -> list[Runtime]:
    """Return the runtimes on a node. ``chosen``: their names; empty for all that there are."""
    found = (build(node) for name, build in RUNTIMES.items() if not chosen or name in chosen)
    return [runtime for runtime in found if runtime is not None]


# --- containerd, Kubernetes -----------------------------------------------------------------------


def _containerd(node: NodeMachine) -> Runtime | None:
    """Return containerd as ``ctr`` uses it, with the directory that its configuration names."""
    ctr = node.find("ctr")
    if ctr is None or not (node.find("containerd") or os.path.exists(_SOCKET)):
        return None
    config = _read_containerd_config(node)
    directories = _config_path_of(config)
    directory = directories[0] if directories else _CERTS_DIRECTORY
    address = node.environ.get("CONTAINERD_ADDRESS") or _address_of(config)
    start = (ctr, "--address", address, "--namespace", _NAMESPACE)

    def remedy(registry: str) -> str:
        file = Path(directory, registry, "hosts.toml")
        default = Path(directory, "_default", "hosts.toml")
        if not file.exists() and not default.exists():
            return f"there is no {file}: write it with oci-mirror clients --for containerd"
        present = file if file.exists() else default
        return (
            f"compare {present} with the output of oci-mirror clients --for containerd, and check "
            "that the node reaches the address in it"
        )

    return Runtime(
        "containerd",
        lambda image: (*start, "content", "fetch", "--hosts-dir", directory, image),
        lambda image: (*start, "images", "rm", "--sync", image),
        remedy,
        findings=_config_path_findings(node, config, directories),
        probe=(ctr, "--address", address, "--connect-timeout", _PROBE_TIMEOUT, "version"),
        start="systemctl start containerd",
    )


def _read_containerd_config(node: NodeMachine) -> dict[str, Any]:
    """Return the configuration of containerd with its defaults and imports, as it states it."""
    text = node.query("containerd", "--config", node.containerd_config, "config", "dump")
    try:
        return tomllib.loads(text or Path(node.containerd_config).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _config_path_of(config: Mapping[str, Any]) -> list[str]:
    """Return the directories of ``hosts.toml`` files that the configuration names."""
    for plugin in _CRI_PLUGINS:
        section: Any = config
        for key in ("plugins", plugin, "registry", "config_path"):
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, str) and section:
            return section.split(":")
    return []


def _address_of(config: Mapping[str, Any]) -> str:
    section = config.get("grpc")
    address = section.get("address") if isinstance(section, dict) else None
    return str(address or _SOCKET)


def _config_path_findings(
    node: NodeMachine, config: Mapping[str, Any], directories: Sequence[str]
) -> tuple[Finding, ...]:
    subject = Checked("config_path", node.containerd_config)
    disabled = config.get("disabled_plugins") or []
    if any(plugin in disabled for plugin in ("cri", *_CRI_PLUGINS)):
        return ()  # Kubernetes cannot use this containerd.
    remedy = (
        f'set config_path = "{_CERTS_DIRECTORY}" in [plugins."io.containerd.grpc.v1.cri".registry] '
        '(1.x) or [plugins."io.containerd.cri.v1.images".registry] (2.x), and restart containerd'
    )
    if not directories:
        message = "it names no config_path, so Kubernetes pulls without any hosts.toml"
        if node.find("kubelet"):
            return (subject.problem(message, remedy),)
        return (subject.warning(f"{message}; there is no kubelet here", remedy),)
    if len(directories) > 1:
        return (
            subject.warning(
                f"config_path has {len(directories)} directories: containerd 2.1 and later then "
                "ignores all hosts.toml files without a message",
                remedy,
            ),
        )
    return (subject.ok(f"config_path is {directories[0]}"),)


def _cri(node: NodeMachine) -> Runtime | None:
    """Return the runtime behind the CRI, as the kubelet uses it."""
    crictl = node.find("crictl")
    start = "systemctl start containerd, or crio; see the endpoint in /etc/crictl.yaml"
    return None if crictl is None else _crictl("cri", (crictl,), start=start)


def _k3s(node: NodeMachine) -> Runtime | None:
    k3s = node.find("k3s")
    if k3s is None:
        return None
    return _crictl("k3s", (k3s, "crictl"), "k3s", "/etc/rancher/k3s/registries.yaml")


def _crictl(
    name: str,
    command: Command,
    client: str = "containerd",
    file: str = "the hosts.toml of the registry (CRI-O: registries.conf)",
    start: str = "systemctl start k3s, or k3s-agent",
) -> Runtime:
    return Runtime(
        name,
        lambda image: (*command, "pull", image),
        lambda image: (*command, "rmi", image),
        lambda registry: (
            f"compare {file} with the output of oci-mirror clients --for {client}, and restart "
            "the runtime after a change of its own configuration"
        ),
        probe=(*command, "version"),
        start=start,
    )


# --- Docker, Podman -------------------------------------------------------------------------------


def _docker(node: NodeMachine) -> Runtime | None:
    docker = node.find("docker")
    if docker is None:
        return None

    def remedy(registry: str) -> str:
        shown = "{{json .RegistryConfig.Mirrors}}"
        mirrors = node.query(docker, "info", "--format", shown).strip()
        if mirrors in ("", "null", "[]"):
            return (
                "the engine has no mirror: write registry-mirrors into "
                "/etc/docker/daemon.json (oci-mirror clients --for docker), and reload it "
                "(systemctl reload docker)"
            )
        return f"the engine has the mirrors {mirrors}: check the URL, and that it reaches it"

    return Runtime(
        "docker",
        lambda image: (docker, "pull", "--quiet", image),
        lambda image: (docker, "rmi", image),
        remedy,
        may_mirror=lambda registry: registry == HUB,
        probe=(docker, "version"),
        start="systemctl start docker",
    )


def _podman(node: NodeMachine) -> Runtime | None:
    podman = node.find("podman")
    if podman is None:
        return None
    return Runtime(
        "podman",
        lambda image: (podman, "pull", "--quiet", image),
        lambda image: (podman, "rmi", image),
        lambda registry: (
            "compare /etc/containers/registries.conf and registries.conf.d with the output of "
            "oci-mirror clients --for podman; ~/.config/containers/registries.conf replaces them"
        ),
    )


RUNTIMES: Final[Mapping[str, Callable[[NodeMachine], Runtime | None]]] = {
    "containerd": _containerd,
    "cri": _cri,
    "k3s": _k3s,
    "docker": _docker,
    "podman": _podman,
}
"""Name -> the function that finds the runtime on a node. None: it is not there."""
