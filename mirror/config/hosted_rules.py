"""The settings of what stays in hosted repositories: immutable tags, and rules of retention.

Lives here: their keys, descriptions and checks. Must not know: how anything is removed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from mirror.config.retention import RetentionRule, check_tags
from mirror.config.section import NonEmptyText, Section


class ImmutableTags(Section):
    """Tags that name one manifest for good. Written ``PATTERN:TAGS``, or with both keys."""

    match: NonEmptyText = "*"
    """Shell-style pattern of repositories, with or without the registry. * also matches /."""
    tags: Annotated[str, AfterValidator(check_tags)] = "*"
    """A range of versions such as ">=1.0", or a pattern such as v*. Default: all tags."""


def _read_immutable(value: Any) -> Any:
    """Read the short form: ``team/*:v*``, or ``team/*`` for all tags."""
    if not isinstance(value, str):
        return value
    match, colon, tags = value.rpartition(":")
    if not colon or "/" in tags:  # A port, or no tag.
        return {"match": value}
    return {"match": match, "tags": tags}


ImmutableTagsOrText = Annotated[ImmutableTags, BeforeValidator(_read_immutable)]
"""A section, or its short form."""


class HostedRetentionRule(RetentionRule):
    """A rule about hosted images. It is about tags, unless it says otherwise."""

    about: Literal["tags", "untagged"] = "tags"
    """
    The rule removes tags, or manifests that no tag and no index names. Signatures and other
    referrers are not among the latter: they go with their subject.
    """
    age: Literal["used", "pushed"] = "used"
    """
    The time that older_than counts from: the last use, or the push alone. A use is the push, a
    pull, or a HEAD by a client that may push.
    """

    @model_validator(mode="after")
    def _check_about(self) -> Self:
        if self.about == "untagged" and self.tags is not None:
            raise ValueError("is about untagged manifests, so it cannot name tags")
        return self
