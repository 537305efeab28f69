"""The result of a restore, and what is common to all kinds of backups.

Lives here: the report, the event of a restored image, the refusal to replace tags. Must not know:
where images come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mirror.config.settings import Hosted
from mirror.hosted.change_rows import change_of
from mirror.hosted.content_row import ContentRow
from mirror.observability.hosted_events import Actor, HostedChange
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest, Tag

_MAX_TAGS_SHOWN: Final = 5
"""Tags that an error names: it is one line."""


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


def check_moved_tags(tags: Sequence[str]) -> None:
    """Raise ``StorageUnavailable`` if there are tags that name another manifest than the backup."""
    if tags:
        shown = ", ".join(tags[:_MAX_TAGS_SHOWN])
        raise StorageUnavailable(
            f"{len(tags)} tags name another manifest here, such as {shown}: nothing was"
            " restored; --force replaces them"
        )


def restore_change(
    hosted: Hosted,
    actor: Actor,
    repository: str,
    digest: Digest,
    tag: Tag | None,
    media_type: str,
    size: int,
    *,
    at: float,
) -> HostedChange:
    """Return the event of a restored image.

    Args:
        hosted: The name of the registry.
        actor: Who restores.
        repository: The repository.
        digest: The manifest.
        tag: The tag. None: it has none.
        media_type: Of the manifest.
        size: Bytes of the manifest.
        at: Seconds since the epoch.
    """
    row = ContentRow(repository, digest, media_type, size)
    return change_of("push", row, tag, registry=hosted.name, actor=actor, at=at)
