"""What a garbage collection and a verification cost, and what a hit beside them costs.

Each command runs as a user runs it: a new process. The contents of ``gc`` are made up, as those of
the listings. The contents of ``verify`` are real, because they are hashed. A hit is a small blob.
Its 99th percentile beside a command is compared with that of the same server without it, in turns.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.listings import ImageMaker, write_config
from bench.measure import MIB, REPOSITORY, download, requests
from bench.table import Run
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror

TAGS: Final = 10_000
"""Tags of the data directory of ``gc``. It has ten times as many contents."""
GC_BOUND_S: Final = 10.0
"""Most seconds of ``gc --dry-run``."""
HIT_BYTES: Final = 20_000
HIT_SECONDS: Final = 3
CONNECTIONS: Final = (1, 16)
BOUND: Final = 2.0
"""Most that the 99th percentile of a hit may be beside a command, as a multiple of that without."""
LARGE: Final = 16
LARGE_BYTES: Final = 64 * MIB
"""Contents to hash: 1 GiB, so that one run lasts for a few seconds."""


def _command(config: Path, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mirror", *words, "--config", str(config)]


def _seconds_of(config: Path, *words: str) -> float:
    begun = time.perf_counter()
    subprocess.run(_command(config, words), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _gc(run: Run) -> Iterator[str]:
    """Measure ``gc`` and ``prune`` with 100,000 contents."""
    yield "| command | contents | tags | median, s | bound, s | |"
    yield "|---|--:|--:|--:|--:|---|"
    with _filled(TAGS) as (data_dir, config):
        contents = sum(1 for _ in (data_dir / "blobs" / "sha256").iterdir())
        for words, bound in ((("gc", "--dry-run"), GC_BOUND_S), (_PRUNE, 0.0)):
            _seconds_of(config, *words)  # Fills the cache of parsed manifests.
            median = statistics.median(_seconds_of(config, *words) for _ in range(run.rounds))
            verdict = "MISSED" if bound and median > bound else ""
            yield (
                f"| {' '.join(words)} | {contents:,} | {TAGS:,} | {median:.2f}"
                f" | {bound or ''} | {verdict} |"
            )


_PRUNE: Final = ("prune", "--keep-last", "3", "--dry-run")


@contextmanager
def _filled(tags: int) -> Iterator[tuple[Path, Path]]:
    """Make images that were last used five days ago. Yields the directory and a configuration."""
    with tempfile.TemporaryDirectory(prefix="cleaning-") as directory:
        root = Path(directory)
        maker = ImageMaker(root / "data", time.time() - 5 * 86400)
        maker.add_images(tags)
        maker.save()
        yield root / "data", write_config(root / "data", root)


def _gc_beside_hits(run: Run) -> Iterator[str]:
    with _filled(TAGS) as (data_dir, config):
        yield from _beside(run, data_dir, config, ("gc", "--dry-run"))


def _verify_beside_hits(run: Run) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="cleaning-") as directory:
        data_dir = Path(directory) / "data"
        blobs = data_dir / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for _ in range(LARGE):
            data = os.urandom(LARGE_BYTES)
            path = blobs / hashlib.sha256(data).hexdigest()
            path.write_bytes(data)
            os.utime(path, (int(time.time()),) * 2)
        yield from _beside(run, data_dir, write_config(data_dir, Path(directory)), ("verify",))


def _beside(run: Run, data_dir: Path, config: Path, words: Sequence[str]) -> Iterator[str]:
    """Measure hits of a server alone and beside a command, in turns."""
    storage = {"max_size": 2**50, "reverify": "inf"}
    with DockerRegistry() as registry:
        blob = registry.push_large(REPOSITORY, HIT_BYTES)
        upstreams = {"docker.io": registry.url}
        log = {"level": "warning"}
        with Mirror(upstreams, data_dir=data_dir, storage=storage, log=log) as mirror:
            url = f"{mirror.url}/v2/{REPOSITORY}/blobs/{blob}?ns=docker.io"
            download(url, 1, HIT_BYTES)
            yield f"hit of {HIT_BYTES:,} bytes, 99th percentile, beside {' '.join(words)}"
            for connections in CONNECTIONS:
                alone, beside, runs = [], [], 0
                for _ in range(run.rounds):
                    alone.append(requests(url, HIT_SECONDS, connections).slow)
                    with _repeated(config, words) as count:
                        beside.append(requests(url, HIT_SECONDS, connections).slow)
                    runs += count[0]
                idle, busy = (statistics.median(values) * 1000 for values in (alone, beside))
                verdict = f"MISSED: more than {BOUND:.0f} x" if busy > BOUND * idle else ""
                yield (
                    f"  {connections:2} connections: alone {idle:6.2f} ms, beside {busy:6.2f} ms,"
                    f" {busy / idle:5.2f} x, {runs} runs begun  {verdict}"
                )


@contextmanager
def _repeated(config: Path, words: Sequence[str]) -> Iterator[list[int]]:
    """Run a command again and again while the block runs. Yields the number of runs, in a list."""
    over, count = threading.Event(), [0]
    running: list[subprocess.Popen[bytes]] = []

    def repeat() -> None:
        while not over.is_set():
            count[0] += 1
            process = subprocess.Popen(_command(config, words), stdout=subprocess.DEVNULL)
            running[:] = [process]
            process.wait()

    thread = threading.Thread(target=repeat)
    thread.start()
    time.sleep(1.0)  # Its start is not what is measured.
    try:
        yield count
    finally:
        over.set()
        running[0].terminate()
        thread.join()


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    "gc": _gc,
    "gc-beside-hits": _gc_beside_hits,
    "verify": _verify_beside_hits,
}
"""Measurements by name."""
