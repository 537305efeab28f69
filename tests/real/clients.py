"""Real clients: containerd, Docker, Podman, skopeo, each with a state directory of its own.

None of them can reach the registry that a reference names. They reach only the mirror (or registry)
that they are given, so it served each pull that succeeds. ``held`` and similar methods return the
content of a client, byte by byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.real.process import Directory, Program, run

NOWHERE = "http://127.0.0.1:9"
"""Refuses connections. A client gets it as the address of the registry itself."""

_POLICY = {"default": [{"type": "insecureAcceptAnything"}]}


class Containerd(Program):
    """A containerd daemon of its own; ``ctr`` pulls through ``hosts.toml`` files."""

    name = "ctrd"

    def __init__(self) -> None:
        super().__init__()
        self.socket = self.dir / "s"
        self.hosts = self.dir / "hosts"
        self.root = self.dir / "root"

    def command(self) -> Sequence[str | Path]:
        config = self.dir / "config.toml"
        config.write_text(
            "version = 2\n"
            f'root = "{self.root}"\nstate = "{self.dir}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri",'
            ' "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs",'
            ' "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",'
            ' "io.containerd.snapshotter.v1.devmapper"]\n'
            f'[grpc]\naddress = "{self.socket}"\n'
        )
        return ["containerd", "--config", config]

    def ready(self) -> bool:
        return self.socket.exists() and self.ctr("version", check=False).returncode == 0

    def ctr(self, *argv: str | Path, **more: Any) -> Any:
        """Run ``ctr`` against this daemon; ``more``: as of ``run``."""
        return run("ctr", "--address", self.socket, "--namespace", "tests", *argv, **more)

    def use(self, namespace: str, mirror: str, *, server: str = NOWHERE) -> None:
        """Let references of ``namespace`` (``docker.io``) be pulled through ``mirror``, a URL."""
        directory = self.hosts / namespace
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "hosts.toml").write_text(
            f'server = "{server}"\n[host."{mirror}"]\n  capabilities = ["pull", "resolve"]\n'
        )

    def pull(
        self, reference: str, *, all_platforms: bool = False, user: str = "", **how: Any
    ) -> None:
        """Pull a full reference (``docker.io/library/app:1``), and unpack it."""
        more = ["--all-platforms"] if all_platforms else ["--platform", "linux/amd64"]
        if user:
            more += ["--user", user]
        # native: layers are unpacked into plain directories, without any mount
        native = ("--hosts-dir", self.hosts, "--snapshotter", "native")
        self.ctr("images", "pull", *native, *more, reference, **how)

    def fetch(self, reference: str) -> None:
        """Get all content of a reference without unpacking it: works for artifacts too."""
        self.ctr("content", "fetch", "--hosts-dir", self.hosts, "--all-platforms", reference)

    def held(self) -> dict[str, bytes]:
        """Return all its content by digest, as it is on disk."""
        blobs = self.root / "io.containerd.content.v1.content/blobs/sha256"
        if not blobs.exists():
            return {}
        return {f"sha256:{path.name}": path.read_bytes() for path in blobs.iterdir()}

    def digest_of(self, reference: str) -> str:
        """Return the digest to which it resolved a reference."""
        for line in self.ctr("images", "ls").stdout.decode().splitlines()[1:]:
            fields = line.split()
            if fields[0] == reference:
                return str(next(word for word in fields if word.startswith("sha256:")))
        raise AssertionError(f"{reference} is not there")

    def forget(self) -> None:
        """Remove every image and all content, so that the next pull asks for all of it."""
        names = self.ctr("images", "ls", "-q").stdout.decode().split()
        if names:
            self.ctr("images", "rm", "--sync", *names)
        assert not self.held(), "containerd still has content"


def _archive_layers(archive: bytes) -> list[str]:
    """Digests of the uncompressed layers in a ``docker save`` archive, in order."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        listed = members.extractfile("manifest.json")
        assert listed is not None
        layers = json.loads(listed.read())[0]["Layers"]
        digests = []
        for name in layers:
            member = members.extractfile(name)
            assert member is not None
            digests.append("sha256:" + hashlib.sha256(member.read()).hexdigest())
    return digests


class Dockerd(Program):
    """A Docker engine of its own, whose ``registry-mirrors`` is the given URL (docker.io only)."""

    name = "dockerd"

    def __init__(self, mirror: str) -> None:
        super().__init__()
        self.mirror = mirror
        self.socket = self.dir / "s"

    def command(self) -> Sequence[str | Path]:
        # no bridge, no firewall, no kernel modules: it only pulls
        return [
            "dockerd",
            *("--bridge", "none", "--iptables=false", "--ip6tables=false"),
            *("--ip-forward=false", "--ip-masq=false", "--storage-driver", "vfs"),
            *("--data-root", self.dir / "data", "--exec-root", self.dir / "exec"),
            *("--pidfile", self.dir / "pid", "--host", f"unix://{self.socket}"),
            *("--registry-mirror", self.mirror, "--config-file", self._empty("daemon.json")),
            *("--max-download-attempts", "1"),
        ]

    def _empty(self, name: str) -> Path:
        path = self.dir / name
        path.write_text("{}")
        return path

    def ready(self) -> bool:
        return self.socket.exists() and self.docker("version", check=False).returncode == 0

    def docker(self, *argv: str, check: bool = True) -> Any:
        """Run the ``docker`` command against this engine."""
        env = {"DOCKER_CONFIG": str(self.dir / "client"), "DOCKER_HOST": f"unix://{self.socket}"}
        done = run("docker", *argv, env=env, check=False)
        if check and done.returncode != 0:
            # Only the log of the engine has the reason why it did not use the mirror.
            pytest.fail(f"docker {argv}: {done.stderr.decode()}\n{self.output_text()[-3000:]}")
        return done

    def pull(self, reference: str) -> None:
        """Pull a docker.io reference, such as ``app:1`` or ``org/app@sha256:…``."""
        self.docker("pull", reference)

    def inspect(self, reference: str) -> dict[str, Any]:
        """``docker image inspect``: ``Id`` (the config's digest), ``RepoDigests``, ``RootFS``."""
        found: dict[str, Any] = json.loads(self.docker("image", "inspect", reference).stdout)[0]
        return found

    def layers(self, reference: str) -> list[str]:
        """Return the digests of the layers of an image, from the bytes that the engine exports."""
        return _archive_layers(self.docker("save", reference).stdout)

    def forget(self) -> None:
        """Remove every image and layer."""
        ids = self.docker("images", "-aq", "--no-trunc").stdout.decode().split()
        if ids:
            self.docker("rmi", "-f", *set(ids))


class _Containers:
    """Base of Podman and skopeo: ``registries.conf``, ``policy.json``, no daemon."""

    name = "containers"

    def __init__(self, mirrors: Mapping[str, str] | None = None) -> None:
        self._directory = Directory(self.name)
        self.dir = self._directory.path
        self.mirrors = dict(mirrors or {})
        (self.dir / "policy.json").write_text(json.dumps(_POLICY))
        (self.dir / "auth.json").write_text("{}")
        (self.dir / "registries.d").mkdir()
        (self.dir / "storage.conf").write_text(
            '[storage]\ndriver = "vfs"\n'
            f'graphroot = "{self.dir}/root"\nrunroot = "{self.dir}/run"\n'
        )
        lines = ['unqualified-search-registries = ["docker.io"]']
        for registry, mirror in self.mirrors.items():
            lines += [
                f'[[registry]]\nprefix = "{registry}"\nlocation = "{registry}"',
                f'[[registry.mirror]]\nlocation = "{mirror}"\ninsecure = true',
            ]
        (self.dir / "registries.conf").write_text("\n".join(lines) + "\n")

    def environment(self) -> dict[str, str]:
        """Return variables that keep it away from the settings and state of this machine."""
        return {
            "CONTAINERS_REGISTRIES_CONF": str(self.dir / "registries.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.dir / "storage.conf"),
            "REGISTRY_AUTH_FILE": str(self.dir / "auth.json"),
            "HOME": str(self.dir),
            "XDG_RUNTIME_DIR": str(self.dir),
            "TMPDIR": str(self.dir),
        }

    def close(self) -> None:
        """Remove its state."""
        self._directory.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Podman(_Containers):
    """Podman with a storage of its own. ``mirrors``: registry to ``host:port/prefix``."""

    name = "podman"

    def podman(self, *argv: str, **more: Any) -> Any:
        """Run ``podman`` on this storage; ``more``: as of ``run``."""
        return run(
            "podman",
            *("--events-backend", "none", "--cgroup-manager", "cgroupfs"),
            *argv,
            env=self.environment(),
            **more,
        )

    def pull(self, reference: str, *more: str, **how: Any) -> None:
        """Pull a reference; ``more``: flags of ``podman pull``."""
        policy = str(self.dir / "policy.json")
        self.podman("pull", "--quiet", "--signature-policy", policy, *more, reference, **how)

    def inspect(self, reference: str) -> dict[str, Any]:
        """``podman image inspect``: ``Id``, ``Digest``, ``RepoDigests``, ``RootFS``."""
        found: dict[str, Any] = json.loads(self.podman("image", "inspect", reference).stdout)[0]
        return found

    def layers(self, reference: str) -> list[str]:
        """Return the digests of the layers of an image, from the bytes that Podman exports."""
        return _archive_layers(self.podman("save", "--quiet", reference).stdout)

    def forget(self) -> None:
        """Remove every image."""
        self.podman("rmi", "--all", "--force")


class Skopeo(_Containers):
    """skopeo. ``mirrors``: registry to ``host:port/prefix``."""

    name = "skopeo"

    def skopeo(self, *argv: str | Path, **more: Any) -> Any:
        """Run ``skopeo``; ``more``: as of ``run``."""
        return run(
            "skopeo",
            # skopeo does not read the variable that Podman reads
            *("--registries-conf", self.dir / "registries.conf"),
            *("--policy", self.dir / "policy.json", "--registries.d", self.dir / "registries.d"),
            *argv,
            env=self.environment(),
            **more,
        )

    def copy(self, reference: str, *more: str, **how: Any) -> dict[str, bytes]:
        """Copy ``docker://reference`` with every platform. Returns all content by digest.

        ``--preserve-digests`` fails if a byte would change.
        """
        target = self.dir / "copy"
        source = f"docker://{reference}"
        flags = ("--all", "--preserve-digests", "--src-tls-verify=false")
        try:
            self.skopeo("copy", "--quiet", *flags, *more, source, f"dir:{target}", **how)
            files = [path for path in target.iterdir() if path.name != "version"]
            return {
                "sha256:" + hashlib.sha256(data).hexdigest(): data
                for data in (path.read_bytes() for path in files)
            }
        finally:
            Directory.clear(target)

    def inspect_raw(self, reference: str) -> bytes:
        """Return the exact bytes of a manifest."""
        done = self.skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{reference}")
        raw: bytes = done.stdout
        return raw
