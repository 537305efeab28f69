"""Threads beside the event loop work and rest in short turns."""

from __future__ import annotations

import pytest

from mirror.store import pace
from mirror.store.pace import Pace


def test_work_is_paused_each_quarter_of_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [0.0], list[float]()
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.time, "sleep", pauses.append)
    one = Pace()
    for _ in range(11):
        now[0] += 0.0001
        one.keep()
    assert pauses == [0.0002] * 3
