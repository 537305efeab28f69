"""Helpers of the row tests: raw requests, many clients, network calls, strace."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from tests.real.process import need
from tests.real.server import ROOT, Mirror
from tests.server_kit import Server

T = TypeVar("T")

CLOSE = "Host: x\r\nConnection: close"
"""Headers of a request after which the server closes the connection."""


async def send_raw(server: Server, request: bytes, *, read: bool = True) -> bytes:
    """Send raw bytes. Returns the bytes until the server closes or is silent for 1.5 s."""
    port = int(server.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    response = b""
    try:
        writer.write(request)
        await writer.drain()
        while read:
            async with asyncio.timeout(1.5):
                data = await reader.read(65_536)
            if not data:
                break
            response += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return response


def statuses(response: bytes) -> list[int]:
    """Return the status of every response in raw bytes."""
    return [int(code) for code in re.findall(rb"HTTP/\d\.\d (\d{3})", response)]


def run_in_threads(count: int, work: Callable[[int], T]) -> list[T]:
    """Run ``work`` in ``count`` threads at once. Returns the results."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def blob_path(digest: str) -> str:
    """Return the URL path of a blob."""
    return f"/v2/library/app/blobs/{digest}"


def is_served(mirror: Mirror, digest: str) -> bool:
    """Return whether a blob is served with the right bytes. Raises if the response is cut."""
    got = mirror.download(blob_path(digest))
    return got.status == 200 and f"sha256:{got.sha256}" == digest


def try_pull(mirror: Mirror, digest: str) -> bool:
    """Return whether a blob was served. Asserts that no complete response has wrong bytes."""
    try:
        got = mirror.download(blob_path(digest))
    except Exception:
        return False
    assert got.status != 200 or f"sha256:{got.sha256}" == digest, (
        "a complete response with wrong bytes"
    )
    return got.status == 200


def every_file_hashes_to_its_name(data: Path) -> None:
    """Assert invariant I1."""
    for path in (data / "blobs").glob("*/*"):
        assert hashlib.new(path.parent.name, path.read_bytes()).hexdigest() == path.name


POOLS = 8 + 8 + 4 + 1 + 2 + 1 + 3 + 1 + min(32, (os.cpu_count() or 1) + 4)
"""Threads at most: opening, writing, publishing, heartbeats, hashing, evicting, index, the
history, the loop's own."""


def descriptors(pid: int) -> list[str]:
    """Return the targets of the open file descriptors of a process."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def open_sockets(pid: int) -> int:
    """Count open sockets. An idle mirror has three: its listener, and a pair to wake its loop."""
    return sum(1 for name in descriptors(pid) if name.startswith("socket:["))


def strace(calls: str, *inject: str, log: str | Path = "/dev/null") -> Sequence[str]:
    """Return a command prefix that injects faults, such as ``fsync:error=EIO:when=2``."""
    faults = [word for fault in inject for word in ("-e", f"inject={fault}")]
    # With --seccomp-bpf, strace sends no signal at a second call.
    quick = [] if any(":signal=" in fault for fault in inject) else ["--seccomp-bpf"]
    return [
        *(need("strace"), "-f", "-I1", "-qq", "-o", str(log), *quick),
        *("-e", f"trace={calls}", *faults),
    ]


def slow_disk(directory: Path, rate: int) -> dict[str, str]:
    """Return the environment of a mirror whose writes of content are slow.

    Args:
        directory: An empty directory. Python reads the patch of ``os.pwritev`` from there.
        rate: Bytes per second, in each thread that writes. 0: the disk keeps its own speed.
    """
    if rate:
        (directory / "sitecustomize.py").write_text(
            "import os, time\n"
            "real = os.pwritev\n"
            "def slow(fd, buffers, offset):\n"
            f"    time.sleep(sum(map(len, buffers)) / {rate})\n"
            "    return real(fd, buffers, offset)\n"
            "os.pwritev = slow\n"
        )
    return {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}


def most_memory(pid: int) -> int:
    """Return the peak memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def fill(layout: Layout, count: int) -> list[tuple[Digest, int]]:
    """Write ``count`` small contents, as a publish leaves them. Returns (digest, size) of each."""
    directory = layout.content_directories()[0]
    directory.mkdir(parents=True)
    held = []
    for number in range(count):
        data = b"content %d of many\n" % number
        name = hashlib.sha256(data).hexdigest()
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, data)
        # Whole seconds mark content that no other program wrote to.
        os.utime(fd, (1_700_000_000 + number // 100,) * 2)
        os.close(fd)
        held.append((Digest.parse(f"sha256:{name}"), len(data)))
    return held


@contextmanager
def mounted(path: Path, kind: str, options: str) -> Iterator[Path]:
    """Mount a file system at ``path``. Needs root, also in a container."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run([need("mount"), "-t", kind, "-o", options, kind, path], check=True)
    try:
        yield path
    finally:
        subprocess.run([need("umount"), "-l", path], check=True)


class NetworkLog:
    """Host names that this process looks up, and ports that it connects to, while ``watched``."""

    def __init__(self) -> None:
        self.hosts: set[object] = set()
        self.ports: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[Self]:
        """Record every name lookup and every connection."""
        loop, resolve = asyncio.get_running_loop(), socket.getaddrinfo
        connect = loop.sock_connect

        def look_up(host: Any, *arguments: Any, **named: Any) -> Any:
            self.hosts.add(host)
            return resolve(host, *arguments, **named)

        async def call(connection: socket.socket, address: Any) -> None:
            self.ports.add(address[1])
            await connect(connection, address)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", look_up)
            patch.setattr(loop, "sock_connect", call)
            yield self
