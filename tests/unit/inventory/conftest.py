"""The data directory of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.inventory.kit import DataDirectory


@pytest.fixture
def data(tmp_path: Path) -> DataDirectory:
    return DataDirectory(tmp_path / "data")
