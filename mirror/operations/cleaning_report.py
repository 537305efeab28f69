"""The reports of operations that remove something: what went, what stays, and why.

Lives here: the items of a report, their sum, and the file with the last report of the scheduled
job. Must not know: how anything is removed, how a report is printed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from mirror.store.layout import Layout

Action: TypeAlias = Literal["removed", "kept"]
"""``removed`` also stands for what a dry run would remove."""
ItemKind: TypeAlias = Literal["image", "content", "hosted", "leftover", "quarantine", "response"]
"""- ``image``: a name, with all content that no other name reaches.
- ``content``: whole content.
- ``hosted``: a blob or a manifest of a hosted repository, or its file.
- ``leftover``: the file of a fetch that has ended without publishing it.
- ``quarantine``: damaged content.
- ``response``: expired rows of the index: remembered 404 responses, lists."""
MAX_SAVED_ITEMS: Final = 1000
"""Items of the file with the last report: 250 KB."""
RETENTION_REPORT: Final = "retention.json"
"""File of the data directory with the last report of the scheduled job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that was looked at."""

    action: Action
    kind: ItemKind
    name: str | None = None
    """Name of the image. None: it has none."""
    digest: str | None = None
    bytes: int = 0
    """Bytes on the disk that were freed. Of what is kept: its bytes."""
    count: int = 1
    """Number of contents or rows."""
    why: str
    """The reason, for people."""
    failure: str | None = None
    """Of what the disk refuses to remove: path, reason and remedy. None: it refuses nothing."""

    def row(self) -> dict[str, Any]:
        """Return the item as JSON values."""
        return {
            "action": self.action,
            "kind": self.kind,
            "name": self.name,
            "digest": self.digest,
            "bytes": self.bytes,
            "count": self.count,
            "why": self.why,
        }


@dataclass(slots=True)
class CleaningReport:
    """The result of one operation."""

    is_dry_run: bool = False
    """Whether nothing was removed in fact."""
    items: list[Item] = field(default_factory=list)
    """In the order in which they were looked at."""

    def removed(self, kind: ItemKind | None = None) -> list[Item]:
        """Return what was removed. ``kind``: only this; None: all."""
        return [
            item
            for item in self.items
            if item.action == "removed" and (kind is None or item.kind == kind)
        ]

    @property
    def failures(self) -> list[str]:
        """Path, reason and remedy of each item that the disk refuses to remove."""
        return [item.failure for item in self.items if item.failure is not None]

    @property
    def freed(self) -> int:
        """Bytes that were freed."""
        return sum(item.bytes for item in self.removed())

    def document(self, finished_at: str) -> dict[str, Any]:
        """Return the report as JSON values. ``finished_at``: RFC 3339 text in UTC."""
        removed = self.removed()
        return {
            "finished_at": finished_at,
            "is_dry_run": self.is_dry_run,
            "removed_images": len(self.removed("image")),
            "freed_bytes": self.freed,
            "items": [item.row() for item in (removed or self.items)[:MAX_SAVED_ITEMS]],
        }


def save_report(layout: Layout, name: str, document: Mapping[str, Any]) -> None:
    """Replace the file of the last report. Raises ``OSError``. Blocks.

    Args:
        layout: The data directory.
        name: The name of the file in it.
        document: The report, as JSON values.
    """
    path = layout.root / name
    draft = path.with_name(f"{name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(document), encoding="utf-8")
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def load_report(layout: Layout, name: str) -> dict[str, Any] | None:
    """Return the last report. None if there is none, or if it cannot be read. Blocks."""
    try:
        document = json.loads(Path(layout.root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
