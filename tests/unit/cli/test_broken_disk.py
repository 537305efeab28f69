"""Every command that needs the disk fails, with one line, if the disk refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.unit.cli.cleaning_kit import NAME, URL, content, fill
from tests.unit.cli.kit import Run, make_run
from tests.unit.cli.test_backup import HOSTED, push

LONG = [errno.EROFS, errno.ENOSPC, errno.EACCES]
ERRORS = [errno.EIO, *(pytest.param(number, marks=pytest.mark.long) for number in LONG)]
"""How a command reads the number differs in its remedy only, so one of them is tried each time."""
REMEDIES = ("run the command", "mount it", "free space", "verify again")
SITE = """
import os

call = os.{function}

def refuse(file, *arguments, **more):
    name = os.readlink(f"/proc/self/fd/{{file}}") if isinstance(file, int) else str(file)
    if name.endswith("{name}"):
        raise OSError({number}, os.strerror({number}), *([] if isinstance(file, int) else [name]))
    return call(file, *arguments, **more)

os.{function} = refuse
"""
"""A sitecustomize.py: breaks the process that hashes content."""


def _name_of(number: int) -> str:
    return errno.errorcode[number]


@dataclass(frozen=True)
class Broken:
    """A command, and what the disk refuses while it runs."""

    words: str
    function: str
    """Of the module ``os``."""
    path: str
    """A part of the paths that it refuses, and of the message."""

    def __str__(self) -> str:
        return f"{self.words.split()[0]}-{self.function}"


BROKEN = [
    Broken("prune --older-than 30d", "unlink", "/data/blobs/"),
    Broken(f"rm {NAME}:1.0", "unlink", "/data/blobs/"),
    Broken("gc", "unlink", "/data/blobs/"),
    Broken("ls", "scandir", "/data/blobs/"),
    Broken("du", "scandir", "/data/blobs/"),
    Broken("verify", "scandir", "/data/blobs/"),
    Broken("backup TARGET", "open", "/target"),
    Broken("backup TARGET", "link", "/target"),
    Broken("backup TARGET.tar", "open", "/target"),
    Broken("backup TARGET", "fsync", "/target"),
    Broken("restore SOURCE", "open", "/data/uploads/"),
    Broken("restore SOURCE", "rename", "/data/blobs/"),
    Broken("restore SOURCE", "pwritev", "/data/"),
    Broken(f"pin {NAME}:1.0", "open", "/data/marks"),
    Broken(f"block {NAME}:1.0 --reason x", "replace", "/data/marks"),
]


def refusing(
    call: Callable[..., Any], part: str, number: int, *, has_path: bool
) -> Callable[..., Any]:
    def refuse(*arguments: Any, **more: Any) -> Any:
        names = [str(os.fspath(one)) for one in arguments if isinstance(one, str | os.PathLike)]
        if not has_path:
            raise OSError(number, os.strerror(number))
        if any(part in name for name in names):
            raise OSError(number, os.strerror(number), names[0])
        return call(*arguments, **more)

    return refuse


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    fill(tmp_path)
    push(tmp_path / "data")
    run = make_run(tmp_path, capsys)
    assert run(URL, "backup", str(tmp_path / "source"), more=HOSTED).code == 0
    return run


@pytest.mark.parametrize("number", ERRORS, ids=_name_of)
@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_command_fails_with_the_path_and_the_remedy(
    run: Run, tmp_path: Path, broken: Broken, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        word.replace("TARGET", str(tmp_path / "target")).replace("SOURCE", str(tmp_path / "source"))
        for word in broken.words.split()
    ]
    if words[0] == "restore":
        (tmp_path / "data").rename(tmp_path / "old")
    call = getattr(os, broken.function)
    has_path = broken.function not in ("fsync", "pwritev")
    with monkeypatch.context() as patches:
        broken_call = refusing(call, broken.path, number, has_path=has_path)
        patches.setattr(os, broken.function, broken_call)
        result = run(URL, *words, more=HOSTED)
    assert result.code == 1, result.out
    lines = [line for line in result.err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, result.err
    assert broken.path in lines[0] or f"{tmp_path}/data" in lines[0]
    assert os.strerror(number) in lines[0]
    assert any(remedy in lines[0] for remedy in REMEDIES), lines[0]


@pytest.mark.parametrize("number", ERRORS, ids=_name_of)
async def test_warm_fails_if_the_disk_refuses_content(
    run: Run, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 2048, tag="new")
        call = refusing(os.open, "/data/ingest/", number, has_path=True)
        monkeypatch.setattr(os, "open", call)
        result = await run_in_thread(run, registry.url, "warm", "app:new")
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert f"{tmp_path}/data: " in line
    assert any(remedy in line for remedy in REMEDIES), line


@pytest.mark.parametrize("number", ERRORS, ids=_name_of)
@pytest.mark.parametrize("function", ["statvfs", "open"])
def test_doctor_calls_the_refusal_of_the_disk_a_problem(
    run: Run, tmp_path: Path, number: int, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        call = refusing(getattr(os, function), f"{tmp_path}/data", number, has_path=True)
        patches.setattr(os, function, call)
        result = run(URL, "doctor", more=HOSTED)
    assert result.code == 1
    lines = result.out.splitlines()
    problem = next(
        n
        for n, line in enumerate(lines)
        if f"{tmp_path}/data" in line and line.startswith("problem") and os.strerror(number) in line
    )
    assert "remedy: " in lines[problem + 1]


@pytest.mark.parametrize("number", ERRORS, ids=_name_of)
@pytest.mark.parametrize("function", ["preadv", "open"])
def test_verify_fails_if_the_disk_refuses_to_read_content_of_no_image(
    run: Run, tmp_path: Path, number: int, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = content(tmp_path / "data", b"orphan").name
    (tmp_path / "site").mkdir()
    script = SITE.format(function=function, name=name, number=number)
    (tmp_path / "site" / "sitecustomize.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path.cwd()}")
    result = run(URL, "verify", more=HOSTED)
    assert result.code == 1, result.out
    (line,) = result.err.splitlines()
    assert f"{name}: {os.strerror(number)}: " in line
    assert any(remedy in line for remedy in REMEDIES), line
