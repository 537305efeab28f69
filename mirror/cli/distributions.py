"""The configuration of Kubernetes distributions that write the runtime's files themselves.

Lives here: one function for each distribution. On their nodes a file that a person writes for
containerd is ignored, or is lost at the next start. Does no I/O. Must not know: the server.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any, Final

import yaml

from mirror.cli.client_files import ClientFile, ClientSetup, SetupOptions, pull_urls, toml_string

_NO_ENFORCE: Final = (
    "--enforce has no effect: this configuration cannot remove the fallback to the registry "
    "itself. Block the way to the registries"
)


def _as_yaml(document: object) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False)
    return text


def _k3s(options: SetupOptions) -> ClientSetup:
    return _registries_yaml(options, "k3s")


def _rke2(options: SetupOptions) -> ClientSetup:
    return _registries_yaml(options, "rke2")


def _registries_yaml(options: SetupOptions, product: str) -> ClientSetup:
    mirror = options.mirror
    tree: dict[str, Any] = {
        "mirrors": {name: {"endpoint": pull_urls(options, name)} for name in options.upstreams}
    }
    if mirror.ca is not None:
        tree["configs"] = {mirror.host: {"tls": {"ca_file": mirror.ca}}}
    notes = [
        (
            f"on every node; restart {product} afterwards. It writes containerd's certs.d from "
            "this file at each start, and deletes what was written there by hand"
        )
    ]
    if options.is_enforced:
        notes.append(
            "--enforce needs the option disable-default-registry-endpoint: true in "
            f"/etc/rancher/{product}/config.yaml, too, on every node"
        )
    return ClientSetup([ClientFile(f"rancher/{product}/registries.yaml", _as_yaml(tree))], notes)


def _gke(options: SetupOptions) -> ClientSetup:
    mirror = options.mirror
    ca = [{"gcpSecretManagerSecretUri": "projects/PROJECT/secrets/NAME/versions/1"}]

    def host(url: str) -> dict[str, Any]:
        entry = {
            "host": url,
            "capabilities": ["HOST_CAPABILITY_PULL", "HOST_CAPABILITY_RESOLVE"],
        }
        return entry if url != mirror.url or mirror.ca is None else {**entry, "ca": deepcopy(ca)}

    tree = {
        "registryHosts": [
            {"server": name, "hosts": [host(url) for url in pull_urls(options, name)]}
            for name in options.upstreams
        ]
    }
    notes = [
        (
            "pass the file to `gcloud container node-pools update --containerd-config-from-file "
            "FILE`: GKE makes the nodes anew, and writes hosts.toml itself"
        ),
    ]
    if mirror.ca is not None:
        notes.append("put the certificate authority into Secret Manager, and name it in the file")
    if options.is_enforced:
        notes.insert(0, _NO_ENFORCE)
    return ClientSetup([ClientFile("gke.yaml", _as_yaml(tree), is_on_node=False)], notes)


def _eks(options: SetupOptions) -> ClientSetup:
    # One directory: with the default, a list of two, containerd's transfer service reads neither.
    text = (
        "apiVersion: node.eks.aws/v1alpha1\n"
        "kind: NodeConfig\n"
        "spec:\n"
        "  containerd:\n"
        "    config: |\n"
        "      [plugins.'io.containerd.cri.v1.images'.registry]\n"
        '      config_path = "/etc/containerd/certs.d"\n'
    )
    notes = (
        (
            "a part of type application/node.eks.aws of the user data of Amazon Linux 2023; a "
            "second part, a shell script, writes the files of `clients --for containerd`"
        ),
        (
            "nodes with containerd 1.x name the section io.containerd.grpc.v1.cri in place of "
            "io.containerd.cri.v1.images"
        ),
    )
    return ClientSetup([ClientFile("eks-nodeconfig.yaml", text, is_on_node=False)], notes)


def _bottlerocket(options: SetupOptions) -> ClientSetup:
    mirror = options.mirror
    blocks = [
        "[[settings.container-registry.mirrors]]\n"
        f"registry = {toml_string(name)}\n"
        f"endpoint = [{', '.join(map(toml_string, pull_urls(options, name)))}]\n"
        for name in options.upstreams
    ]
    if mirror.ca_text:
        data = base64.b64encode(mirror.ca_text.encode()).decode()
        blocks.append(f'[settings.pki.oci-mirror]\ndata = "{data}"\ntrusted = true\n')
    notes = ["user data of the nodes; Bottlerocket has no files that can be written by hand"]
    if options.is_enforced:
        notes.insert(0, _NO_ENFORCE)
    text = "\n".join(blocks)
    return ClientSetup([ClientFile("bottlerocket.toml", text, is_on_node=False)], notes)


def _talos(options: SetupOptions) -> ClientSetup:
    mirror = options.mirror
    skip = {"skipFallback": True} if options.is_enforced else {}
    registries: dict[str, Any] = {
        "mirrors": {
            name: {"endpoints": pull_urls(options, name), **skip} for name in options.upstreams
        }
    }
    if mirror.ca_text:
        ca = base64.b64encode(mirror.ca_text.encode()).decode()
        registries["config"] = {mirror.host: {"tls": {"ca": ca}}}
    notes = (
        (
            "`talosctl patch machineconfig --patch @FILE` on every node; Talos writes "
            "/etc/cri/conf.d/hosts itself"
        ),
    )
    text = _as_yaml({"machine": {"registries": registries}})
    return ClientSetup([ClientFile("talos.yaml", text, is_on_node=False)], notes)


DISTRIBUTIONS: Final[Mapping[str, Callable[[SetupOptions], ClientSetup]]] = MappingProxyType(
    {
        "k3s": _k3s,
        "rke2": _rke2,
        "gke": _gke,
        "eks": _eks,
        "bottlerocket": _bottlerocket,
        "talos": _talos,
    }
)
"""Name on the command line to the function that builds the setup."""
