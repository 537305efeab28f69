"""The sizes of contents, for the trace of accesses.

Lives here: a bounded memory of sizes, and the number that stands for a digest in the trace. Must
not know: the trace.
"""

from __future__ import annotations

import os
from typing import Final

from mirror.oci.errors import DigestInvalid
from mirror.oci.reference import Digest
from mirror.store.layout import Layout

_MAX_REMEMBERED: Final = 100_000
"""Contents whose size is kept in memory: 10 MB. A forgotten one costs a system call."""
_CONTENT_DIGITS: Final = 15
"""Hexadecimal digits of a digest that stand for it: 60 bits, which SQLite keeps as an integer."""


class ContentSizes:
    """Looks up the sizes of contents on the disk. It blocks, and belongs to one thread."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sizes: dict[str, int] = {}

    def find(self, digest: str, known: int = 0) -> int | None:
        """Return the bytes of a content. None: it is not on the disk, and was not before.

        ``known``: its bytes, if a request has told them. It may be evicted already.
        """
        size = known or self._sizes.get(digest)
        if size is None:
            try:
                size = os.stat(self._layout.blob(Digest.parse(digest))).st_size
            except (OSError, DigestInvalid):
                return None
        if digest not in self._sizes and len(self._sizes) >= _MAX_REMEMBERED:
            self._sizes.clear()
        self._sizes[digest] = size
        return size


def content_number(digest: str) -> int:
    """Return the number that stands for a digest in the trace. It is as random as a hash."""
    return int(digest.rpartition(":")[2][:_CONTENT_DIGITS], 16)
