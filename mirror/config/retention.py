"""The settings of retention: rules that remove images.

Lives here: their keys, descriptions and checks. Must not know: how images are removed.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from mirror.config.section import Age, NonEmptyText, Section
from mirror.oci.tag_selection import TagSelection


def check_tags(text: str) -> str:
    """Return a selection of tags. Raises ``ValueError`` if it is none."""
    TagSelection.parse(text)
    return text


class RetentionRule(Section):
    """One rule. An image is removed if it is too old, and not one of the latest."""

    match: NonEmptyText = "*"
    """
    Shell-style pattern of images and repositories, such as ghcr.io/org/*. * also matches /.
    The first rule that matches an image decides.
    """
    older_than: Age | None = None
    """Time since the last use after which an image is removed, with its unit. Default: any."""
    keep_last: Annotated[int, Field(ge=0)] | None = None
    """
    Number of images of each repository that stay: the latest versions if the tags are versions,
    and, of all others, the images that were first seen most recently.
    """
    tags: Annotated[str, AfterValidator(check_tags)] | None = None
    """
    Only tags in a range of versions such as ">=1.2 <2", or that match a pattern such as pr-*.
    Default: all images, also those without a tag.
    """

    @model_validator(mode="after")
    def _check_condition(self) -> Self:
        if self.older_than is None and self.keep_last is None:
            raise ValueError("needs older_than or keep_last, which say what is removed")
        return self
