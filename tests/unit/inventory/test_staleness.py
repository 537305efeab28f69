"""Why a tag is stale. Also see ``test_images.py``, with whole images."""

from __future__ import annotations

import pytest

from mirror.inventory.staleness import MOVED, NOT_CONFIGURED, NOT_CONFIRMED, why_stale
from tests.unit.inventory.kit import NOW, UPSTREAM


@pytest.mark.parametrize("checked", [NOW - 1, NOW - 1e6, NOW + 1000])
def test_tag_that_was_confirmed_has_no_reason_at_any_age(checked: float) -> None:
    assert why_stale(checked, UPSTREAM, is_current=True) is None


@pytest.mark.parametrize(
    ("checked", "is_known", "is_current", "why"),
    [
        (None, True, True, NOT_CONFIRMED),
        (NOW - 1, False, True, NOT_CONFIGURED),
        (NOW - 1, True, False, MOVED),
        (NOW - 1000, False, False, MOVED),
    ],
)
def test_reason_is_the_most_important_one(
    checked: float | None, is_known: bool, is_current: bool, why: str
) -> None:
    upstream = UPSTREAM if is_known else None

    assert why_stale(checked, upstream, is_current=is_current) == why
