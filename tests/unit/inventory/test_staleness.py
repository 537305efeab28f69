"""Why a tag is stale. Also see ``test_images.py``, with whole images."""

from __future__ import annotations

import pytest

from mirror.inventory.staleness import MOVED, NOT_CONFIGURED, TOO_OLD, why_stale
from tests.unit.inventory.kit import NOW, UPSTREAM


def test_fresh_tag_has_no_reason() -> None:
    assert why_stale(NOW - 1, UPSTREAM, NOW, is_current=True) is None


@pytest.mark.parametrize(
    ("checked", "is_known", "is_current", "why"),
    [
        (NOW - 1000, True, True, TOO_OLD),
        (NOW + 1000, True, True, TOO_OLD),
        (NOW - 1, False, True, NOT_CONFIGURED),
        (NOW - 1, True, False, MOVED),
        (NOW - 1000, False, False, MOVED),
    ],
)
def test_reason_is_the_most_important_one(
    checked: float, is_known: bool, is_current: bool, why: str
) -> None:
    upstream = UPSTREAM if is_known else None

    assert why_stale(checked, upstream, NOW, is_current=is_current) == why
