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
"""Most bytes that are reserved ahead. Each step is one small transaction."""
MIN_STEP_BYTES: Final = 1024 * 1024
"""Bytes that any upload may reserve ahead. Above, none reserves more than twice its bytes: so a
client that sends slowly keeps others out of little, whatever length it has announced."""
_UNRESERVED_BYTES: Final = 64 * 1024
"""Bytes that an upload may reach without a reservation. The quota is checked when it is finished:
a push of many small blobs has one transaction less for each."""


class UploadFeed:
    """One request that feeds an upload."""

    def __init__(
        self,
        row: UploadRow,
        writer: UploadWriter,
        reserve: Callable[[str, int, int, int], Awaitable[int]],
        make_room: Callable[[int, int], Awaitable[None]],
    ) -> None:
        """Feed an upload. Created by :meth:`mirror.hosted.sessions.UploadSessions.open`.

        Args:
            row: The upload.
            writer: Appends to its file.
            reserve: Reserves bytes of the quota for an upload (:func:`upload_rows.reserve`).
            make_room: Frees so many bytes of the disk, and so many for later, if it can.
        """
        self.row = row
        self.writer = writer
        self.reserved = row.reserved
        """Bytes that the upload may reach."""
        self.has_ended = False
        """Whether the upload ends with this request, as a blob or without one."""
        self.is_refused = False
        """Whether the quota has refused bytes."""
        self._reserve = reserve
        self._make_room = make_room
        self._announced = 0
        """Length that the upload will have, if the client has said it."""

    @property
    def position(self) -> int:
        """Bytes that the upload has, also those that wait for the disk."""
        return self.writer.position

    async def announce(self, end: int) -> None:
        """Refuse an upload that will have ``end`` bytes, if the quota has no room for them."""
        self._announced = end
        least = min(end, self.position + MIN_STEP_BYTES)
        with self.writer.working():
            await self._reserve_up_to(least, least)

    async def _reserve_up_to(self, least: int, most: int) -> None:
        if least > max(self.reserved, _UNRESERVED_BYTES):
            try:
                self.reserved = await self._reserve(self.row.id, least, most, self._announced)
            except QuotaExceeded:
                self.is_refused = True
                raise

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises ``QuotaExceeded``, ``StorageUnavailable``, ``UploadUnknown``."""
        end = self.position + len(chunk)
        most = end + max(MIN_STEP_BYTES, min(end, _MAX_STEP_BYTES))
        with self.writer.working():
            await self._reserve_up_to(end, max(end, min(most, self._announced or most)))
            await self._make_room(len(chunk), max(0, self.reserved - end))
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
