"""What the other rooms see of content: one protocol, whatever state the content is in.

Whole, ageing and growing content are all read the same way: *wait until the bytes you want are
there, then send them*. A hit is the case with nothing to wait for.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mirror.oci.errors import ContentLost
from mirror.oci.reference import Digest


@dataclass(frozen=True, slots=True)
class FileExtent:
    """Bytes ``start`` to ``stop`` (exclusive) of an open file, ready for ``sendfile``."""

    fd: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MemoryExtent:
    """Bytes from ``start`` on that are on no disk."""

    data: memoryview
    start: int

    @property
    def stop(self) -> int:
        """Offset behind the last byte."""
        return self.start + len(self.data)


Extent: TypeAlias = FileExtent | MemoryExtent


class Reader(Protocol):
    """Content that is open for one client. ``close`` it; the lease ends with the last reader."""

    @property
    def digest(self) -> Digest:
        """The name of the content."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole content; None while an upstream that does not say is still sending."""

    @property
    def arrived(self) -> int:
        """Bytes that can be read without waiting."""

    async def wait(self, start: int, stop: int | None = None) -> Extent | None:
        """The next bytes from ``start`` on, at most up to ``stop``; None at the content's end.

        The end of the content is handed out only once all of it hashes to the digest. Raises
        ``DigestMismatch``, ``ContentLost``, or whatever ended the fetch.
        """

    def close(self) -> None:
        """End the lease. Safe to call twice."""


async def read_all(reader: Reader, limit: int) -> bytes:
    """Small content as bytes, once verified. Raises ``ContentLost`` above ``limit`` bytes."""
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
                None, os.pread, extent.fd, extent.stop - position, position
            )
        if not data:
            raise ContentLost("content was cut while it was read")
        parts.append(data)
        position += len(data)
    return b"".join(parts)
