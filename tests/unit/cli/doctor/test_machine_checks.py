"""The checks of this machine: each finds what it is for, and says what to do."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mirror.cli.doctor import machine_checks
from mirror.cli.doctor.findings import Finding, Status
from mirror.config.settings import Settings
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Marks, Pin
from tests.unit.store.kit import image, opened, pulled

MOUNTS = (
    "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    "36 21 0:41 / /srv/my\\040data rw - nfs4 nas:/x rw,vers=4.2\n"
    "37 21 0:42 / /srv/data rw master:1 - xfs /dev/sdb rw\n"
)


def settings(root: Path, **more: Any) -> Settings:
    return Settings.model_validate(
        {"data_dir": str(root), "upstreams": {"a.example": {"endpoints": ["http://x"]}}, **more}
    )


def by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_good_directory_has_only_ok_findings(tmp_path: Path) -> None:
    found = by_check(machine_checks.check_data_directory(settings(tmp_path)))
    assert found.keys() == {"data directory", "file system", "disk space", "inodes"}
    assert found["data directory"].status is Status.OK
    assert found["file system"].message
    assert list(tmp_path.iterdir()) == []


def test_missing_directory_and_a_file_in_its_place_are_reported(tmp_path: Path) -> None:
    (missing,) = machine_checks.check_data_directory(settings(tmp_path / "none"))
    assert missing.status is Status.WARNING
    (tmp_path / "file").write_text("")
    (wrong,) = machine_checks.check_data_directory(settings(tmp_path / "file"))
    assert wrong.status is Status.PROBLEM


def test_directory_that_refuses_files_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = by_check(machine_checks.check_data_directory(settings(tmp_path)))
    assert found["data directory"].status is Status.PROBLEM
    assert "Permission denied" in found["data directory"].message
    assert "chown" in found["data directory"].remedy


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the owner of a file")
def test_files_of_two_users_are_a_warning(tmp_path: Path) -> None:
    for name, user in (("blobs", 10001), ("ingest", 10001), ("index", 0), ("lost+found", 0)):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, user, user)
    found = by_check(machine_checks.check_data_directory(settings(tmp_path)))
    assert found["owner"].status is Status.WARNING
    assert found["owner"].message.startswith("index belong to user 0")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/srv/my data/x", "nfs4"), ("/srv/data", "xfs"), ("/srv/database", "ext4"), ("/", "ext4")],
)
def test_file_system_is_that_of_the_longest_mount(path: str, kind: str) -> None:
    assert machine_checks.file_system_of(Path(path), MOUNTS) == kind
    assert machine_checks.file_system_of(Path(path), "") == ""


@pytest.mark.parametrize("kind", ["nfs4", "tmpfs", "overlay"])
def test_file_system_that_suits_no_cache_is_a_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"21 1 8:1 / / rw - {kind} none rw\n"
    monkeypatch.setattr(machine_checks, "_read_mounts", lambda: line)
    found = by_check(machine_checks.check_data_directory(settings(tmp_path)))
    assert (found["file system"].status, bool(found["file system"].remedy)) == (
        Status.WARNING,
        True,
    )


@pytest.mark.parametrize(
    ("free", "quota", "status"),
    [
        (500, 400, Status.OK),
        (500, 2000, Status.WARNING),
        (40, 400, Status.WARNING),
        (5, 400, Status.PROBLEM),
    ],
)
def test_space_and_inodes_are_compared_with_their_limits(
    free: int, quota: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1000 MiB, and of 1000 inodes."""
    mib = 2**20
    stat = os.statvfs_result((mib, mib, 1000, free, free, 1000, free, free, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    storage = {"max_size": quota * mib}
    found = by_check(machine_checks.check_data_directory(settings(tmp_path, storage=storage)))
    assert found["disk space"].status is status
    if quota < 1000:
        assert found["inodes"].status is status


def test_index_that_opens_is_ok_and_a_damaged_one_is_a_problem(tmp_path: Path) -> None:
    (none,) = machine_checks.check_index(tmp_path)
    assert none.status is Status.OK
    database = tmp_path / "index/tags/cache.db"
    database.parent.mkdir(parents=True)
    with sqlite3.connect(database) as connection:
        connection.execute("create table rows (a, b)")
        connection.executemany("insert into rows values (?, ?)", [(n, "x" * 90) for n in range(99)])
    connection.close()
    (good,) = machine_checks.check_index(tmp_path)
    assert (good.status, good.message) == (Status.OK, "1 databases open, and are not damaged")
    late = iter([0.0, *[100.0] * 1000])
    (slow,) = machine_checks.check_index(tmp_path, lambda: next(late))
    assert slow.status is Status.OK
    data = bytearray(database.read_bytes())
    data[4096:4200] = b"\xff" * 104
    database.write_bytes(data)
    (damaged,) = machine_checks.check_index(tmp_path)
    assert damaged.status is Status.PROBLEM
    assert "index.json" in damaged.remedy
    assert "***" not in damaged.message
    assert "\n" not in damaged.message
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index.damaged").mkdir()
    assert [one.status for one in machine_checks.check_index(tmp_path)] == [
        Status.WARNING,
        Status.OK,
    ]


def test_marks_that_cannot_be_read_are_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    assert machine_checks.check_marks(path, Marks).message == "there are none"
    for error in (StorageUnavailable("it is damaged"), PermissionError(13, "Permission denied")):

        def fail(error: Exception = error) -> None:
            raise error

        found = machine_checks.check_marks(path, fail)
        assert found.status is Status.PROBLEM
        assert "nothing is evicted" in found.message
        assert str(path) in found.remedy


async def test_marks_that_keep_a_whole_repository_are_named(tmp_path: Path) -> None:
    body = image(b"layer")
    digest = Digest.of(body)
    async with opened(tmp_path) as store:
        await pulled(store, body, Tag("latest"), b"layer", b"{}")
    name = "docker.io/library/app:latest"
    marks = Marks(pins={name: Pin(name, digest, 1.0)})
    path = store.layout.marks
    assert machine_checks.check_marks(path, lambda: marks).status is Status.OK
    store.layout.blob(digest).unlink()
    found = machine_checks.check_marks(path, lambda: marks)
    assert found.status is Status.PROBLEM
    assert f"the manifest of {name} is damaged or missing" in found.message
    assert f"oci-mirror verify --repair {name}" in found.remedy


def test_damaged_content_in_quarantine_is_a_warning(tmp_path: Path) -> None:
    layout, digest = Layout(tmp_path), Digest.of(b"content")
    assert list(machine_checks.check_quarantine(layout)) == []
    path = layout.quarantine(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    (found,) = machine_checks.check_quarantine(layout)
    assert found.status is Status.WARNING
    assert found.message.startswith("1 content (7B) had wrong bytes on the disk")
    assert digest.hex[:12] in found.message


def test_port_is_free_or_of_another_program(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen = f"127.0.0.1:{listener.getsockname()[1]}"
        listener.close()
        free = machine_checks.check_port(settings(tmp_path, listen=listen))
        assert (free.status, "no server listens" in free.message) == (Status.WARNING, True)
    foreign = machine_checks.check_port(settings(tmp_path, listen="203.0.113.1:1"))
    assert foreign.status is Status.PROBLEM


@pytest.mark.parametrize(
    ("offsets", "status"),
    [
        ([], Status.WARNING),
        ([1.0, -2.0, 9000.0], Status.OK),
        ([40.0, 45.0], Status.WARNING),
        ([-4000.0], Status.PROBLEM),
    ],
)
def test_clock_is_compared_with_the_median_of_the_endpoints(
    offsets: list[float], status: Status
) -> None:
    assert machine_checks.check_clock(offsets).status is status
