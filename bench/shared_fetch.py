"""Measure how long eight clients wait that request a cold blob together, over a slow upstream.

``python -m bench.shared_fetch [--size MIB] [--rate MB/s] [--clients N] [--workers N]`` prints
ratios to one direct download of the same blob in the same run. It fails if one misses its bound.
The clients are curl processes, which cost less than what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The helpers that start real programs belong to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.real.process import need
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror

MEGABYTE = 1_000_000
FIRST_BYTE_BOUND = 0.050
"""Seconds from the first byte of the upstream to that of a client, at most."""
LAST_BYTE_BOUND = 1.1
"""Time of the slowest client, as a multiple of one direct download, at most."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Result of one curl. Times are seconds from its start."""

    status: int
    size: int
    first_byte: float
    total: float


@dataclass(frozen=True, slots=True)
class SharedFetch:
    """Result of one measurement, in bytes and seconds. ``upstream_…``: requests of the mirror."""

    size: int
    workers: int
    direct: Timed
    crowd: tuple[Timed, ...]
    """The same number of clients without a mirror: the wait that is due to the machine."""
    clients: tuple[Timed, ...]
    upstream_gets: int
    upstream_bytes: int

    @property
    def bytes_ratio(self) -> float:
        """Bytes from the upstream, as a multiple of the size of the blob."""
        return self.upstream_bytes / self.size

    @property
    def first_byte_delay(self) -> float:
        """Seconds from the direct download's first byte to the latest first byte of a client."""
        return self._last_first(self.clients)

    def _last_first(self, clients: tuple[Timed, ...]) -> float:
        return max(client.first_byte for client in clients) - self.direct.first_byte

    @property
    def last_ratio(self) -> float:
        """Time of the slowest client, as a multiple of that of the direct download."""
        return max(client.total for client in self.clients) / self.direct.total

    @property
    def complete(self) -> bool:
        """True if every client received every byte."""
        return all((one.status, one.size) == (200, self.size) for one in self.clients)

    def misses(self) -> list[str]:
        """Return the bounds that were missed."""
        return [
            what
            for what, held in (
                ("a client got less than the blob", self.complete),
                ("more than one upstream GET", self.upstream_gets == 1),
                ("more upstream bytes than the blob's", self.upstream_bytes == self.size),
                ("first byte too late", self.first_byte_delay <= FIRST_BYTE_BOUND),
                ("last byte too late", self.last_ratio <= LAST_BYTE_BOUND),
            )
            if not held
        ]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        rate = self.direct.size / self.direct.total / MEGABYTE
        what = f"{len(self.clients)} clients, {self.workers} worker(s), {self.size >> 20} MiB"
        return [
            f"{what}; one direct download: {self.direct.total:.2f} s ({rate:.0f} MB/s)",
            f"  upstream GETs          {self.upstream_gets}",
            f"  upstream bytes         {self.bytes_ratio:.2f} x the blob",
            f"  last first byte        {self.first_byte_delay * 1000:+.0f} ms of the upstream's",
            f"    without a mirror     {self._last_first(self.crowd) * 1000:+.0f} ms",
            f"  last client done       {self.last_ratio:.2f} x one direct download",
            *(f"  MISSED: {miss}" for miss in self.misses()),
        ]


def _curl(url: str, sink: str = "/dev/null", *options: str) -> subprocess.Popen[bytes]:
    seen = '{"status":%{http_code},"size":%{size_download},"first_byte":%{time_starttransfer},'
    return subprocess.Popen(
        [need("curl"), "-s", "-o", sink, "-w", seen + '"total":%{time_total}}', *options, url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )


def _timed(process: subprocess.Popen[bytes]) -> Timed:
    output, _ = process.communicate(timeout=600)
    return Timed(**json.loads(output))


def measure(size: int, rate: int, clients: int = 8, workers: int = 1) -> SharedFetch:
    """Measure one shared fetch. ``size``: bytes. ``rate``: bytes per second of each connection.

    Raises ``AssertionError`` if the bytes of a client do not hash to the digest.
    """
    with DockerRegistry() as registry, NginxFront(registry.url, limit_rate=rate) as front:
        digest = registry.push_large("org/big", size)
        with Mirror({"docker.io": front.url}, workers=workers) as mirror:
            path = f"/v2/org/big/blobs/{digest}"
            # First bytes only. Before the other downloads, so that the upstream has logged them.
            first_bytes = ("/dev/null", "--range", "0-65535")
            together = [_curl(front.url + path, *first_bytes) for _ in range(clients)]
            crowd = tuple(_timed(process) for process in together)
            direct = _timed(_curl(front.url + path))
            before = len(front.blob_gets(digest))
            running = [_curl(f"{mirror.url}{path}?ns=docker.io") for _ in range(clients)]
            done = tuple(_timed(process) for process in running)
            fetched = front.blob_gets(digest, before + 1)[before:]
            copy = mirror.dir / "copy"
            _timed(_curl(f"{mirror.url}{path}?ns=docker.io", str(copy)))
            with copy.open("rb") as file:
                hashed = hashlib.file_digest(file, "sha256").hexdigest()
            assert f"sha256:{hashed}" == digest, "wrong bytes"
    return SharedFetch(
        size, workers, direct, crowd, done, len(fetched), sum(seen.sent for seen in fetched)
    )


def main() -> int:
    """Measure with one and with two workers, or as given. Exit code 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="MiB")
    parser.add_argument("--rate", type=int, default=100, help="MB/s")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, action="append", help="default: 1 and 2")
    options = parser.parse_args()
    failed = False
    for workers in options.workers or [1, 2]:
        fetch = measure(options.size << 20, options.rate * MEGABYTE, options.clients, workers)
        print("\n".join(fetch.lines()), flush=True)
        failed = failed or bool(fetch.misses())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
