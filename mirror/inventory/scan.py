"""The content on disk, from a listing of the directories.

Lives here: names, sizes and recency of whole content. Must not know: what the content is.

:class:`mirror.store.eviction.Catalog` lists the same directories, and pauses for the requests of a
server. A command has no requests, and 100,000 files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mirror.inventory.model import DigestText, FileStatus
from mirror.store.layout import Layout

_HEX_LENGTHS: Final = {"sha256": 64, "sha512": 128}
"""Algorithm -> the length of the names of its files."""
_HEX: Final = b"0123456789abcdef"
_IS_HEX: Final = re.compile("[0-9a-f]+").fullmatch


def list_contents(layout: Layout) -> frozenset[DigestText]:
    """Return the digests of all whole content. It takes 0.1 s for 100,000 contents.

    Foreign entries (links, pipes, directories, other names) are passed over. The listing says which
    entries are regular files, so no file is asked. Raises ``OSError`` if a directory cannot be
    listed: its content must not count as gone.
    """
    found: list[DigestText] = []
    for directory in layout.content_directories():
        prefix = f"{directory.name}:"
        with suppress(FileNotFoundError), _opened(directory) as fd:
            found += [prefix + name for name in _content_names(fd, _HEX_LENGTHS[directory.name])]
    return frozenset(found)


def scan(layout: Layout, now: float) -> dict[DigestText, FileStatus]:
    """Return sizes and recency of all whole content. It takes 0.3 s for 100,000 contents.

    A last use in the future is ``now``, as for the eviction. Raises ``OSError`` as
    :func:`list_contents` does.
    """
    found: dict[DigestText, FileStatus] = {}
    for directory in layout.content_directories():
        prefix = f"{directory.name}:"
        with suppress(FileNotFoundError), _opened(directory) as fd:
            for name in _content_names(fd, _HEX_LENGTHS[directory.name]):
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:  # It was just evicted.
                    continue
                used = status.st_mtime
                found[prefix + name] = status.st_size, used if used < now else now
    return found


def _content_names(directory: int, length: int) -> list[str]:
    """Return the names of the regular files that have ``length`` hexadecimal digits."""
    with os.scandir(directory) as entries:
        names = [
            entry.name
            for entry in entries
            if len(entry.name) == length and entry.is_file(follow_symlinks=False)
        ]
    if os.fsencode("".join(names)).translate(None, _HEX):
        names = list(filter(_IS_HEX, names))  # Some are foreign: look at each one.
    return names


def stat_contents(
    layout: Layout, digests: Iterable[DigestText], now: float
) -> dict[DigestText, FileStatus]:
    """Return sizes and recency of some contents. Those that are gone are left out."""
    found: dict[DigestText, FileStatus] = {}
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
