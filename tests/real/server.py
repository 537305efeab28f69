"""Our own server as users run it: a process with a configuration file."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml

from tests.real.process import Program, wait_until
from tests.real.wire import Download, Response, ask, download

ROOT = Path(__file__).resolve().parents[2]


class Mirror(Program):
    """``python -m mirror serve --config FILE`` with a data directory of its own.

    ``upstreams``: as in the configuration; a bare string is the one endpoint. ``settings``: more
    top-level keys, such as ``workers=2`` or ``storage={"reverify": 0}``. The output is JSON, one
    object a line. ``prefix``: a command to run it under, such as strace.
    """

    name = "mirror"

    def __init__(
        self,
        upstreams: Mapping[str, str | Mapping[str, Any]],
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        data_dir: Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.data_dir = data_dir or self.dir / "data"
        self.config_file = self.dir / "mirror.yaml"
        self.prefix = tuple(prefix)
        self.env = dict(env or {})
        self.settings: dict[str, Any] = {
            "listen": self.host,
            "data_dir": str(self.data_dir),
            "log": {"format": "json"},
            "upstreams": {
                name: {"endpoints": [value]} if isinstance(value, str) else dict(value)
                for name, value in upstreams.items()
            },
            **settings,
        }

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, as in an image reference."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The URL at which it listens."""
        return f"{'https' if self.settings.get('tls') else 'http'}://{self.host}"

    def command(self) -> Sequence[str | Path]:
        # Written at each start: a test may change ``settings`` between two runs.
        self.config_file.write_text(yaml.safe_dump(self.settings))
        # sys.executable and no shim: strace injects into the process that it starts.
        return [*self.prefix, sys.executable, "-m", "mirror", "serve", "--config", self.config_file]

    def environment(self) -> Mapping[str, str]:
        # Requests to an upstream on loopback must not use a proxy of the host.
        return {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1,localhost", **self.env}

    def ready(self) -> bool:
        try:
            if self.ask("/readyz", timeout=5).status != 200:
                return False
            # The first worker can be ready before the supervisor has started the others.
            wanted = self.settings.get("workers", 1)
            return wanted == 1 or bool(self.prefix) or len(self.workers()) >= wanted
        except (OSError, HTTPException):
            return False

    def _ca(self) -> str | None:
        tls = self.settings.get("tls")
        return str(tls["certificate"]) if tls else None

    def ask(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60.0,
    ) -> Response:
        """Send one request to it, and return the whole response."""
        return ask(self.url + path, method, headers, timeout=timeout, ca=self._ca())

    def download(self, path: str, headers: Mapping[str, str] | None = None) -> Download:
        """Stream a body from it, and hash it."""
        return download(self.url + path, headers, ca=self._ca())

    def metrics(self) -> dict[str, float]:
        """``/metrics`` by sample, such as ``requests_total{kind="blob"}``."""
        response = self.ask("/metrics")
        assert response.status == 200, response
        samples = {}
        for line in response.body.decode().splitlines():
            if line and not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                samples[sample] = float(value)
        return samples

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0.0 where there is none."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.partition("{")[0] == name and all(want in sample for want in wanted)
        )

    def metric_reaches(self, value: float, name: str, **labels: str) -> bool:
        """Return whether a metric reaches ``value`` within 10 s. Some count after a response."""
        try:
            wait_until(lambda: self.metric(name, **labels) >= value, name, 10)
        except TimeoutError:
            return False
        return True

    def log(self) -> list[dict[str, Any]]:
        """Its log lines that are JSON objects, oldest first."""
        # The last line may be incomplete.
        whole = self.output_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def workers(self) -> list[int]:
        """The pids of its child processes."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def kill_worker(self, pid: int) -> None:
        """Send SIGKILL to one worker."""
        os.kill(pid, signal.SIGKILL)

    def content(self, digest: str) -> Path:
        """Return the path of complete content."""
        algorithm, _, encoded = digest.partition(":")
        return self.data_dir / "blobs" / algorithm / encoded
