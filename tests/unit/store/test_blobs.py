"""Whole content: when it is trusted, when it is verified again, how damage is handled."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirror.observability.events import DigestMismatched, LogMessage, Reverified
from mirror.oci.errors import DigestMismatch, StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import blobs as module
from mirror.store import disk
from mirror.store.reader import FileExtent
from tests.unit.store.kit import (
    DIGEST,
    Verified,
    flip,
    kit,
    no_trace,
    put,
    random_bytes,
    read,
)
from tests.waiting import until

SMALL = random_bytes(100_000, 3)
LARGE = random_bytes(module.SMALL_BYTES + 1_000_000, 4)


async def test_trusted_content_is_served_without_hashing(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        reader = await parts.blobs.find(digest)
        assert reader
        assert await read(reader) == LARGE
        assert await read(reader, 10, 20) == LARGE[10:20]
        assert not [e for e in parts.events if isinstance(e, Reverified)]
        reader.close()
        reader.close()


async def test_missing_content_is_a_miss(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        assert await parts.blobs.find(Digest.of(b"nothing")) is None
        assert await parts.blobs.read(Digest.of(b"nothing"), 100) is None


@pytest.mark.row("C9-damaged-content")
@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "flip-last"])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_damaged_content_is_never_served_completely(
    tmp_path: Path, damage: str, data: bytes
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, data)
        path = parts.layout.blob(digest)
        match damage:
            case "empty":
                path.write_bytes(b"")
            case "cut":
                os.truncate(path, len(data) - 1)
            case "flip":
                flip(path, len(data) // 2)
            case _:
                flip(path, len(data) - 1)
        reader = await parts.blobs.find(digest, len(data))
        if reader is not None:
            with pytest.raises(DigestMismatch):
                await read(reader)
            reader.close()
        assert await parts.blobs.find(digest) is None
        assert not path.exists()
        assert parts.layout.quarantine(digest).exists()
        assert [e.where for e in parts.events if isinstance(e, DigestMismatched)] == ["disk"]


@pytest.mark.row("C9-damaged-content")
async def test_silent_damage_is_found_once_the_verification_is_old(tmp_path: Path) -> None:
    with kit(tmp_path, reverify=0) as parts:
        digest = await put(parts, LARGE)
        path = parts.layout.blob(digest)
        flip(path, 1000)
        no_trace(path)
        reader = await parts.blobs.find(digest)
        assert reader
        with pytest.raises(DigestMismatch):
            await read(reader)
        reader.close()


async def test_content_with_an_old_verification_is_sent_at_once_and_ends_when_verified(
    tmp_path: Path,
) -> None:
    with kit(tmp_path, reverify=0) as parts:
        digest = await put(parts, LARGE)
        reader = await parts.blobs.find(digest)
        assert reader
        first = await reader.wait(0, len(LARGE))
        assert first
        assert await read(reader) == LARGE
        assert await read(reader, 5, 10) == LARGE[5:10]
        reader.close()
        assert [e.is_ok for e in parts.events if isinstance(e, Reverified)] == [True]


async def test_wrong_size_in_a_manifest_does_not_damage_content(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        reader = await parts.blobs.find(digest, 17)
        assert reader
        assert await read(reader) == LARGE
        reader.close()
        assert parts.layout.blob(digest).exists()


@pytest.mark.row("M5-eviction-while-opening")
async def test_content_under_eviction_is_a_miss_and_a_reader_blocks_eviction(
    tmp_path: Path,
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, SMALL)
        path = parts.layout.blob(digest)
        evictor = os.open(path, os.O_RDONLY)
        fcntl.flock(evictor, fcntl.LOCK_EX)
        assert await parts.blobs.find(digest) is None
        fcntl.flock(evictor, fcntl.LOCK_UN)
        reader = await parts.blobs.find(digest)
        assert reader
        with pytest.raises(BlockingIOError):
            fcntl.flock(evictor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        assert await read(reader) == SMALL
        assert await parts.blobs.find(digest) is None
        reader.close()
        os.close(evictor)


@pytest.mark.row("D12-odd-files")
@pytest.mark.parametrize("stranger", ["link", "fifo", "directory", "dangling"])
async def test_links_pipes_and_directories_are_a_miss_and_never_followed(
    tmp_path: Path, stranger: str
) -> None:
    with kit(tmp_path) as parts:
        digest = Digest.of(SMALL)
        path = parts.layout.blob(digest)
        target = tmp_path / "elsewhere"
        target.write_bytes(SMALL)
        match stranger:
            case "link":
                path.symlink_to(target)
            case "fifo":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case _:
                path.symlink_to(tmp_path / "nowhere")
        async with asyncio.timeout(5):
            assert await parts.blobs.find(digest) is None
            assert await parts.blobs.read(digest, 1_000_000) is None


@pytest.mark.row("D6-no-descriptors")
async def test_running_out_of_descriptors_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, SMALL)

        def exhausted(*arguments: object) -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(disk, "open_whole", exhausted)
            with pytest.raises(StorageUnavailable):
                await parts.blobs.find(digest)
            with pytest.raises(StorageUnavailable):
                await parts.blobs.read(digest, 1_000_000)
        assert await parts.blobs.read(digest, 1_000_000) == SMALL
        assert not [e for e in parts.events if isinstance(e, DigestMismatched)]


@pytest.mark.row("D4-io-error-at-a-call")
@pytest.mark.row("D7-unwritable-directories")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
async def test_content_that_cannot_be_opened_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, SMALL)

        def refused(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(disk, "open_whole", refused)
            assert await parts.blobs.find(digest) is None
            assert await parts.blobs.read(digest, 1_000_000) is None
        assert len([e for e in parts.events if isinstance(e, LogMessage)]) == 2
        assert await parts.blobs.read(digest, 1_000_000) == SMALL, "it was not quarantined"


@pytest.mark.row("D4-io-error-at-a-call")
async def test_small_content_that_cannot_be_read_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, SMALL)

        def broken(*arguments: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", broken)
            assert await parts.blobs.read(digest, 1_000_000) is None
        assert parts.layout.quarantine(digest).exists()


@pytest.mark.row("D11-content-cut-under-readers")
async def test_content_truncated_under_a_reader_is_a_miss_for_the_next(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        first = await parts.blobs.find(digest)
        assert first
        os.truncate(parts.layout.blob(digest), 1000)
        second = await parts.blobs.find(digest)
        assert second is None
        first.close()


async def test_readers_share_one_descriptor_and_close_it(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        before = len(os.listdir("/proc/self/fd"))
        readers = [await parts.blobs.find(digest) for _ in range(50)]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        for reader in readers:
            assert reader
            reader.close()
        assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.row("L2-clients-that-reset")
async def test_request_cancelled_during_the_open_leaves_no_descriptor(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        before = len(os.listdir("/proc/self/fd"))
        gate = threading.Event()
        for _ in range(4):  # every thread that opens files waits for the gate
            parts.pools[2].submit(gate.wait)
        finds = [asyncio.ensure_future(parts.blobs.find(digest)) for _ in range(20)]  # noqa: TID251 - a test
        await asyncio.sleep(0)
        for find in finds[:15]:
            find.cancel()
        await asyncio.sleep(0)
        gate.set()
        readers = await asyncio.gather(*finds[15:])
        assert [await read(reader) == LARGE for reader in readers if reader] == [True] * 5
        for reader in readers:
            assert reader
            reader.close()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_remembered_verification_times_are_bounded_and_saved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 5)
    saved: list[Digest] = []

    class Recording(Verified):
        async def set_verified(self, entries: list[tuple[Digest, float]]) -> bool:
            saved.extend(digest for digest, _ in entries)
            return await super().set_verified(entries)

    with kit(tmp_path) as parts:
        parts.blobs._index = Recording()
        bodies = [str(number).encode() for number in range(9)]
        digests = [await put(parts, body) for body in bodies]
        assert saved == digests
        assert len(parts.blobs._verified) == 5
        saved.clear()
        for digest, body in zip(digests[:3], bodies, strict=False):
            assert await parts.blobs.read(digest, 100) == body
        await parts.blobs.flush()
        await parts.blobs.flush()
        assert sorted(saved) == sorted(digests[:3]), "each once, and none that was saved before"


@pytest.mark.row("G5-repeated-verification")
async def test_verification_times_that_the_index_refuses_are_saved_later(tmp_path: Path) -> None:
    class Refusing(Verified):
        is_busy = True

        async def set_verified(self, entries: list[tuple[Digest, float]]) -> bool:
            return not self.is_busy and await super().set_verified(entries)

    with kit(tmp_path) as parts:
        index = parts.blobs._index = Refusing()
        digest = await put(parts, b"content")
        await parts.blobs.flush()
        assert not index.times
        index.is_busy = False
        await parts.blobs.flush()
        assert list(index.times) == [digest]


@pytest.mark.row("K1-wrong-clock")
@pytest.mark.row("K4-negative-ages")
@pytest.mark.parametrize("jump", [365 * 86400.0, -365 * 86400.0])
async def test_content_is_verified_again_and_served_after_a_clock_jump(
    tmp_path: Path, jump: float
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        now = time.time() + jump
        parts.blobs._now = lambda: now
        for times in (1, 1):  # the second time it was verified at this time
            reader = await parts.blobs.find(digest)
            assert reader
            assert await read(reader) == LARGE
            reader.close()
            assert [e.is_ok for e in parts.events if isinstance(e, Reverified)] == [True] * times


async def test_damage_that_cannot_be_quarantined_is_a_miss_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit(tmp_path) as parts:
        digest = await put(parts, SMALL)
        flip(parts.layout.blob(digest), 5)

        def refuse(*arguments: object, **named: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Path, "rename", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
        for _ in range(2):
            assert await parts.blobs.find(digest) is None
            assert await parts.blobs.read(digest, len(SMALL)) is None
        assert parts.layout.blob(digest).exists()


# --- what is hashed, and what waits for it --------------------------------------------------------


class HashGate:
    """Holds verifications until ``go``, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.count = 0
        verify = disk.verify

        def gated(fd: int, size: int, digest: Digest, is_stopping: Callable[[], bool]) -> None:
            self.count += 1
            self.go.wait(30)
            verify(fd, size, digest, is_stopping)

        patch.setattr(disk, "verify", gated)


@pytest.mark.row("G10-range-of-aged-content")
async def test_range_of_aged_content_does_not_wait_for_the_hash_unless_it_has_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, end = HashGate(monkeypatch), len(LARGE)
    with kit(tmp_path, reverify=0) as parts:
        digest = await put(parts, LARGE)
        reader = await parts.blobs.find(digest)
        assert reader
        async with asyncio.timeout(5):
            assert await read(reader, 10, 20) == LARGE[10:20]
            assert await read(reader, 0, end - 1) == LARGE[:-1]
            assert await read(reader, 7, 8) == LARGE[7:8]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await read(reader, end - 5, end)
        gate.go.set()
        assert await read(reader, end - 5, end) == LARGE[-5:]
        reader.close()


@pytest.mark.row("G10-range-of-aged-content")
async def test_range_of_content_that_another_program_wrote_waits_for_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = HashGate(monkeypatch)
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        flip(parts.layout.blob(digest), 15)
        reader = await parts.blobs.find(digest)
        assert reader
        assert await reader.wait(10, 20) == FileExtent(reader._lease.fd, 10, 19)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.wait(19, 20)
        gate.go.set()
        with pytest.raises(DigestMismatch):
            await reader.wait(19, 20)
        reader.close()


@pytest.mark.row("G10-range-of-aged-content")
async def test_no_range_of_aged_content_is_served_after_damage_was_found(tmp_path: Path) -> None:
    with kit(tmp_path, reverify=0) as parts:
        digest = await put(parts, LARGE)
        path = parts.layout.blob(digest)
        flip(path, 1000)
        no_trace(path)
        reader = await parts.blobs.find(digest)
        assert reader
        await until(lambda: any(isinstance(e, DigestMismatched) for e in parts.events))
        assert not path.exists()
        with pytest.raises(DigestMismatch):
            await reader.wait(0, 10)
        reader.close()


@pytest.mark.row("G5-repeated-verification")
async def test_close_does_not_hash_its_queue_and_reports_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit(tmp_path, reverify=0) as parts:
        digests = [await put(parts, random_bytes(5_000_000, seed)) for seed in range(8)]
        gate = HashGate(monkeypatch)
        readers = [await parts.blobs.find(digest) for digest in digests]
        await until(lambda: gate.count == 4)
        parts.blobs.stop_verifying()
        gate.go.set()
        for reader in readers:
            assert reader
            with pytest.raises(StorageUnavailable):
                await read(reader)
            reader.close()
        assert not [e for e in parts.events if isinstance(e, Reverified | DigestMismatched)]
        assert all(parts.layout.blob(digest).exists() for digest in digests)


@pytest.mark.row("G5-repeated-verification")
def test_verify_stops_within_4_mib_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    asked: list[bool] = []

    def is_stopping() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(StorageUnavailable):
        disk.verify(fd, 2**40, DIGEST, is_stopping)
    os.close(fd)
    assert len(asked) == 4


@pytest.mark.row("G5-repeated-verification")
async def test_wrong_size_in_a_manifest_delays_no_request_and_hashes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = HashGate(monkeypatch)
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        parts.blobs._lengths.clear()  # Another process has stored it.
        async with asyncio.timeout(5):
            readers = [await parts.blobs.find(digest, size) for size in (17, len(LARGE) + 1, 17)]
        assert gate.count == 1
        gate.go.set()
        for reader in readers:
            assert reader
            assert await read(reader) == LARGE
            reader.close()
        for size in (17, len(LARGE) - 1):
            reader = await parts.blobs.find(digest, size)
            assert reader
            assert await read(reader) == LARGE
            reader.close()
        assert gate.count == 1


@pytest.mark.row("G5-repeated-verification")
async def test_wrong_size_of_content_that_this_process_fetched_hashes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = HashGate(monkeypatch)
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        reader = await parts.blobs.find(digest, 17)
        assert reader
        assert await read(reader) == LARGE
        reader.close()
        assert gate.count == 0


@pytest.mark.row("G5-repeated-verification")
async def test_two_requests_for_aged_content_at_once_hash_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = HashGate(monkeypatch)
    with kit(tmp_path) as parts:
        digest = await put(parts, LARGE)
        parts.blobs._verified.clear()
        times = Verified()

        async def slow(digest: Digest) -> float:
            await asyncio.sleep(0.01)
            return 0.0

        monkeypatch.setattr(times, "verified_at", slow)
        parts.blobs._index = times
        readers = await asyncio.gather(*(parts.blobs.find(digest) for _ in range(5)))
        gate.go.set()
        for reader in readers:
            assert reader
            assert await read(reader) == LARGE
            reader.close()
        assert gate.count == 1


@pytest.mark.row("G10-range-of-aged-content")
async def test_small_content_does_not_wait_for_the_verification_of_large_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, verify = threading.Event(), disk.verify

    def verify_slowly(fd: int, size: int, digest: Digest, is_stopping: Callable[[], bool]) -> None:
        if size > module.SMALL_BYTES:
            go.wait(20)
        verify(fd, size, digest, is_stopping)

    monkeypatch.setattr(disk, "verify", verify_slowly)
    with kit(tmp_path, reverify=0) as parts:
        large = [await put(parts, LARGE + bytes([number])) for number in range(5)]
        small = await put(parts, SMALL)
        readers = [await parts.blobs.find(digest) for digest in large]
        try:
            async with asyncio.timeout(5):
                readers.append(await parts.blobs.find(small))
        finally:
            go.set()
            for reader in readers:
                assert reader
                assert await read(reader)
                reader.close()
