"""Files beside whole content."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mirror.inventory.leftovers import OtherFile, find_other_files
from mirror.oci.reference import Digest
from tests.unit.inventory.kit import NOW, DataDirectory

DIGEST = Digest.of(b"a")


def write(path: Path, size: int = 4096) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    os.utime(path, (NOW, NOW))
    return path


def found(data: DataDirectory) -> list[tuple[Digest, str, float]]:
    return [(one.digest, one.kind, one.used) for one in find_other_files(data.layout)]


def test_ingest_file_is_unfinished_unless_a_process_holds_its_lock(data: DataDirectory) -> None:
    path = write(data.layout.ingest(DIGEST))
    write(data.layout.ingest_state(DIGEST))
    assert found(data) == [(DIGEST, "unfinished", NOW)]

    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found(data) == [(DIGEST, "fetching", NOW)]


def test_quarantined_file_is_damaged(data: DataDirectory) -> None:
    write(data.layout.quarantine(DIGEST))

    (leftover,) = find_other_files(data.layout)

    assert (leftover.kind, leftover.is_active, leftover.is_damaged) == ("damaged", False, True)
    assert leftover.size >= 4096


def test_sparse_file_counts_with_what_it_takes_up(data: DataDirectory) -> None:
    path = write(data.layout.ingest(DIGEST), 0)
    os.truncate(path, 2**30)

    (leftover,) = find_other_files(data.layout)

    assert leftover.size < 2**20


def test_foreign_entries_and_missing_directories_are_passed_over(data: DataDirectory) -> None:
    assert find_other_files(data.layout) == []
    write(data.layout.ingest(DIGEST).with_name("README"))
    data.layout.ingest(DIGEST).mkdir()

    assert find_other_files(data.layout) == []


def test_each_kind_is_explained() -> None:
    whys = {OtherFile(DIGEST, kind, 1, NOW).why for kind in ("fetching", "unfinished", "damaged")}

    assert len(whys) == 3
