"""Tags that a person selects by a range of versions, or by a pattern."""

from __future__ import annotations

import pytest

from mirror.oci.tag_selection import TagSelection

TAGS = ["1.2.0", "v1.10.0", "2.0.0", "1.3.0-rc.1", "3.20-alpine", "latest", "pr-17"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">=1.2 <2", ["1.2.0", "v1.10.0"]),
        ("2", ["2.0.0"]),
        ("*-alpine", ["3.20-alpine"]),
        ("pr-*", ["pr-17"]),
        ("latest", ["latest"]),
        ("v[0-9]*", ["v1.10.0"]),
        ("*", TAGS),
    ],
)
def test_text_is_a_range_or_else_a_pattern(text: str, expected: list[str]) -> None:
    selection = TagSelection.parse(text)
    assert selection.select(TAGS) == expected
    assert str(selection) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v*", ["v1.0.0", "vnext"]),
        ("1*", ["1", "1.2.3", "1.2-alpine", "1x"]),
        ("1.*", ["1.2.3", "1.2-alpine"]),
        ("1.x", ["1", "1.2.3", "v1.0.0"]),
        ("1", ["1", "1.2.3", "v1.0.0"]),
        ("^1", ["1", "1.2.3", "v1.0.0"]),
        ("~1.2", ["1.2.3"]),
        (">=1.*", ["1", "1.2.3", "2", "v1.0.0", "20240101"]),
        ("1.* || 2.*", ["1", "1.2.3", "2", "v1.0.0"]),
        ("?", ["1", "2"]),
        ("[12]", ["1", "2"]),
        ("*.*.*", ["1.2.3", "v1.0.0"]),
    ],
)
def test_v_star_matches_vnext_and_not_1(text: str, expected: list[str]) -> None:
    tags = ["1", "1.2.3", "1.2-alpine", "1x", "2", "v1.0.0", "vnext", "20240101"]
    assert TagSelection.parse(text).select(tags) == expected


@pytest.mark.parametrize("text", ["", "  ", ">=1.2 <two", "^x.y.z.w", "a b", "1.2 || latest"])
def test_range_with_a_mistake_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=r"empty|neither"):
        TagSelection.parse(text)
