"""Row C2: commands that mark images are killed, and run again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mirror.oci.reference import Digest, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Marks, change_marks, read_marks, replace_leases
from tests.extent import Extent
from tests.robustness.kit import strace
from tests.unit.store.kit import image, opened, pin, pulled

ROOT = Path(__file__).parents[2]
OLD, NEW, LEASED = image(b"old"), image(b"new"), Digest.of(b"leased")
NAME = "docker.io/library/app"
COMMANDS: dict[str, tuple[list[str], Callable[[Marks], object]]] = {
    "pin": (["pin", "app"], lambda marks: marks.pins[f"{NAME}:latest"]),
    "block": (["block", "app", "--reason", "bad"], lambda marks: marks.blocks[NAME]),
    "freeze": (["freeze", "app"], lambda marks: marks.freezes[f"{NAME}:latest"]),
    "rollback": (
        ["rollback", "app", "--to", str(Digest.of(OLD))],
        lambda marks: marks.freezes[f"{NAME}:latest"],
    ),
    "in-use": (["in-use", "--file", "list"], lambda marks: marks.leases[Digest.of(NEW)]),
}
"""Command -> its arguments, and what it has to leave in the marks."""
CALLS = {"fsync": 1, "rename": 1, "unlink": 1, "flock": 1, "write": 1, "openat": 25}
"""Calls at which a command is killed, and the step between kills. Python opens many files."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a tag that has moved, and a pin and a lease that must not get lost."""

    async def fill() -> None:
        async with opened(tmp_path / "data") as store:
            await pulled(store, OLD, Tag("latest"), b"old", b"{}")
            await pulled(store, NEW, Tag("latest"), b"new")

    asyncio.run(fill())
    layout = Layout(tmp_path / "data")
    pin(layout, Digest.of(OLD))
    change_marks(layout, lambda marks: replace_leases(marks, "other", {LEASED}, 9e9, 0.0))
    (tmp_path / "mirror.yaml").write_text(
        "data_dir: data\nupstreams: {docker.io: {endpoints: ['http://127.0.0.1:9']}}\n"
    )
    (tmp_path / "list").write_text("app\n")
    return tmp_path


def run(directory: Path, command: str, *before: str) -> int:
    """Run a command in a directory. Returns its exit code."""
    arguments = [sys.executable, "-m", "mirror", *COMMANDS[command][0], "--config", "mirror.yaml"]
    done = subprocess.run(
        [*before, *arguments],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def kill_and_run_again(root: Path, command: str, call: str, when: int) -> bool:
    """Kill a command and run it again. Returns whether the kill fired."""
    directory = root / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(root, directory, ignore=shutil.ignore_patterns("copy"))
    layout = Layout(directory / "data")
    has_fired = run(directory, command, *strace(call, f"{call}:signal=KILL:when={when}")) != 0
    for _ in range(2):
        marks = read_marks(layout)
        assert f"{NAME}@{Digest.of(OLD)}" in marks.pins, "a mark was lost"
        assert marks.leases[LEASED].source == "other"
        if not has_fired:
            break
        assert run(directory, command) == 0
    assert COMMANDS[command][1](read_marks(layout))
    assert not list(layout.root.glob("marks.json.*")), "a draft was left"
    return has_fired


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.parametrize(
    ("command", "call", "when"),
    [
        ("pin", "fsync", 1),
        ("pin", "rename", 1),
        ("block", "rename", 1),
        ("in-use", "rename", 1),
    ],
)
def test_killed_command_loses_no_mark_and_ends_when_it_runs_again(
    directory: Path, command: str, call: str, when: int
) -> None:
    assert kill_and_run_again(directory, command, call, when), "the point exists"


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("command", COMMANDS)
def test_command_that_is_killed_at_every_changing_call_loses_no_mark(
    directory: Path, command: str, call: str, extent: Extent
) -> None:
    kill = partial(kill_and_run_again, directory, command, call)
    kills = extent.kill_at_points(kill, step=CALLS[call])
    assert kills or call == "unlink", f"{call} is called"
