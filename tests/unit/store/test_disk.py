"""Files and paths of the data directory, call by call, on a real file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.config.settings import Storage
from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store import disk, quarantine
from mirror.store.disk import IngestState, Layout
from mirror.store.recovery import recover
from tests.unit.store.kit import flip, keep, opened, random_bytes

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


# --- paths ----------------------------------------------------------------------------------------

DATA_DIR = Path("/data")
PATHS = Layout(DATA_DIR)
DIGESTS = st.builds(Digest.of, st.binary(max_size=8), st.sampled_from(ALGORITHMS))


@given(DIGESTS, DIGESTS)
def test_two_digests_or_two_states_never_share_a_path(one: Digest, two: Digest) -> None:
    def paths(digest: Digest) -> list[Path]:
        return [
            PATHS.blob(digest),
            PATHS.ingest(digest),
            PATHS.ingest_state(digest),
            PATHS.quarantine(digest),
        ]

    assert len(set(paths(one))) == 4
    assert all(path.is_relative_to(DATA_DIR) for path in paths(one))
    assert (one == two) == bool(set(paths(one)) & set(paths(two)))


def test_whole_content_is_at_the_path_of_the_oci_image_layout() -> None:
    digest = Digest.of(b"x", "sha512")
    assert PATHS.blob(digest) == DATA_DIR / "blobs" / "sha512" / digest.hex
    assert PATHS.content_directories() == [DATA_DIR / "blobs" / name for name in ALGORITHMS]


@given(DIGESTS)
def test_every_path_of_content_is_in_a_listed_directory(digest: Digest) -> None:
    assert PATHS.blob(digest).parent in PATHS.content_directories()
    assert PATHS.ingest(digest).parent in PATHS.ingest_directories()
    assert PATHS.ingest_state(digest).parent in PATHS.ingest_directories()


def test_index_and_eviction_lock_are_outside_the_content_directories() -> None:
    beside = {PATHS.index, PATHS.eviction_lock}
    directories = {*PATHS.content_directories(), *PATHS.ingest_directories()}
    assert not beside & directories
    assert all(path.parent == DATA_DIR for path in beside)


# --- whole content --------------------------------------------------------------------------------


def test_open_whole_takes_a_lease_that_blocks_eviction(layout: Layout) -> None:
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
def test_open_whole_raises_when_the_disk_does_not_answer(
    layout: Layout, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match=os.strerror(code)):
            disk.open_whole(layout, DIGEST)


def test_open_whole_of_no_regular_file_is_none_and_leaks_no_descriptor(layout: Layout) -> None:
    before = open_descriptors()
    path = layout.blob(DIGEST)
    assert disk.open_whole(layout, DIGEST) is None
    path.mkdir()
    assert disk.open_whole(layout, DIGEST) is None
    path.rmdir()
    os.mkfifo(path)
    assert disk.open_whole(layout, DIGEST) is None
    assert open_descriptors() == before


def test_write_by_another_program_shows_in_the_time_of_the_file(layout: Layout) -> None:
    path = layout.blob(DIGEST)
    path.write_bytes(DATA)
    while disk.has_our_mtime(path.stat()):  # one in a billion
        path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    disk.touch_open(fd, 1_700_000_000.9)
    assert disk.has_our_mtime(path.stat())
    assert path.stat().st_mtime == 1_700_000_000
    os.pwrite(fd, b"x", 0)
    assert not disk.has_our_mtime(path.stat())
    os.close(fd)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("damage", ["none", "flip", "cut", "longer"])
def test_verify_finds_a_flipped_bit_a_cut_file_and_extra_bytes(
    layout: Layout, algorithm: str, damage: str
) -> None:
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


def test_close_of_an_unlinked_file_runs_in_a_thread(tmp_path: Path) -> None:
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
    disk.close(late, threads)  # its threads have ended
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
def test_reason_of_maps_each_error_to_one_of_four_labels(code: int, reason: str) -> None:
    assert disk.reason_of(OSError(code, "")) == reason


# --- ingest state ---------------------------------------------------------------------------------


def test_state_is_read_as_written_and_each_write_changes_its_stamp(layout: Layout) -> None:
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


# The first draw of any text builds Hypothesis's table of Unicode, which takes a second or more.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=30)
    | st.dictionaries(
        st.sampled_from(["size", "boot", "written", "error", "holder", "kept"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.text()) | st.text(),
    ).map(lambda document: json.dumps({"size": None, **document}).encode())
)
def test_malformed_state_is_read_as_none_or_as_valid_values(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    layout = Layout(tmp_path_factory.getbasetemp())
    layout.ingest_state(DIGEST).parent.mkdir(parents=True, exist_ok=True)
    layout.ingest_state(DIGEST).write_bytes(raw)
    found = disk.read_state(layout, DIGEST)
    if found is not None:
        assert found[0].size is None or (type(found[0].size) is int and found[0].size >= 0)
        assert type(found[0].written) is int


def test_failed_write_of_a_state_leaves_no_draft(
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


def test_drop_ingest_leaves_the_file_of_another_holder(layout: Layout) -> None:
    fd = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(fd)
    assert disk.is_at(fd, layout.ingest(DIGEST))
    layout.ingest(DIGEST).unlink()
    assert not disk.is_at(fd, layout.ingest(DIGEST))
    other = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(other)
    assert not disk.is_at(fd, layout.ingest(DIGEST))
    disk.drop_ingest(layout, DIGEST, fd)
    assert layout.ingest(DIGEST).exists(), "it belongs to another holder"
    os.close(fd)
    os.close(other)


@pytest.mark.row("D12-odd-files")
def test_open_ingest_never_follows_a_link(layout: Layout, tmp_path: Path) -> None:
    layout.ingest(DIGEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        disk.open_ingest(layout, DIGEST)
    assert not (tmp_path / "elsewhere").exists()


def full_ingest(layout: Layout) -> int:
    fd = disk.open_ingest(layout, DIGEST)
    assert disk.try_lock(fd)
    os.pwrite(fd, DATA, 0)
    disk.write_state(layout, DIGEST, IngestState(len(DATA)))
    return fd


def test_publish_makes_content_visible_leased_and_marked_as_ours(layout: Layout) -> None:
    fd, before = full_ingest(layout), open_descriptors()
    disk.publish(layout, DIGEST, fd, 1_700_000_000.5)
    assert layout.blob(DIGEST).read_bytes() == DATA
    assert disk.has_our_mtime(layout.blob(DIGEST).stat())
    assert not list(layout.ingest(DIGEST).parent.iterdir())
    reader = disk.open_whole(layout, DIGEST)
    assert reader, "it may be read at once"
    os.close(reader[0])
    assert open_descriptors() == before
    os.close(fd)


@pytest.mark.parametrize(("code", "is_durable"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_publish_accepts_an_unsupported_directory_sync_but_no_failed_one(
    layout: Layout, code: int, is_durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, "refused")
        real(fd)

    fd, before = full_ingest(layout), open_descriptors()
    monkeypatch.setattr(os, "fsync", fsync)
    if is_durable:
        disk.publish(layout, DIGEST, fd, time.time())
    else:
        with pytest.raises(OSError, match="refused"):
            disk.publish(layout, DIGEST, fd, time.time())
    # Its path may name a file that a push has put there meanwhile, so nothing is removed.
    assert layout.blob(DIGEST).read_bytes() == DATA
    assert not list(layout.ingest(DIGEST).parent.iterdir())
    assert open_descriptors() == before
    os.close(fd)


@pytest.mark.row("D6-no-descriptors")
def test_publish_waits_for_a_free_descriptor(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = os.open, 2

    def scarce(path: Path, flags: int, *mode: int) -> int:
        nonlocal refusals
        if flags & os.O_DIRECTORY and refusals:
            refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *mode)

    fd = full_ingest(layout)
    monkeypatch.setattr(os, "open", scarce)
    disk.publish(layout, DIGEST, fd, time.time())
    assert refusals == 0
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def test_publish_raises_if_the_ingest_file_was_removed(layout: Layout) -> None:
    fd = full_ingest(layout)
    layout.ingest(DIGEST).unlink()
    other = disk.open_ingest(layout, DIGEST)
    with pytest.raises(FileNotFoundError):
        disk.publish(layout, DIGEST, fd, time.time())
    assert not layout.blob(DIGEST).exists()
    assert layout.ingest(DIGEST).exists()
    os.close(fd)
    os.close(other)


# --- locks ----------------------------------------------------------------------------------------


def test_open_locked_yields_none_while_another_descriptor_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with disk.open_locked(path) as first:
        assert first is not None
        assert disk.is_locked(path)
        with disk.open_locked(path) as second:
            assert second is None
    assert not disk.is_locked(path)
    with disk.open_locked(path) as third:
        assert third is not None


def test_open_locked_yields_none_for_a_file_that_left_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "file", disk.try_lock
    path.touch()

    def unlinked_meanwhile(fd: int) -> bool:
        path.unlink()
        return real(fd)

    monkeypatch.setattr(disk, "try_lock", unlinked_meanwhile)
    with disk.open_locked(path) as fd:
        assert fd is None


def test_open_locked_follows_no_link_and_creates_no_file(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "target")
    for missing in (path, tmp_path / "missing"):
        with pytest.raises(OSError, match=r"file|link"), disk.open_locked(missing):
            raise AssertionError
        assert not disk.is_locked(missing)
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as NFS makes them: an exclusive one needs a descriptor that is open for writing."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and access == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.row("G6-state-of-another-process")
@pytest.mark.usefixtures("nfs")
async def test_content_is_fetched_and_evicted_where_exclusive_locks_need_write_access(
    tmp_path: Path,
) -> None:
    quota = Storage(max_size=1_000_000, high_water=0.9, low_water=0.5)
    async with opened(tmp_path, settings=quota) as store:
        paths = [
            store.layout.blob(await keep(store, random_bytes(300_000, seed))) for seed in range(4)
        ]
        assert (paths[0].exists(), paths[3].exists()) == (False, True)
        paths[3].chmod(0o444)
        for seed in range(4, 7):
            await keep(store, random_bytes(300_000, seed))
        assert not paths[3].exists()


def test_open_locked_reads_a_file_that_it_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a local disk, content that another program has put there can be evicted, too."""
    path, real = tmp_path / "file", os.open
    path.touch()

    def refuse_writing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_writing)
    with disk.open_locked(path) as fd:
        assert fd is not None


# --- quarantine -----------------------------------------------------------------------------------


def damaged(layout: Layout, name: str) -> tuple[Digest, int]:
    digest = Digest.of(name.encode())
    layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.blob(digest).write_bytes(f"not {name}".encode())
    return digest, os.open(layout.blob(digest), os.O_RDONLY)


def test_quarantine_moves_damaged_content_and_keeps_the_newest_16(layout: Layout) -> None:
    digests = []
    for number in range(quarantine.MAX_QUARANTINED_FILES + 3):
        digest, fd = damaged(layout, f"content {number:02}")
        quarantine.quarantine(layout, digest, fd)
        os.close(fd)
        digests.append(digest)
        assert not layout.blob(digest).exists()
        assert layout.quarantine(digest).exists()
    kept = [digest for digest in digests if layout.quarantine(digest).exists()]
    assert len(kept) == quarantine.MAX_QUARANTINED_FILES
    assert quarantine.quarantine_size(layout) == quarantine.MAX_QUARANTINED_FILES * len(
        "not content 00"
    )
    assert quarantine.trim_quarantine(layout, 0) == quarantine.MAX_QUARANTINED_FILES * len(
        "not content 00"
    )
    assert quarantine.quarantine_size(layout) == quarantine.trim_quarantine(layout, 0) == 0


def test_quarantine_leaves_a_file_that_was_replaced_meanwhile(layout: Layout) -> None:
    digest, fd = damaged(layout, "content")
    layout.blob(digest).unlink()
    layout.blob(digest).write_bytes(b"content")
    quarantine.quarantine(layout, digest, fd)
    os.close(fd)
    assert layout.blob(digest).read_bytes() == b"content"
    assert not layout.quarantine(digest).exists()


class Killed(BaseException):
    """Ends a process at a certain point."""


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_quarantine_that_is_killed_between_its_renames_keeps_intact_content_in_its_place(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, renames: int, is_replaced: bool
) -> None:
    digest, fd = damaged(layout, "content")
    done: list[str] = []

    def rename(path: Path, target: Path) -> None:
        if is_replaced and not done:  # By a fetch, in the last moment.
            path.unlink()
            path.write_bytes(b"content")
            disk.touch(layout, [digest], 1000)
        if len(done) == renames:
            raise Killed
        done.append(path.name)
        os.rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed) if renames < 2 else nullcontext():
            quarantine.quarantine(layout, digest, fd)
    os.close(fd)
    assert recover(layout, 1000, "boot") is None
    is_moved = renames == 2 and not is_replaced
    found = layout.quarantine(digest) if is_moved else layout.blob(digest)
    assert found.read_bytes() == (b"content" if is_replaced else b"not content")
    files = [path for path in layout.root.glob("*/sha256/*") if path.is_file()]
    assert files == [found]
    if renames == 1:
        assert not disk.has_our_mtime(found.stat()), "it is hashed before it is served"


def kill_quarantine(layout: Layout) -> tuple[Digest, Path]:
    """Return content, and its file as a quarantine that was killed has left it."""
    digest, fd = damaged(layout, "content")
    os.close(fd)
    layout.quarantine(digest).parent.mkdir(parents=True)
    moving = layout.quarantine(digest).with_name(f"{digest.hex}.0123.moving")
    layout.blob(digest).rename(moving)
    return digest, moving


def test_file_whose_quarantine_was_killed_is_put_back_without_hard_links(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    digest, moving = kill_quarantine(layout)
    monkeypatch.setattr(os, "link", refuse)
    assert recover(layout, 1000, "boot") is None
    assert layout.blob(digest).exists()
    assert not moving.exists()


def test_content_that_is_there_again_stays_instead_of_a_file_whose_quarantine_was_killed(
    layout: Layout,
) -> None:
    digest, moving = kill_quarantine(layout)
    assert quarantine.trim_quarantine(layout, 0) == 0, "another process may be moving it"
    assert not quarantine.quarantined_files(layout)
    layout.blob(digest).write_bytes(b"content")
    assert recover(layout, 1000, "boot") is None
    assert layout.blob(digest).read_bytes() == b"content"
    assert not moving.exists()


@pytest.mark.parametrize("calls", [["rename"], ["mkdir"], ["rename", "unlink"]])
def test_quarantine_never_raises_on_a_read_only_disk(
    layout: Layout, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, fd = damaged(layout, "content")

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(Path, call, refuse)
        quarantine.quarantine(layout, digest, fd)
    os.close(fd)
    assert layout.blob(digest).exists() == ("unlink" in calls)
    assert not layout.quarantine(digest).exists()


def test_file_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    first = disk.lock_file(path)
    assert first is not None
    assert disk.lock_file(path) is None
    os.close(first)
    again = disk.lock_file(path)
    assert again is not None
    os.close(again)
