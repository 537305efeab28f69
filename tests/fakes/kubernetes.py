"""An API server of Kubernetes that plays recorded lists of pods, page by page.

The pods in ``pods.json`` have the form in which kind (Kubernetes 1.31, containerd) and CRI-O report
them: running, pending and finished ones, init and ephemeral containers, images as volumes.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.real.tokens import Certificate

PODS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("pods.json").read_text())
TOKEN = "a-token"


@dataclass
class FakeApiServer:
    """The state of the server. Tests change it between two requests."""

    url: str = ""
    pods: list[dict[str, Any]] = field(default_factory=lambda: list(PODS))
    page: int = 2
    """Pods of one page, whatever limit a client asks for, up to that limit."""
    expired: int = 0
    """Number of ``continue`` tokens that are still refused as expired."""
    status: int = 200
    body: bytes | None = None
    """Sent in place of a list."""
    targets: list[str] = field(default_factory=list)
    """Target of each request."""

    def answer(self, target: str, authorization: str | None) -> tuple[int, dict[str, Any] | bytes]:
        """Return the status and the document of a response."""
        self.targets.append(target)
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        if self.status != 200 or self.body is not None:
            return self.status, self.body or {"kind": "Status", "code": self.status}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"kind": "Status", "code": 401}
        if parts.path != "/api/v1/pods":
            return 404, {"kind": "Status", "code": 404}
        start = int(query.get("continue", ["0"])[0])
        if start and self.expired:
            self.expired -= 1
            return 410, {"kind": "Status", "code": 410, "reason": "Expired"}
        end = start + min(self.page, int(query["limit"][0]))
        token = {"continue": str(end)} if end < len(self.pods) else {}
        metadata = {"resourceVersion": "4711", **token}
        return 200, {"kind": "PodList", "metadata": metadata, "items": self.pods[start:end]}


@contextmanager
def api_server(certificate: Certificate | None = None) -> Iterator[FakeApiServer]:
    """Run the server on a free port of this machine, with TLS if there is a certificate."""
    fake = FakeApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, document = fake.answer(self.path, self.headers.get("Authorization"))
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert_file, certificate.key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        scheme = "http" if certificate is None else "https"
        fake.url = f"{scheme}://127.0.0.1:{server.server_port}"
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
