"""Damaged content is put aside, a little of it, and never fails anything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store import quarantine
from mirror.store.layout import Layout


def damaged(layout: Layout, name: str) -> tuple[Digest, int]:
    digest = Digest.of(name.encode())
    layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.blob(digest).write_bytes(f"not {name}".encode())
    return digest, os.open(layout.blob(digest), os.O_RDONLY)


def test_damaged_content_is_put_aside_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digests = []
    for number in range(quarantine.KEPT + 3):
        digest, fd = damaged(layout, f"content {number:02}")
        quarantine.put_aside(layout, digest, fd)
        os.close(fd)
        digests.append(digest)
        assert not layout.blob(digest).exists()
        assert layout.quarantine(digest).exists()
    kept = [digest for digest in digests if layout.quarantine(digest).exists()]
    assert len(kept) == quarantine.KEPT
    assert quarantine.size(layout) == quarantine.KEPT * len("not content 00")
    assert quarantine.drop(layout, 0) == quarantine.KEPT * len("not content 00")
    assert quarantine.size(layout) == quarantine.drop(layout, 0) == 0


def test_what_was_replaced_in_the_meantime_stays(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest, fd = damaged(layout, "content")
    layout.blob(digest).unlink()
    layout.blob(digest).write_bytes(b"content")
    quarantine.put_aside(layout, digest, fd)
    os.close(fd)
    assert layout.blob(digest).read_bytes() == b"content"
    assert not layout.quarantine(digest).exists()


@pytest.mark.parametrize("calls", [["rename"], ["mkdir"], ["rename", "unlink"]])
def test_a_disk_that_refuses_is_no_error(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    digest, fd = damaged(layout, "content")

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(Path, call, refuse)
        quarantine.put_aside(layout, digest, fd)
    os.close(fd)
    assert layout.blob(digest).exists() == ("unlink" in calls)
    assert not layout.quarantine(digest).exists()
