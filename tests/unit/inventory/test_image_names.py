"""From the rows of the index to names whose manifest is on disk."""

from __future__ import annotations

import pytest

from mirror.inventory.image_names import parse_names
from mirror.oci.reference import Digest, Tag
from mirror.store.records import (
    NamedManifest,
    PreviousDigest,
    TagRecord,
    dump_access_record,
    dump_tag,
    manifest_record,
)
from tests.unit.inventory.kit import APP

ONE, TWO, THREE = (Digest.of(b"%d" % number) for number in range(3))
ALL = {str(ONE), str(TWO), str(THREE)}


def tag_row(
    tag: str, digest: Digest, *earlier: Digest, variant: str = "", confirmed: float = 5.0
) -> tuple[str, str]:
    previous = tuple(PreviousDigest(one, 1.0, 2.0) for one in earlier)
    record = TagRecord(APP, Tag(tag), digest, 1.0, confirmed, previous)
    return f"{APP}:{tag}{variant}", dump_tag(record)


def manifest_row(digest: Digest, media_type: str = "a/b") -> tuple[str, str]:
    return f"{APP}@{digest}", dump_access_record(manifest_record(digest, media_type, 1))


def listed(rows: list[tuple[str, str]], present: set[str] = ALL) -> list[str]:
    return [name.text for name in parse_names(rows).images(present)]


def test_tag_and_its_digest_are_one_name() -> None:
    (name,) = parse_names([tag_row("v1", ONE), manifest_row(ONE)]).images(ALL)

    assert (name.text, name.root, name.current_root) == (f"{APP}:v1", str(ONE), str(ONE))
    assert name.checked == 5.0


def test_earlier_digest_of_a_tag_is_a_name_of_its_own() -> None:
    rows = [tag_row("v1", TWO, ONE), manifest_row(ONE), manifest_row(TWO)]

    assert listed(rows) == [f"{APP}:v1", f"{APP}@{ONE}"]


def test_tag_that_moved_to_content_that_is_not_here_has_its_newest_earlier_digest() -> None:
    rows = [tag_row("v1", THREE, TWO, ONE), *map(manifest_row, (ONE, TWO, THREE))]

    first, second = parse_names(rows).images({str(ONE), str(TWO)})

    assert (first.root, first.current_root) == (str(TWO), str(THREE))
    assert second.text == f"{APP}@{ONE}"


def test_name_whose_manifest_is_not_on_disk_is_no_image() -> None:
    assert listed([tag_row("v1", ONE), manifest_row(ONE)], set()) == []


def test_variant_is_a_name_of_its_own_only_with_another_manifest() -> None:
    same = [tag_row("v1", ONE), tag_row("v1", ONE, variant=" a/b")]
    other = [tag_row("v1", TWO, variant=" a/b"), tag_row("v1", ONE)]

    assert listed(same) == [f"{APP}:v1"]
    assert [(Digest.parse(n.root), n.variant) for n in parse_names(other).images(ALL)] == [
        (ONE, ""),
        (TWO, " a/b"),
    ]


def test_restored_tag_was_never_checked() -> None:
    (name,) = parse_names([tag_row("v1", ONE, confirmed=0.0)]).images(ALL)

    assert name.checked is None


@pytest.mark.parametrize(
    "row",
    [
        ("pins", str(ONE)),
        ("restored", "all"),
        (f"{APP}:bad", "{"),
        (f"{APP}:bad", "{}"),
        (f"{APP}:bad", "[], []"),
        (f"{APP}:bad", tag_row("bad", TWO)[1].replace("5.0", "NaN")),
        (f"{APP}:bad", tag_row("bad", TWO)[1].replace(str(TWO), "sha256:1")),
        (f"{APP}@sha256:1", "{}"),
        (f"no repository@{TWO}", "{}"),
    ],
    ids=range(9),
)
def test_malformed_and_foreign_rows_are_passed_over(row: tuple[str, str]) -> None:
    assert listed([row, tag_row("v1", ONE)]) == [f"{APP}:v1"]


def test_media_type_is_the_recorded_one() -> None:
    names = parse_names([tag_row("v1", ONE), manifest_row(ONE, "a/b"), tag_row("v2", TWO)])
    first, second = names.images(ALL)

    assert names.media_type(first) == "a/b"
    assert names.media_type(second) == ""


def test_saved_names_are_tags_that_were_never_checked_and_digests() -> None:
    names = parse_names([])
    names.add_saved(
        [NamedManifest(APP, Tag("v1"), ONE, "a/b", 1), NamedManifest(APP, None, TWO, "a/b", 1)]
    )

    found = names.images(ALL)

    assert [name.text for name in found] == [f"{APP}:v1", f"{APP}@{TWO}"]
    assert found[0].checked is None


def test_tag_of_the_index_comes_before_the_saved_one() -> None:
    names = parse_names([tag_row("v1", ONE), manifest_row(ONE)])
    names.add_saved([NamedManifest(APP, Tag("v1"), TWO, "a/b", 1)])

    assert [(name.text, Digest.parse(name.root)) for name in names.images(ALL)] == [
        (f"{APP}:v1", ONE),
        (f"{APP}@{TWO}", TWO),
    ]
