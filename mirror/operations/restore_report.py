"""What both kinds of restore share: what they work with, and their result.

Lives here: the report, the event of a restored image. Must not know: where images come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mirror.hosted.change_rows import change_of
from mirror.hosted.content_row import ContentRow
from mirror.hosted.database import Database
from mirror.observability.hosted_events import Actor, HostedChange
from mirror.oci.reference import Digest, Tag
from mirror.operations.backup_files import BackupSource
from mirror.operations.restored_content import RestoredContent
from mirror.store.layout import Layout


@dataclass(slots=True)
class RestoreReport:
    """The result of a restore."""

    images: int = 0
    """Names that are there now."""
    contents: int = 0
    """Contents that were copied: they were not here, or damaged."""
    bytes: int = 0
    """Bytes of these."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each content or image that was not restored."""

    def row(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "images": self.images,
            "contents": self.contents,
            "bytes": self.bytes,
            "problems": self.problems,
        }


@dataclass(frozen=True, slots=True)
class RestoreContext:
    """The parts that each kind of restore works with."""

    source: BackupSource
    """The backup."""
    content: RestoredContent
    """Its content."""
    layout: Layout
    """The paths in the data directory."""
    database: Database
    """The names of the restore. No client sees them yet."""
    registry: str
    """Name of the hosted repositories."""
    actor: Actor
    """The user who restores."""
    now: Callable[[], float]
    """Returns the seconds since the epoch."""

    def change(
        self, repository: str, digest: Digest, tag: Tag | None, media_type: str, size: int
    ) -> HostedChange:
        """Return the event of a restored image.

        Args:
            repository: The repository.
            digest: The manifest.
            tag: The tag. None: it has none.
            media_type: Of the manifest.
            size: Bytes of the manifest.
        """
        row = ContentRow(repository, digest, media_type, size)
        return change_of("push", row, tag, registry=self.registry, actor=self.actor, at=self.now())
