"""Files of the data directory beside whole content: running fetches, ended ones, damaged content.

Lives here: a listing of them with their sizes. Must not know: whole content, who removes them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.removal import BLOCK_BYTES

FETCHING: Final = "fetching"
UNFINISHED: Final = "unfinished"
DAMAGED: Final = "damaged"
_WHY: Final = {
    FETCHING: "a fetch writes it",
    UNFINISHED: "the rest of a fetch that has ended",
    DAMAGED: "damaged content, kept for inspection",
}


@dataclass(frozen=True, slots=True)
class OtherFile:
    """One file that is no whole content."""

    digest: Digest
    """The content that it should become, or should have been."""
    kind: str
    """``fetching``, ``unfinished`` or ``damaged``."""
    size: int
    """Bytes that it takes up: a sparse file has more."""
    used: float
    """Last change, in seconds since the epoch."""

    @property
    def is_active(self) -> bool:
        """Whether a fetch writes it."""
        return self.kind == FETCHING

    @property
    def is_damaged(self) -> bool:
        """Whether it is damaged content. An eviction removes that first."""
        return self.kind == DAMAGED

    @property
    def why(self) -> str:
        """The meaning of the kind, in words."""
        return _WHY[self.kind]


def find_other_files(layout: Layout) -> list[OtherFile]:
    """List the files below ``ingest/`` and ``quarantine/``. Foreign entries are passed over."""
    return [*_ingests(layout), *_quarantined(layout)]


def _ingests(layout: Layout) -> Iterator[OtherFile]:
    for directory in layout.ingest_directories():
        for digest, path in _files(directory):
            kind = FETCHING if disk.is_locked(path) else UNFINISHED
            yield from _leftover(digest, path, kind)


def _quarantined(layout: Layout) -> Iterator[OtherFile]:
    for directory in layout.content_directories():
        for digest, path in _files(layout.root / "quarantine" / directory.name):
            yield from _leftover(digest, path, DAMAGED)


def _files(directory: Path) -> Iterator[tuple[Digest, Path]]:
    with suppress(FileNotFoundError):
        for path in sorted(directory.iterdir()):
            with suppress(InvalidRequest):  # Such as the state of a fetch, ``<hex>.json``.
                yield Digest.parse(f"{directory.name}:{path.name}"), path


def _leftover(digest: Digest, path: Path, kind: str) -> Iterator[OtherFile]:
    with suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            yield OtherFile(digest, kind, status.st_blocks * BLOCK_BYTES, status.st_mtime)
