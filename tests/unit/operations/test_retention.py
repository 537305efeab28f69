"""Which images a retention rule removes, and the reason that it gives."""

from __future__ import annotations

import pytest

from mirror.inventory.model import Image, Keeper
from mirror.oci.reference import Digest, Repository, Tag
from mirror.oci.tag_selection import TagSelection
from mirror.operations.retention import PruneRule, decide
from tests.unit.operations.cleaning_kit import APP, DAY, NOW, OTHER


def named(
    tag: str | None,
    age: float = 0.0,
    *,
    repository: Repository = APP,
    content: str = "",
    first_seen: float = 0.0,
    marks: tuple[str, ...] = (),
) -> Image:
    """An image that was last used ``age`` days ago."""
    digest = str(Digest.of((content or f"{repository}{tag}").encode()))
    return Image(
        repository=repository,
        tag=None if tag is None else Tag(tag),
        root=digest,
        current_root=digest,
        used=NOW - age * DAY,
        first_seen=first_seen,
        marks=marks,
        keeper=next((Keeper(mark, "") for mark in marks if mark != "blocked"), None),
    )


def removed(images: list[Image], *rules: PruneRule) -> list[str]:
    """The names that the rules remove, without the repository."""
    decisions = decide(images, rules, NOW)
    return sorted(
        d.image.name.removeprefix(str(d.image.repository)) for d in decisions if d.is_removed
    )


def test_older_than_counts_from_the_last_use() -> None:
    images = [named("a", 31), named("b", 29.9), named(None, 40)]
    rule = PruneRule(older_than=30 * DAY)
    assert removed(images, rule) == [":a", f"@{images[2].digest}"]


def test_keep_last_orders_versions_by_precedence_and_not_as_text() -> None:
    tags = ["1.9.0", "1.10.0", "v1.11.0", "1.11.0-rc.1"]
    assert removed([named(tag) for tag in tags], PruneRule(keep_last=2)) == [
        ":1.10.0",
        ":1.9.0",
    ]


def test_keep_last_orders_other_images_by_first_use() -> None:
    images = [named(tag, first_seen=float(n)) for n, tag in enumerate(["main", "dev", "latest"])]
    images.append(named(None, first_seen=9.0))
    assert removed(images, PruneRule(keep_last=2)) == [":dev", ":main"]


def test_versions_and_other_tags_are_counted_apart() -> None:
    images = [named("1.0"), named("2.0"), named("latest"), named("edge", first_seen=-1.0)]
    assert removed(images, PruneRule(keep_last=1)) == [":1.0", ":edge"]


def test_tags_of_one_manifest_count_once() -> None:
    images = [
        named("1.2.3", content="new"),
        named("1.2", content="new"),
        named("1", content="new"),
        named("1.1.0"),
        named("1.0.0"),
    ]
    assert removed(images, PruneRule(keep_last=2)) == [":1.0.0"]


def test_each_repository_keeps_its_own_latest() -> None:
    images = [named(tag, repository=one) for one in (APP, OTHER) for tag in ("1.0", "2.0")]
    assert removed(images, PruneRule(keep_last=1)) == [":1.0", ":1.0"]


def test_both_conditions_must_be_met() -> None:
    images = [named("1.0", 40), named("2.0", 1), named("3.0", 40)]
    rule = PruneRule(older_than=30 * DAY, keep_last=1)
    assert removed(images, rule) == [":1.0"]


@pytest.mark.parametrize("mark", ["pinned", "frozen", "leased"])
def test_marked_image_stays(mark: str) -> None:
    (decision,) = decide([named("a", 99, marks=(mark,))], [PruneRule(older_than=DAY)], NOW)
    assert (decision.is_removed, decision.why) == (False, mark)


def test_blocked_image_may_go() -> None:
    assert removed([named("a", 99, marks=("blocked",))], PruneRule(older_than=DAY)) == [":a"]


def test_rule_covers_only_images_that_match() -> None:
    images = [named("a", 9), named("a", 9, repository=OTHER)]
    rule = PruneRule(match="ghcr.io/org/*", older_than=DAY)
    (decision,) = decide(images, [rule], NOW)
    assert decision.image is images[1]


def test_rule_about_tags_is_not_about_images_without_one() -> None:
    images = [named("1.0", 9), named("3.0", 9), named("latest", 9), named(None, 9)]
    below = PruneRule(older_than=DAY, tags=TagSelection.parse("<2"))
    assert removed(images, below) == [":1.0"]
    assert removed(images, PruneRule(older_than=DAY, tags=TagSelection.parse("lat*"))) == [
        ":latest"
    ]


def test_keep_last_counts_only_tags_that_the_rule_is_about() -> None:
    images = [named(tag) for tag in ("1.0", "1.1", "2.0", "2.1")]
    assert removed(images, PruneRule(keep_last=1, tags=TagSelection.parse("<2"))) == [":1.0"]


def test_first_rule_that_matches_decides() -> None:
    images = [named("a", 9), named("a", 9, repository=OTHER)]
    keeping = PruneRule(match="docker.io/*", older_than=30 * DAY)
    assert removed(images, keeping, PruneRule(older_than=DAY)) == [":a"]
    whys = [d.why for d in decide(images, [keeping, PruneRule(older_than=DAY)], NOW)]
    assert whys == ["used 9 d ago", "last used 9 d ago"]


def test_last_use_in_the_future_is_no_age() -> None:
    assert removed([named("a", -5)], PruneRule(older_than=0.0)) == []
