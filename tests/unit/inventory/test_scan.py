"""The listing of the directories."""

from __future__ import annotations

import os

import pytest

from mirror.inventory.scan import list_contents, stat_contents
from mirror.oci.reference import Digest
from tests.unit.inventory.kit import NOW, DataDirectory, content, text


def test_content_is_listed_with_size_and_last_use(data: DataDirectory) -> None:
    digest = data.add(content("a", 7), used=NOW - 5)
    sha512 = Digest.of(b"b", "sha512")
    path = data.layout.blob(sha512)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"b")
    os.utime(path, (NOW + 100, NOW + 100))

    found = list_contents(data.layout)

    assert found == {str(digest), str(sha512)}
    assert stat_contents(data.layout, found, NOW) == {
        str(digest): (7, NOW - 5),
        str(sha512): (1, NOW),
    }


def test_foreign_entries_are_passed_over(data: DataDirectory) -> None:
    digest = data.add(content("a"))
    directory = data.layout.blob(digest).parent
    (directory / "README").write_text("x")
    (directory / ("G" * 64)).write_text("x")
    (directory / ("0" * 64)).mkdir()
    (directory / ("1" * 64)).symlink_to(digest.hex)
    os.mkfifo(directory / ("2" * 64))

    assert list_contents(data.layout) == {str(digest)}


def test_directory_that_is_missing_has_no_content(data: DataDirectory) -> None:
    assert list_contents(data.layout) == frozenset()


def test_directory_that_cannot_be_listed_is_an_error(data: DataDirectory) -> None:
    (data.layout.root / "blobs").mkdir(parents=True)
    (data.layout.root / "blobs" / "sha256").write_text("no directory")

    with pytest.raises(NotADirectoryError):
        list_contents(data.layout)


def test_status_of_content_that_is_gone_is_left_out(data: DataDirectory) -> None:
    data.add(body := content("a", 7), used=NOW - 5)

    found = stat_contents(data.layout, [text(body), text(b"gone")], NOW)

    assert found == {text(body): (7, NOW - 5)}
