"""``clients``: the configuration files with which clients pull through the mirror.

Lives here: the clients whose files a person or a tool writes below ``/etc``, and notes about
mistakes that no client reports. Does no I/O. Must not know: the server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

from mirror.cli.client_files import (
    HUB,
    ClientFile,
    ClientSetup,
    SetupOptions,
    registry_url,
    toml_string,
)
from mirror.cli.distributions import DISTRIBUTIONS

_FALLBACK_FACT: Final = (
    "if the mirror refuses a pull (allow, deny), the client pulls from the upstream itself"
)
FALLBACK_NOTE: Final = f"{_FALLBACK_FACT}: use --enforce if the lists must hold"
"""containerd and skopeo ask the upstream after a 403, 404, 429, 451 or 500 of a mirror (tried)."""

_SEND_LOGINS: Final = frozenset({"containerd", "containerd-default", "nerdctl", "stargz"})
"""The clients whose files can have credentials that are sent in each request."""
_LOGIN_NOTE: Final = (
    "the files have the credentials: let only root read them (--write does), and write them again "
    "when they change"
)
_NO_LOGIN_NOTE: Final = (
    "the credentials are not written: this client sends them only if it is asked, and the mirror's "
    "listener never asks. It pulls what everybody may pull"
)


def client_setup(client: str, options: SetupOptions) -> ClientSetup:
    """Return the setup of ``client``, one of ``CLIENTS``. Raises ``ValueError`` for another."""
    build = CLIENTS.get(client)
    if build is None:
        raise ValueError(f"unknown client: {client}")
    setup = build(options)
    if options.login is None:
        return setup
    note = _LOGIN_NOTE if client in _SEND_LOGINS else _NO_LOGIN_NOTE
    return ClientSetup(setup.files, (note, *setup.notes))


# --- containerd -----------------------------------------------------------------------------------

_CONFIG_PATH_NOTES: Final = (
    (
        "containerd reads these files only if its config.toml names the directory, and one "
        'directory only: config_path = "/etc/containerd/certs.d" in '
        '[plugins."io.containerd.grpc.v1.cri".registry] (1.x) or '
        '[plugins."io.containerd.cri.v1.images".registry] (2.x); restart containerd once'
    ),
    (
        "containerd 2.1 and later pulls through its transfer service. With a list of directories, "
        'such as "/etc/containerd/certs.d:/etc/docker/certs.d" (the default of 2.2), it sends no '
        "request to the mirror, and logs nothing: set config_path to the one directory"
    ),
    "config_path must not be set together with registry.mirrors or registry.configs",
)


def _containerd(options: SetupOptions) -> ClientSetup:
    files = [_hosts_file(options, name) for name in options.upstreams]
    ctr = "ctr reads them with --hosts-dir /etc/containerd/certs.d, nerdctl without any option"
    return ClientSetup(files, (*_CONFIG_PATH_NOTES, ctr, *_containerd_notes(options)))


def _nerdctl(options: SetupOptions) -> ClientSetup:
    rootless = "rootless nerdctl reads them below ~/.config/containerd/certs.d"
    return ClientSetup(_containerd(options).files, (rootless, *_containerd_notes(options)))


def _containerd_default(options: SetupOptions) -> ClientSetup:
    """One file for all registries, also for those that are not configured as upstreams."""
    notes = (
        "a directory certs.d/HOST of another registry wins over _default",
        (
            "the mirror answers 404 for registries that are not its upstreams: containerd then "
            "cannot pull from them"
            if options.is_enforced
            else "the mirror answers 404 for registries that are not its upstreams, and containerd "
            "pulls from them directly"
        ),
    )
    return ClientSetup(
        [_hosts_file(options, None)],
        (*_CONFIG_PATH_NOTES, *notes, *_containerd_notes(options)),
    )


def _hosts_file(options: SetupOptions, name: str | None) -> ClientFile:
    """Return the file of an upstream. ``name`` None: that of all registries."""
    return ClientFile(
        f"containerd/certs.d/{name or '_default'}/hosts.toml",
        _hosts_toml(options, name),
        is_secret=options.login is not None,
    )


def _hosts_toml(options: SetupOptions, name: str | None) -> str:
    """Return a hosts.toml. ``name``: the upstream; None for the file of all registries.

    ``server`` is the last host that containerd asks. Without it, that is the registry itself
    (containerd, "Registry Configuration"). So the mirror as ``server`` leaves no other host.
    containerd 1.6 ignores a file without a table ``host``.
    """
    mirror = options.mirror
    keys = ['capabilities = ["pull", "resolve"]']
    if mirror.ca is not None:
        keys.append(f"ca = {toml_string(mirror.ca)}")
    lines, header = [], []
    if options.login is not None:
        header = [f"Authorization = {toml_string(options.login.authorization)}"]
    if not options.has_fallback(name):
        lines = [f"server = {toml_string(mirror.url)}", *keys, ""]
        if header:
            lines += ["[header]", *header, ""]
    elif name is not None:
        server = registry_url(name, options.upstreams[name])
        lines = [f"server = {toml_string(server)}", ""]
    host = f"host.{toml_string(mirror.url)}"
    lines += [f"[{host}]", *(f"  {key}" for key in keys)]
    if header:
        lines += [f"[{host}.header]", *(f"  {key}" for key in header)]
    return "\n".join(lines) + "\n"


def _containerd_notes(options: SetupOptions) -> tuple[str, ...]:
    notes = () if options.is_enforced else (FALLBACK_NOTE,)
    if "[" in options.mirror.host:
        return (
            (
                "containerd 1.6 cannot read a hosts.toml with an IPv6 address, so it pulls from "
                "the registry itself, even with --enforce: use a host name or an IPv4 address"
            ),
            *notes,
        )
    return notes


# --- Docker, Podman, BuildKit, kaniko -------------------------------------------------------------


def _docker(options: SetupOptions) -> ClientSetup:
    mirror = options.mirror
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
    default = options.default_upstream
    if default != HUB or HUB not in options.upstreams:
        notes.insert(
            0,
            "Docker sends no registry name to a mirror: the mirror's default_upstream must be "
            f"docker.io, and it is {default}",
        )
    if options.is_enforced:
        notes.insert(
            0,
            "--enforce has no effect: Docker always falls back to Docker Hub when a mirror "
            "refuses. Block the way to Docker Hub, or pull as "
            f"{mirror.host}/docker.io/<repository>",
        )
    else:
        notes.append(f"{_FALLBACK_FACT}; Docker has no setting against it")
    if not mirror.is_https:
        notes.append(
            f'references that begin with {mirror.host} need "insecure-registries": '
            f'["{mirror.host}"] (not needed on loopback)'
        )
    return ClientSetup(files, notes)


def _podman(options: SetupOptions) -> ClientSetup:
    return ClientSetup(
        _registries_conf(options, "containers/registries.conf"),
        (
            "for Podman, Buildah, skopeo and CRI-O; a file in registries.conf.d does as well",
            *_podman_notes(options),
        ),
    )


def _crio(options: SetupOptions) -> ClientSetup:
    return ClientSetup(
        _registries_conf(options, "containers/registries.conf.d/50-oci-mirror.conf"),
        ("`systemctl reload crio` is enough", *_podman_notes(options)),
    )


def _podman_notes(options: SetupOptions) -> tuple[str, ...]:
    sticky = (
        "the choice of a mirror is sticky: the host that served the manifest must serve "
        "all blobs, and a later failure does not fall back to another host"
    )
    return (sticky,) if options.is_enforced else (sticky, FALLBACK_NOTE)


def _registries_conf(options: SetupOptions, path: str) -> list[ClientFile]:
    """Return a file of the format of containers-registries.conf(5), and the certificate's file."""
    mirror, blocks = options.mirror, []
    if HUB in options.upstreams:
        blocks.append(f"unqualified-search-registries = [{toml_string(HUB)}]\n")
    for name, upstream in options.upstreams.items():
        # The alias, because "host:port" is not valid in the middle of an image reference.
        at_mirror = [f"location = {toml_string(f'{mirror.host}/{upstream.alias_of(name)}')}"]
        if not mirror.is_https:
            at_mirror.append("insecure = true")
        lines = ["[[registry]]", f"prefix = {toml_string(name)}"]
        if not options.has_fallback(name):
            lines += at_mirror
        else:
            url = registry_url(name, upstream)
            # The fallback. These clients know the address of Docker Hub themselves.
            lines.append(f"location = {toml_string(name)}")
            if url.startswith("http://"):
                lines.append("insecure = true")
            lines += ["", "[[registry.mirror]]", *at_mirror]
        blocks.append("\n".join(lines) + "\n")
    files = [ClientFile(path, "\n".join(blocks))]
    if mirror.ca is not None:
        files.append(ClientFile(f"containers/certs.d/{mirror.host}/ca.crt", mirror.ca_text))
    return files


def _buildkit(options: SetupOptions) -> ClientSetup:
    mirror = options.mirror
    blocks = [
        f"[registry.{toml_string(name)}]\n  mirrors = [{toml_string(mirror.host)}]\n"
        + ("  http = true\n" if registry_url(name, upstream).startswith("http://") else "")
        for name, upstream in options.upstreams.items()
    ]
    section = f"[registry.{toml_string(mirror.host)}]\n"
    if not mirror.is_https:
        blocks.append(f"{section}  http = true\n")
    elif mirror.ca is not None:
        blocks.append(f"{section}  ca = [{toml_string(mirror.ca)}]\n")
    notes = [
        (
            "docker buildx create --use --buildkitd-config FILE (--config before 0.14) makes "
            "a builder with this file; Docker's built-in builder uses daemon.json"
        ),
        f"inside a builder's container, {mirror.host} must be reachable",
    ]
    if options.is_enforced:
        notes.insert(
            0,
            "--enforce has no effect: BuildKit always falls back to the registry itself when a "
            "mirror refuses. Block the way to the registries",
        )
    return ClientSetup([ClientFile("buildkit/buildkitd.toml", "\n".join(blocks))], notes)


def _kaniko(options: SetupOptions) -> ClientSetup:
    """Return the arguments of the executor, which reads no file."""
    mirror = options.mirror
    arguments = [
        f"--registry-map={name}={mirror.host}/{upstream.alias_of(name)}"
        for name, upstream in options.upstreams.items()
    ]
    if options.is_enforced:
        arguments.append("--skip-default-registry-fallback")
    if not options.is_enforced:
        urls = (registry_url(name, upstream) for name, upstream in options.upstreams.items())
        plain = [urlsplit(url).netloc for url in urls if url.startswith("http://")]
        arguments += [f"--insecure-registry={host}" for host in plain]
    if not mirror.is_https:
        arguments.append(f"--insecure-registry={mirror.host}")
    elif mirror.ca is not None:
        arguments.append(f"--registry-certificate={mirror.host}={mirror.ca}")
    notes = ["add these arguments to the executor of kaniko"]
    if not options.is_enforced:
        notes.append(FALLBACK_NOTE)
    text = "\n".join(arguments) + "\n"
    return ClientSetup([ClientFile("kaniko.args", text, is_on_node=False)], notes)


# --- lazy snapshotters ----------------------------------------------------------------------------


_SEND_HEADERS: Final = frozenset({"containerd-stargz-grpc"})
"""The snapshotters that can send further header fields (``MirrorConfig`` of stargz-snapshotter)."""


def _stargz(options: SetupOptions) -> ClientSetup:
    return _snapshotter(options, "containerd-stargz-grpc", "0.19.0")


def _soci(options: SetupOptions) -> ClientSetup:
    return _snapshotter(options, "soci-snapshotter-grpc", None)


def _snapshotter(options: SetupOptions, daemon: str, ns_since: str | None) -> ClientSetup:
    """Return the sections for the mirror in the config.toml of a snapshotter.

    See stargz-snapshotter, "Registry mirrors and insecure connection", and soci-snapshotter,
    "Config file options". A host has no path there, so a path cannot name the upstream.

    Args:
        options: The mirror and the upstreams.
        daemon: The program that reads the file.
        ns_since: Its first release that sends ``ns`` (see ``fs/remote/resolver.go`` of
            stargz-snapshotter). None: none does.
    """
    mirror, blocks, unnamed = options.mirror, [], []
    for name, upstream in options.upstreams.items():
        host = mirror.host
        if upstream.hosts:
            own = urlsplit(f"//{upstream.hosts[0]}")
            port = own.port or urlsplit(mirror.url).port
            host = own.netloc if own.port or port is None else f"{own.netloc}:{port}"
        elif name != options.default_upstream:
            unnamed.append(name)
        lines = [f"[[resolver.host.{toml_string(name)}.mirrors]]", f"  host = {toml_string(host)}"]
        if not mirror.is_https:
            lines.append("  insecure = true")
        if options.login is not None and daemon in _SEND_HEADERS:
            lines.append(f"  [resolver.host.{toml_string(name)}.mirrors.header]")
            lines.append(f"    Authorization = {toml_string(options.login.authorization)}")
        blocks.append("\n".join(lines) + "\n")
    notes = []
    if options.is_enforced:
        notes.append(
            f"--enforce has no effect: {daemon} always asks the registry itself last. Block the "
            "way to the registries"
        )
    if unnamed:
        since = f" before {ns_since}" if ns_since else ""
        notes.append(
            f"{daemon}{since} does not tell the mirror the registry: for {', '.join(unnamed)}, set "
            "upstreams.<registry>.hosts to a name of the mirror that is for this registry only, "
            "and write this file again"
        )
    notes += [
        f"add the sections to an existing config.toml, and restart {daemon}",
        (
            "containerd itself pulls manifests, and layers that are not lazy: write its files too "
            "(--for containerd)"
        ),
    ]
    if mirror.ca is not None:
        notes.append(
            f"{daemon} has no setting for a certificate authority: add {mirror.ca} to those of the "
            "system"
        )
    if not options.is_enforced:
        notes.append(f"{_FALLBACK_FACT}; {daemon} has no setting against it")
    is_secret = options.login is not None and daemon in _SEND_HEADERS
    file = ClientFile(f"{daemon}/config.toml", "\n".join(blocks), is_secret=is_secret)
    return ClientSetup([file], notes)


CLIENTS: Final[Mapping[str, Callable[[SetupOptions], ClientSetup]]] = MappingProxyType(
    {
        "containerd": _containerd,
        "docker": _docker,
        "podman": _podman,
        "buildkit": _buildkit,
        "nerdctl": _nerdctl,
        "containerd-default": _containerd_default,
        "crio": _crio,
        "kaniko": _kaniko,
        "stargz": _stargz,
        "soci": _soci,
        **DISTRIBUTIONS,
    }
)
"""Name on the command line to the function that builds the setup."""
ALL: Final = ("containerd", "docker", "podman", "buildkit")
"""The clients of ``--for all``. Their files differ, and can be on one machine."""
