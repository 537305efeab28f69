"""The blocking half of the store, call by call, on a real file system."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import Digest, Verifier
from mirror.store import disk
from mirror.store.disk import IngestState
from mirror.store.layout import Layout
from tests.unit.store.kit import flip, pieces, random_bytes

DATA = random_bytes(300_000, 21)
DIGEST = Digest.of(DATA)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    for directory in (*made.content_directories(), *made.ingest_directories()):
        directory.mkdir(parents=True)
    return made


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- whole content --------------------------------------------------------------------------------


def test_whole_content_is_opened_with_a_lease(layout: Layout) -> None:
    layout.blob(DIGEST).write_bytes(DATA)
    opened = disk.open_whole(layout, DIGEST)
    assert opened
    fd, status = opened
    assert status.st_size == len(DATA)
    other = os.open(layout.blob(DIGEST), os.O_RDONLY)
    assert not disk.try_lock(other), "an eviction would see that it is being read"
    os.close(fd)
    assert disk.try_lock(other)
    assert disk.open_whole(layout, DIGEST) is None, "it is being evicted"
    os.close(other)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES])
def test_a_disk_that_cannot_tell_is_no_miss(
    layout: Layout, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match=os.strerror(code)):
            disk.open_whole(layout, DIGEST)


def test_what_is_no_file_is_a_miss_and_leaks_no_descriptor(layout: Layout) -> None:
    before = open_descriptors()
    path = layout.blob(DIGEST)
    assert disk.open_whole(layout, DIGEST) is None
    path.mkdir()
    assert disk.open_whole(layout, DIGEST) is None
    path.rmdir()
    os.mkfifo(path)
    assert disk.open_whole(layout, DIGEST) is None
    assert open_descriptors() == before


def test_only_times_that_we_set_are_in_whole_seconds(layout: Layout) -> None:
    path = layout.blob(DIGEST)
    path.write_bytes(DATA)
    while disk.set_by_us(path.stat()):  # one in a billion
        path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    disk.touch_open(fd, 1_700_000_000.9)
    assert disk.set_by_us(path.stat())
    assert path.stat().st_mtime == 1_700_000_000
    os.pwrite(fd, b"x", 0)
    assert not disk.set_by_us(path.stat())
    os.close(fd)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("damage", ["none", "flip", "cut", "longer"])
def test_content_is_verified_byte_by_byte(layout: Layout, algorithm: str, damage: str) -> None:
    digest = Digest.of(DATA, algorithm)
    path = layout.blob(digest)
    path.write_bytes(DATA)
    match damage:
        case "flip":
            flip(path, len(DATA) - 1)
        case "cut":
            os.truncate(path, len(DATA) - 1)
        case "longer":
            path.write_bytes(DATA + b"x")
    fd = os.open(path, os.O_RDONLY)
    size = path.stat().st_size if damage == "longer" else len(DATA)
    if damage == "none":
        disk.verify(fd, size, digest)
    else:
        with pytest.raises(DigestMismatch):
            disk.verify(fd, size, digest)
    os.close(fd)


def test_closing_the_last_of_an_unlinked_file_is_left_to_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(1) as threads:
        path.write_bytes(b"x")
        kept = os.open(path, os.O_RDONLY)
        disk.close(kept, threads)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(kept)
        gone = os.open(path, os.O_RDONLY)
        path.unlink()
        disk.close(gone, threads)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(gone)
    path.write_bytes(b"x")
    late = os.open(path, os.O_RDONLY)
    path.unlink()
    disk.close(late, threads)  # whose threads have ended
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(late)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EFBIG, "full"),
        (errno.EROFS, "readonly"),
        (errno.EACCES, "readonly"),
        (errno.EMFILE, "descriptors"),
        (errno.EIO, "io"),
        (errno.EXDEV, "io"),
    ],
)
def test_a_refusal_has_one_of_few_reasons(code: int, reason: str) -> None:
    assert disk.reason_of(OSError(code, "")) == reason


# --- appending ------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(0, 300))
def test_what_comes_after_a_count_of_bytes(batch: list[bytes], count: int) -> None:
    assert b"".join(disk.after(batch, count)) == b"".join(batch)[count:]


def test_a_batch_of_any_number_of_pieces_is_written_whole(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    batch = pieces(DATA, 97)  # more than one call takes
    assert disk.write_all(fd, [b"", *batch, b""], 5) == 5 + len(DATA)
    assert os.pread(fd, len(DATA) + 10, 5) == DATA
    os.close(fd)


@given(st.integers(0, 2_000), st.integers(1, 700))
def test_short_writes_go_on_and_a_refusal_says_where(limit: int, most: int) -> None:
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
            assert disk.write_all(0, batch, 0) == 1_500
        else:
            with pytest.raises(disk.ShortWrite) as caught:
                disk.write_all(0, batch, 0)
            assert caught.value.end == limit
            assert caught.value.cause.errno == errno.ENOSPC
    assert bytes(written) == DATA[: min(limit, 1_500)]


@given(st.lists(st.integers(0, len(DATA)), min_size=1, max_size=5), st.booleans())
def test_the_last_batch_is_hashed_before_it_is_written(cuts: list[int], right: bool) -> None:
    data = DATA if right else DATA[:-1] + bytes([DATA[-1] ^ 1])
    edges = [0, *sorted(cuts), len(data)]
    with pytest.MonkeyPatch.context() as patch:
        there = bytearray()

        def write_all(fd: int, chunks: list[bytes], offset: int) -> int:
            assert offset == len(there)
            there.extend(b"".join(chunks))
            return len(there)

        patch.setattr(disk, "write_all", write_all)
        verifier = Verifier(DIGEST)
        for start, stop in pairwise(edges):
            last = (start, stop) == (edges[-2], edges[-1])
            batch = pieces(data[start:stop], 60_000)
            if not last or right:
                end = disk.append(0, verifier, batch, start, last=last, keep=True)
                assert end == stop
            else:
                with pytest.raises(DigestMismatch):
                    disk.append(0, verifier, batch, start, last=True, keep=True)
    assert there == (data if right else data[: edges[-2]])


def test_what_an_earlier_fetch_left_is_hashed_from_the_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, DATA[:100_000], 0)
    verifier = Verifier(DIGEST)
    disk.append(fd, verifier, [DATA[100_000:200_000]], 100_000, last=False, keep=True)
    assert verifier.position == 200_000
    disk.append(fd, verifier, [DATA[200_000:]], 200_000, last=True, keep=True)
    assert os.pread(fd, len(DATA), 0) == DATA
    os.close(fd)


def test_what_is_not_kept_is_hashed_all_the_same() -> None:
    verifier = Verifier(DIGEST)
    assert disk.append(None, verifier, [DATA[:9]], 0, last=False, keep=False) == 9
    assert disk.append(None, verifier, [DATA[9:]], 9, last=True, keep=False) == len(DATA)


# --- the state beside growing content -------------------------------------------------------------


def test_a_state_survives_its_file_and_leaves_another_stamp(layout: Layout) -> None:
    state = IngestState(7, "boot", 3, ("UNAVAILABLE", "why"), "holder", 2)
    assert disk.read_state(layout, DIGEST) is None
    assert disk.stamp_of_state(layout, DIGEST) is None
    disk.write_state(layout, DIGEST, state)
    found = disk.read_state(layout, DIGEST)
    assert found
    assert found[0] == state
    stamp = disk.stamp_of_state(layout, DIGEST)
    disk.write_state(layout, DIGEST, IngestState(None))
    assert disk.stamp_of_state(layout, DIGEST) not in (stamp, None)
    disk.drop_state(layout, DIGEST)
    disk.drop_state(layout, DIGEST)
    assert not list(layout.ingest(DIGEST).parent.iterdir())


@given(
    st.binary(max_size=30)
    | st.dictionaries(
        st.sampled_from(["size", "boot", "written", "error", "holder", "kept"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.text()) | st.text(),
    ).map(lambda document: json.dumps({"size": None, **document}).encode())
)
def test_a_garbled_state_is_none_or_a_state(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    layout = Layout(tmp_path_factory.getbasetemp())
    layout.ingest_state(DIGEST).parent.mkdir(parents=True, exist_ok=True)
    layout.ingest_state(DIGEST).write_bytes(raw)
    found = disk.read_state(layout, DIGEST)
    if found is not None:
        assert found[0].size is None or (type(found[0].size) is int and found[0].size >= 0)
        assert type(found[0].written) is int


def test_a_state_that_cannot_be_written_leaves_no_draft(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write_state(layout, DIGEST, IngestState(5))

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="broken"):
        disk.write_state(layout, DIGEST, IngestState(6))
    assert list(layout.ingest(DIGEST).parent.iterdir()) == [layout.ingest_state(DIGEST)]


# --- locks, publishing ----------------------------------------------------------------------------


def test_a_lock_on_an_unlinked_file_locks_nothing(layout: Layout) -> None:
    fd = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(fd)
    assert disk.is_at(fd, layout.ingest(DIGEST))
    layout.ingest(DIGEST).unlink()
    assert not disk.is_at(fd, layout.ingest(DIGEST))
    other = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(other)
    assert not disk.is_at(fd, layout.ingest(DIGEST))
    disk.drop_ingest(layout, DIGEST, fd)
    assert layout.ingest(DIGEST).exists(), "it is another's by now"
    os.close(fd)
    os.close(other)


@pytest.mark.row("D12-odd-files")
def test_growing_content_never_follows_a_link(layout: Layout, tmp_path: Path) -> None:
    layout.ingest(DIGEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        disk.open_ingest(layout, DIGEST)
    assert not (tmp_path / "elsewhere").exists()


def grown(layout: Layout) -> int:
    fd = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(fd)
    disk.write_all(fd, [DATA], 0)
    disk.write_state(layout, DIGEST, IngestState(len(DATA)))
    return fd


def test_publishing_makes_content_visible_leased_and_marked(layout: Layout) -> None:
    fd, before = grown(layout), open_descriptors()
    disk.publish(layout, DIGEST, fd, 1_700_000_000.5)
    assert layout.blob(DIGEST).read_bytes() == DATA
    assert disk.set_by_us(layout.blob(DIGEST).stat())
    assert not list(layout.ingest(DIGEST).parent.iterdir())
    reader = disk.open_whole(layout, DIGEST)
    assert reader, "it may be read at once"
    os.close(reader[0])
    assert open_descriptors() == before
    os.close(fd)


@pytest.mark.parametrize(("code", "published"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_directory_sync_may_be_unsupported_but_must_not_fail(
    layout: Layout, code: int, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, "refused")
        real(fd)

    fd, before = grown(layout), open_descriptors()
    monkeypatch.setattr(os, "fsync", fsync)
    if published:
        disk.publish(layout, DIGEST, fd, time.time())
    else:
        with pytest.raises(OSError, match="refused"):
            disk.publish(layout, DIGEST, fd, time.time())
    assert layout.blob(DIGEST).exists() == published
    assert not list(layout.ingest(DIGEST).parent.iterdir())
    assert open_descriptors() == before
    os.close(fd)


@pytest.mark.row("D6-no-descriptors")
def test_publishing_waits_for_a_descriptor(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = os.open, 2

    def scarce(path: Path, flags: int, *mode: int) -> int:
        nonlocal refusals
        if flags & os.O_DIRECTORY and refusals:
            refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *mode)

    fd = grown(layout)
    monkeypatch.setattr(os, "open", scarce)
    disk.publish(layout, DIGEST, fd, time.time())
    assert refusals == 0
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def test_what_was_taken_away_is_not_published(layout: Layout) -> None:
    fd = grown(layout)
    layout.ingest(DIGEST).unlink()
    other = disk.open_ingest(layout, DIGEST)
    with pytest.raises(FileNotFoundError):
        disk.publish(layout, DIGEST, fd, time.time())
    assert not layout.blob(DIGEST).exists()
    assert layout.ingest(DIGEST).exists()
    os.close(fd)
    os.close(other)
