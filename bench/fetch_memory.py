"""Measure the memory of many cold blobs on a slow disk, and the CPU time of very small chunks.

``python -m bench.fetch_memory [--blobs N] [--size MIB] [--disk MB/s]`` prints the peak memory of
the mirror while ``N`` clients pull a cold blob each, first to a disk that takes ``--disk`` in each
of the eight threads that write, then with a disk that takes nothing. It fails above 150 MiB. After
that it feeds 16 MiB in chunks of 256 bytes to one ingest, and prints the CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# The helpers that start real programs belong to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mirror.oci.reference import Digest
from mirror.store.ingest import Ingest
from tests.real.process import need
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.robustness.kit import most_memory, slow_disk
from tests.unit.store.kit import kit, random_bytes

MIB = 1 << 20
MEMORY_BOUND = 150 * MIB
"""Bytes of the whole process, at most."""
CHUNK_BYTES = 256
"""A registry that sends chunks of this size was seen in the field."""


def pull_together(mirror: Mirror, digests: Sequence[str]) -> float:
    """Pull one blob with each client, all at once. Returns the seconds that it took."""
    urls = [f"{mirror.url}/v2/org/big/blobs/{digest}?ns=docker.io" for digest in digests]
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
            storage = {} if rate else {"storage": {"max_size": "1MiB"}}
            with Mirror({"docker.io": registry.url}, env=environment, **storage) as mirror:
                idle = most_memory(mirror.pid)
                seconds = pull_together(mirror, digests)
                return idle, most_memory(mirror.pid), seconds


async def feed_small_chunks(size: int) -> float:
    """Feed one ingest in chunks of 256 bytes. Returns seconds of CPU time."""
    data = random_bytes(size)
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


def main() -> int:
    """Measure all, and print it. Exit code 1 if the memory is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blobs", type=int, default=40)
    parser.add_argument("--size", type=int, default=32, help="MiB of each blob")
    parser.add_argument("--disk", type=int, default=10, help="MB/s of each writing thread")
    options = parser.parse_args()
    worst = 0
    for rate in (options.disk * 1_000_000, 0):
        idle, peak, seconds = measure(options.blobs, options.size * MIB, rate)
        disk = f"a disk of {options.disk} MB/s a thread" if rate else "a disk without space"
        print(
            f"{options.blobs} cold blobs of {options.size} MiB, {disk}: peak {peak / MIB:.0f} MiB"
            f" (idle {idle / MIB:.0f} MiB), {seconds:.1f} s",
            flush=True,
        )
        worst = max(worst, peak)
    used = asyncio.run(feed_small_chunks(16 * MIB))
    print(f"16 MiB in chunks of {CHUNK_BYTES} bytes: {used:.2f} s of CPU")
    return int(worst > MEMORY_BOUND)


if __name__ == "__main__":
    sys.exit(main())
