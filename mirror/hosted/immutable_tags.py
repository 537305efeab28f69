"""Tags that name one manifest for good.

Lives here: which tags these are, and the refusal. Must not know: who may delete them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from sqlite3 import Connection

from mirror.config.settings import Hosted
from mirror.hosted import name_rows
from mirror.oci.errors import TagImmutable
from mirror.oci.reference import Digest, Reference, Tag
from mirror.oci.tag_selection import TagSelection


class ImmutableTagRules:
    """The configured patterns."""

    def __init__(self, hosted: Hosted) -> None:
        """Parse the patterns of a configuration that was checked."""
        self._name = hosted.name
        self._rules = [
            (rule.match, TagSelection.parse(rule.tags)) for rule in hosted.immutable_tags
        ]

    def is_immutable(self, repository: str, tag: str) -> bool:
        """Return whether a tag of a repository is immutable, once it is there."""
        names = (repository, f"{self._name}/{repository}")
        return any(
            any(fnmatchcase(name, pattern) for name in names) and tags.matches(tag)
            for pattern, tags in self._rules
        )

    def check_push(
        self, connection: Connection, repository: str, digest: Digest, tags: Iterable[Tag]
    ) -> None:
        """Check that ``tags`` may name a manifest. Raises ``TagImmutable``.

        A tag may be pushed again with the digest that it has.
        """
        for tag in tags:
            if not self.is_immutable(repository, str(tag)):
                continue
            current = name_rows.manifest_by_tag(connection, repository, tag)
            if current is not None and current.digest != digest:
                raise TagImmutable(
                    f"the tag {tag} is immutable, and names {current.digest}: push another tag"
                )

    def check_deletion(self, connection: Connection, repository: str, reference: Reference) -> None:
        """Check that a deletion takes no immutable tag away. Raises ``TagImmutable``.

        Args:
            connection: The database.
            repository: The repository.
            reference: A tag, or the digest of a manifest with all its tags.
        """
        for tag in self._tags_of(connection, repository, reference):
            if self.is_immutable(repository, tag):
                raise TagImmutable(f"the tag {tag} is immutable: only an admin can delete it")

    def _tags_of(
        self, connection: Connection, repository: str, reference: Reference
    ) -> Sequence[str]:
        if isinstance(reference, Digest):
            return name_rows.tags_of(connection, repository, reference)
        return [str(reference)]
