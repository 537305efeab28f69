"""Upstreams whose limits are known: nginx with files, and a relay whose connections share a rate.

nginx's own ``limit_rate`` sends the share of the first second at once, with each response. A client
that asks for parts would get all of them without a limit. So the kernel paces each connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.real import images
from tests.real.process import free_port, need
from tests.real.registry import NginxFront
from tests.real.server import ROOT
from tests.real.tokens import Certificate

_SO_MAX_PACING_RATE = 47
"""Bytes per second of one connection, see socket(7). Python has no name for it."""
_SEND_BUFFER_BYTES = 512 * 1024
"""Bytes that nginx may give to the kernel ahead of what was sent. It logs them as sent, so what it
logs for a connection that is closed early must be little."""
_RELAYED_BYTES = 16 * 1024
"""Bytes that a relay reads at once. Connections take turns after each of them."""


class StaticRegistry(NginxFront):
    """nginx that serves blobs and manifests from files, under any name of a repository.

    Args:
        rate: Bytes per second of each connection. 0: no limit.
        tls: Serve HTTPS with this certificate.
        directives: More of nginx's directives for the server, such as ``limit_conn all 2;``.
        addresses: Loopback addresses at which it listens, 127.0.0.1 being the first one.
    """

    name = "static"

    def __init__(
        self,
        *,
        rate: int = 0,
        tls: Certificate | None = None,
        directives: str = "",
        addresses: int = 1,
    ) -> None:
        super().__init__("")
        self.rate, self.tls, self.directives, self.addresses = rate, tls, directives, addresses
        self.files = self.dir / "files"
        self.files.mkdir()

    @property
    def url(self) -> str:
        """The endpoint for the configuration of a mirror."""
        return f"{'https' if self.tls else 'http'}://{self.host}"

    @property
    def urls(self) -> Sequence[str]:
        """The endpoint at each of its addresses."""
        return [f"http://127.0.0.{number}:{self.port}" for number in range(1, self.addresses + 1)]

    def command(self) -> Sequence[str | Path]:
        nginx, *arguments = super().command()
        paced = [sys.executable, "-m", "bench.upstreams", self._listen, str(self.rate)]
        return [*paced, need(str(nginx)), *arguments]

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT)}

    @property
    def _listen(self) -> str:
        return f"{'0.0.0.0' if self.addresses > 1 else '127.0.0.1'}:{self.port}"

    def servers(self) -> str:
        tls = ""
        if self.tls is not None:
            tls = f"ssl_certificate {self.tls.cert_file}; ssl_certificate_key {self.tls.key_file};"
        return f"""
          limit_conn_zone $server_name zone=all:1m;
          server {{
            listen {self._listen}{" ssl" if self.tls else ""}; {tls}
            root {self.files}; {self.directives}
            location = /v2/ {{ default_type application/json; return 200 "{{}}"; }}
            location ~ /blobs/(?<digest>sha256:[0-9a-f]+)$ {{
              default_type application/octet-stream;
              add_header Docker-Content-Digest $digest; try_files /$digest =404;
            }}
            location ~ /manifests/(?<digest>sha256:[0-9a-f]+)$ {{
              default_type application/vnd.oci.image.manifest.v1+json;
              add_header Docker-Content-Digest $digest; try_files /$digest =404;
            }}
          }}
        """

    def add(self, content: images.Content) -> None:
        """Serve all parts of an image, by digest."""
        for digest, data in content.contents().items():
            (self.files / digest).write_bytes(data)

    def add_large(self, size: int, seed: int = 7) -> str:
        """Serve one blob of ``size`` random bytes; returns its digest."""
        hashed, path = hashlib.sha256(), self.files / "new"
        with path.open("wb") as file:
            for piece in images.stream(size, seed):
                hashed.update(piece)
                file.write(piece)
        digest = f"sha256:{hashed.hexdigest()}"
        path.rename(self.files / digest)
        return digest


class SharedRate:
    """A relay to a server. Its connections share one rate, as those through one line do.

    Args:
        target: (host, port) of the server.
        rate: Bytes per second that all connections together get from it.
    """

    def __init__(self, target: tuple[str, int], rate: int) -> None:
        self._target, self._rate = target, rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", free_port()), backlog=64)

    @property
    def url(self) -> str:
        """The endpoint for the configuration of a mirror."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        # Without this, the thread that accepts would stay in the call.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
                server = socket.create_connection(self._target)
                for source, sink, rate in ((client, server, 0), (server, client, self._rate)):
                    relay = threading.Thread(
                        target=self._relay, args=(source, sink, rate), daemon=True
                    )
                    relay.start()

    def _relay(self, source: socket.socket, sink: socket.socket, rate: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_RELAYED_BYTES):
                if rate:
                    time.sleep(self._turn(len(data) / rate))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _turn(self, seconds: float) -> float:
        """Take the next ``seconds`` of the line. Returns the seconds until they are over."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + seconds
            return self._free_at - now


def main() -> None:
    """Run nginx with a listener whose connections are paced: ``HOST:PORT RATE nginx …``.

    nginx takes over a listener that the variable NGINX names, as in an upgrade of its binary.
    Accepted connections have the settings of their listener.
    """
    listen, rate, *command = sys.argv[1:]
    host, _, port = listen.partition(":")
    listener = socket.create_server((host, int(port)), backlog=511)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if int(rate):
        listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(rate))
    os.set_inheritable(listener.fileno(), True)
    os.execve(command[0], command, {**os.environ, "NGINX": f"{listener.fileno()};"})


if __name__ == "__main__":
    main()
