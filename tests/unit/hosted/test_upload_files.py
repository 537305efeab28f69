"""Files of uploads: names, locks, and publishing beside an eviction."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from mirror.hosted import upload_files
from mirror.oci.reference import Digest
from mirror.store.content_hold import ContentHold, removing
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


def publish(layout: Layout, path: Path, fd: int) -> bool:
    with ContentHold(layout) as hold:
        return upload_files.publish_upload(layout, path, fd, DIGEST, NOW, hold)


def store(layout: Layout) -> bool:
    with ContentHold(layout) as hold:
        return upload_files.publish_body(layout, DIGEST, DATA, NOW, hold)


def test_published_content_is_whole_and_kept_until_the_caller_lets_go(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    path, fd = written(layout)
    with ContentHold(layout) as hold:
        assert upload_files.publish_upload(layout, path, fd, DIGEST, NOW, hold) is True
        target = layout.blob(DIGEST)
        assert target.read_bytes() == DATA
        assert has_our_mtime(target.lstat())
        assert not path.exists()
        opened = open_whole(layout, DIGEST)
        assert opened is not None, "clients share its lock"
        os.close(opened[0])
        os.close(fd)
        with removing(layout, DIGEST) as may_remove:
            assert not may_remove
    with removing(layout, DIGEST) as may_remove:
        assert may_remove


def test_content_that_is_there_is_replaced_by_what_was_just_verified(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.blob(DIGEST).parent.mkdir(parents=True)
    layout.blob(DIGEST).write_bytes(b"damaged")
    path, fd = written(layout)
    assert publish(layout, path, fd) is False
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
        publish(layout, path, fd)
    assert layout.blob(DIGEST).read_bytes() == DATA, "without a row it is cache"
    os.close(fd)
    layout.blob(DIGEST).write_bytes(DATA)
    path, fd = written(layout)
    with pytest.raises(OSError, match="Input/output"):
        publish(layout, path, fd)
    assert layout.blob(DIGEST).read_bytes() == DATA
    os.close(fd)


def test_push_whose_directory_sync_fails_leaves_the_file_that_another_push_has_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, sync = Layout(tmp_path), os.fsync

    def fail(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            monkeypatch.setattr(os, "fsync", sync)
            store(layout)
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store(layout)
    assert layout.blob(DIGEST).read_bytes() == DATA


def test_nobody_waits_for_an_upload_whose_locks_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert upload_files.has_waiting(0) is False


def test_small_content_is_stored(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert store(layout) is True
    assert list(layout.uploads.iterdir()) == []
    opened = open_whole(layout, DIGEST)
    assert opened is not None
    os.close(opened[0])
    assert store(layout) is False
