"""Keeps content where it is while a push or a restore writes down that it is hosted.

Lives here: the locks between those who put content into ``blobs/`` and those who take it out. Must
not know: why content is removed, rows.

Theory of operation: whoever takes content out of ``blobs/`` asks whether it is hosted, and then
unlinks or renames a path. A push puts its file at the same path, commits a row, and answers its
client. If the push came between the question and the unlink, the content would be lost. The lock of
a file does not help, because others put their own files at the path. So each digest has two flags.
A push sets the *hold flag* before it renames its file, waits until nobody has the *removal flag*,
and clears its own after the commit. A removal sets the removal flag, and leaves the content alone
if anybody has the hold flag. Each side sets its own flag before it looks at the other's, so at
least one sees the other. After the commit, a removal finds the row.

A flag is a shared lock on a byte of the directory ``blobs/<alg>``, far behind any end of a file
(:mod:`mirror.store.range_lock`). It needs no file that a full disk could refuse, ends with its
process, and concerns one digest only: a process that is stopped while it removes content delays
pushes of that content, and no others.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store.disk import sync_directory
from mirror.store.layout import Layout
from mirror.store.range_lock import is_range_locked, lock_range

_REMOVAL_TIMEOUT_S: Final = 10.0
"""Seconds to wait for a removal of the same content. It takes less than a millisecond."""
_REMOVAL_POLL_S: Final = 0.001
"""Seconds between two looks at a removal of the same content."""
_OFFSET_DIGITS: Final = 15
"""Hexadecimal digits of a digest that make an offset: 60 bits, and one for which of the two flags.
Two digests with the same ones would wait for each other."""
# The kernels of some sandboxes have no such locks. Then only the locks of files protect content.
_NO_RANGE_LOCKS: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


class ContentHold:
    """Keeps contents from removal, from :meth:`acquire` until its last user has left.

    Its users are the request, the thread that publishes for it, and the write of the rows. Each is
    in a ``with`` block of it, since a request that is cancelled leaves first.
    """

    def __init__(self, layout: Layout) -> None:
        """Hold nothing yet."""
        self._layout = layout
        self._mutex = threading.Lock()
        self._users = 0
        self._directories: dict[str, int] = {}

    def __enter__(self) -> ContentHold:
        with self._mutex:
            self._users += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._mutex:
            self._users -= 1
            if not self._users:
                while self._directories:
                    os.close(self._directories.popitem()[1])

    def keep_until(self, done: asyncio.Future[Any]) -> None:
        """Be a user until ``done`` is done."""
        self.__enter__()
        done.add_done_callback(lambda _: self.__exit__(None, None, None))

    def acquire(self, digests: Iterable[Digest]) -> None:
        """Keep contents from removal, whether they are there already or not. Blocks.

        Removals of them that run end first. Outside of a ``with`` block of this hold, they are
        released when the call returns.

        Raises:
            OSError: ``blobs/`` cannot be opened or locked.
            StorageUnavailable: A removal does not end.
        """
        wanted = list(digests)
        with self:
            for digest in wanted:
                _set_flag(self.directory_of(digest), _hold_offset(digest))
            deadline = time.monotonic() + _REMOVAL_TIMEOUT_S
            for digest in wanted:
                while _has_flag(self.directory_of(digest), _removal_offset(digest)):
                    if time.monotonic() > deadline:
                        raise StorageUnavailable("a removal of the same content does not end")
                    time.sleep(_REMOVAL_POLL_S)

    def sync(self) -> None:
        """Make durable that files are where they are, also those of others. Blocks.

        Raises ``OSError``.
        """
        for directory in self._directories.values():
            sync_directory(directory)

    def directory_of(self, digest: Digest) -> int:
        """Return a descriptor of the directory of content. Creates it if it is missing.

        Call it from one thread at a time, unless :meth:`acquire` was called before. Raises
        ``OSError``.
        """
        directory = self._directories.get(digest.algorithm)
        if directory is None:  # Not under the mutex: the disk may be slow, and others wait for it.
            path = self._layout.blob(digest).parent
            try:
                directory = _open_directory(path)
            except FileNotFoundError:
                path.mkdir(parents=True, exist_ok=True)
                directory = _open_directory(path)
            self._directories[digest.algorithm] = directory
        return directory


@contextmanager
def removing(layout: Layout, digest: Digest) -> Iterator[bool]:
    """Take content out of ``blobs/`` while the block runs, if it yields True. Never waits.

    It yields False if the content is being pushed or restored. The block asks whether the content
    is hosted, if that matters, and takes a few milliseconds.

    Raises ``OSError``: there is no directory, or too few descriptors.
    """
    directory = _open_directory(layout.blob(digest).parent)
    try:
        _set_flag(directory, _removal_offset(digest))
        yield not _has_flag(directory, _hold_offset(digest))
    finally:
        os.close(directory)


def _open_directory(path: os.PathLike[str]) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _hold_offset(digest: Digest) -> int:
    return 2 * int(digest.hex[:_OFFSET_DIGITS], 16)


def _removal_offset(digest: Digest) -> int:
    return _hold_offset(digest) + 1


def _set_flag(directory: int, offset: int) -> None:
    try:
        lock_range(directory, offset, 1, is_shared=True)
    except OSError as error:
        if error.errno not in _NO_RANGE_LOCKS:
            raise


def _has_flag(directory: int, offset: int) -> bool:
    try:
        return is_range_locked(directory, offset, 1)
    except OSError as error:
        if error.errno not in _NO_RANGE_LOCKS:
            raise
        return False
