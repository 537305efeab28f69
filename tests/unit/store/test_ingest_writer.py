"""The blocking calls of the writer: short writes, and the hash before the last batch."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import Digest, Verifier
from mirror.store import ingest_writer
from mirror.store.ingest_writer import ShortWrite, append_batch, bytes_after, write_all
from tests.unit.store.kit import pieces, random_bytes

DATA = random_bytes(300_000, 21)
DIGEST = Digest.of(DATA)


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(0, 300))
def test_bytes_after_drops_a_count_of_bytes_from_a_batch(batch: list[bytes], count: int) -> None:
    assert b"".join(bytes_after(batch, count)) == b"".join(batch)[count:]


def test_batch_of_more_chunks_than_one_call_takes_is_written_completely(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    batch = pieces(DATA, 97)  # more than one call takes
    assert write_all(fd, [b"", *batch, b""], 5) == 5 + len(DATA)
    assert os.pread(fd, len(DATA) + 10, 5) == DATA
    os.close(fd)


@given(st.integers(0, 2_000), st.integers(1, 700))
def test_short_writes_are_continued_and_a_refusal_reports_the_valid_length(
    limit: int, most: int
) -> None:
    written = bytearray()

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        assert offset == len(written)
        room = min(most, limit - len(written))
        if room == 0:
            raise OSError(errno.ENOSPC, "full")
        data = b"".join(views)[:room]
        written.extend(data)
        return len(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        batch = pieces(DATA[:1_500], 100)
        if limit >= 1_500:
            assert write_all(0, batch, 0) == 1_500
        else:
            with pytest.raises(ShortWrite) as caught:
                write_all(0, batch, 0)
            assert caught.value.end == limit
            assert caught.value.cause.errno == errno.ENOSPC
    assert bytes(written) == DATA[: min(limit, 1_500)]


@given(st.lists(st.integers(0, len(DATA)), min_size=1, max_size=5), st.booleans())
def test_the_last_batch_is_hashed_before_it_is_written(cuts: list[int], right: bool) -> None:
    data = DATA if right else DATA[:-1] + bytes([DATA[-1] ^ 1])
    edges = [0, *sorted(cuts), len(data)]
    with pytest.MonkeyPatch.context() as patch:
        there = bytearray()

        def write_to_memory(fd: int, chunks: list[bytes], offset: int) -> int:
            assert offset == len(there)
            there.extend(b"".join(chunks))
            return len(there)

        patch.setattr(ingest_writer, "write_all", write_to_memory)
        verifier = Verifier(DIGEST)
        for start, stop in pairwise(edges):
            last = (start, stop) == (edges[-2], edges[-1])
            batch = pieces(data[start:stop], 60_000)
            if not last or right:
                end = append_batch(0, verifier, batch, start, is_last=last, is_stored=True)
                assert end == stop
            else:
                with pytest.raises(DigestMismatch):
                    append_batch(0, verifier, batch, start, is_last=True, is_stored=True)
    assert there == (data if right else data[: edges[-2]])


def test_bytes_of_an_earlier_fetch_are_hashed_from_the_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, DATA[:100_000], 0)
    verifier = Verifier(DIGEST)
    append_batch(fd, verifier, [DATA[100_000:200_000]], 100_000, is_last=False, is_stored=True)
    assert verifier.position == 200_000
    append_batch(fd, verifier, [DATA[200_000:]], 200_000, is_last=True, is_stored=True)
    assert os.pread(fd, len(DATA), 0) == DATA
    os.close(fd)


def test_content_that_is_not_stored_is_hashed_too() -> None:
    verifier = Verifier(DIGEST)
    assert append_batch(None, verifier, [DATA[:9]], 0, is_last=False, is_stored=False) == 9
    assert append_batch(None, verifier, [DATA[9:]], 9, is_last=True, is_stored=False) == len(DATA)
