"""The targets of a block, as users write them: an image, a repository, a pattern, or a digest.

Lives here: how a target is told from another one. Must not know: which requests it refuses.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Final, TypeAlias

from mirror.oci.errors import NameInvalid
from mirror.oci.image_name import ImageName
from mirror.oci.reference import UPSTREAM_ALIASES, Digest, Repository

_WILDCARDS: Final = frozenset("*?[")
_MAX_TARGET_CHARS: Final = 512
"""Characters of a target: a name has at most 255, its tag 128, and a digest 135."""
# The characters of a repository path, or a wildcard of fnmatch. A "[" without its "]" matches only
# itself, and no name has it.
_PATTERN_PATH: Final = re.compile(r"(?:[a-z0-9._/*?-]|\[!?[a-z0-9._-]+\])+", re.ASCII)

Target: TypeAlias = "Digest | ImageName | str"
"""Content, a repository or an image of it, or a pattern of repositories."""


def parse_target(text: str) -> Target:
    """Parse the target of a block, as a user writes it. Its ``str()`` is its whole name.

    A pattern is shell-style, and matched against whole names such as ``docker.io/library/app``. So
    it begins with a registry, whose letters and other names count as in an image name, or with
    ``*``.

    Raises ``InvalidRequest``.
    """
    if text.startswith(("sha256:", "sha512:")):
        return Digest.parse(text)
    if not _WILDCARDS & set(text):
        return ImageName.parse(text)
    registry, slash, path = text.partition("/")
    registry = registry.lower()
    is_registry = any(mark in registry for mark in ".:*") or registry == "localhost"
    if not slash or not is_registry:
        raise NameInvalid("a pattern begins with its registry: docker.io/library/app*, or */app")
    if "@" in path or ":" in path:
        raise NameInvalid("a pattern is about repositories: it has neither tag nor digest")
    if len(text) > _MAX_TARGET_CHARS or not text.isprintable():
        raise NameInvalid("not a pattern of repository names")
    if not _PATTERN_PATH.fullmatch(path):
        raise NameInvalid("no repository can match it: names have a-z, 0-9, and . _ - / between")
    return f"{UPSTREAM_ALIASES.get(registry, registry)}/{path}"


def is_match(repository: Repository, pattern: str) -> bool:
    """Return whether a pattern of :func:`parse_target` matches a repository.

    As in the names that users write, ``docker.io/app`` also means ``docker.io/library/app``.
    """
    name = str(repository)
    short = repository.short_name
    return fnmatchcase(name, pattern) or (short != name and fnmatchcase(short, pattern))
