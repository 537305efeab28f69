"""What the store costs, in one process and without HTTP.

First beside empty contents, a million at most: the first scan, a cold pull, a hit, and a *question*
whether there is room for a fetch. Then a range of content whose verification is old, and for
comparison its last bytes, which wait for the hash of the whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from bench.measure import MIB
from bench.table import Run
from mirror.config.settings import Storage
from mirror.oci.reference import Digest
from mirror.store.store import Store
from tests.unit.store.kit import keep, random_bytes

_COUNTS: Final = (100, 10_000, 100_000, 1_000_000)
_PULLS: Final = 60
_COLD_BYTES: Final = 20_000
_AGED_BYTES: Final = 1024 * MIB
_RANGES: Final = 7


async def _open(root: Path, reverify: str) -> Store:
    settings = Storage.model_validate({"reverify": reverify})
    return await Store.open(str(root), settings, lambda event: None)


def _fill(root: Path, count: int) -> None:
    """Create empty files with the names of contents, an hour old."""
    directory = root / "blobs" / "sha256"
    directory.mkdir(parents=True)
    used = int(time.time()) - 3600
    for number in range(count):
        path = directory / hashlib.sha256(b"%d" % number).hexdigest()
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        os.utime(path, (used, used))


async def _median_ms(times: int, work: Callable[[int], Awaitable[object]]) -> float:
    """Return the median of the milliseconds that ``work`` takes with the numbers 0, 1, 2 …"""
    taken = []
    for number in range(times):
        begun = time.perf_counter()
        await work(number)
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


async def _read(store: Store, digest: Digest, start: int, stop: int) -> int:
    """Read a range. Returns its length."""
    reader = await store.blobs.find(digest)
    assert reader is not None
    position = start
    try:
        while (extent := await reader.wait(position, stop)) is not None:
            position += len(os.pread(extent.fd, extent.stop - position, position))
    finally:
        reader.close()
    return position - start


async def many_contents(root: Path, count: int) -> str:
    """Return the line of one number of contents."""
    _fill(root, count)
    store = await _open(root, "inf")
    begun = time.perf_counter()
    await store.measure()
    scan = time.perf_counter() - begun
    bodies = [random_bytes(_COLD_BYTES, number) for number in range(_PULLS)]
    digests = [Digest.of(body) for body in bodies]
    used = time.process_time()
    cold = await _median_ms(_PULLS, lambda number: keep(store, bodies[number]))
    used = time.process_time() - used
    hit = await _median_ms(_PULLS, lambda n: _read(store, digests[n], 0, _COLD_BYTES))
    question = await _median_ms(_PULLS, lambda number: store.space.make_room(_COLD_BYTES))
    await store.close()
    return (
        f"{count:9,}: first scan {scan:6.2f} s  cold {cold:.2f} ms  hit {hit:.2f} ms"
        f"  question {question:.2f} ms  CPU of {_PULLS} pulls {used:.2f} s"
    )


async def aged_range(root: Path, size: int = _AGED_BYTES) -> str:
    """Return the line of ranges of aged content. ``size``: its bytes, all zero."""
    store = await _open(root, "0s")
    whole = hashlib.sha256()
    for _ in range(size // MIB):
        whole.update(bytes(MIB))
    digest = Digest.parse(f"sha256:{whole.hexdigest()}")
    path = store.layout.blob(digest)
    path.touch()
    os.truncate(path, size)
    os.utime(path, (1, 1))

    async def verified() -> None:
        # The reader of the last byte returns after the verification.
        await _read(store, digest, size - 1, size)

    taken = []
    for number in range(_RANGES):
        start = (number + 1) * size // (_RANGES + 2) // MIB * MIB
        begun = time.perf_counter()
        assert await _read(store, digest, start, start + MIB) == MIB
        taken.append(1000 * (time.perf_counter() - begun))
        await verified()
    last = await _median_ms(3, lambda number: _read(store, digest, size - MIB, size))
    await store.close()
    return (
        f"1 MiB of {size // MIB:,} MiB, aged: {min(taken):.1f} to {max(taken):.1f} ms"
        f" (the last MiB: {last:.0f} ms)"
    )


def store_costs(run: Run) -> Iterator[str]:
    """Measure, and return a line for each measurement."""
    for count in _COUNTS:
        with tempfile.TemporaryDirectory(prefix="store-") as root:
            yield asyncio.run(many_contents(Path(root), count))
    with tempfile.TemporaryDirectory(prefix="store-") as root:
        yield asyncio.run(aged_range(Path(root)))


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {"store-costs": store_costs}
"""Measurements by name."""
