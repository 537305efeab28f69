"""Handing the bytes of a file to the disk early: whole steps only, and never a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirror.store import writeback
from mirror.store.writeback import STEP_BYTES, start_writeback

Call = tuple[int, int, int, int]


@pytest.mark.parametrize(
    ("start", "end", "ranges"),
    [
        (0, 10, []),
        (0, STEP_BYTES, [(0, STEP_BYTES)]),
        (STEP_BYTES - 1, STEP_BYTES + 1, [(0, STEP_BYTES)]),
        (STEP_BYTES, 2 * STEP_BYTES - 1, []),
        (5, 3 * STEP_BYTES + 5, [(0, 3 * STEP_BYTES)]),
    ],
)
def test_whole_steps_are_handed_over_once_they_end(
    monkeypatch: pytest.MonkeyPatch, start: int, end: int, ranges: list[tuple[int, int]]
) -> None:
    calls: list[Call] = []
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: lambda *call: calls.append(call))
    start_writeback(7, start, end)
    assert [(first, size) for _, first, size, _ in calls] == ranges


def test_system_that_cannot_or_refuses_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "file").open("wb") as file:
        start_writeback(file.fileno(), 0, STEP_BYTES)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    start_writeback(descriptor, 0, STEP_BYTES)
    os.close(descriptor)
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: None)
    start_writeback(-1, 0, STEP_BYTES)
