"""Uploads: begin one, feed it, ask how far it has come, finish it, cancel it.

Lives here: which requests may feed an upload, and in which order. Must not know: HTTP, who may
push, how long an upload stays (``idle_uploads.py`` has a table of that).

Theory of operation: an upload has a row (owner, reserved bytes) and a file (its length is the
progress). Both outlive their process. A request that feeds an upload holds the lock of the file.
Before it unlocks the file, what the upload has reserved falls back to the length of the file. An
upload that nobody feeds gives way if others need its room (:mod:`mirror.hosted.idle_uploads`). To
finish an upload, its bytes are verified, synced, and renamed to content; then the row of the blob
is written, in the same transaction that deletes the row of the upload. A crash before that leaves
the upload, or content that no row names. In between, nothing removes the content
(:mod:`mirror.store.content_hold`). An error of the disk ends the upload: an ``fsync`` that failed
once may report success later without having written anything (:func:`mirror.store.disk.publish`),
so the client has to send the bytes again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from sqlite3 import Connection
from typing import Any, Final, TypeVar

from cachetools import LRUCache

from mirror.config.settings import Hosted
from mirror.hosted import name_rows, upload_files, upload_rows
from mirror.hosted.abandoned_uploads import AbandonedUploads
from mirror.hosted.database import Database
from mirror.hosted.idle_uploads import IdleUploads, LastLook
from mirror.hosted.upload_feed import MIN_STEP_BYTES, UploadFeed
from mirror.hosted.upload_files import disk_errors
from mirror.hosted.upload_rows import UploadRow
from mirror.hosted.upload_takeover import UploadTakeover
from mirror.hosted.upload_writer import RunningHash, UploadWriter
from mirror.oci.errors import (
    DigestInvalid,
    MirrorError,
    QuotaExceeded,
    StorageUnavailable,
    UploadOutOfOrder,
    UploadUnknown,
)
from mirror.oci.reference import Digest
from mirror.store.content_hold import ContentHold
from mirror.store.disk import boot_id
from mirror.store.ingest_writer import MemoryBudget
from mirror.store.store import Store
from mirror.threads import open_in_thread, run_in_thread

T = TypeVar("T")

_BEFORE_CACHE_S: Final = 3600.0
"""Seconds (one hour) without a byte after which an upload ends before cached content is evicted."""
_UPLOAD_LOCK_TRIES: Final = 5
"""Tries to lock an upload: whoever looks at it has the lock for a millisecond."""
_UPLOAD_LOCK_INTERVAL_S: Final = 0.01
"""Seconds between two tries."""
_UPLOAD_ROW_BYTES: Final = 1024 * 1024
"""Bytes of the disk that are kept free to begin an upload, and to record it."""
_MEMORY_BYTES: Final = 8 * 1024 * 1024
"""Bytes of all uploads of a process that wait for the disk. Each may hold 256 KiB anyway.
More would not make a push faster: the disk takes batches of this size well."""
_MAX_LEFT: Final = 1000
"""Uploads that are remembered between two requests. The bytes of others are hashed once more."""
_GONE: Final = "there is no such upload: it was finished or has ended. Start the upload again"


@dataclass(frozen=True, slots=True)
class _LeftUpload:
    """An upload as this process has left it."""

    row: UploadRow
    running_hash: RunningHash


class UploadSessions:
    """The uploads of all hosted repositories. Several processes may share them."""

    def __init__(
        self, hosted: Hosted, database: Database, store: Store, now: Callable[[], float]
    ) -> None:
        """Start the threads.

        Args:
            hosted: The quota.
            database: Has the rows.
            store: Where content is published.
            now: Returns the seconds since the epoch.
        """
        self._hosted = hosted
        self._database = database
        self._store = store
        self._layout = store.layout
        self._now = now
        self._idle_uploads = partial(IdleUploads, database, layout=store.layout, look=LastLook())
        self._abandoned = AbandonedUploads(database, store.layout, now)
        self._boot = boot_id()
        self._loop = asyncio.get_running_loop()
        self._memory = MemoryBudget(_MEMORY_BYTES)
        self._left: LRUCache[str, _LeftUpload] = LRUCache(_MAX_LEFT)
        self._writers: dict[str, UploadWriter] = {}
        """The uploads that a request of this process feeds, or has fed a moment ago."""
        # Each kind of blocking work has its own pool, so that none waits for another.
        self._opening = ThreadPoolExecutor(4, "upload-open")
        self._writing = ThreadPoolExecutor(4, "upload")
        self._publishing = ThreadPoolExecutor(8, "publish-upload")
        self._takeover = UploadTakeover(store.layout, self._writers, self._opening, now)

    async def begin(
        self,
        repository: str,
        user: str,
        size: int | None,
        algorithm: str = "sha256",
        *,
        owner: str | None = None,
    ) -> str:
        """Begin an upload, and return its id.

        Args:
            repository: The repository that the blob is for.
            user: The user. Only the same user can feed the upload.
            size: Bytes that it will have. They are reserved as they come. None: not known.
            algorithm: The algorithm of the digest, as far as it is known.
            owner: Whose limit the upload counts for. None: the user's.

        Raises:
            QuotaExceeded: The quota is used up, or has no room for ``size`` bytes.
            TooManyRequests: The owner has too many uploads.
            StorageUnavailable: The disk refuses.
        """
        upload_id = secrets.token_hex(16)
        row = UploadRow(
            *(upload_id, repository, user, min(size or 0, MIN_STEP_BYTES), self._boot, self._now()),
            owner=user if owner is None else owner,
        )

        def begin(connection: Connection) -> None:
            record = partial(
                upload_rows.begin_upload, row=row, hosted=self._hosted, announced=size or 0
            )
            with self._idle_uploads(connection, now=self._now()) as idle:
                idle.end_one_for(row)
                idle.run_within_quota(record, repository, row.owner)
                # No thread of its own: a push of small blobs waits for each thread. A file whose
                # row is not committed is removed like any other without a row.
                with disk_errors("the upload cannot be stored"):
                    upload_files.create(self._layout, upload_id)

        await self.make_room_on_disk(repository, row.owner, _UPLOAD_ROW_BYTES)
        await self._database.write(begin, is_durable=False)
        self._left[upload_id] = _LeftUpload(row, RunningHash(algorithm))
        return upload_id

    async def open(
        self,
        upload_id: str,
        repository: str,
        user: str,
        *,
        start: int | None = None,
        size: int | None = None,
    ) -> UploadFeed:
        """Lock an upload, to feed it. The caller closes it.

        Args:
            upload_id: Its id, as the client has sent it.
            repository: The repository of the request.
            user: The user of the request.
            start: Offset of the first byte that the request has. None: at the end of the upload.
            size: Bytes that the request has. None: not known.

        Raises:
            UploadUnknown: The repository and the user have no such upload.
            UploadOutOfOrder: The upload does not end at ``start``, or another request feeds it.
            QuotaExceeded: The quota has no room for so many bytes.
            StorageUnavailable: The disk refuses.
        """
        if not upload_files.is_upload_id(upload_id):
            raise UploadUnknown(_GONE)
        await self._wait_for_closing(upload_id)
        fd, position = await self._lock(upload_id)
        known = self._left.get(upload_id)
        try:
            # Under the lock: the request before this one has given back what it had reserved.
            row = await self._find(upload_id, repository, user, position)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        if fd is None:
            await self._takeover.take_over(upload_id, position)
            return await self.open(upload_id, repository, user, start=start, size=size)
        if known is None or known.row is not row:
            # Not as we left it: what its row has reserved above its length may be taken.
            row = replace(row, reserved=min(row.reserved, position))
        self._left.pop(upload_id, None)
        if known is None or known.running_hash.position > position:
            running_hash = RunningHash("sha256")
        else:
            running_hash = known.running_hash

        def before_unlock(length: int) -> asyncio.Future[Any] | None:
            # Clients begin again, and need its space for that. So may others.
            if writer.has_disk_failed or feed.is_refused:
                feed.has_ended = True
                return self._database.enqueue_write(
                    partial(self._delete_row_and_file, upload_id), may_use_spare_space=True
                )
            # Others may have taken back a part of a larger reservation, also of bytes that came.
            if feed.reserved <= (length if feed.has_ended else min(length, MIN_STEP_BYTES)):
                return None
            return self._database.enqueue_write(
                partial(upload_rows.set_reservation, upload_id=upload_id, reserved=length)
            )

        def on_closed() -> None:
            if not feed.has_ended:
                left = replace(row, reserved=min(feed.reserved, running_hash.position))
                self._left[upload_id] = _LeftUpload(left, running_hash)
            del self._writers[upload_id]

        writer = UploadWriter(
            *(fd, position, running_hash, self._writing, self._memory, before_unlock, on_closed)
        )
        self._writers[upload_id] = writer
        self._takeover.start()
        reserve = partial(self._reserve, repository, row.owner)
        make_room = partial(self.make_room_on_disk, repository, row.owner)
        feed = UploadFeed(row, writer, reserve, make_room)
        try:
            if start is not None and start != position:
                message = f"the upload has {position} bytes, and the chunk begins at {start}"
                raise UploadOutOfOrder(message, position)
            if size is not None:
                await feed.announce(position + size)
        except BaseException:
            feed.close()
            raise
        return feed

    async def _find_length(self, upload_id: str) -> int | None:
        """Return the bytes in the file of an upload. None: no file. Raises StorageUnavailable."""
        find = partial(upload_files.upload_length, self._layout, upload_id)
        with disk_errors("the upload cannot be read"):
            return await self._loop.run_in_executor(self._opening, find)

    async def _lock(self, upload_id: str) -> tuple[int | None, int]:
        """Open and lock the file of an upload. Returns the descriptor, and its length in bytes.

        The descriptor is None if another request has the lock. Raises ``UploadUnknown``.
        """
        for _ in range(_UPLOAD_LOCK_TRIES):
            open_to_feed = partial(upload_files.open_to_feed, self._layout, upload_id)
            with disk_errors("the upload cannot be read"):
                opened = await open_in_thread(
                    self._opening, open_to_feed, upload_files.close_opened
                )
            if opened is None:
                raise UploadUnknown(_GONE)
            fd, position = opened
            if fd is not None or upload_id in self._writers:
                return fd, position
            # Whoever looks whether a request feeds it has the lock for a moment.
            await asyncio.sleep(_UPLOAD_LOCK_INTERVAL_S)
        return None, position

    def giving_way(
        self, change: Callable[[Connection], T], repository: str, owner: str
    ) -> Callable[[Connection], T]:
        """Return a change to which uploads that nobody feeds give way, if the quota refuses it.

        Args:
            change: Writes rows only: it may be undone, and called again.
            repository: The repository that it is for.
            owner: Whose uploads give way first.
        """

        def run(connection: Connection) -> T:
            with self._idle_uploads(connection, now=self._now()) as idle:
                return idle.run_within_quota(change, repository, owner)

        return run

    async def make_room_on_disk(
        self, repository: str, owner: str, need: int, ahead: int = 0
    ) -> None:
        """Free ``need`` bytes of the disk, if that is possible. Never raises.

        Uploads that nobody has fed for an hour go first, then cached content, then younger ones.

        Args:
            repository: The repository that they are for.
            owner: Whose uploads give way first.
            need: Bytes. Only for these does an upload end.
            ahead: Bytes that will be needed soon.
        """

        async def end_uploads(min_idle: float, missing: int) -> None:
            def end(connection: Connection) -> None:
                with self._idle_uploads(connection, now=self._now()) as idle:
                    idle.end_for_bytes(missing, min_idle, repository, owner)

            with suppress(MirrorError):
                await self._database.write(end, is_durable=False, may_use_spare_space=True)

        await self._store.space.disk_room.make_room(
            need, ahead, partial(end_uploads, _BEFORE_CACHE_S), partial(end_uploads, 0.0)
        )

    async def _reserve(
        self, repository: str, owner: str, upload_id: str, least: int, most: int, announced: int
    ) -> int:
        reserve = partial(
            upload_rows.reserve,
            upload_id=upload_id,
            least=least,
            most=most,
            hosted=self._hosted,
            announced=announced,
        )
        change = self.giving_way(reserve, repository, owner)
        reserved = await self._database.write(change, is_durable=False)
        if reserved is None:
            raise UploadUnknown(_GONE)
        return reserved

    async def _wait_for_closing(self, upload_id: str) -> None:
        """Wait until a request that was cut off has written its last bytes."""
        writer = self._writers.get(upload_id)
        if writer is not None and writer.is_closing:
            await writer.closed.wait()

    async def _find(
        self, upload_id: str, repository: str, user: str, position: int | None = None
    ) -> UploadRow:
        """Return the row of an upload of these. ``position``: its length, if it is locked."""
        if not upload_files.is_upload_id(upload_id):
            raise UploadUnknown(_GONE)
        known = self._left.get(upload_id)
        row: UploadRow | None
        if known is not None and known.running_hash.position == position:
            row = known.row  # No other process has fed it since.
        else:
            find = partial(upload_rows.find_upload, upload_id=upload_id)
            row = await self._database.read(find)
        # The same answer for an upload of somebody else: its id is nobody else's business.
        if row is None or (row.repository, row.user) != (repository, user):
            raise UploadUnknown(_GONE)
        if row.boot != self._boot:  # Unsynced bytes may be anything after another boot.
            raise UploadUnknown(_GONE)
        return row

    async def position(self, upload_id: str, repository: str, user: str) -> int:
        """Return the size of an upload in bytes.

        Args:
            upload_id: Its id, as the client has sent it.
            repository: The repository of the request.
            user: The user of the request.

        Raises:
            UploadUnknown: The repository and the user have no such upload.
            StorageUnavailable: The disk refuses.
        """
        await self._find(upload_id, repository, user)
        await self._wait_for_closing(upload_id)
        length = await self._find_length(upload_id)
        if length is None:
            raise UploadUnknown(_GONE)
        return length

    async def finish(self, feed: UploadFeed, digest: Digest) -> int:
        """Publish an upload as a blob of its repository. Returns its size in bytes.

        It returns once the blob is durable. The upload has ended, also if its bytes are wrong, or
        if the disk refuses to publish them. The caller closes ``feed``.

        Raises:
            DigestInvalid: The bytes hash to another digest.
            UploadUnknown: The upload has ended meanwhile.
            QuotaExceeded: The quota has no room for it. What was published is no more than cache.
            StorageUnavailable: The disk refuses.
        """
        writer, upload_id, repository = feed.writer, feed.row.id, feed.row.repository
        await writer.flush()
        feed.has_ended = True
        size = writer.position

        def record(connection: Connection) -> None:
            with upload_rows.within_quota(connection, repository, self._hosted):
                if not upload_rows.end_upload(connection, upload_id):
                    raise UploadUnknown(_GONE)  # It had to give way to another one.
                name_rows.add_blob(connection, repository, digest, size, self._now())

        with ContentHold(self._layout) as hold:
            publish = partial(self._publish, upload_id, writer, digest, hold)
            try:
                with disk_errors("the upload cannot be stored"):
                    is_new = await writer.run_last(self._publishing, publish)
                self._store.on_pushed(digest, size, is_new=is_new)
                change = self.giving_way(record, repository, feed.row.owner)
                await self._database.write(change, hold=hold)
            except (DigestInvalid, QuotaExceeded, StorageUnavailable):
                # Without its file, the upload has ended anyway. A sweep removes a row that stays.
                with suppress(StorageUnavailable):
                    await self.discard(upload_id)
                raise
        return size

    def _publish(
        self, upload_id: str, writer: UploadWriter, digest: Digest, hold: ContentHold
    ) -> bool:
        """Verify and publish, in a thread. Returns whether the content is new.

        If it raises, the file is removed. Raises ``DigestInvalid``, and like ``publish_upload``.
        """
        running_hash, path = writer.running_hash, upload_files.path_of(self._layout, upload_id)
        if running_hash.algorithm != digest.algorithm:
            running_hash = RunningHash(digest.algorithm)
        layout, fd = self._layout, writer.fd
        try:
            running_hash.catch_up(fd, writer.position)
            found = running_hash.digest()
            if running_hash.position != writer.position or found != digest:
                raise DigestInvalid(f"the uploaded bytes hash to {found}, and not to {digest}")
            return upload_files.publish_upload(layout, path, fd, digest, self._now(), hold)
        except FileNotFoundError:
            if path.exists():
                raise
            raise UploadUnknown(_GONE) from None  # It was cancelled meanwhile.
        except BaseException:
            upload_files.try_remove(path)
            raise

    async def cancel(self, upload_id: str, repository: str, user: str) -> None:
        """End an upload, and drop its bytes. A request that feeds it fails.

        Args:
            upload_id: Its id, as the client has sent it.
            repository: The repository of the request.
            user: The user of the request.

        Raises:
            UploadUnknown: The repository and the user have no such upload.
            StorageUnavailable: The disk refuses.
        """
        await self._find(upload_id, repository, user)
        await self.end(upload_id, is_durable=False)

    async def discard(self, upload_id: str) -> None:
        """Delete an upload that no client knows, or whose file is gone."""
        end = partial(self._delete_row_and_file, upload_id)
        await self._database.write(end, is_durable=False, may_use_spare_space=True)

    async def end(self, upload_id: str, *, is_durable: bool = True) -> int:
        """End an upload of any user. Returns its size in bytes. A request that feeds it fails.

        Args:
            upload_id: Its id.
            is_durable: Return once no crash brings it back.

        Raises ``UploadUnknown``.
        """
        if not upload_files.is_upload_id(upload_id):
            raise UploadUnknown(_GONE)
        size = await self._find_length(upload_id)
        end = partial(self._delete_row_and_file, upload_id)
        if not await self._database.write(end, is_durable=is_durable, may_use_spare_space=True):
            raise UploadUnknown(_GONE)
        self._left.pop(upload_id, None)
        if upload_id in self._writers:
            self._writers[upload_id].fail(UploadUnknown(_GONE))
        return size or 0

    def _delete_row_and_file(self, upload_id: str, connection: Connection) -> bool:
        """Delete the row and the file of an upload, also of one that is fed. False: no such row.

        A request of another process that feeds it goes on, and cannot finish it.
        """
        upload_files.try_remove(upload_files.path_of(self._layout, upload_id))
        return upload_rows.end_upload(connection, upload_id)

    async def end_abandoned(self) -> int:
        """End the uploads that nobody has fed for long. See :meth:`AbandonedUploads.end`."""
        return await self._abandoned.end()

    async def close(self) -> None:
        """End the threads. Running requests must have ended."""
        self._takeover.close()
        for pool in (self._opening, self._writing, self._publishing):
            await run_in_thread(pool.shutdown)
