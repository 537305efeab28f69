"""A data directory with a configuration, for the commands that list it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.inventory_kit import Site


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    return Site(tmp_path, capsys)
