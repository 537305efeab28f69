"""What the other rooms see of content: one protocol, whatever state the content is in.

Whole, ageing and growing content are all read the same way: *wait until the bytes you want are
there, then send them*. A hit is the case with nothing to wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mirror.oci.digest import Digest


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
