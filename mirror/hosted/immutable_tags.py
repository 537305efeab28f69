"""Tags that name one manifest for good, with all that this manifest refers to.

Lives here: which tags these are, and the refusals. Must not know: who may delete them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from sqlite3 import Connection

from mirror.config.settings import Hosted
from mirror.hosted import name_rows
from mirror.hosted.content_row import ContentRow
from mirror.hosted.pushed_manifest import PushedManifest
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
        self,
        connection: Connection,
        repository: str,
        manifest: PushedManifest,
        tags: Iterable[Tag],
    ) -> None:
        """Check that ``tags`` may name a manifest. Raises ``TagImmutable``.

        A tag may be pushed again with the digest and the media type that it has.
        """
        digest = manifest.digest
        earlier = name_rows.manifest_by_digest(connection, repository, digest)
        if earlier is not None and earlier.media_type != manifest.media_type:
            protector = self._protector_of(connection, repository, digest, is_manifest=True)
            if protector is not None:
                raise TagImmutable(
                    f"the tag {protector} is immutable: this manifest stays {earlier.media_type}"
                )
        for tag in tags:
            if not self.is_immutable(repository, str(tag)):
                continue
            current = name_rows.manifest_by_tag(connection, repository, tag)
            if current is not None and current.digest != digest:
                raise TagImmutable(
                    f"the tag {tag} is immutable, and names {current.digest}: push another tag"
                )

    def check_deletion(
        self,
        connection: Connection,
        repository: str,
        reference: Reference,
        *,
        is_manifest: bool = True,
    ) -> None:
        """Check that a deletion takes nothing of an immutable tag. Raises ``TagImmutable``.

        Args:
            connection: The database.
            repository: The repository.
            reference: A tag, or the digest of a blob or a manifest.
            is_manifest: False: a blob is deleted.
        """
        if isinstance(reference, Digest):
            tag = self._protector_of(connection, repository, reference, is_manifest=is_manifest)
        else:
            tag = str(reference) if self.is_immutable(repository, str(reference)) else None
        if tag is not None:
            raise TagImmutable(f"the tag {tag} is immutable: only an admin can delete it")

    def is_protected(self, connection: Connection, row: ContentRow) -> bool:
        """Return whether the image of an immutable tag has a manifest."""
        tag = self._protector_of(connection, row.repository, row.digest, is_manifest=True)
        return tag is not None

    def _protector_of(
        self, connection: Connection, repository: str, digest: Digest, *, is_manifest: bool
    ) -> str | None:
        """Return an immutable tag whose image has a manifest or a blob. None if there is none."""
        names = (repository, f"{self._name}/{repository}")
        if not any(fnmatchcase(name, pattern) for name in names for pattern, _ in self._rules):
            return None
        tags = name_rows.tags_above(connection, repository, digest, is_manifest=is_manifest)
        return next((tag for tag in tags if self.is_immutable(repository, tag)), None)
