"""Versions in tags and ranges of versions (SemVer 2.0.0, and npm's ranges)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.versions import Version, VersionRange, newest_first, parse_version


def version(text: str) -> Version:
    parsed = parse_version(text)
    assert parsed is not None, text
    return parsed


def is_in(text: str, tag: str) -> bool:
    return VersionRange.parse(text).matches(version(tag))


def test_versions_have_the_precedence_of_semver_item_11() -> None:
    ordered = [
        *("0.9.9", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta"),
        *("1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0"),
        *("2.0.0", "10.0.0"),
    ]
    assert all(version(low) < version(high) for low, high in pairwise(ordered))


@pytest.mark.parametrize(
    ("tag", "text", "stated"),
    [
        ("1", "1.0.0", 1),
        ("v1.2", "1.2.0", 2),
        ("V1.2.3", "1.2.3", 3),
        ("1.2.3-rc.1", "1.2.3-rc.1", 3),
        ("3.20-alpine", "3.20.0-alpine", 2),
        ("1.2.3+build.7", "1.2.3", 3),
        ("20261231235959", "20261231235959.0.0", 1),
    ],
)
def test_tag_is_a_version_with_v_partial_and_with_suffix(tag: str, text: str, stated: int) -> None:
    assert str(version(tag)) == text
    assert version(tag).stated == stated


@pytest.mark.parametrize(
    "tag",
    [
        *("", "latest", "v", "1.", "1.2.3.4", "01.2.3", "1.2.03", "1.2.3-", "1.2.3-01", "a1.2"),
        *("1.2.3-rc..1", "1.2.3 ", "\u0663.1", "1.2_3", "sha256-" + "a" * 64, "9" * 19),
    ],
)
def test_other_tags_are_no_versions(tag: str) -> None:
    assert parse_version(tag) is None


def test_partial_version_equals_the_one_with_zeros() -> None:
    assert version("1.2") == version("1.2.0") == version("v1.2.0+b")
    assert hash(version("1.2")) == hash(version("1.2.0"))
    assert version("1.2") != "1.2"


# From the documentation of npm's ranges, and from node-semver's tests.
@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">=1.2 <2", ("1.2.0", "1.9.9", "1.2"), ("1.1.9", "2.0.0", "2", "2.0.0-rc.1")),
        (">=1.2, <2", ("1.2.0",), ("2.0.0",)),
        (">= 1.2 < 2", ("1.2.0",), ("2.0.0",)),
        ("1.2.7 || >=1.2.9 <2.0.0", ("1.2.7", "1.2.9", "1.4.6"), ("1.2.8", "2.0.0")),
        ("1.2.3 - 2.3.4", ("1.2.3", "2.3.4"), ("1.2.2", "2.3.5")),
        ("1.2 - 2.3", ("1.2.0", "2.3.9"), ("1.1.9", "2.4.0", "2.4.0-rc.1")),
        ("1.2.3 - 2", ("2.9.9",), ("3.0.0",)),
        ("*", ("0.0.0", "9.9.9"), ("1.0.0-rc.1",)),
        ("", ("0.0.0",), ("1.0.0-rc.1",)),
        ("1.x", ("1.0.0", "1.9.9"), ("0.9.9", "2.0.0")),
        ("1.2.*", ("1.2.0", "1.2.9"), ("1.3.0",)),
        ("1.2", ("1.2.0", "1.2.9"), ("1.3.0", "1.1.9")),
        ("=1.2.3", ("1.2.3",), ("1.2.4", "1.2.2")),
        ("v1.2.3", ("1.2.3",), ("1.2.4",)),
        ("~1.2.3", ("1.2.3", "1.2.9"), ("1.2.2", "1.3.0")),
        ("~1.2", ("1.2.0",), ("1.3.0",)),
        ("~1", ("1.0.0", "1.9.0"), ("2.0.0",)),
        ("~> 1.2", ("1.2.5",), ("1.3.0",)),
        ("~1.2.3-beta.2", ("1.2.3-beta.4", "1.2.3"), ("1.2.4-beta.2", "1.2.3-beta.1")),
        ("^1.2.3", ("1.2.3", "1.9.0"), ("2.0.0", "1.2.2", "2.0.0-rc.1")),
        ("^0.2.3", ("0.2.3", "0.2.9"), ("0.3.0",)),
        ("^0.0.3", ("0.0.3",), ("0.0.4", "0.0.2")),
        ("^0.0", ("0.0.0", "0.0.9"), ("0.1.0",)),
        ("^0.0.x", ("0.0.9",), ("0.1.0",)),
        ("^0", ("0.9.9",), ("1.0.0",)),
        ("^1.2.3-beta.2", ("1.2.3-beta.4", "1.9.0"), ("1.2.4-beta.2",)),
        (">1.2", ("1.3.0",), ("1.2.9", "1.2.0")),
        (">1", ("2.0.0",), ("1.9.9",)),
        (">1.2.3", ("1.2.4",), ("1.2.3",)),
        ("<=1.2", ("1.2.9",), ("1.3.0", "1.3.0-rc.1")),
        ("<=1.2.3", ("1.2.3",), ("1.2.4",)),
        ("<1.2.3", ("1.2.2",), ("1.2.3", "1.2.3-rc.1")),
        ("<1.2.3-rc.2", ("1.2.2", "1.2.3-rc.1"), ("1.2.3-rc.2", "1.2.2-rc.1")),
        (">1.2.3-alpha.3", ("1.2.3-alpha.7", "3.4.5"), ("3.4.5-alpha.9", "1.2.3-alpha.3")),
        (">=1.2.3-rc.1 <2", ("1.2.3-rc.2",), ("1.3.0-rc.1", "1.2.4-alpine")),
        ("1.2.3-alpine", ("1.2.3-alpine",), ("1.2.3", "1.2.3-slim")),
        ("<*", (), ("0.0.0",)),
    ],
)
def test_range_has_the_versions_that_npm_says(
    text: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    assert [tag for tag in inside if not is_in(text, tag)] == []
    assert [tag for tag in outside if is_in(text, tag)] == []


@pytest.mark.parametrize(
    "text",
    ["latest", ">=", ">=1.2 <two", "1.2.3.4", "1 -", "a - 2", "!1", "*-alpine", ">=1.2-rc.1"],
)
def test_text_that_is_no_range_is_refused_with_the_bad_part(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        VersionRange.parse(text)


def test_range_of_more_than_256_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="256 characters"):
        VersionRange.parse("1 || " * 60)


def test_newest_tags_come_first_and_exact_ones_before_partial_ones() -> None:
    tags = ["1", "1.2", "latest", "1.2.0", "1.10.0", "1.9.0-rc.1", "2.0.0", "1.2.0-alpine"]
    assert newest_first(tags)[:2] == ["2.0.0", "1.10.0"]
    within = VersionRange.parse(">=1 <2")
    assert newest_first(tags, within) == ["1.10.0", "1.2.0", "1.2", "1"]


@given(st.text(alphabet="0123456789.-+vx~^<>=|* ,rc", max_size=40))
def test_any_text_is_a_range_or_a_value_error(text: str) -> None:
    try:
        parsed = VersionRange.parse(text)
    except ValueError:
        return
    parsed.matches(Version(1, 2, 3))


@given(st.text(alphabet="0123456789.-+vrc", max_size=130))
def test_version_that_is_parsed_is_in_the_range_of_itself(text: str) -> None:
    parsed = parse_version(text)
    if parsed is not None:
        assert VersionRange.parse(str(parsed)).matches(parsed)
