"""``docker-registry`` (Distribution) as an upstream, and nginx before it, to limit and to count."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.real import images
from tests.real.process import Program, run, wait_until
from tests.real.tokens import Certificate, TokenServer
from tests.real.wire import ask


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request in the log of an upstream. ``sent``: bytes of the body. ``seconds``: duration."""

    method: str
    path: str
    status: int
    sent: int
    range: str = ""
    seconds: float = 0.0
    ended: float = 0.0
    """Time of its last byte, in seconds since the epoch. 0.0 if it is not known."""


_COMBINED = re.compile(
    r'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[\d.]+" (?P<status>\d+) (?P<sent>\d+)'
)


class DockerRegistry(Program):
    """Distribution, open or with ``basic=(user, password)`` or with ``tokens=TokenServer``.

    ``tls``: serve HTTPS with this certificate. ``proxy_of``: a URL it mirrors (a peer of ours, for
    comparison). ``root``: a storage directory to share; without one it has its own.
    """

    name = "registry"

    def __init__(
        self,
        *,
        basic: tuple[str, str] | None = None,
        tokens: TokenServer | None = None,
        tls: Certificate | None = None,
        proxy_of: str | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__()
        self.basic, self.tokens, self.tls, self.proxy_of = basic, tokens, tls, proxy_of
        self.root = root or self.dir / "storage"

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, as in an image reference."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The endpoint for the configuration of a mirror."""
        return f"{'https' if self.tls else 'http'}://{self.host}"

    @property
    def ca(self) -> str | None:
        """The authority of its certificate, if it has one."""
        return str(self.tls.cert_file) if self.tls else None

    def command(self) -> Sequence[str | Path]:
        settings: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.root)},
                "delete": {"enabled": True},
            },
            "http": {"addr": self.host, "secret": "of-the-tests"},
        }
        if self.tls is not None:
            settings["http"]["tls"] = {
                "certificate": str(self.tls.cert_file),
                "key": str(self.tls.key_file),
            }
        if self.basic is not None:
            users = self.dir / "htpasswd"
            # The registry supports bcrypt only. 4 is its lowest cost.
            users.write_bytes(run("htpasswd", "-nbBC", "4", *self.basic).stdout)
            settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(users)}}
        if self.tokens is not None:
            settings["auth"] = {
                "token": {
                    "realm": self.tokens.realm,
                    "service": self.tokens.service,
                    "issuer": self.tokens.issuer,
                    "rootcertbundle": str(self.tokens.certificate.cert_file),
                }
            }
        if self.proxy_of is not None:
            settings["proxy"] = {"remoteurl": self.proxy_of}
        path = self.dir / "registry.yml"
        path.write_text(yaml.safe_dump(settings))
        return ["docker-registry", "serve", path]

    def environment(self) -> dict[str, str]:
        return {"OTEL_TRACES_EXPORTER": "none"}

    def ready(self) -> bool:
        try:
            return ask(f"{self.url}/v2/", timeout=5, ca=self.ca).status in (200, 401)
        except OSError:
            return False

    def authorization(self, repository: str) -> dict[str, str]:
        """Return the header for requests of tests to a repository."""
        if self.basic is not None:
            return {
                "Authorization": "Basic " + base64.b64encode(":".join(self.basic).encode()).decode()
            }
        return self.tokens.for_push(repository) if self.tokens is not None else {}

    def push(self, repository: str, content: images.Content, *tags: str) -> None:
        """Push an image, an index or an artifact under these tags (by digest without any)."""
        images.push(
            self.url,
            repository,
            content,
            *tags,
            headers=self.authorization(repository),
            ca=self.ca,
        )

    def push_large(self, repository: str, size: int, seed: int = 7) -> str:
        """Push one blob of ``size`` random bytes; returns its digest."""
        return images.push_large(self.url, repository, size, seed, self.authorization(repository))

    def gets(self) -> list[str]:
        """Return digest or tag of each GET so far, sorted."""
        return sorted(
            seen.path.partition("?")[0].rpartition("/")[2]
            for seen in self.seen()
            if seen.method == "GET" and ("/manifests/" in seen.path or "/blobs/" in seen.path)
        )

    def seen(self) -> list[LoggedRequest]:
        """Return the requests in its access log, also those of the tests."""
        return [
            LoggedRequest(found["method"], found["path"], int(found["status"]), int(found["sent"]))
            for found in _COMBINED.finditer(self.output_text())
        ]


class NginxFront(Program):
    """nginx before a registry: limits the rate, and counts requests and bytes by path.

    ``limit_rate``: bytes per second for each response, 0 for none. nginx sends the share of the
    first second at once. With ``cache`` it is a ``proxy_cache`` (for comparison). ``seen`` returns
    the requests that it sent on or answered.
    """

    name = "nginx"

    def __init__(
        self, upstream: str, *, limit_rate: int = 0, cache: bool = False, workers: int = 2
    ) -> None:
        super().__init__()
        self.upstream, self.limit_rate, self.cache = upstream, limit_rate, cache
        self.workers = workers
        self.access_log = self.dir / "access.json"

    @property
    def host(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The endpoint for the configuration of a mirror."""
        return f"http://{self.host}"

    def command(self) -> Sequence[str | Path]:
        for temporary in ("body", "proxy", "fastcgi", "uwsgi", "scgi", "cache"):
            (self.dir / temporary).mkdir(exist_ok=True)
        config = f"""
        daemon off; master_process on; worker_processes {self.workers}; pid {self.dir}/nginx.pid;
        {"user root;" if os.geteuid() == 0 else ""}
        error_log stderr warn;
        events {{ worker_connections 2048; }}
        http {{
          log_format seen escape=json '{{"method":"$request_method","path":"$request_uri",'
            '"status":$status,"sent":$body_bytes_sent,"range":"$http_range",'
            '"seconds":$request_time,"ended":$msec}}';
          access_log {self.access_log} seen;
          client_body_temp_path {self.dir}/body; proxy_temp_path {self.dir}/proxy;
          fastcgi_temp_path {self.dir}/fastcgi; uwsgi_temp_path {self.dir}/uwsgi;
          scgi_temp_path {self.dir}/scgi; client_max_body_size 0; sendfile on;
          {self.servers()}
        }}
        """
        path = self.dir / "nginx.conf"
        path.write_text(config)
        return ["nginx", "-e", "stderr", "-p", self.dir, "-c", path]

    def servers(self) -> str:
        """Return the part of the configuration that says what it serves."""
        store = (
            f"proxy_cache_path {self.dir}/cache keys_zone=all:8m max_size=20g use_temp_path=off;"
        )
        cached = (
            "proxy_cache all; proxy_cache_lock on; proxy_cache_lock_age 600s;"
            " proxy_cache_lock_timeout 600s; proxy_cache_valid 200 206 1h;"
            " proxy_ignore_headers Cache-Control Expires;"
        )
        # A body is not spooled to disk, so that only the limit slows it.
        straight = "proxy_max_temp_file_size 0; proxy_buffers 64 64k; proxy_buffer_size 64k;"
        return f"""
          {store if self.cache else ""}
          server {{
            listen {self.host};
            location / {{
              proxy_pass {self.upstream}; proxy_http_version 1.1;
              proxy_set_header Connection ""; proxy_set_header Host $http_host;
              {cached if self.cache else straight}
              {f"limit_rate {self.limit_rate};" if self.limit_rate else ""}
            }}
          }}
        """

    def seen(self) -> list[LoggedRequest]:
        """Return the requests so far. nginx logs one when its body has ended."""
        if not self.access_log.exists():
            return []
        # The last line may be incomplete.
        whole = self.access_log.read_text().rpartition("\n")[0]
        return [LoggedRequest(**json.loads(line)) for line in whole.splitlines()]

    def blob_gets(self, digest: str, expected: int = 1) -> list[LoggedRequest]:
        """Return the GETs of one blob. Waits up to 2 s for ``expected`` of them.

        nginx logs a request a moment after its last byte.
        """
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: len(self._gets(digest)) >= expected, "logged", 2)
        return self._gets(digest)

    def _gets(self, digest: str) -> list[LoggedRequest]:
        return [
            seen
            for seen in self.seen()
            if seen.method == "GET" and seen.path.split("?")[0].endswith(f"/blobs/{digest}")
        ]
