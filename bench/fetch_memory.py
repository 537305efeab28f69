"""Measure the memory of many cold blobs, and the CPU time of very small chunks.

The rows print the peak memory of the mirror while 40 clients pull a cold blob each, first to a disk
that takes 10 MB/s in each of the eight threads that write, then with a disk that takes nothing, and
then while 200 clients pull blobs that may be fetched over four connections each. After that 16 MiB
are fed to one ingest in chunks of 256 bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.measure import MIB, connections_of
from bench.peers import upstream
from bench.table import Run
from bench.upstreams import StaticRegistry
from mirror.oci.reference import Digest
from mirror.store.ingest import Ingest
from tests.real.images import random_bytes
from tests.real.process import need
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.robustness.kit import most_memory, slow_disk
from tests.unit.store.kit import kit

MEMORY_BOUND: Final = 150 * MIB
"""Bytes of the whole process, at most."""
CHUNK_BYTES: Final = 256
"""A registry that sends chunks of this size was seen in the field."""
BLOBS: Final = 40
DISK_RATE: Final = 10_000_000
"""Bytes per second that a slow disk takes in each thread that writes."""
WINDOW_CLIENTS: Final = 200
WINDOW_RATE: Final = 2_000_000
"""Bytes per second of each connection: so few that 160 of them leave some of the processor."""
BLOBS_OF_ENDPOINT: Final = 2
"""Blobs at each endpoint. Eight connections to an endpoint are allowed, and four for a blob."""


def pull_together(urls: Sequence[str]) -> float:
    """Pull each URL with a client, all at once. Returns the seconds that it took."""
    command = [need("curl"), "-fZ", "--no-progress-meter", "--parallel-immediate"]
    command += ["--parallel-max", str(len(urls))]
    begun = time.monotonic()
    for url in urls:
        command += ["-o", os.devnull, url]
    subprocess.run(command, check=True)
    return time.monotonic() - begun


def measure(blobs: int, size: int, rate: int) -> tuple[int, int, float]:
    """Pull ``blobs`` cold blobs at once. Returns idle and peak memory in bytes, and seconds.

    ``rate``: bytes per second that the disk takes in each thread. 0: it has no space at all.
    """
    with DockerRegistry() as registry:
        digests = [registry.push_large("org/big", size, seed=100 + n) for n in range(blobs)]
        with tempfile.TemporaryDirectory() as patch:
            environment = slow_disk(Path(patch), rate)
            storage = {} if rate else {"max_size": "1MiB"}
            with Mirror({"docker.io": registry.url}, env=environment, storage=storage) as mirror:
                idle = most_memory(mirror.pid)
                blobs_url = f"{mirror.url}/v2/org/big/blobs"
                seconds = pull_together([f"{blobs_url}/{digest}" for digest in digests])
                return idle, most_memory(mirror.pid), seconds


async def feed_small_chunks(size: int) -> float:
    """Feed one ingest in chunks of 256 bytes. Returns seconds of CPU time."""
    data = random_bytes(size, 1)
    with tempfile.TemporaryDirectory() as directory, kit(Path(directory)) as parts:
        ingest = Ingest(parts.ingest_context, Digest.of(data), None)
        chunks = [data[n : n + CHUNK_BYTES] for n in range(0, size, CHUNK_BYTES)]
        await ingest.try_lead()
        await ingest.declare(size)
        begun = time.process_time()
        for chunk in chunks:
            await ingest.feed(chunk)
        await ingest.finish()
        used = time.process_time() - begun
        ingest.release()
    return used


def measure_windows(blobs: int, size: int, clients: int) -> tuple[int, int, float, int]:
    """Pull ``blobs`` cold blobs by ``clients``, over several connections each.

    Returns idle and peak memory in bytes, the seconds, and the connections at most.
    """
    endpoints = blobs // BLOBS_OF_ENDPOINT
    with StaticRegistry(rate=WINDOW_RATE, addresses=endpoints) as registry:
        digests = _add_similar(registry.files, size, blobs)
        names = [f"u{number}.example" for number in range(endpoints)]
        upstreams: Mapping[str, Mapping[str, object]] = {
            name: upstream(url) for name, url in zip(names, registry.urls, strict=True)
        }
        with Mirror(upstreams, default_upstream=names[0]) as mirror:
            idle, most, over = most_memory(mirror.pid), [0], threading.Event()

            def sample() -> None:
                while not over.wait(0.2):
                    most.append(connections_of(registry.port))

            sampling = threading.Thread(target=sample)
            sampling.start()
            seconds = pull_together(
                [
                    f"{mirror.url}/v2/org/big/blobs/{digests[number % blobs]}"
                    f"?ns={names[number % endpoints]}"
                    for number in range(clients)
                ]
            )
            over.set()
            sampling.join()
            return idle, most_memory(mirror.pid), seconds, max(most)


def _add_similar(directory: Path, size: int, count: int) -> list[str]:
    """Write ``count`` blobs that differ in their first 8 bytes. Returns their digests."""
    body, digests = random_bytes(size - 8, 3), []
    for number in range(count):
        first = number.to_bytes(8)
        hashed = hashlib.sha256(first)
        hashed.update(body)
        digests.append(f"sha256:{hashed.hexdigest()}")
        (directory / digests[-1]).write_bytes(first + body)
    return digests


def fetch_memory(run: Run) -> Iterator[str]:
    """Measure all. It is missed if the memory is above its bound."""
    size = run.size // 8
    for rate in (DISK_RATE, 0):
        idle, peak, seconds = measure(BLOBS, size, rate)
        disk = f"a disk of {DISK_RATE // 1_000_000} MB/s a thread" if rate else "a full disk"
        yield f"{BLOBS} cold blobs of {size // MIB} MiB, {disk}: {_memory(idle, peak, seconds)}"
    idle, peak, seconds, connections = measure_windows(BLOBS, 2 * size, WINDOW_CLIENTS)
    yield (
        f"{BLOBS} cold blobs of {2 * size // MIB} MiB, {WINDOW_CLIENTS} clients, {connections}"
        f" upstream connections: {_memory(idle, peak, seconds)}"
    )
    used = asyncio.run(feed_small_chunks(16 * MIB))
    yield f"16 MiB in chunks of {CHUNK_BYTES} bytes: {used:.2f} s of CPU"


def _memory(idle: int, peak: int, seconds: float) -> str:
    missed = "  MISSED: above 150 MiB" if peak > MEMORY_BOUND else ""
    return f"peak {peak / MIB:.0f} MiB (idle {idle / MIB:.0f} MiB), {seconds:.1f} s{missed}"


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {"fetch-memory": fetch_memory}
"""Measurements by name."""
