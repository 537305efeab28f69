"""The mirrors that are measured, each with its best settings for this job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.measure import REPOSITORY
from tests.real import images
from tests.real.process import Program, find_go_program, go_program
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.real.wire import ask

DRAYAGE_VERSION = "0.2.9"
_VENV = Path(__file__).resolve().parents[1] / ".cache" / "drayage"


class Drayage(Program):
    """drayage, from the package index. ``threads``: those that serve. 0: its own choice."""

    name = "drayage"

    def __init__(self, upstream: str, threads: int = 0) -> None:
        super().__init__()
        self.upstream, self.threads = upstream, threads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        return {"TOKIO_WORKER_THREADS": str(self.threads)} if self.threads else {}

    def command(self) -> Sequence[str | Path]:
        program = _VENV / "bin" / "drayage"
        if not program.exists():
            subprocess.run([sys.executable, "-m", "venv", _VENV], check=True)
            pip = _VENV / "bin" / "pip"
            subprocess.run([pip, "install", "-q", f"drayage=={DRAYAGE_VERSION}"], check=True)
        (self.dir / "cache").mkdir(exist_ok=True)
        config = self.dir / "config.toml"
        config.write_text(
            f'listen = "127.0.0.1:{self.port}"\ncache_dir = "{self.dir}/cache"\n'
            f'[upstreams.docker_io]\nregistry = "{self.upstream}"\n'
        )
        return [program, "serve", "-c", config]

    def ready(self) -> bool:
        try:
            return ask(f"{self.url}/v2/", timeout=2).status < 500
        except OSError:
            return False


class Distribution3(DockerRegistry):
    """Distribution 3, which ``go install`` builds as ``registry``. Debian has Distribution 2.8."""

    name = "registry-3"

    def command(self) -> Sequence[str | Path]:
        return [go_program("registry"), *list(super().command())[1:]]


class Zot(Program):
    """zot, which holds the image as its own: as a mirror it asks the upstream for each tag.

    ``go install`` builds it, or ``go build`` in its sources. It has one worker: ``GOMAXPROCS=1``.
    """

    name = "zot"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        return {"GOMAXPROCS": "1"}

    def command(self) -> Sequence[str | Path]:
        program = find_go_program("zot")
        if program is None:
            raise FileNotFoundError("zot is not installed")
        config = self.dir / "config.json"
        settings = {
            "storage": {"rootDirectory": str(self.dir / "storage"), "gc": False, "dedupe": False},
            "http": {"address": "127.0.0.1", "port": str(self.port)},
            "log": {"level": "error"},
        }
        config.write_text(json.dumps(settings))
        return [program, "serve", config]

    def ready(self) -> bool:
        try:
            return ask(f"{self.url}/v2/", timeout=2).status == 200
        except OSError:
            return False

    def __enter__(self) -> Self:
        super().__enter__()
        images.push(self.url, REPOSITORY, images.image(), "1.0")
        return self


def upstream(url: str, *, ca: str | None = None, connections: int = 0) -> Mapping[str, Any]:
    """Return the settings of an upstream of ours.

    Args:
        url: Its endpoint.
        ca: File of its authority.
        connections: Connections for one blob at most. 0: the default of the mirror.
    """
    settings: dict[str, Any] = {"endpoints": [url]}
    if ca is not None:
        settings["ca"] = ca
    if connections:
        settings["parallel"] = {"connections": connections}
    return settings


Start = Callable[[str, str | None], Program]
"""Makes a peer for the URL of an upstream, and the file of its authority if it has TLS."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server of a table. ``query``: names the upstream in a request."""

    name: str
    start: Start
    query: str = ""


def _ours(workers: int) -> Start:
    return lambda url, ca: Mirror({"docker.io": upstream(url, ca=ca)}, workers=workers)


OURS = Peer("oci-mirror, 1 worker", _ours(1))
NGINX = Peer("nginx proxy_cache", lambda url, ca: NginxFront(url, cache=True))
REGISTRY = Peer("docker-registry", lambda url, ca: DockerRegistry(proxy_of=url))
DRAYAGE = Peer("drayage", lambda url, ca: Drayage(url), "?ns=docker.io")
ONE_OF_EACH = (OURS, REGISTRY, NGINX, DRAYAGE)
PEERS = (OURS, Peer("oci-mirror, 2 workers", _ours(2)), *ONE_OF_EACH[1:])
TLS_PEERS = (*PEERS[:2], NGINX)
"""Those that accept a certificate of the tests by their configuration."""
ONE_WORKER_MIRRORS = (
    OURS,
    REGISTRY,
    Peer("nginx, 1 worker", lambda url, ca: NginxFront(url, cache=True, workers=1)),
    Peer("drayage, 1 thread", lambda url, ca: Drayage(url, threads=1), "?ns=docker.io"),
)
ONE_WORKER_PEERS = (*ONE_WORKER_MIRRORS, Peer("zot, 1 thread", lambda url, ca: Zot()))
"""Those for small responses."""
