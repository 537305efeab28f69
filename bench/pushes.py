"""What a push costs: a large blob, many small layers, and many pushes at once.

The large blob is sent by curl, as a stream. The small layers are sent as clients send them:
``HEAD``, ``POST``, ``PATCH``, ``PUT``, over a few connections. Each server gets new bytes in each
round, and the servers take turns.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bench.measure import MIB, back_memory, costs
from bench.peers import Distribution3, Zot
from bench.table import Run
from tests.real.process import find_go_program, free_port, need
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror

SMALL_LAYERS: Final = 200
SMALL_BYTES: Final = 20_000
CONNECTIONS: Final = 6
"""Connections of one client: skopeo and containerd push so many layers at once."""
PUSHES: Final = 50
MEMORY_BOUND: Final = 150 * MIB
"""Most memory of the server beside 50 pushes."""


class PushConnection:
    """A registry that takes pushes, over one connection."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._host, timeout=300)

    def _ask(self, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        self._connection.request(method, target, body, headers)
        response = self._connection.getresponse()
        response.read()
        location = urlsplit(response.headers.get("Location", ""))
        return response.status, f"{location.path}?{location.query}" if location.query else (
            location.path
        )

    def begin(self, repository: str) -> str:
        """Begin an upload, and return its path and query."""
        status, location = self._ask("POST", f"/v2/{repository}/blobs/uploads/", b"")
        assert status == 202
        return location

    def send_file(self, location: str, file: Path) -> str:
        """Send a file by ``PATCH``. Returns the path and query to go on with."""
        command = [need("curl"), "-sS", "-D", "-", "-o", os.devnull, "-X", "PATCH"]
        target = f"http://{self._host}{location}"
        done = subprocess.run([*command, "-T", str(file), target], check=True, capture_output=True)
        fields = done.stdout.decode().splitlines()
        found = next(f.partition(": ")[2] for f in fields if f.lower().startswith("location"))
        parts = urlsplit(found.strip())
        return f"{parts.path}?{parts.query}" if parts.query else parts.path

    def finish(self, location: str, digest: str) -> None:
        """Finish an upload."""
        joint = "&" if "?" in location else "?"
        status, _ = self._ask("PUT", f"{location}{joint}digest={digest}", b"")
        assert status == 201

    def push(self, repository: str, data: bytes) -> None:
        """Push a small blob as clients do."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert self._ask("HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 404
        status, location = self._ask("PATCH", self.begin(repository), data)
        assert status == 202
        self.finish(location, digest)


def _seconds_of_large(url: str, number: int, size: int, directory: Path) -> float:
    file = directory / "blob"
    piece = os.urandom(MIB)
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for chunk in (os.urandom(16), *([piece] * (size // MIB))):
            out.write(chunk)
            digest.update(chunk)
    back_memory(3 * size)  # The file, the copy of the server, and what else it needs.
    os.sync()
    connection = PushConnection(url)
    begun = time.perf_counter()
    location = connection.send_file(connection.begin(f"bench/large{number}"), file)
    connection.finish(location, f"sha256:{digest.hexdigest()}")
    return time.perf_counter() - begun


def _seconds_of_small(url: str, number: int) -> float:
    layers = [os.urandom(SMALL_BYTES) for _ in range(SMALL_LAYERS)]
    os.sync()

    def push_some(first: int) -> None:
        connection = PushConnection(url)
        for data in layers[first::CONNECTIONS]:
            connection.push(f"bench/small{number}", data)

    begun = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        list(threads.map(push_some, range(CONNECTIONS)))
    return time.perf_counter() - begun


def _hosting(stack: ExitStack) -> tuple[Mirror, str]:
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": "registry.example", "listen": push_host}
    mirror = stack.enter_context(Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted))
    return mirror, f"http://{push_host}"


def _push(run: Run) -> Iterator[str]:
    size = 2 * run.size
    yield (
        f"push of {size // MIB} MiB, and of {SMALL_LAYERS} layers of {SMALL_BYTES:,} bytes over"
        f" {CONNECTIONS} connections: median (lowest) seconds"
    )
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="push-") as directory:
        servers = {"oci-mirror, 1 worker": _hosting(stack)[1]}
        servers["docker-registry"] = stack.enter_context(DockerRegistry()).url
        if find_go_program("registry") is not None:
            servers["Distribution 3"] = stack.enter_context(Distribution3()).url
        if find_go_program("zot") is not None:
            servers["zot"] = stack.enter_context(Zot()).url
        large: dict[str, list[float]] = {name: [] for name in servers}
        small: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(run.rounds):
            for name, url in servers.items():
                large[name].append(_seconds_of_large(url, number, size, Path(directory)))
        # Not between the large ones: what these leave to the disk would be a part of the result.
        for number in range(3 * run.rounds):
            for name, url in servers.items():
                small[name].append(_seconds_of_small(url, number))
        for name in servers:
            yield f"  {name:<22} large {_times(large[name])}  small {_times(small[name])}"


def _times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):6.2f} ({min(seconds):5.2f})"


def _push_memory(run: Run) -> Iterator[str]:
    size = min(run.size, 40 * MIB)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="push-") as directory:
        mirror, url = _hosting(stack)
        file = Path(directory) / "blob"
        data = os.urandom(size)
        file.write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def push(number: int) -> None:
            connection = PushConnection(url)
            connection.finish(
                connection.send_file(connection.begin(f"bench/r{number}"), file), digest
            )

        peak = 0
        for _ in range(run.rounds):
            with costs(mirror.pid) as cost, ThreadPoolExecutor(PUSHES) as threads:
                list(threads.map(push, range(PUSHES)))
            peak = max(peak, cost.peak)
        verdict = " MISSED" if peak > MEMORY_BOUND else ""
        yield f"{PUSHES} pushes of {size // MIB} MiB at once: peak {peak / MIB:.0f} MiB{verdict}"


ROWS = {"push": _push, "push-memory": _push_memory}
