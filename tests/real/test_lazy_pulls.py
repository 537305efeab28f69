"""Parts of a cold layer, before the layer has arrived: by HTTP, and by the stargz snapshotter.

Its blob fetcher is a Go library, and ``go install -C tests/real/stargz_read .`` builds a program
with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.real.process import environment, go_program, run
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.real.wire import Download, ask

MIB = 1 << 20
# nginx sends the share of the first second at once. Four connections need 11 seconds for the rest.
SMALL = pytest.param(96 * MIB, 2 * MIB, 1, id="96MiB")
PROCESSES = pytest.param(96 * MIB, 2 * MIB, 2, id="96MiB-2-workers")
LARGE = pytest.param(512 * MIB, 100_000_000, 1, id="512MiB", marks=pytest.mark.long)


class ColdLayer:
    """A layer at a registry behind a slow line, and a mirror without it."""

    def __init__(self, registry: DockerRegistry, front: NginxFront, mirror: Mirror, digest: str):
        self.registry, self.front, self.mirror, self.digest = registry, front, mirror, digest

    def part(self, first: int, length: int) -> bytes:
        """Return the right bytes."""
        headers = {"Range": f"bytes={first}-{first + length - 1}"}
        return ask(f"{self.registry.url}/v2/org/big/blobs/{self.digest}", headers=headers).body

    def download(self, spans: str) -> Download:
        """Request a range from the mirror."""
        path = f"/v2/org/big/blobs/{self.digest}?ns=docker.io"
        return self.mirror.download(path, {"Range": f"bytes={spans}"})

    @property
    def has_arrived(self) -> bool:
        """Whether the mirror has the whole layer."""
        return self.mirror.content(self.digest).exists()


@contextmanager
def cold_layer(size: int, rate: int, workers: int = 1) -> Iterator[ColdLayer]:
    """``size`` in bytes, ``rate`` in bytes per second and connection."""
    with DockerRegistry() as registry, NginxFront(registry.url, limit_rate=rate) as front:
        digest = registry.push_large("org/big", size)
        with Mirror({"docker.io": front.url}, workers=workers, drain_timeout="0s") as mirror:
            yield ColdLayer(registry, front, mirror, digest)


@pytest.mark.row("L12-lazy-pull")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("size", "rate", "workers"), [SMALL, PROCESSES, LARGE])
def test_tail_of_a_cold_layer_comes_long_before_the_layer(
    size: int, rate: int, workers: int
) -> None:
    with cold_layer(size, rate, workers) as layer:
        tail = layer.download("-51")
        assert not layer.has_arrived
        assert (tail.status, tail.size) == (206, 51)
        assert tail.sha256 == hashlib.sha256(layer.part(size - 51, 51)).hexdigest()
        # With two workers, some of these connections reach the one that does not fetch.
        firsts = [size - 60_000 * n for n in range(2, 10)]
        with ThreadPoolExecutor(len(firsts)) as pool:
            parts = list(pool.map(lambda first: layer.download(f"{first}-{first + 9}"), firsts))
        assert not layer.has_arrived
        for first, part in zip(firsts, parts, strict=True):
            assert part.sha256 == hashlib.sha256(layer.part(first, 10)).hexdigest()


def stargz_read(layer: ColdLayer, parts: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
    """Read (offset, length) of each part. Returns (offset, SHA-256) of each."""
    words = [f"{offset}:{length}" for offset, length in parts]
    reference = "docker.io/org/big:latest"
    done = run(
        *(go_program("stargz-read"), layer.mirror.host, reference, layer.digest, *words),
        env=environment(),
    )
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    return [(int(line[1]), line[3]) for line in lines if line[0] == "part"]


@pytest.mark.go_program("stargz-read")
@pytest.mark.row("L12-lazy-pull")
@pytest.mark.timeout(120)
def test_stargz_snapshotter_reads_parts_of_a_cold_layer() -> None:
    size = 96 * MIB
    with cold_layer(size, 2 * MIB) as layer:
        # The footer, a table of contents before it, then files. The last one is in its cache in
        # part, so it requests several ranges at once.
        middle = size // 2
        parts = [(-51, 51), (-900_000, 899_949), (middle, 10), (middle + 200_000, 10)]
        parts.append((middle - 10, 400_000))
        read = stargz_read(layer, parts)
        assert not layer.has_arrived
        assert read == [
            (first, hashlib.sha256(layer.part(first, length)).hexdigest())
            for first, length in [(one % size, length) for one, length in parts]
        ]
        pulls = [line for line in layer.mirror.log() if line.get("kind") == "blob"]
        assert sum(1 for line in pulls if line["outcome"] == "aside") == len(parts)
        resumed = [seen for seen in layer.front.seen() if seen.range.endswith("-")]
        assert not resumed, "the layer is fetched once"
