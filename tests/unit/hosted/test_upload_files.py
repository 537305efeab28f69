"""Files of uploads: names, locks, and publishing beside an eviction."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from mirror.hosted import upload_files
from mirror.oci.errors import DigestMismatch
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout, has_our_mtime, open_whole

ID = "0123456789abcdef" * 2
DATA = b"some content"
DIGEST = Digest.of(DATA)
NOW = 1_900_000_000.0


@pytest.mark.parametrize(
    "name", ["", "x", "../" + "0" * 29, ID.upper(), ID + "0", ID[:-1], ID + "\n", "..", "a/b"]
)
def test_other_names_are_no_ids_and_become_no_path(tmp_path: Path, name: str) -> None:
    assert not upload_files.is_upload_id(name)
    with pytest.raises(ValueError, match="not the id"):
        upload_files.path_of(Layout(tmp_path), name)


def test_link_in_place_of_an_upload_is_not_followed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.uploads.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (layout.uploads / ID).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        upload_files.open_to_feed(layout, ID)
    with pytest.raises(FileExistsError):
        upload_files.create(layout, ID)
    assert upload_files.upload_length(layout, ID) is None


def written(layout: Layout) -> tuple[Path, int]:
    upload_files.create(layout, ID)
    opened = upload_files.open_to_feed(layout, ID)
    assert opened is not None
    assert opened[0] is not None
    os.write(opened[0], DATA)
    return upload_files.path_of(layout, ID), opened[0]


def test_published_content_is_whole_and_kept_until_the_caller_lets_go(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    path, fd = written(layout)
    assert upload_files.publish_upload(layout, path, fd, DIGEST, NOW) is True
    target = layout.blob(DIGEST)
    assert target.read_bytes() == DATA
    assert has_our_mtime(target.lstat())
    assert not path.exists()
    other = os.open(target, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_content_that_is_there_is_replaced_by_what_was_just_verified(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.blob(DIGEST).parent.mkdir(parents=True)
    layout.blob(DIGEST).write_bytes(b"damaged")
    path, fd = written(layout)
    assert upload_files.publish_upload(layout, path, fd, DIGEST, NOW) is False
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def test_eviction_of_the_same_content_ends_first(tmp_path: Path) -> None:
    """It would remove the new file under the path that it has checked."""
    layout = Layout(tmp_path)
    layout.blob(DIGEST).parent.mkdir(parents=True)
    layout.blob(DIGEST).write_bytes(DATA)
    evicted = os.open(layout.blob(DIGEST), os.O_RDONLY)
    fcntl.flock(evicted, fcntl.LOCK_EX)
    path, fd = written(layout)
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(upload_files.publish_upload(layout, path, fd, DIGEST, NOW))
    )
    thread.start()
    thread.join(0.05)
    assert path.exists(), "the upload waits"
    layout.blob(DIGEST).unlink()
    os.close(evicted)
    thread.join(10)
    assert results == [True]
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def test_directory_that_cannot_be_synced_leaves_the_content_that_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    sync = os.fsync

    def fail(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    path, fd = written(layout)
    with pytest.raises(OSError, match="Input/output"):
        upload_files.publish_upload(layout, path, fd, DIGEST, NOW)
    assert layout.blob(DIGEST).read_bytes() == DATA, "without a row it is cache"
    os.close(fd)
    layout.blob(DIGEST).write_bytes(DATA)
    path, fd = written(layout)
    with pytest.raises(OSError, match="Input/output"):
        upload_files.publish_upload(layout, path, fd, DIGEST, NOW)
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def fetched(layout: Layout) -> None:
    """Publish the same content by a proxied fetch."""
    fd = disk.open_ingest(layout, DIGEST)
    os.write(fd, DATA)
    disk.publish(layout, DIGEST, fd, NOW)
    os.close(fd)


def test_file_that_a_fetch_has_put_in_place_of_a_push_is_kept_from_the_first_row_on(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path)
    fd, _ = upload_files.store_body(layout, DIGEST, DATA, NOW)
    fetched(layout)
    ours = layout.blob(DIGEST).lstat()
    assert not disk.is_at(fd, layout.blob(DIGEST))
    upload_files.keep_published(layout, DIGEST, fd, NOW)
    os.close(fd)
    assert os.path.samestat(ours, layout.blob(DIGEST).lstat()), "nothing was copied"


def test_content_that_an_eviction_took_before_the_row_is_brought_back(tmp_path: Path) -> None:
    """A fetch replaced the file of the push, so the eviction found it without a lock."""
    layout = Layout(tmp_path)
    fd, _ = upload_files.store_body(layout, DIGEST, DATA, NOW)
    fetched(layout)
    with disk.open_locked(layout.blob(DIGEST)) as evicted:
        assert evicted is not None, "the lock of the push is on another file"
        thread = threading.Thread(
            target=upload_files.keep_published, args=(layout, DIGEST, fd, NOW)
        )
        thread.start()
        thread.join(0.05)
        assert thread.is_alive(), "it waits for the eviction"
        layout.blob(DIGEST).unlink()
    thread.join(10)
    os.close(fd)
    assert layout.blob(DIGEST).read_bytes() == DATA
    assert has_our_mtime(layout.blob(DIGEST).lstat())
    assert list(layout.uploads.iterdir()) == []


def test_content_is_not_brought_back_with_other_bytes(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    fd, _ = upload_files.store_body(layout, DIGEST, DATA, NOW)
    layout.blob(DIGEST).unlink()
    os.pwrite(fd, b"x", 0)
    with pytest.raises(DigestMismatch):
        upload_files.keep_published(layout, DIGEST, fd, NOW)
    os.close(fd)
    assert not layout.blob(DIGEST).exists()
    assert list(layout.uploads.iterdir()) == []


def test_push_whose_directory_sync_fails_leaves_the_file_that_another_push_has_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, sync = Layout(tmp_path), os.fsync

    def fail(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            monkeypatch.setattr(os, "fsync", sync)
            os.close(upload_files.store_body(layout, DIGEST, DATA, NOW)[0])
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        upload_files.store_body(layout, DIGEST, DATA, NOW)
    assert layout.blob(DIGEST).read_bytes() == DATA


def test_small_content_is_stored_and_leased(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    fd, is_new = upload_files.store_body(layout, DIGEST, DATA, NOW)
    assert is_new
    assert list(layout.uploads.iterdir()) == []
    opened = open_whole(layout, DIGEST)
    assert opened is not None
    os.close(opened[0])
    os.close(fd)
