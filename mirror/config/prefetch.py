"""The settings of prefetch: images that the server fetches ahead, again and again.

Lives here: their keys, descriptions and checks. Must not know: how images are fetched.
"""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from mirror.config.section import NonEmptyText, PositiveDuration, Section, key_error
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.platform import Platform
from mirror.oci.tag_selection import TagSelection

WILDCARDS: Final = frozenset("*?[")
"""A name with one of these characters is a pattern of repositories."""
_MIN_INTERVAL_S: Final = 60.0
"""Seconds. A registry that is asked more often for the same tags may refuse."""


def _check_name(text: str) -> str:
    if not WILDCARDS & set(text):
        try:
            ImageName.parse(text)
        except InvalidRequest as error:
            raise ValueError(f"is no image name: {error.message}") from None
        return text
    first, slash, path = text.partition("/")
    if not slash or WILDCARDS & set(first) or not {".", ":"} & set(first):
        raise ValueError("a pattern must begin with its registry, such as ghcr.io/org/*")
    if ":" in path or "@" in path:
        raise ValueError("a pattern is about repositories: choose their tags by the key tags")
    return text


def _check_tags(text: str) -> str:
    TagSelection.parse(text)
    return text


def _check_platform(text: str) -> str:
    Platform.parse(text)
    return text


def _check_interval(seconds: float) -> float:
    if seconds < _MIN_INTERVAL_S:
        raise ValueError("must be at least 1m")
    return seconds


class Prefetch(Section):
    """Images that are fetched ahead, again and again."""

    images: tuple[Annotated[NonEmptyText, AfterValidator(_check_name)], ...]
    """
    Names of images (docker.io/library/nginx:1.27) or repositories, or shell-style patterns of
    repositories that have been pulled here (ghcr.io/org/*).
    """
    tags: Annotated[str, AfterValidator(_check_tags)] | None = None
    """
    Tags to fetch of each repository: a range of versions such as ">=1.2 <2", or a pattern such as
    "*-alpine". Default: of a repository the tag latest, of a pattern the tags that have been pulled
    here. Prereleases, and tags such as 1.2-alpine, are in a range only if it names one of the same
    version.
    """
    newest: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Fetch only so many of these tags of each repository: the latest versions. Default: all."""
    platforms: tuple[Annotated[str, AfterValidator(_check_platform)], ...] = ()
    """Fetch only these platforms, such as linux/amd64. Default: all."""
    referrers: bool = False
    """Fetch signatures, SBOMs and other referrers, too."""
    interval: Annotated[PositiveDuration, AfterValidator(_check_interval)] = 21600.0
    """Time between two runs, by one process of a data directory. At least 1m."""

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if not self.images:
            raise key_error(("images",), "must not be empty")
        if self.tags is None and self.newest is None:
            return self
        for index, text in enumerate(self.images):
            if not WILDCARDS & set(text) and ImageName.parse(text).reference is not None:
                reason = "names one image already: leave out its tag, or the keys tags and newest"
                raise key_error(("images", index), reason)
        return self

    def upstreams(self) -> tuple[str, ...]:
        """Return the upstream of each of the images and patterns."""
        return tuple(
            text.partition("/")[0]
            if WILDCARDS & set(text)
            else ImageName.parse(text).repository.upstream
            for text in self.images
        )
