"""Shell-style patterns of image names, such as ``nginx``, ``*/team/*`` or ``ghcr.io/*:v1*``.

Lives here: whether an image matches. The upstream may be left out, and so may the tag. Must not
know: who chooses images by a pattern.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from mirror.inventory.model import Image


def is_named(image: Image, pattern: str) -> bool:
    """Return whether a pattern matches the name of an image."""
    repository = str(image.repository)
    reference = image.name.removeprefix(repository)
    short = repository.removeprefix(f"{image.repository.upstream}/")
    names = (repository, short, repository.removeprefix("docker.io/library/"))
    return any(
        fnmatchcase(text, pattern) for name in names for text in (name, f"{name}{reference}")
    )
