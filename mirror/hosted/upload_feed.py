"""One request that feeds an upload: what it reserves of the quota and of the disk as it grows.

Lives here: when bytes are reserved, and how many. Must not know: HTTP, rows, files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from mirror.hosted.upload_rows import UploadRow
from mirror.hosted.upload_writer import UploadWriter
from mirror.oci.errors import QuotaExceeded

_MAX_STEP_BYTES: Final = 64 * 1024 * 1024
"""Most bytes that are reserved at a time. Each step is one small transaction."""
MIN_STEP_BYTES: Final = 1024 * 1024
"""Fewest bytes that are reserved at a time. Above, no upload reserves more than twice its bytes: so
a client that sends slowly keeps others out of little, whatever length it has announced."""
_UNRESERVED_BYTES: Final = 64 * 1024
"""Bytes that an upload may reach without a reservation. The quota is checked when it is finished:
a push of many small blobs has one transaction less for each."""


class UploadFeed:
    """One request that feeds an upload."""

    def __init__(
        self,
        row: UploadRow,
        writer: UploadWriter,
        reserve: Callable[[str, int, int], Awaitable[None]],
        make_room: Callable[[int], Awaitable[None]],
    ) -> None:
        """Feed an upload. Created by :meth:`mirror.hosted.sessions.UploadSessions.open`.

        Args:
            row: The upload.
            writer: Appends to its file.
            reserve: Reserves bytes of the quota for an upload, if those that it has announced fit.
            make_room: Frees so many bytes of the disk, if it can.
        """
        self.row = row
        self.writer = writer
        self.reserved = row.reserved
        """Bytes that the upload may reach."""
        self.has_ended = False
        """Whether the upload ends with this request, as a blob or without one."""
        self._reserve = reserve
        self._make_room = make_room
        self._announced = 0
        """Length that the upload will have, if the client has said it."""
        self._has_room_until = 0
        """Length of the upload up to which the disk was asked for space."""

    @property
    def position(self) -> int:
        """Bytes that the upload has, also those that wait for the disk."""
        return self.writer.position

    async def announce(self, end: int) -> None:
        """Refuse an upload that will have ``end`` bytes, if the quota has no room for them."""
        self._announced = end
        await self._reserve_up_to(min(end, self.position + MIN_STEP_BYTES))

    async def _reserve_up_to(self, size: int) -> None:
        """Reserve as much of the quota as ``size`` bytes of the upload need, and of the disk."""
        if size > max(self.reserved, _UNRESERVED_BYTES):
            await self._reserve(self.row.id, size, self._announced)
            self.reserved = size
        if size > max(self._has_room_until, self.position):
            await self._make_room(size - self.position)
            self._has_room_until = size

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises ``QuotaExceeded``, ``StorageUnavailable``, ``UploadUnknown``."""
        end = self.position + len(chunk)
        if end > max(self.reserved, _UNRESERVED_BYTES):
            step_end = end + max(MIN_STEP_BYTES, min(end, _MAX_STEP_BYTES))
            try:
                await self._reserve_up_to(max(end, min(step_end, self._announced or step_end)))
            except QuotaExceeded:
                await self._reserve_up_to(end)
        elif end > self._has_room_until:
            await self._reserve_up_to(self.reserved)
        await self.writer.write(chunk)

    async def flush(self) -> None:
        """Return once all bytes are in the file. Raises ``StorageUnavailable``."""
        await self.writer.flush()

    def close(self) -> None:
        """Unlock the upload, once no thread writes to it and it reserves no more than it has."""
        self.writer.close()

    async def wait_closed(self) -> None:
        """Return once the upload is unlocked, so that another process can feed it."""
        await self.writer.closed.wait()
