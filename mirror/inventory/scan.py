"""The content on disk, from a listing of the directories.

Lives here: names, sizes and recency of whole content. Must not know: what the content is.

:class:`mirror.store.eviction.Catalog` lists the same directories, and pauses for the requests of a
server. A command has no requests, and 100,000 files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mirror.inventory.model import Content, DigestText
from mirror.oci.reference import Digest
from mirror.store.layout import Layout

_HEX_LENGTHS: Final = {"sha256": 64, "sha512": 128}
"""Algorithm -> the length of the names of its files."""
_HEX: Final = b"0123456789abcdef"
_IS_HEX: Final = re.compile("[0-9a-f]+").fullmatch


def list_contents(layout: Layout) -> frozenset[DigestText]:
    """Return the digests of all whole content. It takes 0.1 s for 100,000 contents.

    Foreign entries are passed over, as by :func:`scan`. The listing says which entries are regular
    files, so no file is asked. Raises ``OSError`` if a directory cannot be listed: its content must
    not count as gone.
    """
    found: list[DigestText] = []
    for directory in layout.content_directories():
        length, prefix = _HEX_LENGTHS[directory.name], f"{directory.name}:"
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            names = [
                entry.name
                for entry in entries
                if len(entry.name) == length and entry.is_file(follow_symlinks=False)
            ]
            if os.fsencode("".join(names)).translate(None, _HEX):
                names = list(filter(_IS_HEX, names))  # Some are foreign: look at each one.
            found += [prefix + name for name in names]
    return frozenset(found)


def scan(layout: Layout, now: float) -> dict[Digest, Content]:
    """Return all whole content with sizes and recency. It takes 0.5 s for 100,000 contents.

    Foreign entries (links, pipes, directories, other names) are passed over. A last use in the
    future is ``now``, as for the eviction.

    Raises ``OSError`` if a directory cannot be listed.
    """
    found: dict[Digest, Content] = {}
    for directory in layout.content_directories():
        algorithm, length = directory.name, _HEX_LENGTHS[directory.name]
        with suppress(FileNotFoundError), _opened(directory) as fd, os.scandir(fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # It was just evicted.
                    continue
                is_digest = len(entry.name) == length and _IS_HEX(entry.name)
                if is_digest and stat.S_ISREG(status.st_mode):
                    digest = Digest(algorithm, entry.name)
                    found[digest] = Content(digest, status.st_size, min(status.st_mtime, now))
    return found


def stat_contents(
    layout: Layout, digests: Iterable[DigestText], now: float
) -> dict[DigestText, tuple[int, float]]:
    """Return (size, last use) of some contents. Those that are gone are left out."""
    found: dict[DigestText, tuple[int, float]] = {}
    with suppress(FileNotFoundError), _opened(layout.root / "blobs") as directory:
        for text in digests:
            path = text.replace(":", "/", 1)
            try:
                status = os.stat(path, dir_fd=directory, follow_symlinks=False)
            except OSError:
                continue
            found[text] = status.st_size, min(status.st_mtime, now)
    return found


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """Open a directory: the system looks up its path once, and not for each file."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
