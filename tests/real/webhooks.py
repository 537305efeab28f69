"""A receiver of webhooks in a thread, for tests of whole servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU="


class WebhookReceiver:
    """Listens on a loopback port, and keeps the events that it has accepted."""

    def __init__(self, directory: Path) -> None:
        """Write the secret below ``directory``."""
        self.secret_file = directory / "webhook.secret"
        self.secret_file.write_text(f"{SECRET}\n")
        self.accepted: list[dict[str, Any]] = []
        self.status_of: Callable[[dict[str, Any]], int] = lambda event: 204
        """Returns the status of the response to an event. One below 300 accepts it."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = receiver.status_of(event)
                if status < 300:
                    receiver.accepted.append(event)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def target(self, name: str = "audit", **keys: Any) -> dict[str, Any]:
        """Return an element of the section ``events``."""
        url = f"http://127.0.0.1:{self._server.server_port}/{name}"
        return {"name": name, "url": url, "secret_file": str(self.secret_file), **keys}

    def accepted_subjects(self) -> list[str]:
        """Return ``type subject`` of each event, the oldest first."""
        return [f"{event['type']} {event['subject']}" for event in list(self.accepted)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
