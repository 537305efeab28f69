"""Commands that work on a data directory, run with a configuration of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import pytest

from mirror.cli.main import main


class Result(SimpleNamespace):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Result]


def make_data_directory(path: Path) -> None:
    """Create what the first start of a server leaves in a data directory."""
    path.mkdir(exist_ok=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def make_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command with one upstream. It blocks."""

    def run(url: str, command: str, *arguments: str) -> Result:
        config = tmp_path / "mirror.yaml"
        config.write_text(
            f"data_dir: {tmp_path}/data\nupstreams: {{docker.io: {{endpoints: [{url}]}}}}\n"
        )
        code = main([command, *arguments, "--config", str(config)])
        output = capsys.readouterr()
        return Result(code=code, out=output.out, err=output.err)

    return run
