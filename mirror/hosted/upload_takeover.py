"""A newer request takes an upload over from an older one whose client is silent.

Lives here: when the older request lets go, in this process and in another one. Must not know: HTTP,
rows, whose an upload is.

Theory of operation: the request that feeds an upload has the ``flock`` of its file, which nobody
can take away from another process. So the newer request locks a byte behind the end of the file,
which says that it waits, and ends with its process. The process that feeds the upload looks for
that lock once the client has been silent for long enough, and closes the file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Final

from mirror.hosted import upload_files
from mirror.hosted.upload_files import disk_errors
from mirror.hosted.upload_writer import UploadWriter
from mirror.oci.errors import UploadOutOfOrder
from mirror.store.layout import Layout
from mirror.threads import open_in_thread

_SILENT_S: Final = 5.0
"""Seconds without a byte after which a newer request of the user takes an upload over."""
_LOOK_INTERVAL_S: Final = 1.0
"""Seconds between two looks for requests of other processes that wait."""
_TRY_INTERVAL_S: Final = 0.05
"""Seconds between two tries to lock an upload that another process feeds."""
_TRIES: Final = 60
"""Tries: three seconds, for the next look of the other process, and for its last batch."""
_FED: Final = "another request sends bytes of this upload"
_TAKEN_OVER: Final = "a newer request goes on with this upload"


class UploadTakeover:
    """Lets newer requests take over the uploads that this process, or another one, feeds."""

    def __init__(
        self,
        layout: Layout,
        writers: Mapping[str, UploadWriter],
        threads: Executor,
        now: Callable[[], float],
    ) -> None:
        """Look for nobody yet.

        Args:
            layout: Has the files.
            writers: The uploads that this process feeds. They are open.
            threads: Open files.
            now: Returns the seconds since the epoch.
        """
        self._layout = layout
        self._writers = writers
        self._threads = threads
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._next_look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look for requests that wait, from now on, until this process feeds no upload."""
        if self._next_look is None:
            self._next_look = self._loop.call_later(_LOOK_INTERVAL_S, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._next_look is not None:
            self._next_look.cancel()

    def _look(self) -> None:
        self._next_look = None
        for writer in list(self._writers.values()):
            if writer.silent_s() >= _SILENT_S and upload_files.has_waiting(writer.fd):
                writer.fail(UploadOutOfOrder(_TAKEN_OVER, writer.position))
        if self._writers:
            self.start()

    async def take_over(self, upload_id: str, position: int) -> None:
        """Return once a silent request no longer feeds an upload of ``position`` bytes.

        Raises:
            UploadOutOfOrder: It is not silent, or it finishes the upload.
            StorageUnavailable: The disk refuses.
        """
        writer = self._writers.get(upload_id)
        if writer is None:
            await self._take_over_from_other_process(upload_id, position)
            return
        if writer.silent_s() < _SILENT_S:
            raise UploadOutOfOrder(_FED, position)
        writer.fail(UploadOutOfOrder(_TAKEN_OVER, position))
        await writer.closed.wait()

    async def _take_over_from_other_process(self, upload_id: str, position: int) -> None:
        last = self._now() - _SILENT_S
        wait = partial(upload_files.start_waiting, self._layout, upload_id, last)
        with disk_errors("the upload cannot be read"):
            fd = await open_in_thread(self._threads, wait, _close_waiting)
        if fd is None:
            raise UploadOutOfOrder(_FED, position)
        try:
            for _ in range(_TRIES):
                if not await self._is_fed(upload_id):
                    return
                await asyncio.sleep(_TRY_INTERVAL_S)
        finally:
            os.close(fd)
        raise UploadOutOfOrder(_FED, position)

    async def _is_fed(self, upload_id: str) -> bool:
        with disk_errors("the upload cannot be read"):
            return await self._loop.run_in_executor(
                self._threads, upload_files.is_fed, self._layout, upload_id
            )


def _close_waiting(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
