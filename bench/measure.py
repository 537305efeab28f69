"""Measure a row: time at the clients, CPU and memory of the processes of the server."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.real.process import need

# The header of containerd.
_ACCEPT = (
    "application/vnd.docker.distribution.manifest.v2+json,"
    " application/vnd.docker.distribution.manifest.list.v2+json,"
    " application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"
)
_TICKS = os.sysconf("SC_CLK_TCK")


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


def download(url: str, streams: int, size: int) -> float:
    """Return bytes per second of ``streams`` parallel curls. Raises if one got less than all."""
    command = [need("curl"), "-sS", "-o", os.devnull, "-w", "%{http_code} %{size_download}", url]
    begun = time.monotonic()
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(streams)]
    said = [process.communicate()[0] for process in running]
    seconds = time.monotonic() - begun
    if said != [f"200 {size}"] * streams:
        raise RuntimeError(f"incomplete: {sorted(set(said))}")
    return streams * size / seconds


def requests(url: str, seconds: int) -> float:
    """Return responses per second of wrk with 16 connections."""
    command = [need("wrk"), "-t1", "-c16", f"-d{seconds}s", "-H", f"Accept: {_ACCEPT}", url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise RuntimeError("responses with an error status")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if found is None:
        raise RuntimeError(said)
    return float(found[1])


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
