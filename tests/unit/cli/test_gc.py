"""``gc``: what it prints, its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.cleaning_kit import LAYERS, URL, content, fill, rows
from tests.unit.cli.kit import Run, make_run


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(tmp_path, capsys)


def test_dry_run_prints_each_kind_and_removes_nothing(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "gc", "--dry-run")
    assert result.code == 0
    assert result.out.splitlines() == [
        "WHAT                         COUNT  SIZE  RESULT",
        "content that no image needs      1    6B  would be removed",
        "6B would be freed",
    ]
    assert content(data, b"orphan").exists()


def test_orphan_goes_and_images_stay(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    (row,) = rows("gc", run(URL, "gc", "--json"))
    assert (row["action"], row["kind"], row["bytes"]) == ("removed", "content", 6)
    assert not content(data, b"orphan").exists()
    assert all(content(data, layer).exists() for layer in LAYERS)


def test_longer_grace_keeps_content(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    assert run(URL, "gc", "--grace", "60d").out == "0B freed\n"
    assert content(data, b"orphan").exists()


@pytest.mark.parametrize("grace", ["0", "9m", "soon"])
def test_grace_that_is_too_short_is_wrong_usage(run: Run, tmp_path: Path, grace: str) -> None:
    fill(tmp_path)
    assert run(URL, "gc", "--grace", grace).code == 2
