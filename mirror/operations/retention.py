"""Retention: which images of the cache are removed, by rules about their age and number.

Lives here: the pure decision about each image, with its reason. Must not know: files, the index,
where the rules come from.

The first rule that matches an image decides. Within a repository, tags that are versions are
ordered by version, and all other images by the time at which they were first seen. Each of these
two lists keeps its newest ones. Tags of one manifest count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from mirror.inventory.model import Image
from mirror.inventory.name_patterns import is_named
from mirror.oci.reference import Digest
from mirror.oci.text import age_text
from mirror.oci.versions import Version, parse_version


class TagCondition(Protocol):
    """A condition on tags, such as a range of versions."""

    def matches(self, tag: str) -> bool:
        """Return whether a tag fulfils it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRule:
    """A rule. An image is removed if it is too old, and not one of the newest."""

    match: str = "*"
    """Shell-style pattern of images and repositories, as ``oci-mirror ls`` takes it."""
    older_than: float | None = None
    """Seconds since the last use. None: any age."""
    keep_last: int | None = None
    """Number of images that stay in each list of a repository. None: none for this reason."""
    tags: TagCondition | None = None
    """The rule is about these tags only. None: about all images, also those without a tag."""

    is_age_of_push: bool = False
    """Whether ``older_than`` counts from the time at which the image was first seen."""

    def is_about(self, image: Image) -> bool:
        """Return whether the rule is about an image."""
        if self.tags is not None and (image.tag is None or not self.tags.matches(image.tag.name)):
            return False
        return is_named(image, self.match)


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """The decision about one image."""

    image: Image
    is_removed: bool
    why: str
    """The reason, for people."""


def decide(images: Iterable[Image], rules: Sequence[PruneRule], now: float) -> list[PruneDecision]:
    """Decide about each image that a rule covers, in the order of the rules.

    Hosted images are no cache: the rules are not about them.

    Args:
        images: The images, without signatures and SBOMs that go with another image.
        rules: The first one that covers an image decides.
        now: Seconds since the epoch.
    """
    decisions: list[PruneDecision] = []
    cached = (image for image in images if not image.is_hosted)
    rest = sorted(cached, key=lambda image: str(image.repository))
    for rule in rules:
        covered = [image for image in rest if rule.is_about(image)]
        done = set(covered)
        rest = [image for image in rest if image not in done]
        for _, in_repository in groupby(covered, key=lambda image: image.repository):
            decisions += _decide_in_repository(list(in_repository), rule, now)
    return decisions


def _decide_in_repository(
    images: Sequence[Image], rule: PruneRule, now: float
) -> Iterator[PruneDecision]:
    newest = _newest(images, rule.keep_last or 0)
    verb = "pushed" if rule.is_age_of_push else "used"
    last = verb if rule.is_age_of_push else f"last {verb}"
    for image in images:
        age = max(0.0, now - (image.first_seen if rule.is_age_of_push else image.used))
        if image.keeper is not None:
            yield PruneDecision(image, is_removed=False, why=image.keeper.why)
        elif image in newest:
            yield PruneDecision(
                image, is_removed=False, why=f"one of the last {rule.keep_last} of its repository"
            )
        elif rule.older_than is not None and age <= rule.older_than:
            yield PruneDecision(image, is_removed=False, why=f"{verb} {age_text(age)} ago")
        elif rule.keep_last is not None:
            why = f"not one of the last {rule.keep_last}, {last} {age_text(age)} ago"
            yield PruneDecision(image, is_removed=True, why=why)
        else:
            yield PruneDecision(image, is_removed=True, why=f"{last} {age_text(age)} ago")


def _newest(images: Sequence[Image], count: int) -> set[Image]:
    """Return the newest images of one repository: ``count`` versions, and ``count`` others."""
    versions: list[tuple[Version, Image]] = []
    others: list[Image] = []
    for image in images:
        version = parse_version(image.tag.name) if image.tag is not None else None
        if version is None:
            others.append(image)
        else:
            versions.append((version, image))
    versions.sort(key=lambda pair: pair[0], reverse=True)
    others.sort(key=lambda image: (image.first_seen, image.name), reverse=True)
    by_version = _first([image for _, image in versions], count)
    return by_version | _first(others, count)


def _first(images: Sequence[Image], count: int) -> set[Image]:
    """Return the images of the first ``count`` names with a manifest of their own."""
    kept: set[Image] = set()
    digests: set[Digest] = set()
    names: set[str] = set()
    for image in images:
        # Clients that accept fewer types get another manifest under the same name.
        is_counted = image.name in names or image.digest in digests
        if not is_counted and len(names) >= count:
            continue
        if not is_counted:
            names.add(image.name)
        digests.add(image.digest)
        kept.add(image)
    return kept
