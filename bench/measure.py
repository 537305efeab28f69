"""Measure a row: time at the clients, CPU and memory of the processes of the server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.real.process import need

# The header of containerd.
_ACCEPT = (
    "application/vnd.docker.distribution.manifest.v2+json,"
    " application/vnd.docker.distribution.manifest.list.v2+json,"
    " application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"
)
_TICKS = os.sysconf("SC_CLK_TCK")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MIB = 1024 * 1024
REPOSITORY: Final = "library/bench"
"""The repository of all that is measured."""


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for process in found:
        try:
            children = Path(f"/proc/{process}/task/{process}/children").read_text()
        except OSError:
            continue
        found += map(int, children.split())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree."""
    total = 0
    for process in tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def memory(pid: int) -> int:
    """Bytes of a process tree: its anonymous memory, and its share of what is mapped."""
    total = 0
    for process in tree(pid):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def connections_of(port: int) -> int:
    """Return how many connections a server at this port of IPv4 has."""
    found = re.findall(
        rf"^\s*\d+: [0-9A-F]{{8}}:{port:04X} \S+ 01 ",
        Path("/proc/net/tcp").read_text(),
        re.MULTILINE,
    )
    return len(found)


@dataclass(slots=True)
class Cost:
    """Seconds of CPU, and bytes at the peak."""

    cpu: float = 0.0
    peak: int = 0


@contextmanager
def costs(pid: int) -> Iterator[Cost]:
    """Measure a process tree while the context lasts."""
    cost, over = Cost(), threading.Event()

    def sample() -> None:
        while not over.wait(0.2):
            cost.peak = max(cost.peak, memory(pid))

    before = cpu_seconds(pid)
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield cost
    finally:
        cost.peak = max(cost.peak, memory(pid))
        over.set()
        thread.join()
        cost.cpu = cpu_seconds(pid) - before


def back_memory(size: int) -> None:
    """Write a file of ``size`` bytes, and delete it.

    A virtual machine gets memory from its host when a page is used for the first time, which takes
    longer than all that is measured here. Afterwards the pages are free, and the machine has them.
    """
    piece = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(prefix="om-back-", dir="/tmp") as file:
        for _ in range(-(-size // MIB)):
            file.write(piece)


DOWNLOAD_LIMIT_S: Final = 90
"""Seconds for one download: three times as long as the slowest peer needs. Some never respond."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Result of one curl. Times are seconds from its start."""

    status: int
    size: int
    first_byte: float
    total: float


def start_curl(url: str, sink: str = os.devnull, *options: str) -> subprocess.Popen[bytes]:
    """Start a download to the file ``sink``. :func:`timed` waits for its end."""
    seen = '{"status":"%{http_code}","size":%{size_download},"first_byte":%{time_starttransfer},'
    # The certificates of upstreams are their own authorities.
    command = [need("curl"), "-skm", str(DOWNLOAD_LIMIT_S), "-o", sink]
    return subprocess.Popen(
        [*command, "-w", seen + '"total":%{time_total}}', *options, url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )


def timed(process: subprocess.Popen[bytes]) -> Timed:
    """Wait for a process of :func:`start_curl`."""
    output, _ = process.communicate()
    seen = json.loads(output)
    return Timed(**seen | {"status": int(seen["status"])})  # "000" without a response.


def download(url: str, streams: int, size: int) -> float:
    """Return bytes per second of ``streams`` parallel curls. Raises if one got less than all."""
    begun = time.monotonic()
    running = [start_curl(url) for _ in range(streams)]
    done = [timed(process) for process in running]
    seconds = time.monotonic() - begun
    if short := [one for one in done if (one.status, one.size) != (200, size)]:
        raise RuntimeError(f"incomplete: {short[0].status}, {short[0].size} bytes")
    return streams * size / seconds


@dataclass(frozen=True, slots=True)
class Rate:
    """Result of one wrk: responses per second, and seconds until half and 99 % of them came."""

    requests: float
    median: float
    slow: float


def requests(url: str, seconds: int, connections: int = 16) -> Rate:
    """Ask for ``url`` again and again with wrk, on ``connections`` connections."""
    command = [need("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    command += ["-H", f"Accept: {_ACCEPT}", url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise RuntimeError("responses with an error status")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    percents = dict(re.findall(r"^\s+(\d+)%\s+([\d.]+(?:us|ms|s))$", said, re.MULTILINE))
    if found is None or "99" not in percents:
        raise RuntimeError(said)
    return Rate(float(found[1]), _seconds(percents["50"]), _seconds(percents["99"]))


def _seconds(text: str) -> float:
    """Return the seconds of a duration as wrk prints it, such as ``1.25ms``."""
    number = text.rstrip("mus")
    return float(number) * _UNITS[text.removeprefix(number)]


async def crowd(
    host: str, port: int, path: str, clients: int, rate: int, over: Callable[[], bool]
) -> int:
    """Read with ``clients``, each at ``rate`` bytes per second. Returns the sum of bytes."""
    request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    got = 0

    async def one(number: int) -> None:
        nonlocal got
        with socket.socket() as connection:
            # A slow link has a small window. Loopback would buffer too much.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            connection.setblocking(False)
            await loop.sock_connect(connection, (host, port))
            await loop.sock_sendall(connection, request)
            # Twice a second: the slow clients must cost less than the server.
            await asyncio.sleep(number / clients / 2)
            while not over():
                got += len(await loop.sock_recv(connection, rate // 2))
                await asyncio.sleep(0.5)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return got
