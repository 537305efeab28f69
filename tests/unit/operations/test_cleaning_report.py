"""The report of a removal, and the file with the last one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.operations.cleaning_report import (
    MAX_SAVED_ITEMS,
    CleaningReport,
    Item,
    load_report,
    save_report,
)
from mirror.store.layout import Layout


def item(action: str, kind: str = "image", size: int = 10) -> Item:
    return Item(action=action, kind=kind, name="a", bytes=size, why="so")  # type: ignore[arg-type] # of a parametrized test


def test_only_removed_items_count_as_freed() -> None:
    report = CleaningReport(items=[item("removed"), item("kept"), item("removed", "content", 5)])
    assert report.freed == 15
    assert len(report.removed("image")) == 1


def test_saved_report_is_bounded_and_read_again(tmp_path: Path) -> None:
    report = CleaningReport(items=[item("removed")] * (MAX_SAVED_ITEMS + 1))
    save_report(Layout(tmp_path), "report.json", report.document("now"))
    saved = load_report(Layout(tmp_path), "report.json")
    assert saved is not None
    assert saved["removed_images"] == MAX_SAVED_ITEMS + 1
    assert len(saved["items"]) == MAX_SAVED_ITEMS
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_malformed_report_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert load_report(Layout(tmp_path), "report.json") is None
    assert load_report(Layout(tmp_path), "missing.json") is None
