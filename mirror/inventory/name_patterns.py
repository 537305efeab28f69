"""Shell-style patterns of image names, such as ``nginx``, ``*/team/*`` or ``ghcr.io/*:v1*``.

Lives here: whether an image matches. The upstream may be left out, and so may the tag. Must not
know: who chooses images by a pattern.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from mirror.inventory.model import Image


def is_named(image: Image, pattern: str) -> bool:
    """Return whether a pattern matches the name of an image."""
    repository = image.repository
    return is_name_match(image.name, repository.upstream, repository.path, pattern)


def is_name_match(name: str, upstream: str, path: str, pattern: str) -> bool:
    """Return whether a pattern matches a whole name, of the repository ``path`` of an upstream."""
    repository = f"{upstream}/{path}"
    reference = name.removeprefix(repository)
    names = (repository, path, repository.removeprefix("docker.io/library/"))
    return any(fnmatchcase(text, pattern) for one in names for text in (one, f"{one}{reference}"))
