"""A token service as Docker registries use it, with tokens that a real registry accepts.

Source: Distribution ``docs/spec/auth/token.md`` and ``jwt.md``. It runs in a thread of the tests,
so that they can count its calls and turn its failures on and off.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from tests.real.process import Directory, free_port


@dataclass(frozen=True, slots=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 and localhost; it is its own authority."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    cert_file: Path
    key_file: Path

    @classmethod
    def make(
        cls, directory: Path, name: str = "localhost", first_day: int = -1, last_day: int = 30
    ) -> Certificate:
        """Make one; the PEM files are ``<name>.crt`` and ``<name>.key`` in ``directory``.

        It is valid from ``first_day`` to ``last_day``, counted from today.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName(
            [
                x509.DNSName("localhost"),
                x509.DNSName(name),
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            ]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=first_day))
            .not_valid_after(now + datetime.timedelta(days=last_day))
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        cert_file, key_file = directory / f"{name}.crt", directory / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cls(key, certificate, cert_file, key_file)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class TokenCall:
    """One request for a token. ``account`` is empty for an anonymous one."""

    account: str
    scopes: tuple[str, ...]
    status: int


class TokenServer:
    """Issues tokens that ``DockerRegistry(tokens=…)`` accepts.

    ``users``: name to password. ``anonymous``: whether pulls without credentials get a token.
    ``expires_in``: seconds a token lives. ``failing``: set to a status to answer with it.
    """

    issuer = "oci-mirror-tests"
    service = "registry.tests"

    def __init__(
        self,
        users: Mapping[str, str] | None = None,
        *,
        anonymous: bool = True,
        expires_in: int = 300,
    ) -> None:
        self.users = dict(users or {})
        self.anonymous = anonymous
        self.expires_in = expires_in
        self.failing: int | None = None
        self.delay = 0.0
        self.calls: list[TokenCall] = []
        self.port = free_port()
        self._directory = Directory("tokens")
        self.certificate = Certificate.make(self._directory.path)
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def realm(self) -> str:
        """The URL that challenges name."""
        return f"http://127.0.0.1:{self.port}/token"

    def mint(self, access: Sequence[Mapping[str, Any]], subject: str = "") -> str:
        """A signed token for this access: ``[{"type", "name", "actions"}]``."""
        now = int(time.time())
        der = self.certificate.certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": self.issuer,
            "sub": subject,
            "aud": self.service,
            "iat": now,
            "nbf": now - 10,
            "exp": now + self.expires_in,
            "jti": secrets.token_hex(8),
            "access": list(access),
        }
        signed = f"{_base64(json.dumps(header).encode())}.{_base64(json.dumps(claims).encode())}"
        der_signature = self.certificate.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(der_signature)
        return f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def for_push(self, repository: str) -> dict[str, str]:
        """The header with which a test pushes to this repository."""
        access = {"type": "repository", "name": repository, "actions": ["pull", "push"]}
        return {"Authorization": f"Bearer {self.mint([access], 'pusher')}"}

    def respond(self, query: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        """Return status and JSON body for a request of a token."""
        asked = parse_qs(query)
        scopes = tuple(scope for value in asked.get("scope", []) for scope in value.split())
        account, allowed = "", self.anonymous
        if authorization is not None and authorization.startswith("Basic "):
            account, _, password = base64.b64decode(authorization[6:]).decode().partition(":")
            allowed = account in self.users and self.users[account] == password
        status = self.failing or (200 if allowed else 401)
        self.calls.append(TokenCall(account, scopes, status))
        if status != 200:
            return status, {"errors": [{"code": "UNAUTHORIZED", "message": "no"}]}
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            # Only pulls are granted, as a public registry does for readers.
            granted = [action for action in actions.split(",") if action == "pull"]
            access.append({"type": kind, "name": name, "actions": granted})
        token = self.mint(access, account)
        return 200, {"token": token, "expires_in": self.expires_in}

    def start(self) -> Self:
        """Listen in a thread."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                time.sleep(owner.delay)
                sent = self.headers.get("Authorization")
                status, body = owner.respond(urlsplit(self.path).query, sent)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                # A kept connection would keep a thread of a stopped service.
                self.send_header("Connection", "close")
                self.close_connection = True
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base names it
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening. ``start`` listens again on the same port."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._directory.remove()
