"""Commands that work on a data directory, run with a configuration of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

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
    """Return a function that runs a command with one upstream. It blocks.

    ``more`` has further keys of the configuration.
    """

    def run(
        url: str, command: str, *arguments: str, more: Mapping[str, Any] | None = None
    ) -> Result:
        config = tmp_path / "mirror.yaml"
        keys = {"data_dir": f"{tmp_path}/data", "upstreams": {"docker.io": {"endpoints": [url]}}}
        config.write_text(json.dumps({**keys, **(more or {})}))
        code = main([command, *arguments, "--config", str(config)])
        output = capsys.readouterr()
        return Result(code=code, out=output.out, err=output.err)

    return run
