"""Rows L3, HC7: clients that send their requests slowly, or read their responses slowly."""

from __future__ import annotations

import asyncio
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.real.process import need, wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.robustness.kit import blob_path, is_served, most_memory, open_sockets
from tests.server_kit import running

MIB = 1 << 20
ATTACKS = {"-H": "/v2/", "-B": "/v2/", "-X": ""}
"""Slow headers, slow bodies, slow reads (of a blob)."""


class SlowClients:
    """Clients of one blob, each of which reads 50 KB a second, in a thread of their own."""

    def __init__(self, mirror: Mirror, path: str, count: int) -> None:
        self.received = [0] * count
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()
        for number in range(count):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            connection.connect(("127.0.0.1", mirror.port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: m\r\n\r\n".encode())
            self._selector.register(connection, selectors.EVENT_READ, number)
        self._thread = threading.Thread(target=self._read)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read until the context ends."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
            for key in list(self._selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
            self._selector.close()

    def _read(self) -> None:
        while not self._over.wait(0.1):
            for key, _ in self._selector.select(0):
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(5_000)
                assert data, "a slow client was cut off"
                self.received[key.data] += len(data)


@pytest.mark.row("L3-slow-clients")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "size", [96 * MIB, pytest.param(1024 * MIB, marks=pytest.mark.long)], ids=["96MiB", "1GiB"]
)
def test_200_slow_clients_use_bounded_memory_and_delay_no_fast_client(
    size: int, tried: Callable[[int], None]
) -> None:
    """The benchmarks measure the speed of the fast client."""
    with DockerRegistry() as registry:
        digest = registry.push_large("library/app", size)
        with Mirror({"docker.io": registry.url}) as mirror:
            slow = SlowClients(mirror, blob_path(digest), 200)
            with slow.reading():
                assert is_served(mirror, digest)
                wait_until(lambda: min(slow.received) > 100_000, "all of them are served", 30)
                assert max(slow.received) < size / 8, "they are slow"
                assert most_memory(mirror.pid) < 150e6
            seen = [one for one in registry.seen() if one.path.endswith(f"/blobs/{digest}")]
            fetched = [one for one in seen if one.method == "GET"]
            assert [one.status for one in fetched].count(200) == 1, "the others are of parts"
            # The first response, and no other one, may be closed early. What is in its sockets is
            # lost then: 4 MB of the sender, and up to 1 MB of ours.
            assert sum(one.sent for one in fetched) <= size * 1.01 + 6e6
            tried(200)


@pytest.mark.row("HC7-slow-attacks")
async def test_connections_with_slow_headers_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[[int], None]
) -> None:
    monkeypatch.setattr("mirror.server.KEEPALIVE_TIMEOUT_S", 0.5)
    async with running(tmp_path) as server:
        port = int(server.url.rpartition(":")[2])

        async def begin(request: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            async with asyncio.timeout(10):
                await reader.read()
            writer.close()

        beginnings = (b"", b"GET /v2/ HTTP/1.1\r\n", b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        await asyncio.gather(*map(begin, beginnings))
        tried(len(beginnings))


def attack(mirror: Mirror, mode: str, path: str, seconds: int) -> subprocess.Popen[bytes]:
    """Start slowhttptest with 200 connections."""
    command = [
        *(need("slowhttptest"), mode, "-u", f"{mirror.url}{path}", "-l", str(seconds)),
        *("-c", "200", "-r", "200", "-i", "2", "-p", "5"),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.row("HC7-slow-attacks")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "cut", [False, pytest.param(True, marks=pytest.mark.long(125))], ids=["beside", "until-cut"]
)
def test_600_slow_attackers_do_not_stop_service_and_are_cut_off(
    cut: bool, tried: Callable[[int], None]
) -> None:
    """Other clients are served meanwhile. In the end all slow connections are closed."""
    with DockerRegistry() as registry, ExitStack() as stack:
        digest = registry.push_large("library/app", 50_000_000)
        other = registry.push_large("library/app", 1_000_000, seed=8)
        with Mirror({"docker.io": registry.url}) as mirror:
            assert is_served(mirror, digest)
            attacks = [
                stack.enter_context(
                    attack(mirror, mode, path or blob_path(digest), 240 if cut else 3)
                )
                for mode, path in ATTACKS.items()
            ]
            wait_until(lambda: len(connected(mirror.port)) >= 600, "all are connected", 30)
            assert is_served(mirror, other)
            assert is_served(mirror, digest)
            if cut:
                # Three sockets of its own, and kept connections to the registry.
                wait_until(lambda: open_sockets(mirror.pid) < 10, "all are cut off", 200)
                for one in attacks:
                    one.terminate()
            for one in attacks:
                said = one.communicate(timeout=30)[0].decode()
                assert "YES" in said.rpartition("service available:")[2]
            tried(600)


def connected(port: int) -> list[str]:
    """Return the connections of clients to a loopback port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[2].endswith(f":{port:04X}")]
