"""Runs the commands that list a data directory, on one that the test fills."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from tests.unit.inventory.kit import DataDirectory

CONFIG = """\
data_dir: {data_dir}
storage: {{max_size: 1000000}}
upstreams:
  docker.io: {{endpoints: ["https://r.example"]}}
  ghcr.io: {{endpoints: ["https://g.example"], tag_ttl: inf}}
"""


class Site:
    """A data directory and its configuration file."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data = DataDirectory(root / "data")
        self.data.layout.root.mkdir()
        (self.data.layout.root / "oci-layout").write_text("{}")
        self.now = time.time()
        self.config = root / "mirror.yaml"
        self.config.write_text(CONFIG.format(data_dir=self.data.layout.root))
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command. Returns its exit code, output and errors."""
        self.data.save()
        return self.run_without_saving(*arguments)

    def run_without_saving(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command on the directory as it is."""
        code = main([*arguments, "--config", str(self.config)])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def lines(self, *arguments: str) -> list[str]:
        """The lines that a command prints, which must succeed."""
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out.splitlines()

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """The rows of ``--json``, which must suit the schema of the command."""
        rows = [json.loads(line) for line in self.lines(*arguments, "--json")]
        validator = Draft202012Validator(SCHEMAS[arguments[0]])
        for row in rows:
            validator.validate(row)
        return rows
