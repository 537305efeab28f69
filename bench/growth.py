"""What a pull, a hit and a start cost beside few and many contents.

Each value is a ratio to that beside the first number of contents, measured in the same run. Values
of pulls and hits are medians of the rounds: the 99th percentile of one round depends on what else
the machine did. Contents are sparse files of 1 MiB: they have a length, and take up no space.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from bench.measure import MIB, REPOSITORY, costs, cpu_seconds, memory, requests
from bench.table import Run
from tests.real.process import need, wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror

CONTENTS = (100, 10_000, 100_000)
CHUNKED = "chunked.example"
COLD_BLOBS = 40
COLD_BYTES = 20_000
CHUNKED_BYTES = 256 * MIB
BOUND = 2.0
"""Most that a cold pull or a hit may cost, as a multiple of the cost beside the first number."""
HIT_SECONDS = 3
HIGH_WATER = 0.95


@dataclass(slots=True)
class Costs:
    """The values beside one number of contents, by row."""

    contents: int
    values: dict[str, float] = field(default_factory=dict)


class ChunkedUpstream(ThreadingHTTPServer):
    """An upstream that sends one blob without its length."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ChunkedHandler)
        self.digest = f"sha256:{hashlib.sha256(bytes(CHUNKED_BYTES)).hexdigest()}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"


class _ChunkedHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        chunk = b"%x\r\n" % MIB + bytes(MIB) + b"\r\n"
        for _ in range(CHUNKED_BYTES // MIB):
            self.wfile.write(chunk)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def fill(data_dir: Path, count: int) -> None:
    """Create ``count`` sparse contents of 1 MiB, an hour old, the first one the oldest.

    Those that exist stay. The next start counts all of them.
    """
    (data_dir / "totals").unlink(missing_ok=True)
    directory = data_dir / "blobs" / "sha256"
    directory.mkdir(parents=True, exist_ok=True)
    used = int(time.time()) - 3600 - count // 1000
    for number in range(count):
        path = directory / hashlib.sha256(b"%d" % number).hexdigest()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.truncate(fd, MIB)
        os.utime(fd, (used + number // 1000,) * 2)
        os.close(fd)


class Growth:
    """The measurements beside one number of contents."""

    def __init__(
        self, registry: DockerRegistry, blobs: Sequence[str], chunked: ChunkedUpstream
    ) -> None:
        self.registry = registry
        self.blobs = blobs
        self.chunked = chunked

    def measure(self, contents: int, rounds: int) -> Costs:
        found = Costs(contents)
        with tempfile.TemporaryDirectory(prefix="growth-") as directory:
            data_dir = Path(directory)
            fill(data_dir, contents)
            self._pulls(data_dir, found, rounds)
            evictions: list[dict[str, float]] = []
            for _ in range(rounds):
                fill(data_dir, contents)
                evictions.append(self._eviction(data_dir, contents))
            found.values |= medians(evictions)
        return found

    def _pulls(self, data_dir: Path, found: Costs, rounds: int) -> None:
        quota = 10 * (found.contents + 1000) * MIB
        begun = time.monotonic()
        with self._mirror(data_dir, quota) as mirror:
            found.values["start, s"] = time.monotonic() - begun
            reached = mirror.metric_reaches(found.contents, "oci_mirror_contents")
            found.values["first scan, s"] = time.monotonic() - begun if reached else float("inf")
            found.values["CPU of the start, s"] = cpu_seconds(mirror.pid)
            self._pull_cold(mirror)
            times, cpu = [], []
            for _ in range(rounds):
                with costs(mirror.pid) as cost:
                    times.append(self._pull_cold(mirror))
                cpu.append(cost.cpu)
            found.values["40 cold blobs at once, s"] = statistics.median(times)
            found.values["CPU of them, s"] = statistics.median(cpu)
            found.values |= medians([self._hits(mirror, "alone") for _ in range(rounds)])
            over = threading.Event()
            pulling = threading.Thread(target=self._pull_until, args=(mirror, over))
            pulling.start()
            beside = [self._hits(mirror, "beside cold pulls") for _ in range(rounds)]
            found.values |= medians(beside)
            over.set()
            pulling.join()
            found.values["chunked blob, s"] = statistics.median(
                self._get_cold(mirror, [self.chunked.digest], CHUNKED) for _ in range(rounds)
            )
            found.values["memory, MiB"] = memory(mirror.pid) / MIB

    def _eviction(self, data_dir: Path, contents: int) -> dict[str, float]:
        """Evict a tenth of all content, while cold blobs are pulled and hits are measured."""
        used = sum(path.stat().st_size for path in (data_dir / "blobs").glob("*/*"))
        with self._mirror(data_dir, int((used - MIB) / HIGH_WATER)) as mirror:
            assert mirror.metric_reaches(contents * 0.9, "oci_mirror_contents")
            times: list[float] = []
            begun = time.monotonic()
            pulling = threading.Thread(target=lambda: times.append(self._pull_cold(mirror)))
            pulling.start()
            found = self._hits(mirror, "beside an eviction")
            pulling.join()
            found["40 cold blobs beside an eviction, s"] = times[0]
            evictions = "oci_mirror_evictions_total"
            wait_until(lambda: mirror.metric(evictions) > 0, "something is evicted", 60)
            found["eviction and 3 s of hits, s"] = time.monotonic() - begun
            return found

    def _mirror(self, data_dir: Path, quota: int) -> Mirror:
        storage = {"max_size": quota, "high_water": HIGH_WATER, "reverify": "inf"}
        log = {"level": "warning"}
        upstreams = {"docker.io": self.registry.url, CHUNKED: self.chunked.url}
        return Mirror(upstreams, data_dir=data_dir, storage=storage, log=log)

    def _pull_cold(self, mirror: Mirror) -> float:
        return self._get_cold(mirror, self.blobs[1:])

    def _pull_until(self, mirror: Mirror, over: threading.Event) -> None:
        while not over.is_set():
            self._pull_cold(mirror)

    def _get_cold(
        self, mirror: Mirror, digests: Sequence[str], upstream: str = "docker.io"
    ) -> float:
        """Return the seconds that all take at once, none of them being stored."""
        for digest in digests:
            with suppress(FileNotFoundError):
                mirror.content(digest).unlink()
        seconds = self._get(mirror, digests, upstream)
        for digest in digests:
            wait_until(mirror.content(digest).exists, "it is published", 20)
        return seconds

    def _get(self, mirror: Mirror, digests: Sequence[str], upstream: str = "docker.io") -> float:
        urls = [f"{mirror.url}/v2/{REPOSITORY}/blobs/{digest}?ns={upstream}" for digest in digests]
        sinks = [word for url in urls for word in ("-o", os.devnull, url)]
        command = [
            need("curl"),
            "-sSf",
            "--no-progress-meter",
            "-Z",
            "--parallel-max",
            str(COLD_BLOBS),
            *sinks,
        ]
        begun = time.monotonic()
        subprocess.run(command, check=True)
        return time.monotonic() - begun

    def _hits(self, mirror: Mirror, beside: str) -> dict[str, float]:
        url = f"{mirror.url}/v2/{REPOSITORY}/blobs/{self.blobs[0]}?ns=docker.io"
        self._get(mirror, self.blobs[:1])
        rate = requests(url, HIT_SECONDS, 1)
        return {
            f"hit {beside}, median, ms": rate.median * 1000,
            f"hit {beside}, 99th percentile, ms": rate.slow * 1000,
        }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each value."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def misses(found: list[Costs]) -> list[str]:
    """Return the rows that exceed :data:`BOUND`: cold pulls and hits.

    Each is compared with its value beside the first number of contents. There an eviction ends at
    once, so the median of the hits beside it is compared with that of hits alone, too.
    """
    bounded = ("40 cold blobs", "CPU of them", "chunked", "hit")
    compared = [
        (f"{name} beside {cost.contents:,}", value, found[0].values[name])
        for cost in found[1:]
        for name, value in cost.values.items()
        if name.startswith(bounded)
    ]
    beside, alone = (f"hit {state}, median, ms" for state in ("beside an eviction", "alone"))
    compared += [
        (
            f"{beside}, against alone, beside {cost.contents:,}",
            cost.values[beside],
            cost.values[alone],
        )
        for cost in found
    ]
    return [
        f"{name}: {value / base:.2f} x" for name, value, base in compared if value > BOUND * base
    ]


def growth(run: Run) -> Iterator[str]:
    """Measure, and return one row for each cost."""
    with DockerRegistry() as registry:
        blobs = [registry.push_large(REPOSITORY, COLD_BYTES, seed=n) for n in range(COLD_BLOBS + 1)]
        beside = Growth(registry, blobs, ChunkedUpstream())
        found = [beside.measure(count, run.rounds) for count in CONTENTS]
    yield f"{'contents':42}" + "".join(f"{cost.contents:>20,}" for cost in found)
    for name, base in found[0].values.items():
        values = [(cost.values[name], cost.values[name] / base) for cost in found]
        yield f"{name:42}" + "".join(f"{value:10,.2f} {ratio:7.2f} x" for value, ratio in values)
    yield from (f"  MISSED: {miss}" for miss in misses(found))


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {"growth": growth}
"""Measurements by name."""
