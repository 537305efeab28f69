"""The writer of one request: batches, and a hash that catches up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mirror.hosted.upload_writer import RunningHash, UploadWriter
from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store.ingest_writer import MemoryBudget
from tests.unit.store.kit import random_bytes

DATA = random_bytes(700_000, 5)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_bytes_are_written_and_hashed_in_order(
    tmp_path: Path, threads: ThreadPoolExecutor, algorithm: str
) -> None:
    closed: list[bool] = []
    fd = os.open(tmp_path / "upload", os.O_RDWR | os.O_CREAT)
    running_hash = RunningHash(algorithm)
    writer = UploadWriter(
        *(fd, 0, running_hash, threads, MemoryBudget(100_000)),
        before_unlock=lambda _: None,
        on_closed=lambda: closed.append(True),
    )
    for start in range(0, len(DATA), 70_001):
        await writer.write(DATA[start : start + 70_001])
    assert writer.position == len(DATA)
    await writer.flush()
    assert (tmp_path / "upload").read_bytes() == DATA
    assert running_hash.digest() == Digest.of(DATA, algorithm)
    writer.close()
    assert (closed, writer.closed.is_set()) == ([True], True)
    writer.close()
    assert closed == [True]


async def test_hash_that_is_behind_waits_and_catches_up_from_the_file(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    path = tmp_path / "upload"
    path.write_bytes(DATA[:300_000])
    running_hash = RunningHash("sha256")
    running_hash.update(DATA[:100_000])
    fd = os.open(path, os.O_RDWR)
    writer = UploadWriter(
        *(fd, 300_000, running_hash, threads, MemoryBudget(10**6), lambda _: None, lambda: None)
    )
    await writer.write(DATA[300_000:])
    await writer.flush()
    assert running_hash.position == 100_000
    running_hash.catch_up(fd, len(DATA))
    assert running_hash.digest() == Digest.of(DATA)
    writer.close()


def test_file_that_is_shorter_than_expected_ends_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    running_hash = RunningHash("sha256")
    running_hash.catch_up(fd, 10)
    assert running_hash.position == 3
    os.close(fd)
