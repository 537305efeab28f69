"""``backup`` and ``restore``: what they print, their exit codes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.cleaning_kit import URL, content, rows
from tests.unit.cli.kit import Run, make_run
from tests.unit.hosted.kit import hosted_kit

HOSTED: dict[str, Any] = {"hosted": {"name": "registry.example", "listen": "127.0.0.1:0"}}

PUSHED = dict(HOSTED)
"""The same, with an image that was pushed."""


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(tmp_path, capsys)


def push(data: Path) -> None:
    async def push_image() -> None:
        async with hosted_kit(data) as kit:
            await kit.push_image(b"layer", repository="team/app")

    asyncio.run(push_image())


@pytest.mark.parametrize("name", ["backup", "registry.tar"])
def test_backup_and_restore_say_what_they_did(run: Run, tmp_path: Path, name: str) -> None:
    push(tmp_path / "data")
    target = str(tmp_path / name)
    done = run(URL, "backup", target, more=HOSTED)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("1 images, 3 contents, ")
    (row,) = rows("backup", run(URL, "backup", target, "--json", more=HOSTED))
    assert (row["images"], row["contents"], row["missing"]) == (1, 3, [])
    (tmp_path / "data").rename(tmp_path / "old")
    done = run(URL, "restore", target, more=HOSTED)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("1 images restored; 3 contents, ")
    (row,) = rows("restore", run(URL, "restore", target, "--json", more=HOSTED))
    assert row == {"images": 1, "contents": 0, "bytes": 0, "problems": []}


def test_what_is_lost_or_damaged_is_named_and_fails(run: Run, tmp_path: Path) -> None:
    data, target = tmp_path / "data", str(tmp_path / "backup")
    push(data)
    content(data, b"layer").unlink()
    done = run(URL, "backup", target, more=HOSTED)
    assert done.code == 1
    assert "is lost or damaged on the disk" in done.err
    data.rename(tmp_path / "old")
    done = run(URL, "restore", target, more=HOSTED)
    assert done.code == 1
    assert done.out.startswith("1 images restored; 2 contents, ")
    assert "team/app: the backup does not have sha256:" in done.err


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["backup", "TARGET"], {}, "the configuration has no section hosted"),
        (["restore", "TARGET"], {}, "the configuration has no section hosted"),
        (["backup", "TARGET"], HOSTED, "nothing was pushed yet"),
        (["restore", "TARGET"], HOSTED, "TARGET: there is no backup"),
        (["restore", "FILE/x"], HOSTED, "FILE/x: there is no backup"),
        (
            ["backup", "FILE"],
            PUSHED,
            "FILE: is a file: name a directory, or a file that ends with .tar",
        ),
        (["restore", "FILE"], HOSTED, "neither a directory nor a plain tar file"),
        (["restore", "DIRECTORY"], HOSTED, "index.json is missing"),
    ],
)
def test_failure_is_one_line_with_the_reason(
    run: Run, tmp_path: Path, arguments: list[str], more: dict[str, Any], message: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "oci-layout").write_text("{}")
    (tmp_path / "FILE").write_text("x" * 1000)
    (tmp_path / "DIRECTORY").mkdir()
    if more is PUSHED:
        push(tmp_path / "data")
    done = run(URL, arguments[0], str(tmp_path / arguments[1]), more=more)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_tag_that_was_moved_is_kept_without_force(run: Run, tmp_path: Path) -> None:
    data, target = tmp_path / "data", str(tmp_path / "backup")
    push(data)
    assert run(URL, "backup", target, more=HOSTED).code == 0

    async def move() -> None:
        async with hosted_kit(data) as kit:
            await kit.push_image(b"other", repository="team/app")

    asyncio.run(move())
    done = run(URL, "restore", target, more=HOSTED)
    assert done.code == 1
    assert "1 tags name another manifest here, such as team/app:v1" in done.err
    assert run(URL, "restore", target, "--force", more=HOSTED).code == 0
    assert json.loads((tmp_path / "backup" / "oci-layout").read_text())


def test_damaged_names_are_brought_back_as_the_error_says(run: Run, tmp_path: Path) -> None:
    data, target = tmp_path / "data", str(tmp_path / "backup")
    push(data)
    assert run(URL, "backup", target, more=HOSTED).code == 0
    names = data / "hosted" / "names.db"
    names.write_bytes(b"no database" * 1000)
    done = run(URL, "restore", target, more=HOSTED)
    assert done.code == 1
    assert (
        "move names.db, names.db-wal and names.db-shm away, and run oci-mirror restore" in done.err
    )
    for file in names.parent.glob("names.db*"):
        file.rename(tmp_path / file.name)
    done = run(URL, "restore", target, more=HOSTED)
    assert (done.code, done.err) == (0, "")
    assert done.out == "1 images restored; 0 contents, 0B were not here\n"


def test_backup_into_a_directory_that_others_may_read_says_so_in_one_line(
    run: Run, tmp_path: Path
) -> None:
    push(tmp_path / "data")
    target = tmp_path / "backup"
    target.mkdir(mode=0o755)
    target.chmod(0o755)
    done = run(URL, "backup", str(target), more=HOSTED)
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.endswith(f"{target} can be read by other users of this machine: chmod 700 {target}")
    target.chmod(0o700)
    assert run(URL, "backup", str(target), more=HOSTED).err == ""
