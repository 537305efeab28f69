"""How other packages read content: one protocol for every state of the content.

Cached content, content that is being verified again and content that is being fetched are read the
same way: wait until the wanted bytes are there, then send them. For a hit, nothing is waited for.

Lives here: that protocol, the extents that it returns, and reading small content into memory. Must
not know: where the bytes come from.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mirror.oci.errors import ContentLost
from mirror.oci.reference import Digest
from mirror.threads import DISK_READS


@dataclass(frozen=True, slots=True)
class FileExtent:
    """Bytes ``start`` to ``stop`` (exclusive) of an open file, ready for ``sendfile``.

    The file stays open until the reader that returned the extent is closed.
    """

    fd: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MemoryExtent:
    """Bytes from offset ``start`` on, of content that is not on disk."""

    data: memoryview
    start: int

    @property
    def stop(self) -> int:
        """Offset after the last byte."""
        return self.start + len(self.data)


Extent: TypeAlias = FileExtent | MemoryExtent


class Reader(Protocol):
    """Content that is open for one client. It is not evicted before its last reader is closed."""

    @property
    def digest(self) -> Digest:
        """The name of the content."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole content; None while an upstream sends it without stating its size."""

    async def wait_for_size(self) -> int | None:
        """Wait until the size is known. Every byte can be read after that, too.

        Returns:
            The size. None if it is not known, and bytes would leave memory during the wait: the
            disk does not take the content.

        Raises:
            MirrorError: The error that ended the fetch.
        """

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """Wait for the byte at ``start``, and return an extent that begins with it.

        The last bytes of the content are returned only once the whole of it hashes to the digest.

        Args:
            start: Offset of the first wanted byte.
            stop: Offset after the last wanted byte; None for the end of the content. The extent may
                end before it: ask again from its ``stop``.

        Returns:
            At least one byte; None if ``start`` is at or after the end of the content, or at or
            after ``stop``.

        Raises:
            DigestMismatch: The content is wrong. No further byte of it is returned.
            ContentLost: The bytes are not available any more, or this reader is closed.
            MirrorError: Any other error that ended the fetch; bytes before the break are returned
                first.
        """

    def close(self) -> None:
        """Stop reading. Extents must not be used after this. Safe to call twice."""


async def read_all(reader: Reader, limit: int) -> bytes:
    """Read small content into memory, up to its verified end.

    Args:
        reader: The caller closes it.
        limit: Most bytes to read.

    Raises:
        ContentLost: The content has more than ``limit`` bytes, or its file was cut.
        MirrorError: What :meth:`Reader.wait` raises.
    """
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    position = 0
    while (extent := await reader.wait(position)) is not None:
        if extent.stop > limit:
            raise ContentLost(f"content of more than {limit} bytes")
        if isinstance(extent, MemoryExtent):
            data = bytes(extent.data)
        else:
            data = await loop.run_in_executor(
                DISK_READS, os.pread, extent.fd, extent.stop - position, position
            )
        if not data:
            raise ContentLost("content was cut while it was read")
        parts.append(data)
        position += len(data)
    return b"".join(parts)
