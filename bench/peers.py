"""The mirrors that are measured, each with its best settings for this job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.real.process import Program
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.real.wire import ask

DRAYAGE_VERSION = "0.2.9"
_VENV = Path(__file__).resolve().parents[1] / ".cache" / "drayage"


class Drayage(Program):
    """drayage, from the package index."""

    name = "drayage"

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str | Path]:
        program = _VENV / "bin" / "drayage"
        if not program.exists():
            subprocess.run([sys.executable, "-m", "venv", _VENV], check=True)
            pip = [_VENV / "bin" / "pip", "install", "-q", f"drayage=={DRAYAGE_VERSION}"]
            subprocess.run(pip, check=True)
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


@dataclass(frozen=True, slots=True)
class Peer:
    """One column of the table. ``query``: names the upstream in a request."""

    name: str
    start: Callable[[str], Program]
    query: str = ""


def ours(workers: int) -> Callable[[str], Program]:
    return lambda upstream: Mirror({"docker.io": upstream}, workers=workers)


PEERS = (
    Peer("oci-mirror, 1 worker", ours(1)),
    Peer("oci-mirror, 2 workers", ours(2)),
    Peer("docker-registry", lambda upstream: DockerRegistry(proxy_of=upstream)),
    Peer("nginx proxy_cache", lambda upstream: NginxFront(upstream, cache=True)),
    Peer("drayage", Drayage, "?ns=docker.io"),
)


def cores() -> int:
    return os.cpu_count() or 1
