"""The targets of a block, as users write them: an image, a repository, a pattern, or a digest.

Lives here: how a target is told from another one. Must not know: which requests it refuses.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from mirror.oci.errors import NameInvalid
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest

_WILDCARDS: Final = frozenset("*?[")
_MAX_TARGET_CHARS: Final = 512
"""Characters of a target: a name has at most 255, its tag 128, and a digest 135."""

Target: TypeAlias = "Digest | ImageName | str"
"""Content, a repository or an image of it, or a pattern of repositories."""


def parse_target(text: str) -> Target:
    """Parse the target of a block, as a user writes it. Its ``str()`` is its whole name.

    A pattern is shell-style, and matched against whole names such as ``docker.io/library/app``. So
    it begins with a registry, or with ``*``.

    Raises ``InvalidRequest``.
    """
    if text.startswith(("sha256:", "sha512:")):
        return Digest.parse(text)
    if not _WILDCARDS & set(text):
        return ImageName.parse(text)
    first, slash, _ = text.partition("/")
    has_registry = "." in first or ":" in first or first == "localhost" or first.startswith("*")
    if not slash or not has_registry:
        raise NameInvalid("a pattern begins with its registry: docker.io/library/app*, or */app")
    if "@" in text or ":" in text.rpartition("/")[2]:
        raise NameInvalid("a pattern is about repositories: it has neither tag nor digest")
    if len(text) > _MAX_TARGET_CHARS or not text.isprintable():
        raise NameInvalid("not a pattern of repository names")
    return text
