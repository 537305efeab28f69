"""Rows that compare servers: a ratio of each to another one, all measured in this run.

Each number is the median of the rounds; the servers take turns within a round. A row says which
server failed in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Protocol

import pytest

from bench.measure import (
    MIB,
    REPOSITORY,
    Cost,
    back_memory,
    costs,
    download,
    requests,
    start_curl,
    timed,
)
from bench.peers import ONE_WORKER_PEERS, PEERS, TLS_PEERS, Peer
from bench.upstreams import StaticRegistry
from tests.real import images
from tests.real.process import Directory, Program
from tests.real.registry import DockerRegistry
from tests.real.tokens import Certificate

LIMIT: Final = 100_000_000
"""Bytes per second of one connection to an upstream that is limited, as public registries are."""
DIRECT: Final = "direct"


class Served(Protocol):
    """A program with a URL: an upstream, or a server that is measured."""

    @property
    def url(self) -> str: ...


class Run:
    """One run of the benchmarks. Its upstreams start when a row needs them.

    Args:
        stack: Stops them at its end.
        rounds: How often each number is measured.
        is_quick: Measure small blobs for a short time, to try the benchmark itself.
    """

    def __init__(self, stack: ExitStack, rounds: int, *, is_quick: bool) -> None:
        self._stack = stack
        self.rounds = rounds
        self.size = 32 * MIB if is_quick else 256 * MIB
        """Bytes of a blob of an upstream without a limit."""
        self.large_size = 2 * self.size
        """Bytes of a blob of an upstream with a limit."""
        self.seconds = 1 if is_quick else 2
        """Seconds for which small responses are measured."""
        self.image = images.image()

    @cached_property
    def registry(self) -> DockerRegistry:
        """An upstream without a limit."""
        registry = self._stack.enter_context(DockerRegistry())
        registry.push(REPOSITORY, self.image, "1.0")
        return registry

    @cached_property
    def limited(self) -> StaticRegistry:
        """An upstream with :data:`LIMIT`."""
        limited = self._stack.enter_context(StaticRegistry(rate=LIMIT))
        limited.add(self.image)
        return limited

    @cached_property
    def tls(self) -> StaticRegistry:
        """An upstream with TLS, without a limit."""
        directory = Directory("certificate")
        self._stack.callback(directory.remove)
        certificate = Certificate.make(directory.path)
        return self._stack.enter_context(StaticRegistry(tls=certificate))

    @cached_property
    def blob(self) -> str:
        """A blob of :attr:`registry`."""
        return self.registry.push_large(REPOSITORY, self.size)

    @cached_property
    def limited_blob(self) -> str:
        """A blob of :attr:`limited`."""
        return self.limited.add_large(self.large_size)

    @cached_property
    def tls_blob(self) -> str:
        """A blob of :attr:`tls`."""
        return self.tls.add_large(self.size)


@dataclass(slots=True)
class Cell:
    """The measurements of one server in one row."""

    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    failure: str = ""

    @property
    def value(self) -> float | None:
        """The median. None if one measurement failed."""
        return statistics.median(self.values) if self.values and not self.failure else None

    def add(self, value: float, cost: Cost) -> None:
        """Add a measurement."""
        self.values.append(value)
        self.cpu.append(cost.cpu)
        self.peak = max(self.peak, cost.peak)


@dataclass(frozen=True, slots=True)
class Row:
    """One row. It is ready to be measured, so its upstream runs.

    Args:
        title: What is measured.
        unit: ``MB/s`` for bytes per second, ``1/s`` for responses per second.
        against: The server to which the ratios are.
        target: Our target for the ratio.
        upstream: The upstream of all servers.
        path: Path of what is requested.
        measure: Measures a URL.
        warm: Called with the URL before. None: the row is about content that is not cached.
        size: Bytes of a cold blob.
        peers: The servers.
    """

    title: str
    unit: str
    against: str
    target: str
    upstream: DockerRegistry | StaticRegistry
    path: str
    measure: Callable[[str], float]
    warm: Callable[[str], object] | None = None
    size: int = 0
    peers: Sequence[Peer] = PEERS

    def lines(self, rounds: int) -> Iterator[str]:
        """Measure, and return the lines of the table."""
        names = [peer.name for peer in self.peers]
        if self.against == DIRECT:
            names.insert(0, DIRECT)
        cells = {name: Cell() for name in names}
        for number in range(rounds):
            self._round(cells, number)
        base, scale = cells[self.against].value, 1e6 if self.unit == "MB/s" else 1
        yield f"{self.title}  (ratio to {self.against}{', ours ' * bool(self.target)}{self.target})"
        for name, cell in cells.items():
            if cell.value is None:
                yield f"  {name:24} failed: {cell.failure}"
                continue
            ratio = f"{cell.value / base:6.2f} x" if base else "     ?"
            yield (
                f"  {name:24} {ratio}  {cell.value / scale:10,.0f} {self.unit:5}"
                f"  cpu {statistics.median(cell.cpu):6.2f} s  peak {cell.peak / MIB:6.0f} MiB"
            )

    def _round(self, cells: dict[str, Cell], number: int) -> None:
        """Measure all once, in another order each time: each affects the load of the next."""
        turns: list[Peer | None] = [*self.peers, *([None] if DIRECT in cells else [])]
        first = number % len(turns)
        for peer in (*turns[first:], *turns[:first]):
            back_memory(self.size)
            if peer is None:
                # One download: eight would share the processor, which is no reference for a cache.
                cells[DIRECT].add(download(self.upstream.url + self.path, 1, self.size), Cost())
                continue
            try:
                with peer.start(self.upstream.url, self._ca()) as program:
                    self._one(peer, program, cells[peer.name])
            except (Exception, pytest.fail.Exception) as error:
                cells[peer.name].failure = f"{type(error).__name__}: {error}"[:60]

    def _ca(self) -> str | None:
        return str(self.upstream.tls.cert_file) if self.upstream.tls is not None else None

    def _one(self, peer: Peer, program: Program, cell: Cell) -> None:
        url = f"{url_of(program)}{self.path}{peer.query}"
        if self.warm is not None:
            self.warm(url)
        with costs(program.pid) as cost:
            value = self.measure(url)
        cell.add(value, cost)


def measure_each(
    peers: Sequence[Peer], upstream: str, measure: Callable[[Peer, Program], str]
) -> Iterator[str]:
    """Measure each peer once. Returns a line for each.

    Args:
        peers: The servers.
        upstream: URL of their upstream.
        measure: Measures a peer that runs. Returns the text of its line.
    """
    for peer in peers:
        try:
            with peer.start(upstream, None) as program:
                text = measure(peer, program)
        except (Exception, pytest.fail.Exception) as error:
            text = f"failed: {type(error).__name__}: {error}"[:80]
        yield f"  {peer.name:24} {text}"


def url_of(program: Program) -> str:
    """Return the URL of a server that is measured: all of them have one."""
    return str(program.url)  # type: ignore[attr-defined] # of `Program` only some have one


def _blob_path(digest: str) -> str:
    return f"/v2/{REPOSITORY}/blobs/{digest}"


def _warm_blob(run: Run, streams: int) -> Iterator[str]:
    return Row(
        f"warm blob, {streams} stream{'s' * (streams > 1)}",
        "MB/s",
        "nginx proxy_cache",
        ">= 0.9",
        run.registry,
        _blob_path(run.blob),
        lambda url: download(url, streams, run.size),
        warm=lambda url: [download(url, 1, run.size) for _ in range(2)],
    ).lines(run.rounds)


def _small(run: Run, title: str, path: str) -> Iterator[str]:
    return Row(
        title,
        "1/s",
        "drayage, 1 thread",
        "> 1.0",
        run.registry,
        path,
        lambda url: requests(url, run.seconds).requests,
        # One client first: docker-registry refuses some of many that ask for a blob it fetches.
        warm=lambda url: [timed(start_curl(url)), timed(start_curl(url)), requests(url, 1)],
        peers=ONE_WORKER_PEERS,
    ).lines(run.rounds)


def _limited(run: Run, streams: int, target: str) -> Iterator[str]:
    many = f", {streams} at once" if streams > 1 else ""
    return Row(
        f"cold blob{many}, 100 MB/s a connection",
        "MB/s",
        DIRECT,
        target,
        run.limited,
        _blob_path(run.limited_blob),
        lambda url: download(url, streams, run.large_size),
        size=run.large_size,
        # The kernel keeps the rate: rounds differ by little.
    ).lines(min(run.rounds, 2))


def _unlimited(run: Run, title: str, blob: str, peers: Sequence[Peer]) -> Iterator[str]:
    return Row(
        title,
        "MB/s",
        DIRECT,
        "",
        run.tls if peers is TLS_PEERS else run.registry,
        _blob_path(blob),
        lambda url: download(url, 1, run.size),
        size=run.size,
        peers=peers,
    ).lines(run.rounds)


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "warm-blob": lambda run: _warm_blob(run, 1),
    "warm-blob-8": lambda run: _warm_blob(run, 8),
    "manifest-by-digest": lambda run: _small(
        run, "warm manifest by digest", f"/v2/{REPOSITORY}/manifests/{run.image.digest}"
    ),
    "manifest-by-tag": lambda run: _small(
        run, "warm manifest by tag", f"/v2/{REPOSITORY}/manifests/1.0"
    ),
    "config-blob": lambda run: _small(run, "warm config blob", _blob_path(run.image.config.digest)),
    "cold-blob": lambda run: _limited(run, 1, ">= 2.22"),
    "cold-blob-8": lambda run: _limited(run, 8, ">= 12.3"),
    "cold-unlimited": lambda run: _unlimited(run, "cold blob, unlimited", run.blob, PEERS),
    "cold-tls": lambda run: _unlimited(run, "cold blob, TLS", run.tls_blob, TLS_PEERS),
}
"""Measurements by name."""
