"""``make bench``: a table of ratios against other mirrors, all measured in this run.

``python -m bench [--quick] [--rounds N] [--only SUBSTRING]``. Each number is the median of the
rounds; peers take turns within a round. A row says which peer failed in it.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from bench.measure import Cost, costs, crowd, download, requests
from bench.peers import PEERS, Peer, cores
from tests.real import images
from tests.real.process import Program
from tests.real.registry import DockerRegistry, NginxFront

MIB = 1024 * 1024
REPOSITORY = "library/bench"
LIMIT = 100_000_000
DIRECT = "direct"


@dataclass(slots=True)
class Cell:
    """The measurements of one peer in one row."""

    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    failure: str = ""

    @property
    def value(self) -> float | None:
        return statistics.median(self.values) if self.values and not self.failure else None

    def add(self, value: float, cost: Cost) -> None:
        self.values.append(value)
        self.cpu.append(cost.cpu)
        self.peak = max(self.peak, cost.peak)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. ``against``: the peer of the ratios. ``target``: our target."""

    name: str
    unit: str
    against: str
    target: str
    cold: bool
    limited: bool
    measure: Callable[[str, str], float]


class Bench:
    """One run."""

    def __init__(self, size: int, seconds: int) -> None:
        self.size = size
        self.registry = DockerRegistry()
        self.front: NginxFront | None = None
        self.seconds = seconds
        self.blob = ""
        self.large = ""
        self.digest = ""
        self.cells: dict[tuple[str, str], Cell] = {}

    def rows(self) -> list[Row]:
        size, seconds = self.size, self.seconds

        def blob(streams: int) -> Callable[[str, str], float]:
            return lambda base, query: download(
                f"{base}/v2/{REPOSITORY}/blobs/{self.blob}{query}", streams, size
            )

        def large(streams: int) -> Callable[[str, str], float]:
            return lambda base, query: download(
                f"{base}/v2/{REPOSITORY}/blobs/{self.large}{query}", streams, 2 * size
            )

        def manifest(by_tag: bool) -> Callable[[str, str], float]:
            return lambda base, query: requests(
                f"{base}/v2/{REPOSITORY}/manifests/{'1.0' if by_tag else self.digest}{query}",
                seconds,
            )

        nginx, registry = "nginx proxy_cache", "docker-registry"
        return [
            Row("warm blob, 1 stream", "MB/s", nginx, ">= 0.9", False, False, blob(1)),
            Row("warm blob, 8 streams", "MB/s", nginx, ">= 0.9", False, False, blob(8)),
            Row("warm manifest by digest", "1/s", registry, ">= 10", False, False, manifest(False)),
            Row("warm manifest by tag", "1/s", registry, ">= 10", False, False, manifest(True)),
            Row("cold blob, 100 MB/s", "MB/s", DIRECT, ">= 0.95", True, True, large(1)),
            Row("cold blob, 8 at once, 100 MB/s", "MB/s", DIRECT, "", True, True, large(8)),
            Row("cold blob, unlimited", "MB/s", DIRECT, "", True, False, blob(1)),
        ]

    def run(self, rounds: int, only: str) -> None:
        with self.registry, NginxFront(self.registry.url, limit_rate=LIMIT) as front:
            self.front = front
            image = images.image()
            self.registry.push(REPOSITORY, image, "1.0")
            self.digest = image.digest
            self.blob = self.registry.push_large(REPOSITORY, self.size)
            self.large = self.registry.push_large(REPOSITORY, 2 * self.size, seed=9)
            for row in self.rows():
                if only in row.name:
                    for number in range(rounds):
                        self._round(row, number)
                    self._print(row)
            if only in "slow clients":
                self._slow_clients()

    def _upstream(self, row: Row) -> str:
        assert self.front is not None
        return self.front.url if row.limited else self.registry.url

    def _round(self, row: Row, number: int) -> None:
        """Measure all peers, in another order each time: each affects the load of the next."""
        turns: list[Peer | None] = [*PEERS, *([None] if row.against == DIRECT else [])]
        first = number % len(turns)
        for peer in (*turns[first:], *turns[:first]):
            if peer is None:
                self._direct(row)
                continue
            cell = self.cells.setdefault((row.name, peer.name), Cell())
            try:
                with peer.start(self._upstream(row)) as program:
                    self._one(row, peer, program, cell)
            except (Exception, pytest.fail.Exception) as error:
                cell.failure = f"{type(error).__name__}: {error}"[:60]

    def _direct(self, row: Row) -> None:
        cell = self.cells.setdefault((row.name, DIRECT), Cell())
        # One download: eight would share the rate, which is no reference for a cache.
        digest, size = (self.large, 2 * self.size) if row.limited else (self.blob, self.size)
        url = f"{self._upstream(row)}/v2/{REPOSITORY}/blobs/{digest}"
        cell.add(download(url, 1, size), Cost())

    def _one(self, row: Row, peer: Peer, program: Program, cell: Cell) -> None:
        base = program.url  # type: ignore[attr-defined] # all peers have a URL
        if not row.cold:
            for _ in range(2):
                row.measure(base, peer.query)
        with costs(program.pid) as cost:
            value = row.measure(base, peer.query)
        cell.add(value, cost)

    def _print(self, row: Row) -> None:
        base = self.cells[row.name, row.against].value
        scale = 1e6 if row.unit == "MB/s" else 1
        print(
            f"\n{row.name}  (ratio to {row.against}{', ours ' + row.target if row.target else ''})"
        )
        names = [DIRECT] if row.against == DIRECT else []
        for name in (*names, *(peer.name for peer in PEERS)):
            cell = self.cells[row.name, name]
            if cell.value is None:
                print(f"  {name:24} failed: {cell.failure}")
                continue
            ratio = f"{cell.value / base:6.2f} x" if base else "     ?"
            cpu = statistics.median(cell.cpu)
            print(
                f"  {name:24} {ratio}  {cell.value / scale:10,.0f} {row.unit:5}"
                f"  cpu {cpu:6.2f} s  peak {cell.peak / MIB:6.0f} MiB",
                flush=True,
            )

    def _slow_clients(self) -> None:
        """Measure 200 clients at 50 KB/s on 1 GiB, and a fast client beside them."""
        size = 1024 * MIB
        blob = self.registry.push_large(REPOSITORY, size, seed=8)
        print(
            "\n200 slow clients on 1 GiB"
            "  (ours: peak < 150 MiB, fast client >= 0.8 x its idle speed)"
        )
        for peer in PEERS:
            try:
                with peer.start(self.registry.url) as program:
                    path = f"/v2/{REPOSITORY}/blobs/{blob}{peer.query}"
                    base = program.url  # type: ignore[attr-defined] # all peers have a URL
                    download(f"{base}{path}", 1, size)
                    with costs(program.pid) as cost:
                        over = threading.Event()
                        crowding = threading.Thread(
                            target=lambda port=program.port, path=path, over=over: asyncio.run(
                                crowd("127.0.0.1", port, path, 200, 50_000, over.is_set)
                            )
                        )
                        crowding.start()
                        # The buffers of the kernel for 200 clients have to be full first.
                        time.sleep(5.0)
                        fast = [download(f"{base}{path}", 1, size) for _ in range(5)]
                        over.set()
                        crowding.join()
                    idle = [download(f"{base}{path}", 1, size) for _ in range(5)]
                    ratio = statistics.median(fast) / statistics.median(idle)
                    print(
                        f"  {peer.name:24} peak {cost.peak / MIB:6.0f} MiB  cpu {cost.cpu:6.2f} s"
                        f"  fast client {ratio:5.2f} x its idle speed",
                        flush=True,
                    )
            except (Exception, pytest.fail.Exception) as error:
                print(f"  {peer.name:24} failed: {type(error).__name__}: {error}"[:110])


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--quick", action="store_true", help="one round, small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    arguments = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {cores()} cores")
    bench = Bench(64 * MIB if arguments.quick else 256 * MIB, 2 if arguments.quick else 4)
    bench.run(1 if arguments.quick else arguments.rounds, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
