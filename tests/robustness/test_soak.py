"""Row R6: mixed pulls with every kind of trouble at once, and nothing is left afterwards."""

from __future__ import annotations

import random
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Final

import pytest

from tests.extent import Extent
from tests.real import images
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import ROOT, Mirror
from tests.robustness.kit import (
    POOLS,
    blob_path,
    descriptors,
    every_file_hashes_to_its_name,
    mounted,
)

CLOCK = """
import os, time

_time, _time_ns = time.time, time.time_ns

def _offset():
    with open(os.environ["CLOCK_OFFSET"]) as file:
        return int(file.read() or 0)

time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + 10**9 * _offset()
"""
"""A sitecustomize.py that moves the wall clock of a process by the seconds in a file.

libfaketime moves it, too, but breaks ``clock_nanosleep``, and with it ``time.sleep``.
"""
LARGE = 16
"""Images of 1.9 MB."""
SMALL = 44
"""Images of a few kilobytes."""
KEPT = SMALL + 6
"""Images that were pulled last: more than half of the quota is free beside them."""
CLIENTS = 8
WORKERS = 2
QUOTA_BYTES = 24_000_000
"""Two thirds of the images: eviction runs all the time."""
DISK_BYTES = 48_000_000
"""Twice the quota: it has also room for the index, the history, and what workers write beside."""
DATA_FILES = {
    *("blobs", "ingest", "quarantine", "index", "index.lock", "index.json", "oci-layout"),
    *("totals", "eviction.lock", "index.json.lock", "marks.lock", "history"),
}
"""All that may be in a data directory: no draft, and no damaged index."""
OWN_ROWS = 1
"""Rows of a table that are about no content: a note of a restore."""


_HISTORY: Final = "/history/history."
_FOREIGN: Final = re.compile(rf"^/dev/|{_HISTORY}")


@dataclass(frozen=True, slots=True)
class Use:
    """Resources that the worker processes hold."""

    descriptors: int
    """Those of devices, and of the history, are left out."""
    history: int
    """Descriptors of the history. Each worker opens it at its first write."""
    threads: int
    memory: int
    """Resident memory in bytes."""


def use(mirror: Mirror) -> Use:
    """Return the sum over all workers."""
    found = [
        (
            len([name for name in descriptors(pid) if not _FOREIGN.search(name)]),
            len([name for name in descriptors(pid) if _HISTORY in name]),
            len(list(Path(f"/proc/{pid}/task").iterdir())),
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096,
        )
        for pid in mirror.workers()
    ]
    return Use(*(sum(column) for column in zip(*found, strict=True)))


class Clients:
    """Clients that pull at random until they are told to stop."""

    def __init__(self, mirror: Mirror, held: list[images.Image], seed: int) -> None:
        self.mirror, self.held, self.seed = mirror, held, seed
        self.stopped = threading.Event()
        self.pulls = self.complete = 0

    def run(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        ways = (self.image, self.image, self.range, self.leave, self.tags, self.absent)
        while not self.stopped.is_set():
            with suppress(OSError, HTTPException):
                done = rng.choice(ways)(rng)
                self.complete += done
            self.pulls += 1

    def run_all(self, meanwhile: Callable[[], None]) -> None:
        """Let all clients pull until ``meanwhile`` returns. Raises what a client raised."""
        self.stopped.clear()
        with ThreadPoolExecutor(CLIENTS) as pool:
            runs = [pool.submit(self.run, number) for number in range(CLIENTS)]
            try:
                meanwhile()
            finally:
                self.stopped.set()
        for run in runs:
            run.result()

    def image(self, rng: random.Random) -> bool:
        return self.pull(rng.randrange(rng.choice((LARGE, len(self.held)))))

    def pull(self, number: int) -> bool:
        """Pull an image by its tag, and then by its digest."""
        image = self.held[number]
        paths = {
            f"/v2/library/app/manifests/v{number}": image.manifest,
            f"/v2/library/app/manifests/{image.digest}": image.manifest,
        }
        paths |= {blob_path(blob.digest): blob for blob in image.blobs}
        for path, blob in paths.items():
            got = self.mirror.download(path, images.ACCEPT)
            if got.status != 200:
                return False
            assert f"sha256:{got.sha256}" == blob.digest, "a complete response with wrong bytes"
        return True

    def range(self, rng: random.Random) -> bool:
        blob = rng.choice(rng.choice(self.held).blobs)
        first = rng.randrange(len(blob.data))
        last = rng.randrange(first, len(blob.data))
        wanted = {"Range": f"bytes={first}-{last}"}
        got = self.mirror.ask(blob_path(blob.digest), headers=wanted)
        if got.status != 206:
            return False
        assert got.body == blob.data[first : last + 1]
        return True

    def leave(self, rng: random.Random) -> bool:
        """Send a request, read a little, and reset the connection."""
        blob = rng.choice(rng.choice(self.held).blobs)
        with socket.create_connection(("127.0.0.1", self.mirror.port), 10) as connection:
            request = f"GET {blob_path(blob.digest)} HTTP/1.1\r\nHost: x\r\n\r\n"
            connection.sendall(request.encode())
            connection.settimeout(10)
            connection.recv(rng.randrange(1, 2000))
            reset = b"\1\0\0\0\0\0\0\0"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        return True

    def tags(self, _: random.Random) -> bool:
        return self.mirror.ask("/v2/library/app/tags/list").status == 200

    def absent(self, rng: random.Random) -> bool:
        """Ask for a tag that does not exist. The response is 404, or tells of trouble."""
        got = self.mirror.ask(f"/v2/library/app/manifests/absent{rng.randrange(50)}")
        assert got.status in (404, 502, 503, 504), got.status
        return got.status == 404


class Trouble:
    """What goes wrong. One kind at a time, or two different kinds at once."""

    def __init__(self, mirror: Mirror, front: NginxFront, disk: Path, clock: Path) -> None:
        self.mirror, self.front, self.disk, self.clock = mirror, front, disk, clock

    def upstream_flaps(self, rng: random.Random) -> None:
        for _ in range(3):
            self.front.kill()
            time.sleep(rng.uniform(0.1, 0.7))
            self.front.start()
            time.sleep(rng.uniform(0.1, 0.7))

    def clock_jumps(self, rng: random.Random) -> None:
        days = rng.choice((-400, -1, 1, 400))
        self.set_clock(days * 86_400)
        time.sleep(rng.uniform(0.5, 1.5))
        self.set_clock(0)

    def set_clock(self, seconds: int) -> None:
        new = self.clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self.clock)

    def disk_fills(self, rng: random.Random) -> None:
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(65_536))
        time.sleep(rng.uniform(0.5, 1.5))
        filler.unlink()

    def worker_dies(self, rng: random.Random) -> None:
        workers = self.mirror.workers()
        if workers:
            with suppress(ProcessLookupError):
                self.mirror.kill_worker(rng.choice(workers))
        wait_until(lambda: len(self.mirror.workers()) == WORKERS, "a new worker")


@pytest.fixture
def upstream() -> Iterator[tuple[NginxFront, list[images.Image]]]:
    with DockerRegistry() as registry:
        held = [images.image(n, layers=(1_500_000, 400_000)) for n in range(LARGE)]
        held += [images.image(n, layers=(2_000, 500)) for n in range(LARGE, LARGE + SMALL)]
        for number, image in enumerate(held):
            registry.push("library/app", image, f"v{number}")
        with NginxFront(registry.url) as front:
            yield front, held


@pytest.mark.row("R6-soak")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seconds", "seed", "at_once"),
    [
        pytest.param(75, 2, 1, marks=pytest.mark.long(75)),
        pytest.param(75, 3, 2, marks=pytest.mark.long(75)),
    ],
)
def test_soak_leaves_right_content_and_the_resources_of_before(
    tmp_path: Path,
    upstream: tuple[NginxFront, list[images.Image]],
    seconds: int,
    seed: int,
    at_once: int,
    extent: Extent,
) -> None:
    if not extent.is_whole:
        seconds //= 2
    front, held = upstream
    clock, temporary = tmp_path / "clock", tmp_path / "temporary"
    clock.write_text("0")
    temporary.mkdir()
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CLOCK_OFFSET": str(clock)}
    env["TMPDIR"] = str(temporary)
    options = {
        "workers": WORKERS,
        "storage": {"max_size": QUOTA_BYTES, "reverify": "3s"},
        "drain_timeout": "5s",
    }
    settings = {"endpoints": [front.url], "tag_ttl": "1s", "negative_ttl": "1s"}
    with (
        mounted(tmp_path / "disk", "tmpfs", f"size={DISK_BYTES}") as disk,
        Mirror({"docker.io": settings}, env=env, data_dir=disk / "data", **options) as mirror,
    ):
        clients = Clients(mirror, held, seed)
        before, files_before = settled(mirror, clients), files_in(temporary)
        trouble = Trouble(mirror, front, disk, clock)
        kinds = [trouble.upstream_flaps, trouble.clock_jumps, trouble.disk_fills]
        kinds.append(trouble.worker_dies)
        rng = random.Random(seed)
        ends = time.monotonic() + seconds

        def make_trouble() -> None:
            with ThreadPoolExecutor(at_once) as pool:
                while time.monotonic() < ends:
                    chosen = rng.sample(kinds, at_once)
                    runs = [pool.submit(kind, random.Random(rng.random())) for kind in chosen]
                    for run in runs:
                        run.result()

        clients.run_all(make_trouble)
        extent.tried(clients.pulls)
        assert clients.complete > clients.pulls / 10, "most of the time the mirror served"

        # --- afterwards: everything is served, and nothing is left -------------------------------
        after = settled(mirror, clients)
        for number in range(len(held)):
            if number == len(held) - KEPT:
                # The use of content is recorded once a minute, and eviction goes by this record.
                trouble.set_clock(120)
            wait_until(partial(clients.pull, number), f"pull of {number}")
        assert after.descriptors <= before.descriptors + 4, (before, after)
        # The database and its two files.
        assert after.history <= 3 * WORKERS, (before, after)
        # Pools start their threads when they are needed, and keep them.
        assert after.threads <= WORKERS * (1 + POOLS), (before, after)
        assert after.memory <= 1.5 * before.memory, (before, after)
        wait_until(lambda: is_accounted(mirror), "the size on disk is not accounted for", 90)
        assert not [line for line in mirror.log() if line.get("level") == "critical"]
        assert b"Traceback" not in mirror.output_text().encode()
        # No private copy of the index, and no file with the metrics of a dead worker.
        wait_until(lambda: files_in(temporary) == files_before, "temporary files are left", 90)
        wait_until(lambda: not fetches(mirror), "fetches do not end, or leave something", 90)

        # --- what was pulled last is served without the upstream, also after a restart -----------
        front.stop()
        assert_served_without_upstream(clients, len(held))
        mirror.stop()
        assert not files_in(temporary)
        # A draft that a killed worker left may be removed at a start one minute later.
        trouble.set_clock(240)
        mirror.start()
        assert_served_without_upstream(clients, len(held))
        mirror.stop()
        every_file_hashes_to_its_name(mirror.data_dir)
        size = sum(path.stat().st_size for path in (mirror.data_dir / "blobs").glob("*/*"))
        assert size <= QUOTA_BYTES
        assert {path.name for path in mirror.data_dir.iterdir()} <= DATA_FILES
        assert not list((mirror.data_dir / "quarantine").glob("*/*"))
        blobs = sum(len(image.blobs) for image in held)
        # A tag and a manifest each. Access to each content, and the time of its verification.
        assert rows_in(mirror, "named") <= 2 * len(held) + OWN_ROWS
        assert rows_in(mirror, "members") <= 2 * (len(held) + blobs) + OWN_ROWS


def assert_served_without_upstream(clients: Clients, images: int) -> None:
    """Assert that the images that were pulled last are served by tag and by digest."""
    missing = [number for number in range(images - KEPT, images) if not clients.pull(number)]
    assert not missing


def files_in(temporary: Path) -> set[str]:
    """The files in the temporary directory, by the kind of their directory and their names."""
    return {
        f"{path.parent.name.rpartition('-')[0]}/{path.name}"
        for path in temporary.rglob("*")
        if path.is_file()
    }


def fetches(mirror: Mirror) -> list[Path]:
    """The files of fetches, also of those that were given up."""
    return list((mirror.data_dir / "ingest").glob("*/*"))


def rows_in(mirror: Mirror, table: str) -> int:
    """The number of rows of a table of the index. The mirror does not run."""
    path = mirror.data_dir / "index" / table / "cache.db"
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM Cache").fetchone()
        return int(count)


def settled(mirror: Mirror, clients: Clients) -> Use:
    """Return the resources in use after each worker was busy, and is idle again.

    Threads of a pool are started when they are needed, and never end.
    """
    clients.run_all(lambda: time.sleep(4))
    found: list[Use] = []

    def is_stable() -> bool:
        found.append(use(mirror))
        return len(found) > 20 and found[-1].descriptors == found[-10].descriptors

    wait_until(is_stable, "idle workers", 30)
    return found[-1]


def is_accounted(mirror: Mirror) -> bool:
    """Whether the metric of the size on disk is the size of the files."""
    files = list((mirror.data_dir / "blobs").glob("*/*"))
    return mirror.metric("oci_mirror_content_bytes") == sum(f.stat().st_size for f in files)
