"""``healthcheck``: the URL of the server, and the reasons why it is not healthy.

The command's exit codes are in ``test_main.py``.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mirror.cli.health import check_health, health_url, own_url
from mirror.config.settings import Settings
from tests.real.process import free_port
from tests.real.tokens import Certificate


@pytest.mark.parametrize(
    ("listen", "tls", "url"),
    [
        ("127.0.0.1:5100", False, "http://127.0.0.1:5100/healthz"),
        ("0.0.0.0:5100", False, "http://127.0.0.1:5100/healthz"),
        ("[::]:5100", False, "http://[::1]:5100/healthz"),
        ("[::1]:5100", True, "https://[::1]:5100/healthz"),
        ("mirror.internal:443", True, "https://mirror.internal:443/healthz"),
    ],
)
def test_own_url_has_a_loopback_address_for_all_interfaces(
    listen: str, tls: bool, url: str
) -> None:
    assert own_url(listen, has_tls=tls) == url


def test_configuration_wins_over_the_environment() -> None:
    environ = {"OCI_MIRROR_LISTEN": "127.0.0.1:1", "OCI_MIRROR_TLS__CERTIFICATE": "x"}
    settings = Settings(listen="127.0.0.1:2")
    assert health_url(settings, environ) == "http://127.0.0.1:2/healthz"
    assert health_url(None, environ) == "https://127.0.0.1:1/healthz"
    assert health_url(None, {}) == "http://127.0.0.1:5100/healthz"
    with pytest.raises(ValueError, match="port"):
        health_url(None, {"OCI_MIRROR_LISTEN": "127.0.0.1"})


class Healthy(BaseHTTPRequestHandler):
    """Responds on every path, and records the paths."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(certificate: Certificate | None = None) -> Iterator[tuple[int, list[str]]]:
    """A server on a loopback port, and the paths of its requests."""
    handler = type("Handler", (Healthy,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.cert_file, certificate.key_file)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port, handler.asked
        finally:
            server.shutdown()
            thread.join()


def test_status_200_is_healthy() -> None:
    with serving() as (port, asked):
        assert check_health(f"http://127.0.0.1:{port}/readyz") is None
        assert check_health(f"http://127.0.0.1:{port}") is None
        assert asked == ["/readyz", "/healthz"]


def test_certificate_of_the_server_need_not_name_its_address(tmp_path: Path) -> None:
    with serving(Certificate.make(tmp_path)) as (port, asked):
        assert check_health(f"https://127.0.0.1:{port}/healthz") is None
        assert asked == ["/healthz"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "status 503"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "status 301"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        (b"", "closed connection"),
        (None, "no response within"),
    ],
    ids=["503", "301", "not http", "nothing", "silence"],
)
def test_other_response_is_unhealthy_with_a_reason(
    said: bytes | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is None:
        monkeypatch.setattr("mirror.cli.own_server._STEP_TIMEOUT_S", 0.1)
    gone = threading.Event()

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with closing(connection):
            connection.recv(4096)
            if said is None:
                gone.wait(20)
            else:
                connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        found = check_health(f"http://127.0.0.1:{listener.getsockname()[1]}/healthz")
        gone.set()
        thread.join()
    assert found is not None
    assert why in found


def test_refused_connection_is_unhealthy_with_a_reason() -> None:
    assert "refused" in (check_health(f"http://127.0.0.1:{free_port()}/healthz") or "")
