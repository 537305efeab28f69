"""Tags that a person selects by a range of versions, or by a pattern.

Lives here: which of the two a text is. Must not know: what the tags are selected for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Self

from mirror.oci.versions import VersionRange, parse_version

_TAG_PATTERN: Final = re.compile(r"[A-Za-z0-9_.*?\[\]!-]+", re.ASCII)
"""Characters of tags, and wildcards."""
_WILDCARDS: Final = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class TagSelection:
    """A range of versions such as ``>=1.2 <2``, or a shell-style pattern such as ``v*``.

    A text of the characters of tags that has a wildcard is a pattern, also where npm would read a
    range: ``v*`` matches ``vnext`` and not ``1``, and ``1.*`` also matches ``1.2-alpine``. The
    range of all versions 1 is ``1.x`` or ``1``.
    """

    text: str
    versions: VersionRange | None
    """None: the text is a pattern."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a range or a pattern. Raises ``ValueError`` if the text is neither.

        A pattern has only characters of tags and wildcards. So a range with a mistake is no
        pattern that matches no tag.
        """
        if not text.strip():
            raise ValueError("must not be empty")
        if _WILDCARDS & set(text) and _TAG_PATTERN.fullmatch(text):
            return cls(text, None)
        try:
            return cls(text, VersionRange.parse(text))
        except ValueError as error:
            if not _TAG_PATTERN.fullmatch(text):
                raise ValueError(f"neither a range nor a pattern of tags: {error}") from None
            return cls(text, None)

    def matches(self, tag: str) -> bool:
        """Return whether a tag is selected."""
        if self.versions is None:
            return fnmatchcase(tag, self.text)
        version = parse_version(tag)
        return version is not None and self.versions.matches(version)

    def select(self, tags: Iterable[str]) -> list[str]:
        """Return the selected tags, in their order."""
        return [tag for tag in tags if self.matches(tag)]

    def __str__(self) -> str:
        return self.text
