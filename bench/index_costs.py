"""What the index costs beside few and many contents.

A content is a manifest with a tag. Beside each operation, a tag is read again and again, and
another connection, as a worker has it, begins one transaction after another.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from bench.table import Run
from mirror.config.settings import Storage
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.index import Index
from mirror.store.records import AccessRecord
from mirror.store.store import Store

_COUNTS: Final = (100, 10_000, 100_000)
_REPOSITORY: Final = Repository("docker.io", "library/bench")
_TAG: Final = Tag("v0")
_BODY: Final = b'{"schemaVersion": 2, "mediaType": "%s", "config": null, "layers": [], "n": %d}'


async def _open(root: Path) -> Store:
    return await Store.open(str(root), Storage(), lambda event: None)


async def _fill(store: Store, count: int) -> list[Digest]:
    """Put manifests on the disk and into the index."""
    digests, records = [], []
    for number in range(count):
        body = _BODY % (OCI_MANIFEST.encode(), number)
        digests.append(Digest.of(body))
        store.layout.blob(digests[-1]).write_bytes(body)
        records.append(
            AccessRecord(
                digest=digests[-1],
                kind="manifest",
                media_type=OCI_MANIFEST,
                size=len(body),
                referrer=None,
                expires_at=None,
            )
        )
    await store.index.put_access_records(_REPOSITORY, records)
    for number, digest in enumerate(digests):
        await store.index.confirm_tag(_REPOSITORY, Tag(f"v{number}"), digest)
    return digests


class _OtherWriter(threading.Thread):
    """Begins a transaction every 5 ms, and measures how long it waits for that."""

    def __init__(self, database: Path) -> None:
        super().__init__()
        self._database = database
        self.is_stopping = threading.Event()
        self.longest = 0.0
        """Seconds."""

    def run(self) -> None:
        """Measure until :attr:`is_stopping` is set."""
        connection = sqlite3.connect(self._database, isolation_level=None, timeout=60)
        while not self.is_stopping.wait(0.005):
            begun = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            self.longest = max(self.longest, time.perf_counter() - begun)
        connection.close()


async def _longest_read(index: Index, until: asyncio.Future[object]) -> float:
    """Read a tag again and again. Returns the seconds of the slowest read."""
    longest = 0.0
    while not until.done():
        begun = time.perf_counter()
        await index.tag(_REPOSITORY, _TAG)
        longest = max(longest, time.perf_counter() - begun)
        await asyncio.sleep(0.002)
    return longest


async def _row(
    name: str, index: Index, database: Path, work: Callable[[], Awaitable[object]]
) -> str:
    other = _OtherWriter(database)
    other.start()
    begun, used = time.perf_counter(), time.process_time()
    job = asyncio.ensure_future(work())  # noqa: TID251 - a measurement, not the mirror
    longest = await _longest_read(index, job)
    await job
    numbers = [time.perf_counter() - begun, time.process_time() - used, longest]
    other.is_stopping.set()
    other.join()
    cells = (f"{1000 * number:,.1f}" for number in (*numbers, other.longest))
    return f"| {name} | {' | '.join(cells)} |"


async def measure(root: Path, count: int) -> list[str]:
    """Return the rows of a table for ``count`` contents in a new directory ``root``."""
    store = await _open(root)
    digests = await _fill(store, count)
    index, databases = store.index, root / "index"
    names, access = databases / "named" / "cache.db", databases / "members" / "cache.db"
    times = [(digest, 1.0) for digest in digests]
    lines = [
        await _row(
            "write a tag", index, names, lambda: index.confirm_tag(_REPOSITORY, _TAG, digests[0])
        ),
        await _row("save verification times", index, access, lambda: index.set_verified(times)),
        await _row("write index.json", index, names, lambda: store.save_image_layout(share=1.0)),
        await _row("index.json, same digests", index, names, store.save_image_layout),
        await _row("list tags of a repository", index, names, lambda: index.tags_of(_REPOSITORY)),
        await _row("check one page of rows", index, access, lambda: _check(index, count)),
        await _row("check all for damage", index, names, index.check),
    ]
    await store.close()
    for name, is_lost in (("start", False), ("start with a lost index", True)):
        if is_lost:
            shutil.rmtree(databases)
        begun, used = time.perf_counter(), time.process_time()
        store = await _open(root)
        assert await store.index.tag(_REPOSITORY, _TAG)
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        lines.append(f"| {name} | {1000 * wall:,.1f} | {1000 * cpu:,.1f} | | |")
        await store.close()
    return lines


async def _check(index: Index, count: int) -> None:
    await index.orphans.drop(lambda digest: True, count)


def index_costs(run: Run) -> Iterator[str]:
    """Measure, and return a table for each number of contents."""
    for count in _COUNTS:
        with tempfile.TemporaryDirectory() as root:
            lines = asyncio.run(measure(Path(root), count))
        yield f"{count:,} contents"
        yield "| | wall, ms | processor, ms | slowest read, ms | slowest write of another, ms |"
        yield "|---|--:|--:|--:|--:|"
        yield from lines


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {"index-costs": index_costs}
"""Measurements by name."""
