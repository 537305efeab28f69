"""A part of the kill points is spread evenly, has the first and the last, and is the same again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.extent import FIRST, PART, Extent


def kills(calls: int, *, is_whole: bool, test: str = "test_x.py::test[a]") -> tuple[list[int], int]:
    """Kill at the points of a command with so many calls. Returns (what fired, what missed)."""
    points: list[int] = []
    extent = Extent(test, is_whole, lambda times: None)

    def kill(when: int) -> bool:
        points.append(when)
        return when <= calls

    found = extent.kill_at_points(kill)
    fired = [when for when in points if when <= calls]
    assert found == len(fired) == len(set(fired))
    return sorted(fired), len(points) - len(fired)


@pytest.mark.parametrize("calls", [0, 1, 7])
def test_whole_extent_kills_at_every_point(calls: int) -> None:
    assert kills(calls, is_whole=True) == (list(range(1, calls + 1)), 1)


@pytest.mark.parametrize("calls", range(FIRST + 1))
def test_few_points_are_all_tried(calls: int) -> None:
    assert kills(calls, is_whole=False)[0] == list(range(1, calls + 1))


@pytest.mark.parametrize("test", ["a", "b", "c", "d"])
def test_part_has_the_first_and_the_last_points_and_no_wide_gap(test: str) -> None:
    for calls in range(1, 60):
        fired, misses = kills(calls, is_whole=False, test=test)
        assert (fired[0], fired[-1]) == (1, calls)
        assert max((b - a for a, b in pairwise(fired)), default=1) <= PART
        assert len(fired) <= FIRST + calls / PART + PART
        assert misses <= 2


def test_tests_begin_at_different_points_and_at_the_same_in_each_run() -> None:
    tests = [f"test[{n}]" for n in range(20)]
    found = [tuple(kills(40, is_whole=False, test=test)[0]) for test in tests]
    assert len(set(found)) == PART
    assert found == [tuple(kills(40, is_whole=False, test=test)[0]) for test in tests]


def test_examples_are_a_part_rounded_up() -> None:
    assert Extent("", True, print).of(12) == 12
    assert Extent("", False, print).of(12) == 3
